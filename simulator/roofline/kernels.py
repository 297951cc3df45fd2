"""Kernels: what one op computes, moves and takes on one chip.

An op takes::

    max(FLOPs / (peak · matmul or attention), (weights + activations) / (HBM · hbm) + KV / (HBM · kv)) + count · overhead

or, where the chip's kernels were measured, the time of their fitted curve (:mod:`simulator.roofline.calibrated`),

which is never less than its roofline bound [1]_; collectives follow :mod:`simulator.roofline.collectives`.

.. [1] S. Williams, A. Waterman, D. Patterson, "Roofline", Commun. ACM 52(4), 2009, doi:10.1145/1498765.1498785.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.slices import LinkDomain
from simulator.roofline import calibrated
from simulator.roofline.calibrated import Times
from simulator.roofline.collectives import all_gather_s, all_reduce_s, all_to_all_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernel_times import present
from simulator.roofline.precision import BITS, Dtype, Precision

Number = float | NDArray[np.float64]
"""A figure of one step, or an array of them over steps of different size."""

#: Rows of a tile of products for which a weight is unpacked once (assumed: the usual width of GPU tiles).
TILE_ROWS = 128

Kind = Literal["matmul", "attention", "elementwise", "collective", "overhead"]


@dataclass(frozen=True)
class Op:
    """One kind of kernel in a step, per chip, summed over its ``count`` launches.

    Attributes
    ----------
    name, kind
        what it is; ops of several layer groups share a name.
    count
        launches per step.
    flops
        floating-point operations; a multiply-add is two.
    weight_bytes, kv_read_bytes, kv_write_bytes, activation_bytes
        HBM traffic; recurrent state counts as KV.
    comm_bytes
        bytes the chip takes in over its links.
    copied_flops, copied_weight_bytes, copied_kv_bytes
        parts of the above that are no work of the model: another chip does them as well, an earlier step did them, or
        a leaner form of the product does without. The sum over chips less these is the unsharded figure.
    compute_s, memory_s, network_s
        time on each resource, at the deployment's efficiency. [s]
    roofline_s
        the longest of the three; summed over layer groups, of which each has its own bound. [s]
    overhead_s
        launches and other fixed time. [s]
    dtype
        format of its arithmetic; empty if it does none.
    adds
        whether compute and memory time add up instead of overlapping.
    hides
        of a collective, the fraction that runs in pieces inside matrix products.
    """

    name: str
    kind: Kind
    count: int = 1
    flops: Number = 0.0
    weight_bytes: Number = 0.0
    kv_read_bytes: Number = 0.0
    kv_write_bytes: Number = 0.0
    activation_bytes: Number = 0.0
    comm_bytes: Number = 0.0
    copied_flops: Number = 0.0
    copied_weight_bytes: Number = 0.0
    copied_kv_bytes: Number = 0.0
    compute_s: Number = 0.0
    memory_s: Number = 0.0
    network_s: Number = 0.0
    roofline_s: Number = 0.0
    overhead_s: Number = 0.0
    dtype: str = ""
    adds: bool = False
    hides: float = 0.0

    @property
    def hbm_bytes(self) -> Number:
        """All HBM traffic."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes + self.activation_bytes

    @property
    def time_s(self) -> Number:
        """Time of the op on its own. [s]"""
        return self.roofline_s + self.overhead_s


@dataclass(frozen=True)
class Matrix:
    """The shard of a weight matrix (or of several side by side) that one chip multiplies with.

    Attributes
    ----------
    n_in, n_out
        rows and columns of the shard.
    bias
        bias elements of the shard.
    copied, copied_bias
        the parts of ``n_out`` and ``bias`` that repeat what other chips hold.
    split_rows
        whether the matrix is split over its inputs (chips' outputs are summed) or over its outputs.
    form
        ``weights``: the precision's; ``experts``: as well, in routed experts; ``head``: that of embedding and head;
        ``wide``: 16-bit whatever the precision.
    crossed
        chips over which the other dimension is split as well (two-dimensional layouts).
    gathered
        chips whose shards were put together to make this one (weight-gathered layouts).
    """

    n_in: float
    n_out: float
    bias: float = 0.0
    copied: float = 0.0
    copied_bias: float = 0.0
    split_rows: bool = False
    form: Literal["weights", "experts", "head", "wide"] = "weights"
    crossed: int = 1
    gathered: int = 1

    def quantised(self, p: Precision) -> bool:
        """Whether the matrix is held in the precision's weights."""
        if self.form == "head":
            return p.quantize_head
        return self.form == "experts" or (self.form == "weights" and not p.experts_only)


def matrix_bytes(p: Precision, m: Matrix) -> float:
    """Stored bytes of a shard, scales and biases included. [bytes]"""
    return _stored(p, m, m.n_in, m.n_out) + m.bias * p.wide_bytes


def _stored(p: Precision, m: Matrix, n_in: float, n_out: float) -> float:
    return p.matrix_bytes(n_in, n_out) if m.quantised(p) else n_in * n_out * p.wide_bytes


def matmul_op(
    d: Deployment,
    name: str,
    count: int,
    m: Matrix,
    n: Number,
    *,
    reads: Number | None = None,
    slowdown: float = 1.0,
    linear: bool = False,
) -> Op:
    """``count`` products of ``n`` rows with a matrix like ``m``.

    Parameters
    ----------
    reads
        times the weights are read per launch; None: once when there is a row. A grouped product of experts reads as
        many matrices as there are experts touched.
    slowdown
        factor of at least 1 on the op's time.
    linear
        whether time must be in proportion to ``n``: these rows join a product that runs anyway.
    """
    p, e, some = d.precision, d.eff, present(n)
    read = some if reads is None else reads
    # Scales may belong to whole columns or blocks that a split cuts: what is over the chip's share is a copy.
    own, ways = m.n_out - m.copied, d.chips / (m.crossed * m.gathered)
    whole = (m.n_in * ways, own * m.crossed) if m.split_rows else (m.n_in * m.crossed, own * ways)
    copied_bias = m.bias - (m.bias - m.copied_bias) / m.gathered
    copied_bytes = _stored(p, m, m.n_in, m.n_out) - _stored(p, m, *whole) / d.chips + copied_bias * p.wide_bytes
    narrow = m.quantised(p)
    dtype = d.compute_dtype if narrow else d.attention_dtype
    flops = n * (2 * count * m.n_in * m.n_out)
    weights = read * (count * matrix_bytes(p, m))
    traffic = count * (
        m.n_in * (p.input_bytes if narrow and m.form != "head" else p.wide_bytes) + m.n_out * p.wide_bytes
    )
    activations = times(n, traffic if d.activation_traffic else 0.0)
    unpacking: Number = 0.0
    if narrow and BITS[p.weights] < BITS[dtype] and d.unpacking_flops:
        unpacked = np.maximum(read, n * (1 / TILE_ROWS))  # every weight once, and again for each further tile of rows
        unpacking = unpacked * (d.unpacking_flops * count * m.n_in * m.n_out)
    moved = weights + activations
    found = calibrated.product_curve(d, narrow=narrow, experts=m.form == "experts")
    if found is None:
        compute_s = (flops + unpacking) / (d.rate_flops_per_s(dtype) * e.matmul)
        memory_s = moved / (d.hbm_bytes_per_s * e.hbm)
        taken = Times(compute_s, memory_s, np.maximum(compute_s, memory_s), times(some, count * e.op_overhead_s))
    elif linear:
        taken = calibrated.linear_product_times(d, found, flops=flops, moved_bytes=moved, dtype=dtype)
    else:
        taken = calibrated.product_times(
            d, m, n, found, count=count, dtype=dtype, weight_bytes=weights, activation_bytes=activations, reads=read,
            unpacking=unpacking,
        )  # fmt: skip
    return Op(
        name,
        "matmul",
        count,
        flops=flops,
        weight_bytes=weights,
        activation_bytes=activations,
        copied_flops=times(n, 2 * count * m.n_in * m.copied),
        copied_weight_bytes=times(read, count * copied_bytes),
        compute_s=taken.compute_s,
        memory_s=taken.memory_s,
        roofline_s=taken.roofline_s if slowdown == 1 else slowdown * taken.roofline_s,
        overhead_s=taken.overhead_s,
        dtype=dtype,
    )


def attention_op(
    d: Deployment,
    name: str,
    count: int,
    launches: Number,
    *,
    flops: Number,
    copied_flops: Number = 0.0,
    read_bytes: Number,
    written_bytes: Number = 0.0,
    copied_bytes: Number = 0.0,
    activation_bytes: Number = 0.0,
    dtype: Dtype | None = None,
) -> Op:
    """Attention over the cache, ``launches`` times in each of ``count`` layers; figures are of all of them."""
    e = d.eff
    form: Dtype = d.attention_dtype if dtype is None else dtype
    moved = activation_bytes if d.activation_traffic else 0.0
    compute_s = flops / (d.rate_flops_per_s(form) * e.attention)
    memory_s = (read_bytes + written_bytes) / (d.hbm_bytes_per_s * e.kv)
    memory_s = memory_s + moved / (d.hbm_bytes_per_s * e.hbm)
    return Op(
        name,
        "attention",
        count,
        flops=flops,
        copied_flops=copied_flops,
        kv_read_bytes=read_bytes,
        kv_write_bytes=written_bytes,
        activation_bytes=moved,
        copied_kv_bytes=copied_bytes,
        compute_s=compute_s,
        memory_s=memory_s,
        roofline_s=np.maximum(compute_s, memory_s),
        overhead_s=launches * (count * e.op_overhead_s),
        dtype=form,
    )


def memory_op(
    d: Deployment,
    name: str,
    count: int,
    some: Number,
    *,
    activation_bytes: Number,
    weight_bytes: Number = 0.0,
    copied_weight_bytes: Number = 0.0,
    kv_write_bytes: Number = 0.0,
    copied_kv_bytes: Number = 0.0,
    flops: Number = 0.0,
) -> Op:
    """An op that only moves bytes, or whose arithmetic (``flops``, at attention's rate) is small beside them."""
    if not d.activation_traffic:
        activation_bytes = kv_write_bytes = copied_kv_bytes = 0.0
    moved = weight_bytes + activation_bytes + kv_write_bytes
    memory_s = moved / (d.hbm_bytes_per_s * d.eff.hbm)
    computes = isinstance(flops, np.ndarray) or flops > 0
    compute_s: Number = 0.0
    if computes:
        compute_s = flops / (d.rate_flops_per_s(d.attention_dtype) * d.eff.attention)
    return Op(
        name,
        "elementwise",
        count,
        flops=flops,
        weight_bytes=weight_bytes,
        kv_write_bytes=kv_write_bytes,
        activation_bytes=activation_bytes,
        copied_weight_bytes=copied_weight_bytes,
        copied_kv_bytes=copied_kv_bytes,
        compute_s=compute_s,
        memory_s=memory_s,
        roofline_s=np.maximum(compute_s, memory_s) if computes else memory_s,
        overhead_s=times(some, count * d.eff.op_overhead_s),
        dtype=d.attention_dtype if computes else "",
    )


def all_reduce_ops(d: Deployment, name: str, count: int, n: Number) -> list[Op]:
    """``count`` all-reduces of the residual stream; none on one chip."""
    if d.chips == 1:
        return []
    size = n * (d.architecture.d_model * d.precision.wide_bytes)
    moved = size * (count * 2 * (1 - 1 / d.chips))
    # Where tokens are split between the two halves, each is a collective of its own.
    halves = 2 if d.splits_tokens else 1
    return [collective_op(d, name, "all_reduce", count, size, d.slice.domains, comm_bytes=moved, halves=halves)]


def all_to_all_op(d: Deployment, name: str, count: int, size_bytes: Number) -> Op:
    """``count`` exchanges of ``size_bytes``, of all chips together, between attention ranks and experts."""
    ep = d.expert_chips
    moved = size_bytes * (count * (ep - 1) / ep**2)
    return collective_op(d, name, "alltoall", count, size_bytes, d.expert_domains, comm_bytes=moved)


def collective_op(
    d: Deployment, name: str, kind: Literal["all_reduce", "all_gather", "alltoall"], count: int, size_bytes: Number,
    domains: tuple[LinkDomain, ...], *, comm_bytes: Number, halves: int = 1,
) -> Op:  # fmt: skip
    """``count`` collectives of ``size_bytes`` over ``domains``; ``halves``: launches of each, where none was measured."""
    seconds = {"all_reduce": all_reduce_s, "all_gather": all_gather_s, "alltoall": all_to_all_s}[kind]
    curve = calibrated.domain_curve(d, kind, domains)
    if curve is None:
        network_s = roofline_s = count * seconds(size_bytes, domains, link=d.eff.link)
        overhead_s = present(size_bytes) * (count * halves * d.eff.collective_latency_s)
    else:  # the curve holds all latency, and without it time is in proportion to size
        transfer_s = size_bytes * seconds(1.0, [replace(domain, latency_s=0.0) for domain in domains])
        network_s = count * transfer_s
        roofline_s, overhead_s = calibrated.collective_times(curve, count, transfer_s)
    return Op(
        name,
        "collective",
        count,
        comm_bytes=comm_bytes,
        network_s=network_s,
        roofline_s=roofline_s,
        overhead_s=overhead_s,
    )


def times(n: Number, factor: float) -> Number:
    """``n * factor``, without an array of zeros for a factor of 0."""
    return n * factor if factor else 0.0


def sum_ops(one: Op, other: Op) -> Op:
    """Add two ops of one name."""
    kept = {"name", "kind", "dtype", "adds", "hides"}
    return replace(one, **{f: getattr(one, f) + getattr(other, f) for f in vars(one) if f not in kept})
