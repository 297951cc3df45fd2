"""Lifetime scenarios: the quality asked for, where the model is trained, how it is served, and what demand is expected.

One TOML file with ``schema_version = 1``; ``docs/lifetime.md`` lists every field.
"""

from collections.abc import Iterable, Mapping
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from simulator.catalog.chips import DType
from simulator.catalog.files import data_folder, find, names_in, parse, read_toml
from simulator.catalog.overrides import assign, parse_override
from simulator.catalog.records import Record

Fraction = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=-1, le=5)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Like(Record):
    """A model whose quality is to be matched: a size or a catalogue model, and the tokens it was trained on."""

    parameters: PositiveFloat | None = None
    model: str | None = None
    tokens: PositiveFloat | None = None
    """None: the compute-optimal number for its size."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Like":
        if (self.parameters is None) == (self.model is None):
            raise ValueError("state parameters, or the name of a model, not both")
        return self


class QualityOptions(Record):
    """``[quality]``: the loss law, and the loss to reach."""

    law: str = "besiroglu"
    """Named set of coefficients (docs/scaling.md)."""
    loss: PositiveFloat | None = None
    """Nats per token."""
    like: Like | None = None
    """As good as this model, by the same law."""
    extrapolate: bool = False
    """Whether sizes outside the law's runs may be asked for; they are marked in the answer."""

    @model_validator(mode="after")
    def _one_target(self) -> "QualityOptions":
        if (self.loss is None) == (self.like is None):
            raise ValueError("state loss, or like = { … }: what quality is to be reached")
        return self


class TrainingOptions(Record):
    """``[training]``: where the model is trained, and how well the chips are used."""

    slice: str
    """``chip:shape`` of one training run."""
    mfu: Fraction = 0.4
    dtype: DType = "bf16"
    overhead: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Chip time paid ÷ chip time trained: restarts, evaluation, failed runs."""
    usd_per_chip_hour: PositiveFloat | None = None
    """None: the chip's price under ``term``."""
    term: str | None = None
    """Of the price book: ``on-demand``, ``spot``, ``owned`` …; None: the chip's first quote."""


class FormulaServing(Record):
    """``[serving]`` with ``kind = "formula"``: 2N FLOPs a token at a stated MFU (eq. 6 of Sardana et al. 2024)."""

    kind: Literal["formula"]
    chip: str
    dtype: DType = "bf16"
    mfu_input: Fraction = 0.5
    mfu_output: Fraction = 0.5
    usd_per_chip_hour: PositiveFloat | None = None
    term: str | None = None
    input_tokens: Annotated[float, Field(ge=0)]
    """Of a query."""
    output_tokens: Annotated[float, Field(ge=0)]


class PlanServing(Record):
    """``[serving]`` with ``kind = "plan"``: the cheapest fleet that meets the SLO, simulated, size by size."""

    kind: Literal["plan"]
    scenario: str
    """Scenario that gives traffic, SLO and engine settings; its model and slice are not used."""
    chips: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    precisions: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("bf16",)
    max_chips: Annotated[int, Field(ge=1)] = 16
    """Of one replica."""
    shardings: Annotated[tuple[Literal["tp", "pp", "ep"], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "tp",
        "pp",
        "ep",
    )
    """Kinds that are tried."""
    usd_per_chip_hour: PositiveFloat | None = None
    headroom: Annotated[float, Field(ge=0, lt=1)] | None = None
    peak_to_mean: Annotated[float, Field(ge=1)] | None = None
    n_requests: Annotated[int, Field(ge=100)] = 2_000
    """Simulated per trial rate."""
    shape: str = "llama-3"
    """Rule that turns N into an architecture."""
    sizes: Annotated[int, Field(ge=3, le=200)] = 16
    """Sizes tried first, evenly in log N; the neighbourhood of the best is then searched more finely."""
    smallest: PositiveFloat | None = None
    """Parameters; None: a little above what can reach the loss at all."""
    largest: PositiveFloat | None = None
    """None: twice the compute-optimal size."""
    slo_limits_s: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_as_tuple)] = ()
    """Instead of the scenario's E2E limit: each of these, an optimum for each."""


Serving = Annotated[FormulaServing | PlanServing, Field(discriminator="kind")]


class Forecast(Record):
    """One demand that may come true: the expected one, times ``times``."""

    name: str
    times: PositiveFloat
    probability: Fraction | None = None


class DemandOptions(Record):
    """``[demand]``: queries over the model's life."""

    queries: PositiveFloat | None = None
    """Over the whole life …"""
    queries_per_s: PositiveFloat | None = None
    """… or, instead, the mean rate of the first year."""
    years: PositiveFloat = 1.0
    growth: Rate = 0.0
    """Of demand, per year, continuous."""
    price_decline: Rate = 0.0
    """Of chip prices, per year, continuous."""
    discount: Rate = 0.0
    """Of money, per year, continuous."""
    elasticity: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Of demand in the price of a query, taken to follow its cost."""
    spread: Annotated[float, Field(gt=0, le=5)] | None = None
    """Standard deviation of ln(demand ÷ median); ``queries`` is then the median."""
    forecasts: Annotated[tuple[Forecast, ...], BeforeValidator(_as_tuple)] = ()
    """Named demands; with probabilities that sum to 1, or without any."""

    @model_validator(mode="after")
    def _is_one_forecast(self) -> "DemandOptions":
        if (self.queries is None) == (self.queries_per_s is None):
            raise ValueError("state queries (over the life) or queries_per_s (of the first year)")
        if self.forecasts and self.spread is not None:
            raise ValueError("state forecasts or spread, not both")
        chances = [f.probability for f in self.forecasts if f.probability is not None]
        if chances and (len(chances) < len(self.forecasts) or abs(sum(chances) - 1) > 1e-9):
            raise ValueError(
                f"probabilities of the forecasts sum to {sum(chances):g}: all of them, summing to 1, or none"
            )
        return self


class LifetimeScenario(Record):
    """Everything a lifetime optimum depends on."""

    schema_version: Literal[1]
    name: str
    description: str = ""
    quality: QualityOptions
    training: TrainingOptions
    serving: Serving
    demand: DemandOptions

    def as_toml(self) -> dict[str, Any]:
        """The scenario as plain data, every default stated."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return data


def lifetime_names() -> list[str]:
    """Names of the lifetime scenarios that ship with the package, sorted."""
    return names_in(_folder())


def lifetime_file(name_or_path: str) -> Traversable:
    """File of a lifetime scenario: a shipped name, or a path."""
    return find("lifetime scenario", name_or_path, _folder())


def load_lifetime(name_or_path: str, overrides: Iterable[str] = ()) -> LifetimeScenario:
    """Read a lifetime scenario and apply ``path=value`` overrides.

    Raises
    ------
    InputError
        For an unknown scenario, field or value.
    """
    data = read_toml(lifetime_file(name_or_path))
    where = name_or_path
    for text in overrides:
        path, value = parse_override(text, example="demand.queries=1e10")
        assign(data, path, value)
        where = f"{name_or_path} with --set {text}"
    return parse_lifetime(data, where)


def parse_lifetime(data: Mapping[str, Any], where: str) -> LifetimeScenario:
    """Validate plain data; errors name ``where``."""
    return parse(LifetimeScenario, data, where)


def _folder() -> Traversable:
    return data_folder("workloads") / "lifetimes"
