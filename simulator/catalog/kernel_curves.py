"""Fitted efficiency curves of one chip's kernels: what a calibration file of ``hardware_specs/calibration`` may say.

Fractions are of the chip's datasheet, so that a chip of the same generation can inherit them; fixed times are seconds. What
the parameters do to a kernel's time is in :mod:`simulator.roofline.kernel_times`, how they were fitted in
``docs/calibration.md``. Every fit carries its standard errors, the correlation of its parameters and its errors on shapes
that it was not fitted to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import log
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from simulator.catalog.files import data_folder, find, names_in, parse, read_toml
from simulator.catalog.records import Record
from simulator.errors import InputError

KernelOp = Literal[
    "gemm",
    "gemv",
    "moe",
    "attention_prefill",
    "attention_decode",
    "mha_decode",
    "mla_prefill",
    "mla_decode",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "alltoall",
]

Schedule = Literal["", "whole", "waves", "shares"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
"""How decode attention may deal a sequence's keys to blocks of threads; :func:`simulator.roofline.attention_times.decode_splits`."""

#: Which framework's kernels stand for a chip where several were measured, best first: the engines this project models.
FRAMEWORKS = ("vllm", "sglang", "trtllm", "nccl", "llmservingsim", "user")


#: A framework whose curve is off by more than this multiple of another's does not stand for a chip: its kernels change with
#: shape in ways that the parameters do not follow, so they would be off elsewhere too.
POOR_FIT = 1.5


#: Measured chip -> framework -> chip whose measurements of that framework's kernels stand in for those missing here, as fractions
#: of the datasheet. On A100 only SGLang's attention and experts were measured, and TensorRT-LLM has kernels of its own. On
#: Blackwell vLLM and SGLang run TensorRT-LLM's (through FlashInfer), so nothing stands in there.
KERNELS_FROM: Mapping[str, Mapping[str, str]] = {"a100-80-sxm": {"trtllm": "h100-sxm"}}


#: Frameworks whose routed experts hardly walk those that no token comes to, and the time each of them takes at most [s]: vLLM's on H100, in the one
#: format and chip measured of both (8-bit blocks), where TensorRT-LLM's take 0.24 us. TensorRT-LLM's stand for theirs without the rest.
SKIP_IDLE_EXPERTS = {"vllm": 3e-8, "sglang": 3e-8}


@dataclass(frozen=True)
class _Curve:
    fractions: ClassVar[frozenset[str]] = frozenset()
    multiples: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse parameters that could push a time under its bound."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str):
                continue
            if item.name in self.fractions:
                if not 0 < value <= 1:
                    raise InputError(f"{type(self).__name__}.{item.name} = {value}: must be above 0 and at most 1")
            elif item.name in self.multiples:
                if not 1 <= value < float("inf"):
                    raise InputError(f"{type(self).__name__}.{item.name} = {value}: must be finite and at least 1")
            elif not 0 <= value < float("inf"):
                raise InputError(f"{type(self).__name__}.{item.name} = {value}: must be finite and not negative")


@dataclass(frozen=True)
class GemmCurve(_Curve):
    """Matrix products of one format.

    Attributes
    ----------
    peak, hbm
        fractions of peak FLOP/s and of HBM bandwidth that large products reach.
    launch_s
        time of the smallest product, launch and gap to the next kernel included. [s]
    fill_bytes
        bytes in flight before the memory is busy. [bytes]
    depth
        steps of the inner dimension lost at either end of a tile's loop. [elements]
    tile
        outputs a tile of no size would cost: what does not shrink with the tile. [elements]
    split_s
        further time of a product whose inner dimension is split over multiprocessors. [s]
    quantise
        bytes moved per element of the input to quantise it, at full bandwidth; 0 where the rows hold none. [bytes]
    sharpness
        p of the p-norm that joins compute and memory time: 1 is their sum, infinity their maximum.
    spill
        as ``quantise``, moved besides where inputs and outputs do not fit the on-die memory. [bytes]
    row_s
        per row of the input, of kernels that quantise it a row at a time. [s]
    resident, resident_speed
        part of the on-die memory that inputs and outputs may fill, and how many times faster than HBM they come from there.
        A price stays at or above the time of all bytes at HBM's full rate.
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"peak", "hbm"})
    multiples: ClassVar[frozenset[str]] = frozenset({"sharpness", "resident_speed"})

    peak: float
    hbm: float
    launch_s: float
    fill_bytes: float = 0.0
    depth: float = 0.0
    tile: float = 0.0
    split_s: float = 0.0
    quantise: float = 0.0
    sharpness: float = 2.0
    spill: float = 0.0
    row_s: float = 0.0
    resident: float = 0.0
    resident_speed: float = 1.0


@dataclass(frozen=True)
class VectorCurve(_Curve):
    """Products with a single row, where a library reads the weights by another kernel, as those of CPUs do.

    Attributes
    ----------
    hbm, launch_s
        as in :class:`GemmCurve`.
    depth
        steps of the inner dimension lost at either end of each output's sum. [elements]
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"hbm"})

    hbm: float
    launch_s: float
    depth: float = 0.0


@dataclass(frozen=True)
class GroupedCurve(_Curve):
    """The products of one layer's routed experts; attributes as in :class:`GemmCurve`, and

    Attributes
    ----------
    traffic
        time of gathering, activating and summing, as a multiple of its bytes at full HBM bandwidth.
    expert_s
        per expert that the chip holds, whether a token comes to it or not: groups without rows are walked as well. [s]
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"peak", "hbm"})
    multiples: ClassVar[frozenset[str]] = frozenset({"traffic", "sharpness"})

    peak: float
    hbm: float
    launch_s: float
    fill_bytes: float = 0.0
    depth: float = 0.0
    tile: float = 0.0
    traffic: float = 1.0
    expert_s: float = 0.0
    sharpness: float = 2.0


@dataclass(frozen=True)
class PrefillCurve(_Curve):
    """Attention of new tokens.

    Attributes
    ----------
    peak
        fraction of peak FLOP/s of its two products and the softmax between them.
    softmax
        the softmax of one pair in one head, as width of head. [elements]
    launch_s
        per call. [s]
    serial
        time of the last tile of queries to walk its keys on one multiprocessor, in units of its products' time at peak.
    traffic
        time of reading queries and writing keys, values and outputs, as a multiple of these bytes at full HBM bandwidth.
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"peak"})
    multiples: ClassVar[frozenset[str]] = frozenset({"traffic"})

    peak: float
    softmax: float
    launch_s: float
    serial: float = 0.0
    traffic: float = 1.0


@dataclass(frozen=True)
class DecodeCurve(_Curve):
    """Attention of one new token per sequence over its cached keys.

    Attributes
    ----------
    hbm
        fraction of HBM bandwidth of large reads.
    peak
        fraction of peak FLOP/s, of products padded to sixteen query heads per KV head.
    launch_s
        per call. [s]
    ramp_s, ramp_bytes
        further time of splitting and joining sequences, reached in proportion once so many bytes are read. [s], [bytes]
    kv_head_s, head_s
        per sequence and KV head, and per sequence and query head. [s]
    schedule
        how the kernel deals keys to blocks of threads, one of :data:`SCHEDULES`; empty: evenly, whatever their number.
    item_s
        with a schedule: of a block, whatever its keys. [s]
    walk_s
        with a schedule: time of a key in a block that is alone on its multiprocessor, of heads 128 wide. [s]
    pair
        with a schedule: time of two blocks that share a multiprocessor, in that of one: 1 where each fills the other's waits, 2 at most.
    split_s
        with a schedule: of joining what the blocks of one sequence found, where it has several. [s]
    sharpness
        with a schedule: p of the p-norm that joins the time of the busiest multiprocessor with that of all reading.
    resident, resident_speed
        of the measurement alone: the part of the on-die memory up to which repeated reads came from there, and how many
        times faster than HBM. A server's layers evict each other's keys, so nothing is priced that way.
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"hbm", "peak"})
    multiples: ClassVar[frozenset[str]] = frozenset({"ramp_bytes", "pair", "resident_speed", "sharpness"})

    hbm: float
    peak: float
    launch_s: float
    ramp_s: float = 0.0
    ramp_bytes: float = 1e6
    kv_head_s: float = 0.0
    head_s: float = 0.0
    walk_s: float = 0.0
    pair: float = 2.0
    resident: float = 0.0
    resident_speed: float = 1.0
    item_s: float = 0.0
    split_s: float = 0.0
    sharpness: float = 1.0
    schedule: Schedule = ""

    def __post_init__(self) -> None:
        """Refuse a schedule that is none, besides."""
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"DecodeCurve.schedule = {self.schedule!r}: must be one of {', '.join(map(repr, SCHEDULES))}"
            )


@dataclass(frozen=True)
class CollectiveCurve(_Curve):
    """One collective on one number of chips.

    Attributes
    ----------
    latency_s
        time of the smallest message. [s]
    link
        fraction of a chip's link bandwidth.
    sharpness
        p of the p-norm that joins latency and transfer time; below 1 they hinder each other.
    direct
        time of the short way that small messages go, latency apart, as a multiple of the transfer at the full link rate: every chip sends
        all it has to all others, or every other word is a flag. 0: there is none.
    setup_s
        further latency of the long way, where there is a short one. [s]
    """

    fractions: ClassVar[frozenset[str]] = frozenset({"link"})

    latency_s: float
    link: float
    sharpness: float = 1.0
    direct: float = 0.0
    setup_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a norm that is none, and a short way faster than the link, besides."""
        super().__post_init__()
        if not self.sharpness > 0:
            raise InputError(f"CollectiveCurve.sharpness = {self.sharpness}: must be above 0")
        if 0 < self.direct < 1:
            raise InputError(f"CollectiveCurve.direct = {self.direct}: must be 0 or at least 1")


Curve = GemmCurve | VectorCurve | GroupedCurve | PrefillCurve | DecodeCurve | CollectiveCurve
C = TypeVar("C", bound=Curve)

CURVES: dict[str, type[Any]] = {
    "gemm": GemmCurve,
    "gemv": VectorCurve,
    "moe": GroupedCurve,
    "attention_prefill": PrefillCurve,
    "mla_prefill": PrefillCurve,
    "attention_decode": DecodeCurve,
    "mha_decode": DecodeCurve,
    "mla_decode": DecodeCurve,
    "all_reduce": CollectiveCurve,
    "all_gather": CollectiveCurve,
    "reduce_scatter": CollectiveCurve,
    "alltoall": CollectiveCurve,
}
"""The curve of each op."""


Key = tuple[str, str, str, int]
"""Op, format, KV format and size of a curve: chips of a collective, width of attention's heads, else 1."""


class Residuals(Record):
    """How far off a fit is in one regime: relative errors, predicted over measured less 1."""

    regime: str
    rows: PositiveInt
    median_abs: NonNegativeFloat
    p90_abs: NonNegativeFloat
    bias: float
    """Median of the signed errors."""


class KernelFit(Record):
    """One fitted curve, as a calibration file holds it."""

    op: KernelOp
    dtype: str = ""
    kv_dtype: str = ""
    framework: str
    chips: PositiveInt = 1
    """Chips of a collective."""
    head_dim: NonNegativeInt = 0
    """Width of attention's heads, for which its kernels are compiled one by one; 0: of every width."""
    rows: PositiveInt
    left_out: NonNegativeInt = 0
    """Rows not fitted to; ``left_out_why`` says why."""
    left_out_why: str = ""
    held_out_by: str
    """What was left out as a whole in cross-validation."""
    schedule: Schedule = ""
    """Of decode attention: how it deals keys to blocks of threads."""
    parameters: dict[str, float]
    standard_errors: dict[str, NonNegativeFloat]
    """Relative; 0 for a parameter that is held or at a limit."""
    at_limit: tuple[str, ...] = ()
    """Parameters that ended at the edge of their allowed range."""
    correlation: tuple[tuple[float, ...], ...] = ()
    """Of the logarithms of the free parameters, in their order."""
    in_sample_median_abs: NonNegativeFloat
    residuals: tuple[Residuals, ...]
    """On shapes left out, by regime; the first is all of them."""

    @model_validator(mode="after")
    def _names_are_the_curves(self) -> "KernelFit":
        known = {item.name for item in fields(CURVES[self.op])} - {"schedule"}
        if set(self.parameters) != known:
            raise ValueError(f"parameters {sorted(self.parameters)} must be {sorted(known)}")
        _curve_of(self)
        return self

    @property
    def key(self) -> Key:
        """What the curve is of."""
        return self.op, self.dtype, self.kv_dtype, self.head_dim or self.chips


class CalibrationFile(Record):
    """A file of ``hardware_specs/calibration``."""

    schema_version: Literal[1]
    chip: str
    """The chip that was measured."""
    command: str
    """What wrote the file."""
    source: tuple[str, ...]
    """Keys of the bibliography, or names of the user's files."""
    tables: dict[str, str]
    """Tables read, each with the start of the SHA-256 of its rows as text."""
    fits: tuple[KernelFit, ...]


def _curve_of(fit: KernelFit) -> Curve:
    words = {"schedule": fit.schedule} if fit.schedule else {}
    curve: Curve = CURVES[fit.op](**fit.parameters, **words)
    return curve


@dataclass(frozen=True)
class KernelCurves:
    """The curves in force on one chip.

    Attributes
    ----------
    chip
        where they were measured.
    curves
        by (op, format, KV format, chips); of several frameworks the :func:`preferred` one's.
    own
        framework -> its curves, of those that were measured: what :meth:`of` puts in force.
    """

    chip: str
    curves: Mapping[Key, Curve] = field(default_factory=dict)
    own: Mapping[str, Mapping[Key, Curve]] = field(default_factory=dict)

    def of(self, framework: str) -> "KernelCurves":
        """With a framework's own kernels in force wherever they were measured; as they are, for one that was not."""
        if framework not in self.own:
            return self
        own = self.own[framework]
        decodes = {(dtype, kv_dtype) for op, dtype, kv_dtype, _ in own if op == "attention_decode"}
        others = {key: curve for key, curve in self.curves.items() if key[0] != "mha_decode" or key[1:3] not in decodes}
        return replace(self, curves={**others, **own})

    def get(self, kind: type[C], op: KernelOp, dtype: str = "", kv_dtype: str = "", chips: int = 1) -> C | None:
        """The curve of an op, if it was measured."""
        found = self.curves.get((op, dtype, kv_dtype, chips))
        return found if isinstance(found, kind) else None

    def at_width(self, kind: type[C], op: KernelOp, dtype: str, kv_dtype: str, head_dim: int) -> C | None:
        """The curve of attention with heads so wide; of the measured width that is nearest in proportion."""
        widths = [size for (name, fmt, kv, size) in self.curves if (name, fmt, kv) == (op, dtype, kv_dtype)]
        if not widths:
            return None
        nearest = min(widths, key=lambda width: (abs(log(width / head_dim)), width))
        return self.get(kind, op, dtype, kv_dtype, nearest)

    def measured_chips(self, op: KernelOp) -> list[int]:
        """Group sizes of a collective that were measured, ascending."""
        return sorted(chips for (name, _, _, chips) in self.curves if name == op)

    def without(self, *ops: str) -> "KernelCurves":
        """Without the curves of some ops, which the constant efficiencies price then."""
        return self._mapped(lambda curves: {key: curve for key, curve in curves.items() if key[0] not in ops})

    def with_fixed_times(self, *, kernels: float, collectives: float) -> "KernelCurves":
        """Launches and other times of kernels in seconds, and latencies of collectives, multiplied."""

        def changed(curve: Curve) -> Curve:
            factor = collectives if isinstance(curve, CollectiveCurve) else kernels
            return replace(
                curve,
                **{f.name: factor * getattr(curve, f.name) for f in fields(curve) if f.name.endswith("_s")},
            )

        return self._mapped(lambda curves: {key: changed(curve) for key, curve in curves.items()})

    def _mapped(self, change: Callable[[Mapping[Key, Curve]], dict[Key, Curve]]) -> "KernelCurves":
        own = {framework: change(curves) for framework, curves in self.own.items()}
        return replace(self, curves=change(self.curves), own=own)


def read_calibration(name_or_path: str) -> CalibrationFile:
    """Read a calibration by the name of the measured chip, or by the path of a file.

    Raises
    ------
    InputError
        If there is no such file, or a field is wrong.
    """
    file = find("calibration", name_or_path, data_folder("hardware_specs") / "calibration")
    return parse(CalibrationFile, read_toml(file), str(file))


def calibration_names() -> list[str]:
    """Names of the chips whose kernels were measured, sorted."""
    return names_in(data_folder("hardware_specs") / "calibration")


@cache
def load_curves(name_or_path: str) -> KernelCurves:
    """The curves of a calibration; of frameworks measured side by side the :func:`preferred` one."""
    calibration = read_calibration(name_or_path)
    frameworks = sorted({fit.framework for fit in calibration.fits} - {"nccl"})
    own = {name: _by_key([fit for fit in calibration.fits if fit.framework == name]) for name in frameworks}
    for framework, donor in KERNELS_FROM.get(calibration.chip, {}).items():
        own[framework] = {**load_curves(donor).own[framework], **own.get(framework, {})}
    curves = _by_key(preferred_fits(calibration))
    experts = {key: curve for key, curve in curves.items() if isinstance(curve, GroupedCurve)}
    for framework, most in SKIP_IDLE_EXPERTS.items():
        skipping = {key: replace(curve, expert_s=min(curve.expert_s, most)) for key, curve in experts.items()}
        own[framework] = {**skipping, **own.get(framework, {})}
    return KernelCurves(calibration.chip, curves, own)


def _by_key(fits: Sequence[KernelFit]) -> dict[Key, Curve]:
    return {fit.key: _curve_of(fit) for fit in fits}


def preferred_fits(calibration: CalibrationFile) -> list[KernelFit]:
    """One fit per op, format and size: the :func:`preferred` of those measured side by side.

    A collective's numbers of chips are all of one framework, so that what lies between them can be interpolated; so are attention's widths,
    and decodes of heads that share keys and of heads that do not.
    """
    side_by_side: dict[tuple[str, str, str], dict[str, list[KernelFit]]] = {}
    for fit in calibration.fits:
        op = "attention_decode" if fit.op == "mha_decode" else fit.op
        side_by_side.setdefault((op, fit.dtype, fit.kv_dtype), {}).setdefault(fit.framework, []).append(fit)
    found = []
    for by_framework in side_by_side.values():
        framework = preferred(
            [max(fits, key=lambda fit: (fit.chips, fit.rows)) for fits in by_framework.values()]
        ).framework
        found += by_framework[framework]
    return found


def preferred(fits: Sequence[KernelFit]) -> KernelFit:
    """Which of several frameworks' kernels stands for the chip: the first of :data:`FRAMEWORKS` that its curve describes well.

    Well is a median error on left-out shapes of at most :data:`POOR_FIT` times that of the best described.
    """
    best = min(fit.residuals[0].median_abs for fit in fits)
    good = [fit for fit in fits if fit.residuals[0].median_abs <= POOR_FIT * best]
    return min(good, key=lambda fit: _rank(fit.framework))


def _rank(framework: str) -> int:
    return FRAMEWORKS.index(framework) if framework in FRAMEWORKS else len(FRAMEWORKS)
