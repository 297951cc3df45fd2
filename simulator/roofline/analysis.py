"""What one step costs and what bounds it: the answer of the ``roofline`` command."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from simulator.catalog.chips import IDEAL
from simulator.errors import InputError
from simulator.roofline.compile import hidden_s, hiding, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.ops import Op, StepShape, dense_ops, merge_ops, step_op_groups, step_ops

Bound = Literal["compute", "HBM", "interconnect", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "HBM", "interconnect", "overhead")


@dataclass(frozen=True)
class OpReport:
    """One row of the op table: an op per chip and step, and what bounds it.

    ``time_s`` is what the op adds to the step: for a collective, what ``overlap`` leaves of it.
    """

    op: Op
    time_s: float
    share: float
    bound: Bound
    dtype: str
    """Format of its arithmetic; empty if it does none."""

    @property
    def intensity_flops_per_byte(self) -> float:
        """FLOPs per byte of HBM traffic; infinite without traffic, 0 without FLOPs. [FLOP/byte]"""
        return _ratio(float(self.op.flops), float(self.op.hbm_bytes))

    @property
    def flops_per_s(self) -> float:
        """Achieved rate on one chip. [FLOP/s]"""
        return _ratio(float(self.op.flops), self.time_s)


@dataclass(frozen=True)
class StepReport:
    """One step of a deployment.

    Attributes
    ----------
    deployment, step
        what was priced.
    ops
        the op table, in the order of the network.
    time_s
        time of the step. [s]
    bound_s
        time by what bounds it; sums to ``time_s``. Overheads are one entry, whatever op they belong to. [s]
    bound
        the largest of these.
    roofline_s
        the least the step could take: the largest of its FLOPs at peak, format by format, its HBM bytes at full
        bandwidth, and its collectives at full link bandwidth and no software latency — everything overlapped. [s]
    model_flops, required_bytes
        of the whole replica: FLOPs without copies; weights once per chip, KV reads and writes, but no activations.
    mfu, mbu
        model FLOPs ÷ (peak · time), required bytes ÷ (HBM bandwidth · time); the peak is that of the linear layers'
        format.
    intensity_flops_per_byte
        model FLOPs ÷ required bytes. [FLOP/byte]
    critical_batch
        tokens in a step above which the linear layers take longer to compute than to load. [tokens]
    memory
        how the deployment fills its chips.
    """

    deployment: Deployment
    step: StepShape
    ops: tuple[OpReport, ...]
    time_s: float
    bound_s: dict[Bound, float]
    bound: Bound
    roofline_s: float
    model_flops: float
    required_bytes: float
    mfu: float
    mbu: float
    intensity_flops_per_byte: float
    critical_batch: float
    memory: MemoryFit

    @property
    def tokens_per_s(self) -> float:
        """Tokens processed per second: prompt tokens of chunks, new tokens of decodes."""
        return self.step.n / self.time_s

    @property
    def tokens_per_s_per_chip(self) -> float:
        """As :attr:`tokens_per_s`, per chip."""
        return self.tokens_per_s / self.deployment.chips


def critical_batch(d: Deployment) -> float:
    """Tokens at which the layers' matrix products take as long to compute as their weights take to load. [tokens]

    Activation traffic left out, as in the usual peak ÷ bandwidth figure, which this is for dense models at efficiency 1
    and 16-bit weights; efficiencies move it by matmul ÷ hbm. Of experts, all are loaded: so many tokens touch them all.
    """
    tokens = 1e9
    products = [op for op in dense_ops(d, tokens) if op.kind == "matmul"]
    load_s = sum_over(op.weight_bytes for op in products) / (d.slice.chip.hbm_bandwidth_bytes_per_s * d.eff.hbm)
    return float(load_s / sum_over(op.compute_s for op in products)) * tokens


def step_report(
    d: Deployment, *, prefill: int | None = None, decode: int | None = None, context: int | None = None
) -> StepReport:
    """Report on a prefill of ``prefill`` tokens, or a decode step of ``decode`` sequences.

    Parameters
    ----------
    prefill
        new prompt tokens, processed in one step that ends the prompt.
    decode
        sequences that decode one token each.
    context
        length at the end of the step, new tokens included: of the prompt (default: ``prefill``, nothing cached), or
        of every decoding sequence.

    Raises
    ------
    InputError
        Unless exactly one of ``prefill`` and ``decode`` is given, with a context that can hold it.
    """
    if (prefill is None) == (decode is None):
        raise InputError("give exactly one of prefill (tokens) and decode (batch)")
    if prefill is not None:
        total = prefill if context is None else context
        if not 1 <= prefill <= total:
            raise InputError(
                f"prefill = {prefill} of context = {total}: need 1 ≤ prefill ≤ context; the context is the length at "
                "the end of the step, cached and new tokens together"
            )
        shape = StepShape.prefill(prefill, total - prefill, window=d.window, chunked=d.window_chunked)
        return report(d, shape)
    if context is None:
        raise InputError("decode needs a context: the length of each sequence, its new token included")
    return report(d, StepShape.decode(decode or 0, context, window=d.window, chunked=d.window_chunked))


def report(d: Deployment, step: StepShape) -> StepReport:
    """Report on any step, mixed ones included."""
    if step.n < 1:
        raise InputError(f"step.n = {step.n:g}: a step has at least one token")
    dense, attention, head = step_op_groups(d, step)
    merged = merge_ops((dense, attention, head))
    hidden = _hidden_fraction(d, dense) | _hidden_fraction(d, head)
    times = [float(op.time_s - hidden.get(op.name, 0.0) * op.roofline_s) for op in merged]
    time_s = sum(times)
    bound_s: dict[Bound, float] = dict.fromkeys(BOUNDS, 0.0)
    rows = []
    for op, op_s in zip(merged, times, strict=True):
        resource = _resource(op)
        bound_s[resource] += op_s - float(op.overhead_s)
        bound_s["overhead"] += float(op.overhead_s)
        bound = "overhead" if float(op.overhead_s) > op_s / 2 else resource
        rows.append(OpReport(op, op_s, op_s / time_s, bound, op.dtype))
    flops = d.chips * float(sum_over(op.flops - op.copied_flops for op in merged))
    required = d.chips * float(sum_over(op.hbm_bytes - op.activation_bytes for op in merged))
    chip = d.slice.chip
    return StepReport(
        deployment=d,
        step=step,
        ops=tuple(rows),
        time_s=time_s,
        bound_s=bound_s,
        bound=max(BOUNDS, key=lambda b: bound_s[b]),
        roofline_s=_roofline_s(d, step),
        model_flops=flops,
        required_bytes=required,
        mfu=flops / (d.chips * d.peak_flops_per_s * time_s),
        mbu=required / (d.chips * chip.hbm_bandwidth_bytes_per_s * time_s),
        intensity_flops_per_byte=flops / required,
        critical_batch=critical_batch(d),
        memory=memory_fit(d),
    )


def _hidden_fraction(d: Deployment, ops: Sequence[Op]) -> dict[str, float]:
    """Fraction of each collective among ``ops`` that hides: all hide the same part of what they may."""
    collectives = [op for op in ops if op.kind == "collective"]
    able_s = float(sum_over(hiding(d, op) * op.roofline_s for op in collectives))
    return {op.name: hiding(d, op) * float(hidden_s(d, ops)) / able_s for op in collectives} if able_s else {}


def _resource(op: Op) -> Bound:
    if op.kind == "collective":
        return "interconnect"
    if op.kind == "overhead":
        return "overhead"
    return "compute" if op.compute_s >= op.memory_s else "HBM"


def _roofline_s(d: Deployment, step: StepShape) -> float:
    """Longest of the three resources at full rate, each used without pause. [s]"""
    ideal = replace(d, efficiency=IDEAL)
    ops = step_ops(ideal, step)
    required = sum_over(op.hbm_bytes - op.activation_bytes for op in ops)
    return max(
        float(sum_over(op.compute_s for op in ops)),
        float(required / d.slice.chip.hbm_bandwidth_bytes_per_s),
        float(sum_over(op.network_s for op in ops)),
    )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return float("inf") if numerator else 0.0
    return numerator / denominator
