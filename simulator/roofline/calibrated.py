"""Prices of ops by fitted curves, where the chip's kernels were measured.

Each function takes an op that already says what it computes and moves (:mod:`simulator.roofline.kernels`) and returns it with
the times of :mod:`simulator.roofline.kernel_times`; or as it was, where the deployment has no curve for it. FLOPs and bytes never
change. Which curve stands for which format is decided here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import log2
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from simulator.catalog.architecture import LatentAttention, SoftmaxAttention
from simulator.catalog.kernel_curves import (
    CollectiveCurve,
    DecodeCurve,
    GemmCurve,
    GroupedCurve,
    KernelOp,
    PrefillCurve,
    VectorCurve,
)
from simulator.roofline.attention_times import (
    block_key_s,
    decode_blocks,
    decode_key_s,
    padded_heads,
    prefill_key_s,
    prefill_pair_s,
    scheduled_key_s,
    scheduled_line,
)
from simulator.roofline.kernel_times import (
    collective_s,
    gemm_compute_s,
    grouped_compute_s,
    memory_s,
    present,
    soft_max,
    spilled_share,
    tiling_of,
)
from simulator.roofline.precision import BITS, Dtype, Precision

if TYPE_CHECKING:  # kernels call these functions on their own ops and deployments
    from simulator.catalog.kernel_curves import KernelCurves
    from simulator.catalog.slices import LinkDomain
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.kernels import Matrix, Number, Op

A = TypeVar("A", PrefillCurve, DecodeCurve)

#: Formats whose curve stands for one that was not measured, in this order; after them the 16-bit curve does.
_STANDS_FOR = {"fp8_block": ("fp8",), "fp8": ("fp8_block",), "w4a8_mxfp4_mxfp8": ("fp8_block", "fp8"), "nvfp4": ()}


def wide_format(p: Precision) -> str:
    """Name, in calibration tables, of the format of residuals, attention and unquantised matrices."""
    return "float32" if p.wide == "fp32" else "bfloat16"


def product_format(p: Precision, *, narrow: bool, experts: bool) -> str:
    """Name, in calibration tables, of the format of a product; empty for formats no table has.

    >>> from simulator.roofline.precision import parse_precision
    >>> [product_format(parse_precision(w), narrow=True, experts=False) for w in ("bf16", "fp8g128", "int4", "nvfp4")]
    ['bfloat16', 'fp8_block', 'int4_wo', 'nvfp4']
    """
    weights, inputs = p.weights, p.activations
    if not narrow or weights in {"fp32", "bf16", "fp16"}:
        return wide_format(p)
    if BITS[inputs] > 16:
        return ""
    if weights == inputs:
        return {"fp8": "fp8_block" if p.group_size else "fp8", "int8": "sq", "fp4": "nvfp4"}.get(weights, "")
    if BITS[inputs] == 16:
        if weights == "fp4" and experts:
            return "w4a16_mxfp4"
        return "int8_wo" if BITS[weights] == 8 else "int4_wo"
    return "w4a8_mxfp4_mxfp8" if weights == "fp4" and experts else inputs if inputs == "fp8" else "sq"


def quantises_inputs(p: Precision) -> bool:
    """Whether narrow products have inputs that are scaled by blocks, in a kernel of its own; one scale per tensor is fused.

    >>> from simulator.roofline.precision import parse_precision
    >>> [quantises_inputs(parse_precision(word)) for word in ("bf16", "fp8", "fp8g128", "int4", "nvfp4")]
    [False, False, True, False, True]
    """
    narrow = {product_format(p, narrow=True, experts=experts) for experts in (False, True)}
    return not narrow.isdisjoint({"fp8_block", "nvfp4", "sq", "w4a8_mxfp4_mxfp8"})


@dataclass(frozen=True)
class Product:
    """Curve of a product, and whether it was measured in the product's own format.

    Attributes
    ----------
    own
        False: it is that of a wider format, and unpacking is charged on top.
    vector
        curve of the same product with a single row, where that was measured apart.
    """

    curve: GemmCurve | GroupedCurve
    own: bool
    vector: VectorCurve | None = None


def product_curve(d: Deployment, *, narrow: bool, experts: bool) -> Product | None:
    """Curve of products with a matrix in the precision's weights (``narrow``) or in 16 bits."""
    curves = d.eff.curves
    wanted = product_format(d.precision, narrow=narrow, experts=experts)
    if curves is None or not wanted:
        return None
    for name in dict.fromkeys((wanted, *_STANDS_FOR.get(wanted, ()), wide_format(d.precision))):
        curve = curves.get(GroupedCurve, "moe", name) if experts else curves.get(GemmCurve, "gemm", name)
        if curve is not None:
            own = name == wanted
            return Product(curve, own, curves.get(VectorCurve, "gemv", name) if own and not experts else None)
    return None


def kv_format(p: Precision) -> str:
    """Name, in calibration tables, of the format of the cache: 32 or 16 bits, or 8 for everything narrower."""
    return "float32" if BITS[p.kv] == 32 else "bfloat16" if BITS[p.kv] >= 16 else "fp8"


def prefill_curve(d: Deployment, mixer: SoftmaxAttention | LatentAttention) -> PrefillCurve | None:
    """Curve of prefill attention; that of a cache as wide as the rest where the cache's own format was not measured."""
    return _attention_curve(d, mixer, PrefillCurve, "mla_prefill", "attention_prefill")


def decode_curve(d: Deployment, mixer: SoftmaxAttention | LatentAttention) -> DecodeCurve | None:
    """Curve of decode attention; that of a cache as wide as the rest where the cache's own format was not measured.

    Heads that share no keys have one of their own where a framework has another kernel for them.
    """
    if isinstance(mixer, SoftmaxAttention) and mixer.n_heads / d.chips <= d.kv_heads_per_chip(mixer):
        unshared = _attention_curve(d, mixer, DecodeCurve, "mla_decode", "mha_decode")
        if unshared is not None:
            return unshared
    return _attention_curve(d, mixer, DecodeCurve, "mla_decode", "attention_decode")


def _attention_curve(
    d: Deployment, mixer: SoftmaxAttention | LatentAttention, kind: type[A], latent: KernelOp, plain: KernelOp
) -> A | None:
    curves, wide = d.eff.curves, wide_format(d.precision)
    if curves is None:
        return None
    for kv in (kv_format(d.precision), wide):
        if isinstance(mixer, LatentAttention):
            found = curves.get(kind, latent, wide, kv)
        else:
            found = curves.at_width(kind, plain, wide, kv, mixer.head_dim)
        if found is not None:
            return found
    return None


class Times(NamedTuple):
    """What an op takes: the attributes of :class:`~simulator.roofline.kernels.Op` of these names. [s]"""

    compute_s: Number
    memory_s: Number
    roofline_s: Number
    overhead_s: Number


def product_times(
    d: Deployment, m: Matrix, n: Number, found: Product, *,
    count: int, dtype: Dtype, weight_bytes: Number, activation_bytes: Number, reads: Number, unpacking: Number,
) -> Times:  # fmt: skip
    """Times of ``count`` products by their curve.

    Parameters
    ----------
    n, reads
        rows, and matrices read, per launch.
    weight_bytes, activation_bytes
        weights, and inputs and outputs, of all launches.
    unpacking
        FLOPs of unpacking weights, charged where the curve is that of another format.
    """
    curve, hbm, some = found.curve, d.hbm_bytes_per_s, present(n)
    peak, units = d.rate_flops_per_s(dtype), d.multiprocessors
    quantise_s: Number = 0.0
    if isinstance(curve, GroupedCurve):
        each = grouped_compute_s(n, reads, m.n_out, m.n_in, curve, peak_flops_per_s=peak, multiprocessors=units)
        launches = 0.5  # the curve's launch is that of both products
    else:
        each = gemm_compute_s(
            n, m.n_out, m.n_in, curve, peak_flops_per_s=peak, hbm_bytes_per_s=hbm, multiprocessors=units,
            tiling=tiling_of(matrix_units=d.slice.chip.has_matrix_units),
        )  # fmt: skip
        quantise_s, launches = count * _quantise_s(d, m, n, curve), 1.0
    compute = count * each
    if not found.own:
        compute = compute + unpacking / (peak * curve.peak)
    moved_bytes = weight_bytes + activation_bytes
    crossing = moved_bytes
    if isinstance(curve, GemmCurve) and curve.resident:
        out = _spilled(d, m, n, curve)
        crossing = weight_bytes + activation_bytes * (out + (1 - out) / curve.resident_speed)
    memory = memory_s(crossing, some * (count * curve.fill_bytes), curve.hbm, hbm)
    if crossing is not moved_bytes:  # what stays on the die counts as moved all the same: no op falls under that bound
        memory = np.maximum(memory, moved_bytes / hbm)
    time = soft_max(compute, memory, curve.sharpness)
    if isinstance(quantise_s, np.ndarray) or quantise_s:
        time = time + quantise_s
    every = Times(compute, memory, time, some * (launches * count * curve.launch_s))
    if found.vector is None:
        return every
    v = found.vector
    # A single row has no tiles: its arithmetic is bound by the peak alone.
    compute = n * (2 * count * m.n_in * m.n_out / peak)
    p = d.precision
    lost_bytes = m.n_out * v.depth * BITS[p.weights if m.quantised(p) else p.wide] / 8
    memory = memory_s(moved_bytes, some * (count * lost_bytes), v.hbm, hbm)
    single = Times(compute, memory, np.maximum(compute, memory), some * (count * v.launch_s))
    if not isinstance(n, np.ndarray):
        return single if n == 1 else every
    return Times(*(np.where(n == 1, one, other) for one, other in zip(single, every, strict=True)))


def _quantise_s(d: Deployment, m: Matrix, n: Number, curve: GemmCurve) -> Number:
    """Time to quantise ``n`` rows of input, where the curve's product holds that. [s]"""
    if not (curve.quantise or curve.spill or curve.row_s):
        return 0.0
    moved: Number = curve.quantise * m.n_in
    if curve.spill:
        moved = moved + curve.spill * m.n_in * _spilled(d, m, n, curve)
    return n * (moved / d.hbm_bytes_per_s + curve.row_s)


def _spilled(d: Deployment, m: Matrix, n: Number, curve: GemmCurve) -> Number:
    """Share of ``n`` rows of input and output that the on-die memory cannot hold, with what is quantised into the input."""
    p, narrow = d.precision, m.quantised(d.precision) and m.form != "head"
    each = m.n_in * (p.input_bytes if narrow else p.wide_bytes) + m.n_out * p.wide_bytes
    if curve.quantise:
        each += m.n_in * p.wide_bytes
    return spilled_share(n * each, curve.resident * d.on_chip_bytes)


def linear_product_times(d: Deployment, found: Product, *, flops: Number, moved_bytes: Number, dtype: Dtype) -> Times:
    """Times of products at their curve's large-size rates, without tiles and launches: in proportion to their rows."""
    compute = flops / (d.rate_flops_per_s(dtype) * found.curve.peak)
    memory = moved_bytes / (d.hbm_bytes_per_s * found.curve.hbm)
    return Times(compute, memory, np.maximum(compute, memory), 0.0)


def walked_experts(d: Deployment, op: Op, held: float, n: Number) -> Op:
    """One of the two products of routed experts, with its half of the time of walking the ``held`` experts of this chip."""
    found = product_curve(d, narrow=True, experts=True)
    if found is None or not isinstance(found.curve, GroupedCurve) or not found.curve.expert_s:
        return op
    return replace(op, roofline_s=op.roofline_s + present(n) * (0.5 * op.count * held * found.curve.expert_s))


def expert_traffic(d: Deployment, op: Op, routed_bytes: Number, *, launches: float) -> Op:
    """An op that moves tokens to, within or from routed experts: ``routed_bytes`` of its traffic at the experts' curve.

    What is routed was measured together with the products; ``launches`` is the share of the op's that is left.
    """
    found = product_curve(d, narrow=True, experts=True)
    if found is None or not isinstance(found.curve, GroupedCurve) or not d.activation_traffic:
        return op
    rest = op.activation_bytes - routed_bytes
    time = rest / (d.hbm_bytes_per_s * d.eff.hbm) + routed_bytes * (found.curve.traffic / d.hbm_bytes_per_s)
    return replace(op, memory_s=time, roofline_s=time, overhead_s=launches * op.overhead_s)


def token_io_s(d: Deployment, mixer: SoftmaxAttention | LatentAttention) -> float | None:
    """Time per token and layer of attention's own reading and writing of tokens; None without a curve. [s]

    Queries in, outputs out, keys and values written; whatever the length of the context.
    """
    heads = mixer.n_heads / d.chips
    if isinstance(mixer, SoftmaxAttention):
        curve = prefill_curve(d, mixer)
        keys = d.kv_heads_per_chip(mixer) * d.precision.kv_head_bytes(mixer.head_dim)
        moved = 2 * heads * mixer.head_dim * d.precision.wide_bytes + keys
    else:
        curve = prefill_curve(d, mixer) if mixer.indexer is None else None
        moved = heads * (2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.v_dim) * d.precision.wide_bytes
    if curve is None or not d.activation_traffic:
        return None
    return curve.traffic * moved / d.hbm_bytes_per_s


def decode_times(
    d: Deployment, op: Op, mixer: SoftmaxAttention | LatentAttention, B: Number, keys: Number, *, bytes_per_key: float
) -> Op:
    """Decode attention of ``B`` sequences over ``keys`` keys in all, in each of the op's layers.

    Launch, time per sequence, and time per key; full layers also have the ramp, which ends at one number of keys, and where
    a kernel deals each sequence's keys to blocks of threads a time per key that depends on how many there are. The mean length stands
    for the longest there: a batch of unequal lengths may wait for its longest sequence, by up to their ratio, which a step's
    sums do not tell. Windowed layers have neither.
    """
    curve = decode_curve(d, mixer)
    if curve is None:
        return op
    heads, units = mixer.n_heads / d.chips, d.slice.chip.has_matrix_units
    if isinstance(mixer, LatentAttention):
        kv_heads, flops = 1.0, 2.0 * padded_heads(heads, 1.0, matrix_units=units) * (2 * mixer.kv_rank + mixer.rope_dim)
        each, width, latent = heads * curve.head_s, mixer.kv_rank + mixer.rope_dim / 2, True
    else:
        kv_heads = d.kv_heads_per_chip(mixer)
        flops = 4.0 * padded_heads(heads, kv_heads, matrix_units=units) * mixer.head_dim
        each, width, latent = kv_heads * curve.kv_head_s + heads * curve.head_s, float(mixer.head_dim), False
    rate = d.rate_flops_per_s(d.attention_dtype)
    key_s = decode_key_s(bytes_per_key, flops, curve, peak_flops_per_s=rate, hbm_bytes_per_s=d.hbm_bytes_per_s)
    launch_s = curve.launch_s
    ramp: Number = 0.0
    per_key: Number = key_s
    if curve.schedule:
        block_s = block_key_s(width, curve)
        blocks = float(decode_blocks(heads, kv_heads, latent=latent))
        line = scheduled_line(curve, blocks, key_s, float(block_s), d.multiprocessors)
        launch_s, each = launch_s + line.launch_s, each + line.sequence_s
        if not is_windowed(mixer):
            per_key = scheduled_key_s(B, line.table, key_s)
    if not is_windowed(mixer):
        ramp = curve.ramp_s * np.minimum(1.0, keys * (bytes_per_key / curve.ramp_bytes))
    # The tokens' own traffic is priced with all tokens of the step, prefilled ones included.
    each = max(0.0, each - (token_io_s(d, mixer) or 0.0))
    return replace(
        op,
        compute_s=keys * (op.count * flops / (rate * curve.peak)),
        memory_s=keys * (op.count * bytes_per_key / (d.hbm_bytes_per_s * curve.hbm)),
        roofline_s=op.count * (keys * per_key + ramp + B * each),
        overhead_s=present(B) * (op.count * launch_s),
    )


def is_windowed(mixer: SoftmaxAttention | LatentAttention) -> bool:
    """Whether a window bounds the keys that the mixer reads."""
    return isinstance(mixer, SoftmaxAttention) and mixer.window is not None


def decode_knot(d: Deployment, mixer: SoftmaxAttention | LatentAttention, bytes_per_key: float) -> float | None:
    """Keys at which the ramp of decode attention ends; None without one. [keys]"""
    curve = decode_curve(d, mixer)
    if curve is None or curve.ramp_s == 0 or is_windowed(mixer):
        return None
    return curve.ramp_bytes / bytes_per_key


def prefill_times(
    d: Deployment, op: Op, mixer: SoftmaxAttention | LatentAttention, launches: Number, pairs: Number, keys: Number, *,
    flops_per_pair: float, bytes_per_key: float,
) -> Op:  # fmt: skip
    """Prefill attention: time per pair, and on top of it time per key."""
    curve = prefill_curve(d, mixer)
    if curve is None:
        return op
    heads = mixer.n_heads / d.chips
    width = flops_per_pair / (4 * heads)
    rate = d.rate_flops_per_s(d.attention_dtype)
    pair_s = prefill_pair_s(flops_per_pair, heads, curve, rate)
    key_s = prefill_key_s(
        width,
        bytes_per_key,
        curve,
        peak_flops_per_s=rate,
        hbm_bytes_per_s=d.hbm_bytes_per_s,
        multiprocessors=d.multiprocessors,
    )
    compute, memory = pairs * (op.count * pair_s), keys * (op.count * key_s)
    return replace(
        op,
        compute_s=compute,
        memory_s=memory,
        roofline_s=compute + memory,
        overhead_s=launches * (op.count * curve.launch_s),
        adds=True,
    )


def domain_curve(d: Deployment, kind: KernelOp, domains: tuple[LinkDomain, ...]) -> CollectiveCurve | None:
    """Curve of a collective within one domain of switched or PCIe links; None for all others."""
    if d.eff.curves is None or len(domains) != 1 or domains[0].kind == "torus":
        return None
    return collective_curve(d.eff.curves, kind, domains[0].size)


def collective_times(curve: CollectiveCurve, count: int, transfer_s: Number) -> tuple[Number, Number]:
    """Time of ``count`` calls beyond their latency, and latency; ``transfer_s`` is one call's at the full link rate. [s]"""
    latency = present(transfer_s) * (count * curve.latency_s)
    return np.maximum(0.0, count * collective_s(transfer_s, curve) - latency), latency


def collective_curve(curves: KernelCurves, kind: KernelOp, chips: int) -> CollectiveCurve | None:
    """Curve of a collective on so many chips: between two measured numbers in proportion to log chips, else the nearest's."""
    known = curves.measured_chips(kind)
    if not known or chips < 2:
        return None
    low = max((n for n in known if n <= chips), default=known[0])
    high = min((n for n in known if n >= chips), default=known[-1])
    one, other = (curves.get(CollectiveCurve, kind, chips=n) for n in (low, high))
    if one is None or other is None or low == high:
        return one
    share = log2(chips / low) / log2(high / low)
    between = {
        f.name: (1 - share) * getattr(one, f.name) + share * getattr(other, f.name) for f in fields(CollectiveCurve)
    }
    if not (one.direct and other.direct):  # a short way that only one of them has is not known between them
        between |= {"direct": 0.0, "setup_s": 0.0}
    return CollectiveCurve(**between)
