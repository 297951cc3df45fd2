"""What a plan may choose from, and how it chooses."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from simulator.catalog.records import Record

ShardingKind = Literal["tp", "pp", "ep"]


class PlanOptions(Record):
    """The space that is searched, what is provisioned beyond the peak's need, and the size of a simulation."""

    precisions: tuple[str, ...] = ()
    """Formats of weights, compute and KV cache; none: the template's. Quality is the asker's to judge."""
    slices: tuple[str, ...] = ()
    """Slices of one replica, ``chip:shape``; none: every legal slice of the chips up to ``max_chips``."""
    max_chips: PositiveInt = 64
    """Chips of one replica at most."""
    shardings: tuple[ShardingKind, ...] = ("tp", "pp", "ep")
    """``tp``: all chips of the slice; ``pp``: pipeline stages of them; ``ep``: attention ranks that share experts."""
    kinds: tuple[Literal["unified", "disaggregated"], ...] = ("unified",)
    """Whether replicas do both, or prompts are computed in one pool and answers decoded in another."""
    max_stages: PositiveInt = 4
    """Pipeline stages at most."""
    batch_limits: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    """``max_num_seqs`` of a replica, the template's own besides; of those far beyond what the KV cache holds, only the first."""
    token_budgets: tuple[PositiveInt, ...] = (512, 2048, 8192)
    """``max_num_batched_tokens``, the template's own besides."""
    peak_to_mean: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Rate of the busiest hour ÷ mean rate of the day."""
    headroom: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the rate within the targets left free even at the peak."""
    spare_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas of each pool beyond those the peak needs."""
    failed_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the slices that may be down at the peak."""
    rank_by: Literal["cost", "chips"] = "cost"
    """``cost`` ranks chips with a price; ``chips`` counts chips of any kind alike."""
    usd_per_chip_hour: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Prices that replace the catalogue's, by chip. [USD]"""
    requests: Annotated[int, Field(ge=200)] = 3_000
    """Requests of a simulation at least; more where full batches need them."""
    seed: Annotated[int, Field(ge=0)] = 1
    interval: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Percent of draws of the calibrated parameters that the interval of the best fleet's chips holds; None: no interval."""
    interval_draws: Annotated[int, Field(ge=16, le=4096)] = 64
    front: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
    """Factors on every limit for which the cheapest fleet is sought as well; none: no front."""
    front_chips: PositiveInt = 3
    """Chips that the front looks at: those with the cheapest fleets for the limits as they are."""
    runners_up: Annotated[int, Field(ge=0)] = 5
    """Further fleets to name."""
    look_elsewhere: bool = True
    """If no chip asked for will do: look for others in the catalogue that do."""
    relax: bool = True
    """If no chip asked for will do: look for the least relaxation of the limits with which one does, and its fleet."""
