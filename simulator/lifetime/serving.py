"""What serving a query costs as a function of model size: by a formula, or by planning a fleet for each size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from simulator.catalog.architecture import Architecture
from simulator.catalog.chips import load_chip
from simulator.catalog.parameters import count
from simulator.errors import ChipsecondsError, InfeasibleError
from simulator.lifetime.optimum import TokenDemand, flop_price
from simulator.lifetime.scenario import FormulaServing, PlanServing
from simulator.lifetime.shapes import shape_rule
from simulator.results.summary import Assumption
from simulator.run import Scenario, load_scenario

if TYPE_CHECKING:
    from simulator.results.plan import PlannedFleet, Targets


@dataclass(frozen=True)
class Served:
    """What a query costs on one model, today. ``parameters`` are those the model really has."""

    parameters: float
    usd_per_query: float
    chip_s_per_query: float | None = None
    chips: int | None = None
    deployment: str = ""


class Server(Protocol):
    """Serves a model of about so many parameters; raises InfeasibleError where none of the deployments can."""

    def at(self, parameters: float) -> Served:
        """Cost of a query on the model of this size."""

    def of(self, architecture: Architecture) -> Served:
        """Cost of a query on this very model."""


@dataclass(frozen=True)
class FormulaServer:
    """2N FLOPs for every token of a query, at a stated price of a FLOP (eq. 6 of Sardana et al. 2024, arXiv:2401.00448)."""

    input_tokens: float
    output_tokens: float
    input_usd_per_flop: float
    output_usd_per_flop: float

    def demand(self, queries: float) -> TokenDemand:
        """So many queries, as the tokens of eq. 6."""
        return TokenDemand(
            queries * self.input_tokens,
            queries * self.output_tokens,
            self.input_usd_per_flop,
            self.output_usd_per_flop,
        )

    def at(self, parameters: float) -> Served:
        """Proportional to N."""
        return Served(parameters, parameters * self.demand(1.0).cost_per_parameter)

    def of(self, architecture: Architecture) -> Served:
        """By its total parameters, as the paper counts."""
        return self.at(float(count(architecture).total))


def formula_server(options: FormulaServing, usd_per_chip_hour: float) -> FormulaServer:
    """Server of a formula scenario at a price of its chip.

    Raises
    ------
    UnpriceableError
        If the chip has no rate for the format.
    """
    peak = load_chip(options.chip).peak_flops_per_s(options.dtype)
    return FormulaServer(
        options.input_tokens,
        options.output_tokens,
        flop_price(usd_per_chip_hour, peak, options.mfu_input),
        flop_price(usd_per_chip_hour, peak, options.mfu_output),
    )


@dataclass
class PlannedServer:
    """The cheapest fleet within the SLO, planned for each size once.

    Attributes
    ----------
    options, scenario
        what is planned; the scenario gives traffic and engine settings.
    targets
        limits the fleet must keep.
    queries_per_s
        mean rate it is planned for.
    """

    options: PlanServing
    scenario: Scenario
    targets: "Targets"
    queries_per_s: float
    workers: int = 1
    progress: Callable[[str], None] = field(default=lambda _: None)
    assumptions: list[Assumption] = field(default_factory=list)
    known: dict[str, Served | str] = field(default_factory=dict)

    def at(self, parameters: float) -> Served:
        """Of the architecture that the shape rule makes of this size."""
        return self.of(shape_rule(self.options.shape)(parameters))

    def of(self, architecture: Architecture) -> Served:
        """Plan, or remember.

        Raises
        ------
        InfeasibleError
            If no fleet of the chips keeps the targets.
        """
        self.plan_for([architecture])
        found = self.known[architecture.name]
        if isinstance(found, str):
            raise InfeasibleError(found)
        return found

    def plan_for(self, architectures: Sequence[Architecture]) -> None:
        """Plan those that are not known yet, ``workers`` at a time: what is found, and its order, does not depend on how many."""
        from simulator.planning.choices import in_threads

        new = [one for one in architectures if one.name not in self.known]
        each = self.workers if len(new) == 1 else 1  # chips searched at the same time
        for one, (found, assumptions) in zip(
            new, in_threads(lambda one: self._plan(one, each), new, self.workers), strict=True
        ):
            self.known[one.name] = found
            self.assumptions += [assumption for assumption in assumptions if assumption not in self.assumptions]

    def _plan(self, architecture: Architecture, workers: int) -> tuple[Served | str, list[Assumption]]:
        """What serves a size, or why nothing does; and what that rests on."""
        from simulator.planning import PlanOptions, plan

        self.progress(f"planning for {count(architecture).total / 1e9:.3g}B parameters")
        o = self.options
        more = {name: getattr(o, name) for name in ("headroom", "peak_to_mean") if getattr(o, name) is not None}
        made = plan(
            architecture,
            self.scenario.traffic,
            self.targets,
            self.queries_per_s,
            o.chips,
            options=PlanOptions(
                precisions=o.precisions,
                max_chips=o.max_chips,
                shardings=o.shardings,
                requests=o.n_requests,
                usd_per_chip_hour={} if o.usd_per_chip_hour is None else dict.fromkeys(o.chips, o.usd_per_chip_hour),
                front=(),
                runners_up=0,
                look_elsewhere=False,
                relax=False,
                **more,
            ),
            template=self.scenario,
            workers=workers,
        )
        if made.best is None:
            return "; ".join(f"{c.chip}: {c.reason}" for c in made.by_chip), []
        if made.best.usd_per_query is None:
            chips = ", ".join(o.chips)
            raise ChipsecondsError(f"{chips}: no price is known; state serving.usd_per_chip_hour")
        served = Served(
            float(count(architecture).total),
            made.best.usd_per_query,
            made.best.chip_seconds_per_query,
            made.best.chips,
            _in_words(made.best),
        )
        return served, made.assumptions


def planned_server(
    options: PlanServing,
    queries_per_s: float,
    *,
    limit_s: float | None = None,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> PlannedServer:
    """Server of a plan scenario; ``limit_s`` takes the place of the scenario's E2E limit."""
    from simulator.planning import targets_of

    scenario = load_scenario(options.scenario)
    slo = scenario.slo if limit_s is None else scenario.slo.model_copy(update={"e2e_s": limit_s})
    server = PlannedServer(options, scenario, targets_of(slo), queries_per_s, workers)
    if progress is not None:
        server.progress = progress
    return server


def _in_words(fleet: "PlannedFleet") -> str:
    return " + ".join(
        f"{pool.replicas:,} × {pool.slice} {pool.sharding} {pool.precision}, batch {pool.max_num_seqs}"
        for pool in fleet.pools
    )
