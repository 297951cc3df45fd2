"""The ops of one step of a dense decoder under tensor parallelism: what each computes, moves and costs.

Everything is *per chip and step*; all chips do the same. One op stands for its ``count`` kernels over all layers. The
formulas, op by op, are in ``docs/roofline.md``. An op takes::

    max(FLOPs / (peak · matmul or attention), (weights + activations) / (HBM · hbm) + KV / (HBM · kv)) + count · overhead

which is never less than its roofline bound [1]_; collectives follow :mod:`simulator.roofline.collectives`. Norms, rotary
embeddings, activation functions and sampling are counted as memory traffic, without FLOPs.

.. [1] S. Williams, A. Waterman, D. Patterson, "Roofline", Commun. ACM 52(4), 2009, doi:10.1145/1498765.1498785.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.architecture import Architecture
from simulator.errors import InputError
from simulator.roofline.collectives import all_gather_s, all_reduce_s
from simulator.roofline.deployment import Deployment, Layer
from simulator.roofline.precision import Precision

Number = float | NDArray[np.float64]
"""A figure of one step, or an array of them over steps of different size."""

Kind = Literal["matmul", "attention", "elementwise", "collective", "overhead"]


@dataclass(frozen=True)
class StepShape:
    """What a step processes, in the symbols of :mod:`simulator.roofline.step_cost`."""

    n: float = 0
    B: float = 0
    S: float = 0
    P: float = 0
    A: float = 0
    K: float = 0
    R: float = 0

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        for name in ("n", "B", "S", "P", "A", "K", "R"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"step.{name} = {getattr(self, name)}: must be finite and not negative")

    @classmethod
    def decode(cls, batch: int, context: float) -> "StepShape":
        """``batch`` sequences that each attend to ``context`` keys, the new token's own included.

        >>> StepShape.decode(4, 1000).S
        4000
        """
        if batch < 1 or context < 1:
            raise InputError(f"decode batch {batch} at context {context}: both must be at least 1")
        return cls(n=batch, B=batch, S=batch * context, R=batch)

    @classmethod
    def prefill(cls, tokens: int, past: int = 0, *, completes: bool = True) -> "StepShape":
        """One chunk of ``tokens`` on ``past`` cached ones; ``completes``: it ends its prompt and emits a token.

        >>> StepShape.prefill(8192, 131072 - 8192).A
        1040191488.0
        """
        if tokens < 1 or past < 0:
            raise InputError(f"prefill of {tokens} tokens on {past} earlier ones: need at least 1, and not below 0")
        pairs = float(tokens * past + tokens * (tokens + 1) // 2)
        return cls(n=tokens, P=1, A=pairs, K=past + tokens, R=float(completes))

    def __add__(self, other: "StepShape") -> "StepShape":
        """Both in one step."""
        return StepShape(
            n=self.n + other.n,
            B=self.B + other.B,
            S=self.S + other.S,
            P=self.P + other.P,
            A=self.A + other.A,
            K=self.K + other.K,
            R=self.R + other.R,
        )


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
        HBM traffic.
    comm_bytes
        bytes the chip takes in over its links.
    copied_flops, copied_weight_bytes, copied_kv_bytes
        parts of the above that another chip does as well; the sum over chips less these is the unsharded figure.
    compute_s, memory_s, network_s
        time on each resource, at the deployment's efficiency. [s]
    roofline_s
        the longest of the three; summed over layer groups, of which each has its own bound. [s]
    overhead_s
        launches and other fixed time. [s]
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
    copied
        the part of ``n_out`` that repeats what other chips hold.
    split_rows
        whether the matrix is split over its inputs (chips' outputs are summed) or over its outputs.
    """

    n_in: float
    n_out: float
    bias: float = 0.0
    copied: float = 0.0
    split_rows: bool = False


def qkv_matrix(d: Deployment, layer: Layer) -> Matrix:
    """Query, key and value projections of one layer on one chip."""
    a = layer.attention
    queries = a.n_heads / d.chips * a.head_dim
    keys = 2 * d.kv_heads_per_chip(layer) * a.head_dim
    copied = keys - 2 * a.n_kv_heads * a.head_dim / d.chips
    return Matrix(d.architecture.d_model, queries + keys, bias=queries + keys if a.qkv_bias else 0.0, copied=copied)


def output_matrix(d: Deployment, layer: Layer) -> Matrix:
    """Attention output projection of one layer on one chip."""
    a = layer.attention
    bias = d.architecture.d_model / d.chips if a.o_bias else 0.0
    return Matrix(a.n_heads / d.chips * a.head_dim, d.architecture.d_model, bias=bias, split_rows=True)


def up_matrix(d: Deployment, layer: Layer) -> Matrix:
    """Gate and up projections (up alone in a plain block) of one layer on one chip."""
    columns = (2 if layer.ffn.gated else 1) * layer.ffn.d_ff / d.chips
    return Matrix(d.architecture.d_model, columns, bias=columns if layer.ffn.bias else 0.0)


def down_matrix(d: Deployment, layer: Layer) -> Matrix:
    """Down projection of one layer on one chip."""
    bias = d.architecture.d_model / d.chips if layer.ffn.bias else 0.0
    return Matrix(layer.ffn.d_ff / d.chips, d.architecture.d_model, bias=bias, split_rows=True)


def head_matrix(d: Deployment) -> Matrix:
    """Output head on one chip; the vocabulary is split, without padding."""
    columns = d.architecture.vocab_size / d.chips
    return Matrix(d.architecture.d_model, columns, bias=columns if d.architecture.head_bias else 0.0)


def norm_parameters(architecture: Architecture, layer: Layer) -> float:
    """Parameters of the norms of one layer: of the model's width, and of queries and keys."""
    a = layer.attention
    per_norm = architecture.d_model * (2 if architecture.norm == "layer" else 1)
    qk = {"none": 0, "per_head": 2 * a.head_dim, "full": (a.n_heads + a.n_kv_heads) * a.head_dim}[a.qk_norm]
    return layer.n_norms * per_norm + qk + (a.n_heads if a.sinks else 0)


def final_norm_parameters(architecture: Architecture) -> float:
    """Parameters of the norm before the head."""
    return architecture.d_model * (2 if architecture.norm == "layer" else 1) * int(architecture.final_norm)


def matrix_bytes(p: Precision, m: Matrix, *, head: bool = False) -> float:
    """Stored bytes of a shard, scales and biases included. [bytes]"""
    return p.matrix_bytes(m.n_in, m.n_out, head=head) + m.bias * p.wide_bytes


def dense_ops(d: Deployment, n: Number) -> list[Op]:
    """Ops that depend on the number of tokens ``n`` alone, per-step overhead included. Nothing for n = 0."""
    p, arch, e = d.precision, d.architecture, d.eff
    D, wide, some = arch.d_model, p.wide_bytes, np.greater(n, 0) * 1.0
    own = 1 / d.chips if d.splits_tokens else 1.0  # share of the tokens whose norms and residuals this chip does
    row_bytes = p.matrix_bytes(D, 1, head=True) / d.chips + (wide / d.chips * D if arch.learned_positions else 0)
    ops = []
    if d.is_first_stage:
        ops += [
            _memory_op(d, "embedding lookup", 1, some, activation_bytes=n * (row_bytes + own * D * wide)),
            *_all_reduce(d, "all-reduce, embed.", 1, n),
        ]
    for layer in d.layers:
        a, count = layer.attention, layer.count
        qkv, out, up, down = (f(d, layer) for f in (qkv_matrix, output_matrix, up_matrix, down_matrix))
        queries, columns = out.n_in, down.n_in
        keys = 2 * d.kv_heads_per_chip(layer) * a.head_dim
        kv_token = d.kv_heads_per_chip(layer) * p.kv_head_bytes(a.head_dim)
        ops += [
            _memory_op(
                d,
                "norms, residuals",
                count * layer.n_norms,
                some,
                weight_bytes=some * (count * norm_parameters(arch, layer) * wide),
                copied_weight_bytes=_times(some, count * norm_parameters(arch, layer) * wide * (1 - 1 / d.chips)),
                activation_bytes=n * (count * layer.n_norms * own * 4 * D * wide),
            ),
            _matmul(d, "QKV projection", count, qkv, n),
            _memory_op(
                d,
                "rotary, KV write",
                count,
                some,
                # Queries and keys are rotated in place; attention reads queries and writes as much.
                activation_bytes=n * (count * (2 * queries + 2 * keys + 2 * queries) * wide),
                kv_write_bytes=n * (count * kv_token),
                copied_kv_bytes=_times(n, count * (kv_token - a.n_kv_heads / d.chips * p.kv_head_bytes(a.head_dim))),
            ),
            _matmul(d, "output projection", count, out, n),
            _matmul(d, "FFN gate, up" if layer.ffn.gated else "FFN up", count, up, n),
            _memory_op(d, "FFN activation", count, some, activation_bytes=n * (count * (up.n_out + columns) * wide)),
            _matmul(d, "FFN down", count, down, n),
            *_all_reduce(d, "all-reduce, layers", 2 * count, n),
        ]
    if arch.final_norm and d.is_last_stage:
        weights = final_norm_parameters(arch) * wide
        ops.append(
            _memory_op(
                d,
                "norms, residuals",
                1,
                some,
                weight_bytes=some * weights,
                copied_weight_bytes=some * weights * (1 - 1 / d.chips),
                activation_bytes=n * (own * 4 * D * wide),
            )
        )
    ops.append(Op("step overhead", "overhead", overhead_s=some * e.step_overhead_s))
    return ops


def head_ops(d: Deployment, R: Number) -> list[Op]:
    """Output head, logits exchange and sampling for ``R`` rows. Nothing for R = 0, or before the last stage."""
    if not d.is_last_stage:
        return []
    e, vocabulary, some = d.eff, d.architecture.vocab_size, np.greater(R, 0) * 1.0
    ops = [_matmul(d, "output head", 1, head_matrix(d), R, head=True)]
    if d.chips > 1:
        size = R * (vocabulary * d.precision.wide_bytes)
        time = all_gather_s(size, d.slice.domains, link=e.link)
        ops.append(
            Op(
                "all-gather, logits",
                "collective",
                comm_bytes=size * (1 - 1 / d.chips),
                network_s=time,
                roofline_s=time,
                overhead_s=some * e.collective_latency_s,
            )
        )
    # The sampler reads FP32 logits twice, on every chip.
    sampling = _memory_op(d, "sampling", 1, some, activation_bytes=R * (2.0 * 4 * vocabulary))
    return [*ops, replace(sampling, overhead_s=sampling.overhead_s + R * e.row_overhead_s)]


def decode_attention_ops(d: Deployment, B: Number, S: Number) -> list[Op]:
    """Attention of ``B`` decoding sequences over ``S`` keys in all: one launch per layer, none for B = 0."""
    some = np.greater(B, 0) * 1.0
    return [_attention(d, "attention, decode", layer, some, pairs=S, keys=S) for layer in d.layers]


def prefill_attention_ops(d: Deployment, P: Number, A: Number, K: Number) -> list[Op]:
    """Attention of ``P`` prefill chunks: ``A`` (query, key) pairs, ``K`` keys read; one launch per chunk and layer."""
    return [_attention(d, "attention, prefill", layer, P, pairs=A, keys=K) for layer in d.layers]


def step_op_groups(d: Deployment, step: StepShape) -> tuple[list[Op], list[Op], list[Op]]:
    """Every op of one step, in three lists: dense ops, attention, output head."""
    attention = decode_attention_ops(d, step.B, step.S) if step.B else []
    attention += prefill_attention_ops(d, step.P, step.A, step.K) if step.P else []
    return dense_ops(d, step.n), attention, head_ops(d, step.R) if step.R else []


def step_ops(d: Deployment, step: StepShape) -> list[Op]:
    """Every op of one step in the order of the network, ops of equal name added up."""
    return merge_ops(step_op_groups(d, step))


def merge_ops(groups: tuple[list[Op], list[Op], list[Op]]) -> list[Op]:
    """One list of a step's ops in the order of the network, ops of equal name added up."""
    (*dense, overhead), attention, head = groups
    at = next(i for i, op in enumerate(dense) if op.name == "rotary, KV write") + 1
    merged: dict[str, Op] = {}
    for op in [*dense[:at], *attention, *dense[at:], *head, overhead]:
        merged[op.name] = _sum(merged[op.name], op) if op.name in merged else op
    return list(merged.values())


def _matmul(d: Deployment, name: str, count: int, m: Matrix, n: Number, *, head: bool = False) -> Op:
    p, chip, e, some = d.precision, d.slice.chip, d.eff, np.greater(n, 0) * 1.0
    copied_bytes = p.matrix_bytes(m.n_in, m.copied) + (m.copied * p.wide_bytes if m.bias else 0.0)
    if m.split_rows:  # 8-bit scales belong to whole columns, so every chip holds all of them
        copied_bytes += p.matrix_bytes(m.n_in, m.n_out) - p.matrix_bytes(m.n_in * d.chips, m.n_out) / d.chips
    flops = n * (2 * count * m.n_in * m.n_out)
    weights = some * (count * matrix_bytes(p, m, head=head))
    traffic = count * (m.n_in * (p.wide_bytes if head else p.input_bytes) + m.n_out * p.wide_bytes)
    activations = _times(n, traffic if d.activation_traffic else 0.0)
    compute_s = flops / (chip.peak_flops_per_s(d.head_dtype if head else d.compute_dtype) * e.matmul)
    memory_s = (weights + activations) / (chip.hbm_bandwidth_bytes_per_s * e.hbm)
    return Op(
        name,
        "matmul",
        count,
        flops=flops,
        weight_bytes=weights,
        activation_bytes=activations,
        copied_flops=_times(n, 2 * count * m.n_in * m.copied),
        copied_weight_bytes=_times(some, count * copied_bytes),
        compute_s=compute_s,
        memory_s=memory_s,
        roofline_s=np.maximum(compute_s, memory_s),
        overhead_s=_times(some, count * e.op_overhead_s),
    )


def _attention(d: Deployment, name: str, layer: Layer, launches: Number, *, pairs: Number, keys: Number) -> Op:
    a, p, chip, e = layer.attention, d.precision, d.slice.chip, d.eff
    kv = layer.count * p.kv_head_bytes(a.head_dim)
    flops = pairs * (4 * layer.count * a.n_heads / d.chips * a.head_dim)
    read = keys * (kv * d.kv_heads_per_chip(layer))
    compute_s = flops / (chip.peak_flops_per_s(d.attention_dtype) * e.attention)
    memory_s = read / (chip.hbm_bandwidth_bytes_per_s * e.kv)
    return Op(
        name,
        "attention",
        layer.count,
        flops=flops,
        kv_read_bytes=read,
        copied_kv_bytes=keys * (kv * (d.kv_heads_per_chip(layer) - a.n_kv_heads / d.chips)),
        compute_s=compute_s,
        memory_s=memory_s,
        roofline_s=np.maximum(compute_s, memory_s),
        overhead_s=launches * (layer.count * e.op_overhead_s),
    )


def _memory_op(
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
) -> Op:
    """An op that only moves bytes."""
    if not d.activation_traffic:
        activation_bytes = kv_write_bytes = copied_kv_bytes = 0.0
    moved = weight_bytes + activation_bytes + kv_write_bytes
    memory_s = moved / (d.slice.chip.hbm_bandwidth_bytes_per_s * d.eff.hbm)
    return Op(
        name,
        "elementwise",
        count,
        weight_bytes=weight_bytes,
        kv_write_bytes=kv_write_bytes,
        activation_bytes=activation_bytes,
        copied_weight_bytes=copied_weight_bytes,
        copied_kv_bytes=copied_kv_bytes,
        memory_s=memory_s,
        roofline_s=memory_s,
        overhead_s=_times(some, count * d.eff.op_overhead_s),
    )


def _all_reduce(d: Deployment, name: str, count: int, n: Number) -> list[Op]:
    """``count`` all-reduces of the residual stream; none on one chip."""
    if d.chips == 1:
        return []
    size = n * (d.architecture.d_model * d.precision.wide_bytes)
    time = count * all_reduce_s(size, d.slice.domains, link=d.eff.link)
    return [
        Op(
            name,
            "collective",
            count,
            comm_bytes=count * 2 * size * (1 - 1 / d.chips),
            network_s=time,
            roofline_s=time,
            overhead_s=np.greater(n, 0) * (count * d.eff.collective_latency_s),
        )
    ]


def _times(n: Number, factor: float) -> Number:
    """``n * factor``, without an array of zeros for a factor of 0."""
    return n * factor if factor else 0.0


def _sum(one: Op, other: Op) -> Op:
    """Add two ops of one name."""
    return replace(one, **{f: getattr(one, f) + getattr(other, f) for f in vars(one) if f not in {"name", "kind"}})
