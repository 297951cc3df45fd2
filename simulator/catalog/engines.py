"""Serving engines: the record of a file in ``workloads/engines``, and the SI values the rest of the package reads.

A profile is what a serving engine adds to the kernels it launches: host work that the chips wait for, launches that a
captured graph does not remove, how its kernels fare among others rather than alone, how it divides memory, and its default
limits. Values carry unit, source and kind like those of chips.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from simulator.catalog.files import data_folder, find, names_in, parse, read_toml
from simulator.catalog.records import Quantity, Record
from simulator.errors import InputError, nearest
from simulator.units import UNITS, to_si


def _between(dimension: str, least: float, most: float) -> AfterValidator:
    def check(quantity: Quantity) -> Quantity:
        found, factor = UNITS.get(quantity.unit, ("unknown", 1.0))
        if found != dimension or quantity.value is None or not least <= quantity.value * factor <= most:
            raise ValueError(
                f"{quantity.value} {quantity.unit}: must be given, in units of {dimension or '1'}, {least:g} … {most:g}"
            )
        return quantity

    return AfterValidator(check)


Time = Annotated[Quantity, _between("s", 0, 1)]
Slowdown = Annotated[Quantity, _between("1", 0.0, 10)]
Bytes = Annotated[Quantity, _between("bytes", 0, 1e11)]
Share = Annotated[Quantity, _between("1", 0.01, 1)]
Tail = Literal[0, 2, 4]
"""Degrees of freedom of Student's t; 0: normal."""

MemoryRule = Literal["total", "free", "static"]
"""What the memory fraction is of: all memory, less everything else that runs (vLLM); what weights, activations and workspace leave
free (TensorRT-LLM); all memory, for weights and KV cache alone (SGLang)."""


class HostTable(Record):
    """``[host]``: time on the host that the chips wait for."""

    step: Time
    """Per step: scheduling, inputs, launches, sampling."""
    sequence: Time
    """Per decoding sequence and step."""
    token: Time
    """Per token of a step."""
    request: Time
    """What a client waits for its first token beyond the engine's steps: routing, opening the stream. No chip waits for it."""
    request_token: Time
    """The same per token of its prompt: reading and tokenising it."""


class LaunchTable(Record):
    """``[launch]``: fixed times of a step's kernels."""

    kernel: Time
    """Per kernel, collectives apart: what is left of a launch in a captured graph, and the time of the smallest kernel."""
    eager: Time
    """Per kernel and prompt chunk of a step, besides: steps with prompts are not replayed from a graph, so the host launches every kernel."""


class RoutingTable(Record):
    """``[routing]``: how tokens choose routed experts. Of models and texts more than of engines, but measured with them."""

    skew: Annotated[Quantity, _between("1", 0.0, 2)]
    """Exponent of the popularity of experts by rank; 0: all alike."""


class SlowdownTable(Record):
    """``[slowdown]``: time in a running server ÷ time of the cost model, by what it goes to; never below the roofline's bound."""

    weights: Slowdown
    """Matrix products that wait for their weights."""
    products: Slowdown
    """Matrix products that compute."""
    experts: Slowdown
    """Products of routed experts."""
    elementwise: Slowdown
    collective: Slowdown
    launches: Slowdown
    """Launches of kernels one after the other, as measured alone; a captured graph hides part of them."""
    decode_attention: Slowdown
    prefill_attention: Slowdown


class MemoryTable(Record):
    """``[memory]``."""

    rule: MemoryRule
    fraction: Share
    workspace: Bytes
    """Per chip: context, communication buffers, captured graphs, and what else is neither weights, activations nor cache."""


class SchedulerTable(Record):
    """``[scheduler]``: default limits of a server."""

    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    prefix_caching: bool
    reserve_output: bool = False
    """Whether a request is admitted only once KV blocks for its whole length, prompt and output, can be set aside."""
    source: str
    note: str = ""


class LeftOut(Record):
    """What rows of groups that a fit had not seen show beyond the errors of its parameters, for one kind of model.

    Scales are of the logarithm: of a factor on the time of every step, and of a further one on the first token.
    """

    groups: PositiveInt
    """Groups (model, chip, engine, formats) it was estimated from."""
    rows: PositiveInt
    step_scale: NonNegativeFloat
    step_tail: Tail
    first_token_scale: NonNegativeFloat
    first_token_tail: Tail
    within_group: Annotated[float, Field(ge=0, le=1)]
    """Share of the variance that the rows of one group have in common."""


ModelKind = Literal["dense", "experts"]


class FitErrors(Record):
    """``[errors]``: how well the fitted quantities are known, and what is left beyond them. Written by ``calibrate serving``."""

    parameters: tuple[str, ...]
    """Paths of the fitted quantities, e.g. ``host.step``."""
    standard_errors: tuple[NonNegativeFloat, ...]
    """In SI units."""
    correlation: tuple[tuple[float, ...], ...]
    """Lower triangle, the diagonal included."""
    chips: tuple[str, ...] = ()
    """Chips of the rows that were fitted."""
    left_out: dict[ModelKind, LeftOut] = Field(default_factory=dict)
    """By kind of model; from groups left out of the fit, on these chips."""
    other_chips: LeftOut | None = None
    """On chips that no row of the fit has, from rows that were not fitted."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "FitErrors":
        n = len(self.parameters)
        if len(self.standard_errors) != n or [len(row) for row in self.correlation] != list(range(1, n + 1)):
            raise ValueError(f"{n} parameters need {n} standard_errors and a lower triangle of {n} rows of correlation")
        return self


class EngineSpec(Record):
    """One serving engine: the record of a file in ``workloads/engines``."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    versions: str
    """Those that the figures stand for."""
    kernels: str = ""
    """Framework in chips' calibrations whose kernels the engine runs, where they were measured; empty: whichever stands for the chip."""
    note: str = ""
    host: HostTable
    launch: LaunchTable
    routing: RoutingTable
    slowdown: SlowdownTable
    memory: MemoryTable
    scheduler: SchedulerTable
    errors: FitErrors | None = None

    @model_validator(mode="after")
    def _errors_are_of_quantities(self) -> "EngineSpec":
        known = self.quantities()
        for path in self.errors.parameters if self.errors else ():
            if path not in known:
                raise ValueError(f"errors.parameters: {path!r}{nearest(path, known)}")
        return self

    def quantities(self) -> dict[str, Quantity]:
        """Every sourced number by its dotted path, e.g. ``host.step``."""
        tables = {
            "host": self.host,
            "launch": self.launch,
            "routing": self.routing,
            "slowdown": self.slowdown,
            "memory": self.memory,
        }
        return {
            f"{name}.{key}": value
            for name, table in tables.items()
            for key, value in ((k, getattr(table, k)) for k in type(table).model_fields)
            if isinstance(value, Quantity)
        }

    @property
    def profile(self) -> "EngineProfile":
        """The values in SI units."""
        si = {path: to_si(q.value, q.unit) for path, q in self.quantities().items() if q.value is not None}
        values = {field_of(path): value for path, value in si.items() if not path.startswith("memory.")}
        return EngineProfile(
            name=self.name,
            kernels=self.kernels,
            memory_rule=self.memory.rule,
            memory_fraction=si["memory.fraction"],
            workspace_bytes=si["memory.workspace"],
            max_num_seqs=self.scheduler.max_num_seqs,
            max_num_batched_tokens=self.scheduler.max_num_batched_tokens,
            prefix_caching=self.scheduler.prefix_caching,
            reserve_output=self.scheduler.reserve_output,
            **values,
        )


def field_of(path: str) -> str:
    """Field of :class:`EngineProfile` that a quantity of a file sets.

    >>> [field_of(p) for p in ("host.step", "launch.layer", "slowdown.weights", "memory.workspace")]
    ['step_s', 'layer_s', 'weights_slowdown', 'workspace_bytes']
    """
    table, _, key = path.partition(".")
    if table == "memory":
        return {"fraction": "memory_fraction", "workspace": "workspace_bytes"}[key]
    return {"slowdown": f"{key}_slowdown", "routing": f"routing_{key}"}.get(table, f"{key}_s")


@dataclass(frozen=True)
class EngineProfile:
    """What an engine adds to its kernels. Times in seconds; the tables above say what each is.

    The default is an engine that adds nothing, with vLLM's limits.
    """

    name: str = "none"
    kernels: str = ""
    step_s: float = 0.0
    sequence_s: float = 0.0
    token_s: float = 0.0
    request_s: float = 0.0
    request_token_s: float = 0.0
    kernel_s: float = 0.0
    eager_s: float = 0.0
    routing_skew: float = 0.0
    weights_slowdown: float = 1.0
    products_slowdown: float = 1.0
    experts_slowdown: float = 1.0
    elementwise_slowdown: float = 1.0
    collective_slowdown: float = 1.0
    launches_slowdown: float = 1.0
    decode_attention_slowdown: float = 1.0
    prefill_attention_slowdown: float = 1.0
    memory_rule: MemoryRule = "total"
    memory_fraction: float = 0.9
    workspace_bytes: float = 1e9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    prefix_caching: bool = True
    reserve_output: bool = False

    def __post_init__(self) -> None:
        """Refuse times below 0, and factors that are none."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_s", "_slowdown")) and not 0 <= value < float("inf"):
                raise InputError(f"engine profile {self.name}: {item.name} = {value}: must be finite and not negative")
        if not self.workspace_bytes >= 0:
            raise InputError(
                f"engine profile {self.name}: workspace_bytes = {self.workspace_bytes}: must not be negative"
            )
        if not 0 < self.memory_fraction <= 1:
            raise InputError(f"engine profile {self.name}: memory_fraction = {self.memory_fraction}: must be in (0, 1]")

    def with_values(self, **values: float) -> "EngineProfile":
        """The same profile with other values."""
        return replace(self, **values)  # type: ignore[arg-type]  # names of float fields only; dataclasses cannot say so


def engine_names() -> list[str]:
    """Names of the engine profiles in the catalogue, sorted."""
    return names_in(data_folder("workloads") / "engines")


def load_engine(name_or_path: str) -> EngineSpec:
    """Load an engine profile of the catalogue by name, or the user's own by the path of its file.

    Raises
    ------
    InputError
        If there is no such profile, or a field is wrong.
    """
    file = find("engine profile", name_or_path, data_folder("workloads") / "engines")
    return parse(EngineSpec, read_toml(file), str(file))


@cache
def engine_profile(name: str) -> EngineProfile:
    """SI values of a profile of the catalogue."""
    return load_engine(name).profile
