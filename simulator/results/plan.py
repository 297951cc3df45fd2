"""The record of a plan: which fleet serves a rate of queries within its limits, what it costs, and what else would do.

A plan is one JSON file. Like a result it holds no wall time, host name or path, so equal questions give equal bytes.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from simulator.errors import InputError
from simulator.results.store import has_format, json_text, write_json_file
from simulator.results.summary import Assumption, Energy, Latency, ParameterInterval, Section

FORMAT = "chipseconds-plan"
#: Version of the plan schema; a change of meaning, name or unit raises it.
PLAN_SCHEMA_VERSION = 1

Metric = Literal["ttft_s", "tpot_s", "e2e_s"]
Role = Literal["unified", "prefill", "decode"]


class Target(Section):
    """A limit on one latency."""

    metric: Metric
    limit_s: float = Field(gt=0, allow_inf_nan=False)
    percentile: float | None = Field(default=None, gt=0, le=100)
    """Percent of the requests that must be within the limit; null: it only counts in the joint share."""

    def __str__(self) -> str:
        """Write it for people.

        >>> str(Target(metric="ttft_s", limit_s=0.5, percentile=95))
        'TTFT p95 <= 0.5 s'
        """
        name = self.metric.removesuffix("_s").upper()
        share = "" if self.percentile is None else f" p{self.percentile:g}"
        return f"{name}{share} <= {self.limit_s:g} s"


class Targets(Section):
    """What the fleet must keep. Rejected and unfinished requests keep nothing; a one-token output keeps any TPOT.

    Without limits, every request must be served.
    """

    limits: tuple[Target, ...] = ()
    joint_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the requests that must keep all limits together (goodput share); null: none is asked."""

    @model_validator(mode="after")
    def _consistent(self) -> "Targets":
        names = [t.metric for t in self.limits]
        if len(set(names)) < len(names):
            raise ValueError(f"limits: {names} has a latency twice")
        if self.joint_fraction is None and any(t.percentile is None for t in self.limits):
            raise ValueError("a limit without a percentile needs joint_fraction")
        if self.joint_fraction is not None and not self.limits:
            raise ValueError("joint_fraction needs limits to keep")
        return self

    def scaled(self, factor: float, metrics: tuple[str, ...] | None = None) -> "Targets":
        """The same with limits ``factor`` times as long: all, or those of ``metrics``."""
        limits = tuple(
            t.model_copy(update={"limit_s": t.limit_s * factor}) if metrics is None or t.metric in metrics else t
            for t in self.limits
        )
        return self.model_copy(update={"limits": limits})

    def __str__(self) -> str:
        """Write them for people."""
        if not self.limits:
            return "no latency limits"
        joint = "" if self.joint_fraction is None else f" ({100 * self.joint_fraction:g} % of requests keep all)"
        return ", ".join(map(str, self.limits)) + joint


class Provisioning(Section):
    """How much more than the mean rate a fleet is built for."""

    qps: float = Field(gt=0, allow_inf_nan=False)
    """Queries per second, mean over the day. [1/s]"""
    peak_to_mean: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """Rate of the busiest hour ÷ mean rate of the day; at 1, ``qps`` is what the fleet must carry."""
    headroom_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of the rate within the targets that is left free even at the peak: runs are samples, and forecasts err."""
    spare_replicas: int = Field(default=0, ge=0)
    """Replicas of each pool beyond those the peak needs (N + k)."""
    failed_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the slices that may be down at the peak."""

    @property
    def peak_qps(self) -> float:
        """Rate that the replicas without spares must carry. [1/s]"""
        return self.qps * self.peak_to_mean


class Percentiles(Section):
    """A latency at one rate. [s]"""

    p50: float | None
    p95: float | None
    p99: float | None


class Pool(Section):
    """Equal replicas of a planned fleet."""

    role: Role
    chip: str
    slice: str
    chips_per_replica: int
    sharding: str
    layout: str
    precision: str
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_blocks: int
    saturated_per_s: float
    """Requests per second of a replica when all of them are queued at once. [1/s]"""
    rate_per_s: float
    """Largest simulated rate of a replica within the targets. [1/s]"""
    load: float
    """rate_per_s ÷ saturated_per_s."""
    binding: list[str]
    """What gives way just above that rate: latencies that miss their limits, or the capacity."""
    needed_replicas: int
    """Those that the peak takes, headroom included."""
    replicas: int
    """With spares."""
    latency: dict[str, Percentiles]
    """At rate_per_s, by latency."""

    @property
    def chips(self) -> int:
        """Chips of the pool, spares included."""
        return self.replicas * self.chips_per_replica


class PlannedFleet(Section):
    """A fleet that keeps the targets."""

    kind: Literal["unified", "disaggregated"]
    pools: list[Pool]
    chips: int
    replicas: int
    chip_seconds_per_query: float
    """Provisioned: chips ÷ mean rate. [chip-s]"""
    usd_per_chip_hour: float | None
    """Of the first pool's chip; null without a price."""
    usd_per_hour: float | None
    low_usd_per_hour: float | None
    """At the low end of the prices, where they state one."""
    high_usd_per_hour: float | None
    usd_per_query: float | None
    price_source: str = ""


class ChipOutcome(Section):
    """What the search found on one chip."""

    chip: str
    status: Literal["planned", "infeasible", "does_not_fit", "unpriceable"]
    reason: str = ""
    """Why there is no fleet, or no price."""
    fleet: PlannedFleet | None = None


class WaterfallStep(Section):
    """One factor between the ideal roofline and the fleet."""

    name: str
    factor: float
    chip_s_per_query: float
    """After this factor. [chip-s]"""
    meaning: str


class FrontPoint(Section):
    """The cheapest fleet when every limit is ``scale`` times as long."""

    scale: float
    targets: Targets
    fleet: PlannedFleet | None
    """Null: no fleet keeps them."""
    on_front: bool
    """Whether nothing tighter is as cheap."""


class Verification(Section):
    """The plan simulated again, with another seed, at the rate that its replicas get at the peak."""

    replicas: list[int]
    """Replicas simulated, of each pool; few stand for many that are loaded alike."""
    rate_per_s: float
    """Of all that were simulated. [1/s]"""
    requests: int
    seed: int
    kept: bool
    """Whether the targets held."""
    kept_fraction: float
    """Share of the requests that kept all limits together."""
    added_replicas: int
    """Replicas added until they held."""
    latency: Latency


class Consumption(Section):
    """What a query takes of the fleet, averaged over the day at the mean rate; spares share the load."""

    rate_per_s: float
    """Of the replicas simulated: one, or few of each pool. [1/s]"""
    ideal_chip_s: float
    """The query alone at efficiency 1, at the batch of a saturated replica. [chip-s]"""
    busy_chip_s: float
    """Of provisioned, the part during which a step is in progress. [chip-s]"""
    provisioned_chip_s: float
    """chips ÷ qps. [chip-s]"""
    joules_per_query: float | None
    """Energy at the chips, idle included; null where the power is not published. [J]"""
    facility_joules_per_query: float | None
    """With servers and the building. [J]"""
    energy: Energy | None


class Alternative(Section):
    """A question near an infeasible one that has an answer."""

    what: str
    """What was changed, in words."""
    targets: Targets
    fleet: PlannedFleet


class Searched(Section):
    """How the search went; counts of deployments unless named otherwise."""

    considered: int
    illegal: int
    """Shardings that the model or the engine does not have."""
    unfit: int
    """Memory holds no KV cache beside the weights, or none of the requests."""
    pruned_by_latency: int
    """Even alone, too few requests could keep the targets."""
    pruned_by_cost: int
    """Even with every step at its cheapest, a fleet would need more chips than one already found on that chip."""
    simulated: int
    simulations: int
    """Runs of a replica."""


class Plan(Section):
    """The answer: how many chips, of which kind, sharded and pooled how, for this rate within these targets."""

    format: Literal["chipseconds-plan"] = "chipseconds-plan"
    schema_version: Literal[1] = 1
    name: str
    model: str
    traffic: str
    """Where requests come from, in words."""
    targets: Targets
    provisioning: Provisioning
    rank_by: Literal["cost", "chips"]
    seed: int
    requests: int
    """Requests of a simulation, at least."""
    best: PlannedFleet | None
    """Null: no fleet of the chips asked keeps the targets."""
    waterfall: list[WaterfallStep] = Field(default_factory=list)
    verification: Verification | None = None
    consumption: Consumption | None = None
    interval_percent: float | None = None
    """Percent of the draws inside ``chips_interval``."""
    chips_interval: ParameterInterval | None = None
    """Chips of the best fleet over draws of the calibrated parameters; null if not asked for."""
    by_chip: list[ChipOutcome]
    """One per chip asked, those with a price first, the cheapest first."""
    runners_up: list[PlannedFleet] = Field(default_factory=list)
    """The best fleets after the first among those simulated, each of another slice, sharding or precision."""
    front: list[FrontPoint] = Field(default_factory=list)
    """Cost against latency: limits tightened and relaxed together."""
    idle_latency_s: dict[str, float] = Field(default_factory=dict)
    """If infeasible: the least that any deployment of the chips asked reaches at the target's percentile, one request at a time,
    whatever the other latencies. [s]"""
    nearest: list[Alternative] = Field(default_factory=list)
    """If infeasible: what would be feasible."""
    searched: Searched
    assumptions: list[Assumption] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    scenario: dict[str, Any] = Field(default_factory=dict)
    """The planned replica at its peak rate as a scenario, to simulate or change."""

    @property
    def feasible(self) -> bool:
        """Whether there is a fleet."""
        return self.best is not None

    @property
    def total_factor(self) -> float:
        """Product of the waterfall's factors: provisioned ÷ ideal chip-seconds."""
        return math.prod(step.factor for step in self.waterfall)


def plan_json(plan: Plan) -> str:
    """A plan as JSON text."""
    return json_text(plan.model_dump(mode="json"))


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written there.
    """
    write_json_file(plan.model_dump(mode="json"), path)


def is_plan(path: Path) -> bool:
    """Whether a file was written by :func:`write_plan`, of whatever version."""
    return has_format(path, FORMAT)


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises
    ------
    InputError
        If the file is none, is damaged, or is of another schema version.
    """
    if not is_plan(path):
        raise InputError(f"{path}: not a plan (no JSON file with format = {FORMAT!r})")
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema_version") != PLAN_SCHEMA_VERSION:
        raise InputError(
            f"{path}: plan schema version {document.get('schema_version')}; this version reads {PLAN_SCHEMA_VERSION}: plan again"
        )
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: damaged plan: {where}: {first['msg']}") from None
