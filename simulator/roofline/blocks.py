"""The blocks of a layer under tensor parallelism: their matrices on one chip, and the ops they run.

Mixers: softmax attention, full or windowed; latent attention (MLA), absorbed when decoding and expanded in prefill,
with or without a sparse indexer (DSA); gated delta net and Mamba-2. Feed-forward blocks: dense, and mixtures of experts.
The formulas, op by op, are in ``docs/roofline.md``; symbols as in :mod:`simulator.catalog.parameters`.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import assert_never

import numpy as np

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    Mixer,
    MoEFFN,
    SoftmaxAttention,
)
from simulator.roofline import calibrated
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernel_times import present
from simulator.roofline.kernels import Matrix, Number, Op, all_to_all_op, attention_op, matmul_op, memory_op, times

GDN_FLOPS = 7
"""FLOPs of the delta rule per token and element of the state: decay, read, correct, write, query."""
MAMBA_FLOPS = 6
"""FLOPs of the state-space recurrence per token and element of the state."""
STATE_BYTES = 4
"""Bytes per element of recurrent state, whatever the precision of the rest."""


def mixer_matrices(d: Deployment, mixer: Mixer) -> dict[str, Matrix]:
    """Matrices of one mixer on one chip, by the name of their product."""
    D, t = d.architecture.d_model, d.chips
    match mixer:
        case SoftmaxAttention(n_heads=N, n_kv_heads=K, head_dim=H):
            x, f, g = d.model_chips, d.column_chips, d.gathered_chips
            queries, keys = N / f * H, 2 * d.projected_kv_heads(mixer) * H
            gate = queries if mixer.gated_output else 0.0
            bias = (queries + keys) / x if mixer.qkv_bias else 0.0
            again = keys - 2 * K * H / f
            copied_bias = again / x if mixer.qkv_bias else 0.0
            into = Matrix(D / x, queries + gate + keys, bias, again, copied_bias, crossed=x, gathered=g)
            out = Matrix(queries, D / x, D / (x * f) if mixer.o_bias else 0.0, split_rows=True, crossed=x, gathered=g)
            return {"QKV projection": into, "output projection": out}
        case LatentAttention(n_heads=N, q_rank=q, kv_rank=kv, nope_dim=nope, rope_dim=rope, v_dim=v):
            down = kv + rope + (q or 0)
            found = {
                "latent projections": Matrix(D, down, copied=down * (1 - 1 / t)),
                "query projection": Matrix(q or D, N / t * (nope + rope)),
                "latent up-projection": Matrix(kv, N / t * (nope + v)),
                "output projection": Matrix(N / t * v, D, split_rows=True),
            }
            if mixer.indexer is not None:  # every rank picks the same keys, so every rank has the whole indexer
                queries, keys = mixer.indexer.n_heads * mixer.indexer.head_dim, mixer.indexer.head_dim
                weights = mixer.indexer.n_heads
                found["indexer queries"] = Matrix(q or D, queries, copied=queries * (1 - 1 / t))
                found["indexer keys"] = Matrix(D, keys + weights, copied=(keys + weights) * (1 - 1 / t))
            return found
        case GatedDeltaNet(n_value_heads=heads, value_dim=dv):
            kd, vd = mixer.n_key_heads * mixer.key_dim, heads * dv
            return {
                "GDN projections": Matrix(D, (2 * kd + 2 * vd + 2 * heads) / t),
                "output projection": Matrix(vd / t, D, split_rows=True),
            }
        case Mamba2(n_heads=heads, head_dim=P, state_dim=S):
            groups = 2 * d.groups_per_chip(mixer) * S
            return {
                "Mamba projections": Matrix(
                    D, (2 * heads * P + heads) / t + groups, copied=groups - 2 * mixer.n_groups * S / t
                ),
                "output projection": Matrix(heads * P / t, D, split_rows=True),
            }
        case _:
            assert_never(mixer)


def mixer_vectors(d: Deployment, mixer: Mixer) -> tuple[float, float]:
    """Parameters of one mixer on one chip outside its matrices, and the part of them that other chips hold too."""
    t = d.chips
    match mixer:
        case SoftmaxAttention(n_heads=N, n_kv_heads=K, head_dim=H):
            every = {"none": 0, "per_head": 2 * H, "full": (N + K) * H}[mixer.qk_norm] + (N if mixer.sinks else 0)
            return every, every * (1 - 1 / t)
        case LatentAttention():
            index = 0 if mixer.indexer is None else 2 * mixer.indexer.head_dim
            every = (mixer.q_rank or 0) + mixer.kv_rank + index
            return every, every * (1 - 1 / t)
        case GatedDeltaNet(n_value_heads=heads, value_dim=dv):
            channels = 2 * mixer.n_key_heads * mixer.key_dim + heads * dv
            return (mixer.conv * channels + 2 * heads) / t + dv, dv * (1 - 1 / t)
        case Mamba2(n_heads=heads, n_groups=G, state_dim=S):
            inner, taps = heads * mixer.head_dim, mixer.conv + 1
            groups = 2 * d.groups_per_chip(mixer) * S
            return (taps * inner + 3 * heads + inner) / t + taps * groups, taps * (groups - 2 * G * S / t)
        case _:
            assert_never(mixer)


def ffn_matrices(d: Deployment, ffn: FeedForward) -> dict[str, tuple[float, Matrix]]:
    """Matrices of one feed-forward block on one chip, by the name of their product, each with how many there are."""
    D, t = d.architecture.d_model, d.chips
    inputs = 2 if ffn.gated else 1
    match ffn:
        case DenseFFN(d_ff=F):
            x, f, g = d.model_chips, d.column_chips, d.gathered_chips
            columns, bias = inputs * F / f, float(ffn.bias)
            return {
                "FFN gate, up" if ffn.gated else "FFN up": (
                    1,
                    Matrix(D / x, columns, bias * columns / x, crossed=x, gathered=g),
                ),
                "FFN down": (
                    1,
                    Matrix(F / f, D / x, bias * D / (x * f), split_rows=True, crossed=x, gathered=g),
                ),
            }
        case MoEFFN(d_ff=F, n_experts=E):
            bias = E * (ffn.router_bias + ffn.score_correction_bias)
            other = 1 - 1 / t  # every chip routes every token
            router = Matrix(D, E, bias=bias, copied=E * other, copied_bias=bias * other, form="wide")
            up, down = _up(D, inputs * F / t, bias=ffn.expert_bias), _down(F / t, D, t, bias=ffn.expert_bias)
            if d.expert_chips > 1:  # some whole experts in place of a share of each
                up, down = _up(D, inputs * F, bias=ffn.expert_bias), Matrix(F, D, bias=D if ffn.expert_bias else 0.0)
            found = {
                "router": (1.0, router),
                "experts gate, up" if ffn.gated else "experts up": (E / d.expert_chips, replace(up, form="experts")),
                "experts down": (E / d.expert_chips, replace(down, form="experts")),
            }
            if ffn.n_shared:
                shared = ffn.n_shared * (ffn.shared_d_ff or F)
                name = "shared experts gate, up" if ffn.gated else "shared experts up"
                found[name] = (1.0, _up(D, inputs * shared / t, bias=False))
                found["shared experts down"] = (1.0, _down(shared / t, D, t, bias=False))
            if ffn.shared_gate:
                found["shared experts' gate"] = (1.0, Matrix(D, 1, copied=1 - 1 / t, form="wide"))
            return found
        case _:
            assert_never(ffn)


def _up(n_in: float, n_out: float, *, bias: bool) -> Matrix:
    return Matrix(n_in, n_out, bias=n_out if bias else 0.0)


def _down(n_in: float, n_out: float, chips: int, *, bias: bool) -> Matrix:
    return Matrix(n_in, n_out, bias=n_out / chips if bias else 0.0, split_rows=True)


def head_matrix(d: Deployment) -> Matrix:
    """Output head on one chip; the vocabulary is split, without padding."""
    columns = d.architecture.vocab_size / d.chips
    return Matrix(d.architecture.d_model, columns, bias=columns if d.architecture.head_bias else 0.0, form="head")


def norm_parameters(architecture: Architecture) -> float:
    """Parameters of one norm of the model's width."""
    return architecture.d_model * (2 if architecture.norm == "layer" else 1)


def touched_experts(n_experts: int, top_k: int, n: Number, skew: float = 0.0) -> Number:
    """Distinct experts that ``n`` tokens touch in expectation, each token choosing ``top_k`` on its own.

    With ``skew`` s the r-th most popular expert is chosen in proportion to r^−s, but by no token twice; at 0 all are alike.

    >>> [round(float(touched_experts(256, 8, n)), 1) for n in (0, 1, 64, 4096)]
    [0.0, 8.0, 222.4, 256.0]
    >>> [round(float(touched_experts(256, 8, n, 0.6)), 1) for n in (0, 1, 64, 4096)]
    [0.0, 8.0, 194.3, 256.0]
    """
    if top_k >= n_experts:
        return n_experts * np.minimum(n, 1)
    touched: Number = 0.0
    for experts, share in _popularity(n_experts, top_k, skew):
        touched = (
            touched + experts * -np.expm1(n * np.log1p(-share)) if share < 1 else touched + experts * np.minimum(n, 1)
        )
    return touched


POPULARITY_CLASSES = 12
"""Classes of experts of nearly the same popularity, each twice as popular or so as the next."""


@lru_cache(maxsize=256)
def _popularity(n_experts: int, top_k: int, skew: float) -> tuple[tuple[int, float], ...]:
    """Experts of each class, and the share of tokens that choose any one of them; the shares of all sum to ``top_k``."""
    if skew == 0:
        return ((n_experts, top_k / n_experts),)
    weight = np.arange(1, n_experts + 1, dtype=np.float64) ** -skew
    low, high = 0.0, n_experts / weight[-1]
    for _ in range(60):  # shares are min(1, scale · weight)
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(1.0, scale * weight).sum() < top_k else (low, scale)
    shares = np.minimum(1.0, high * weight)
    edges = np.unique(np.round(np.geomspace(1, n_experts + 1, POPULARITY_CLASSES + 1)).astype(int)) - 1
    return tuple((int(b - a), float(shares[a:b].mean())) for a, b in pairwise(edges))


def busiest_experts(n_experts: int, touched: Number, chips: int) -> Number:
    """Experts touched on the busiest of ``chips`` that hold whole experts, where each has ``touched`` in expectation.

    Routing is even and every expert is touched or not on its own, so a chip's number is nearly binomial; the largest of g normal
    deviates is put at its expected rank (Blom [1]_). At least one, at most all of a chip's.

    .. [1] G. Blom, "Statistical Estimates and Transformed Beta-Variables", 1958 (recalled).

    >>> [round(float(busiest_experts(128, x, 8)), 2) for x in (0.5, 4.0, 16.0)]
    [1.5, 6.48, 16.0]
    """
    held = n_experts / chips
    deviate = NormalDist().inv_cdf((chips - 0.375) / (chips + 0.25))
    spread = np.sqrt(touched * np.maximum(0.0, 1 - touched / held))
    return np.asarray(np.clip(touched + deviate * spread, np.minimum(1.0, held), held))


def mixer_ops(d: Deployment, count: int, mixer: Mixer, n: Number) -> list[Op]:
    """Ops of ``count`` mixers that depend on the number of tokens alone."""
    p, some, t = d.precision, present(n), d.chips
    wide = p.wide_bytes
    rows = n * (1 / d.gathered_chips)
    products = {name: matmul_op(d, name, count, m, rows) for name, m in mixer_matrices(d, mixer).items()}
    last = products.pop("output projection")
    ops = list(products.values())
    match mixer:
        case SoftmaxAttention(n_heads=N, n_kv_heads=K, head_dim=H):
            # What a chip has of the step's tokens, d.model_chips having scattered the queries' heads.
            queries, keys = N / t * H, 2 * d.projected_kv_heads(mixer) / d.gathered_chips * H
            written = d.kv_heads_per_chip(mixer) * p.kv_head_bytes(H)
            # Queries and keys are rotated in place; attention reads queries and writes as much.
            moved = (2 * queries + 2 * keys + 2 * queries) * wide
            rotated = (2 * queries + 2 * keys) * wide
            ops.append(_write_op(d, count, mixer, n, moved, rotated, written, K / t * p.kv_head_bytes(H)))
            if mixer.gated_output:
                ops.append(memory_op(d, "output gate", count, some, activation_bytes=n * (count * 3 * queries * wide)))
        case LatentAttention(n_heads=N, kv_rank=kv, nope_dim=nope, rope_dim=rope, v_dim=v):
            heads = N / t * (2 * rope + nope + rope + v)
            norms = 2 * ((mixer.q_rank or 0) + kv)
            written = latent_bytes(d, mixer) + index_bytes(d, mixer)
            moved = (heads + 2 * (kv + rope) + norms) * wide
            rotated = (N / t * 2 * rope + 2 * (kv + rope) + norms) * wide
            copied = d.latent_share * t
            ops.append(_write_op(d, count, mixer, n, moved, rotated, written, written / copied))
        case GatedDeltaNet(n_value_heads=heads, key_dim=dk, value_dim=dv):
            channels = (2 * mixer.n_key_heads * dk + heads * dv) / t
            ops += _recurrence_ops(d, count, n, channels, 2 * heads * dv / t, GDN_FLOPS * heads * dk * dv / t)
        case Mamba2(n_heads=heads, head_dim=P, state_dim=S):
            channels = heads * P / t + 2 * d.groups_per_chip(mixer) * S
            ops += _recurrence_ops(d, count, n, channels, 2 * heads * P / t, MAMBA_FLOPS * heads * P * S / t)
        case _:
            assert_never(mixer)
    return [*ops, last]


def _write_op(
    d: Deployment,
    count: int,
    mixer: SoftmaxAttention | LatentAttention,
    n: Number,
    moved: float,
    rotated: float,
    written: float,
    own: float,
) -> Op:
    """Rotation of queries and keys (``rotated`` bytes of those ``moved``), and what attention reads and writes per token.

    Of the new keys' ``written`` bytes ``own`` are no copy.
    """
    op = memory_op(
        d,
        "rotary, KV write",
        count,
        present(n),
        activation_bytes=n * (count * moved),
        kv_write_bytes=n * (count * written),
        copied_kv_bytes=times(n, count * (written - own)),
    )
    token_s = None if d.eff.curves is None else calibrated.token_io_s(d, mixer)
    if token_s is None:
        return op
    time = n * (count * (rotated / (d.hbm_bytes_per_s * d.eff.hbm) + token_s))
    return replace(op, memory_s=time, roofline_s=time)


def _recurrence_ops(d: Deployment, count: int, n: Number, channels: float, gated: float, flops: float) -> list[Op]:
    """Short convolution, the recurrence itself, and the gated norm of its outputs; the state is priced apart."""
    some, wide = present(n), d.precision.wide_bytes
    return [
        memory_op(d, "convolution", count, some, activation_bytes=n * (count * 2 * channels * wide)),
        memory_op(
            d,
            "recurrence, gate",
            2 * count,
            some,
            activation_bytes=n * (count * (channels + 2 * gated) * wide),
            flops=n * (count * flops),
        ),
    ]


def ffn_ops(d: Deployment, count: int, ffn: FeedForward, n: Number) -> list[Op]:
    """Ops of ``count`` feed-forward blocks."""
    if isinstance(ffn, MoEFFN):
        return _moe_ops(d, count, ffn, n)
    some, wide = present(n), d.precision.wide_bytes
    (up, (_, wider)), (down, (_, narrower)) = ffn_matrices(d, ffn).items()
    rows = n * (1 / d.gathered_chips)
    moved = (wider.n_out + narrower.n_in) * wide / d.model_chips  # partial sums are scattered first
    return [
        matmul_op(d, up, count, wider, rows),
        memory_op(d, "FFN activation", count, some, activation_bytes=rows * (count * moved)),
        matmul_op(d, down, count, narrower, rows),
    ]


def _moe_ops(d: Deployment, count: int, ffn: MoEFFN, n: Number) -> list[Op]:
    D, t, wide, some = d.architecture.d_model, d.chips, d.precision.wide_bytes, present(n)
    # Visits to, and experts touched on, this chip: its share of what the tokens of all ranks need.
    touched = touched_experts(ffn.n_experts, ffn.top_k, n * d.expert_ranks, d.routing_skew) / d.expert_chips
    ops, routed = [], n * ffn.top_k
    if d.expert_chips > 1:
        routed = routed / t
    for name, (held, m) in ffn_matrices(d, ffn).items():
        if name.startswith("experts"):
            op = matmul_op(d, name, count, m, routed, reads=touched, slowdown=d.expert_imbalance)
            if d.expert_chips > 1:  # all wait for the chip that has the most experts to load
                wait = busiest_experts(ffn.n_experts, touched, d.expert_chips) / np.where(some > 0, touched, 1.0)
                op = replace(op, roofline_s=op.roofline_s * np.where(some > 0, wait, 1.0))
            ops.append(calibrated.walked_experts(d, op, held, n))
        else:
            ops.append(matmul_op(d, name, count, m, n))
    columns = ffn.top_k * ffn.d_ff + ffn.n_shared * (ffn.shared_d_ff or ffn.d_ff)
    inputs = (2 if ffn.gated else 1) + 1
    launches = 2 if ffn.n_shared else 1
    activation = memory_op(
        d, "FFN activation", launches * count, some, activation_bytes=n * (count * inputs * columns / t * wide)
    )
    # Scores are read back for the choice; each expert's output is read again to be summed.
    summed = (ffn.top_k + bool(ffn.n_shared) + 1) * D * wide
    combine = memory_op(
        d, "route, combine", 2 * count, some, activation_bytes=n * (count * (2 * ffn.n_experts * wide + summed))
    )
    if d.eff.curves is not None:
        routed_bytes = n * (count * inputs * ffn.top_k * ffn.d_ff / t * wide)
        activation = calibrated.expert_traffic(d, activation, routed_bytes, launches=1 - 1 / launches)
        combine = calibrated.expert_traffic(d, combine, n * (count * summed), launches=0.5)
    ops.insert(2, activation)
    ops.append(combine)
    if d.expert_ranks > 1:  # ranks of one tensor-parallel group all hold all its tokens: its all-reduce is enough
        visits = n * (d.expert_ranks * ffn.top_k * D)
        ops.append(all_to_all_op(d, "all-to-all, dispatch", count, visits * d.precision.input_bytes))
        ops.append(all_to_all_op(d, "all-to-all, combine", count, visits * wide))
    return ops


def latent_bytes(d: Deployment, mixer: LatentAttention) -> float:
    """Cache of one token in one layer on one chip, index keys apart: the latent, which no rank can do without. [bytes]"""
    return d.latent_share * d.precision.latent_bytes(mixer.kv_rank, mixer.rope_dim, sparse=mixer.indexer is not None)


def index_bytes(d: Deployment, mixer: LatentAttention) -> float:
    """Index key of one token in one layer on one chip; 0 without an indexer. [bytes]"""
    return 0.0 if mixer.indexer is None else d.latent_share * d.precision.index_key_bytes(mixer.indexer.head_dim)


def state_bytes(d: Deployment, mixer: Mixer) -> float:
    """Recurrent state of one sequence in one layer on one chip: FP32, and the inputs of the convolution. [bytes]"""
    t, wide = d.chips, d.precision.wide_bytes
    match mixer:
        case GatedDeltaNet(n_value_heads=heads, key_dim=dk, value_dim=dv):
            channels = (2 * mixer.n_key_heads * dk + heads * dv) / t
            return heads * dk * dv / t * STATE_BYTES + (mixer.conv - 1) * channels * wide
        case Mamba2(n_heads=heads, head_dim=P, state_dim=S):
            channels = heads * P / t + 2 * d.groups_per_chip(mixer) * S
            return heads * P * S / t * STATE_BYTES + (mixer.conv - 1) * channels * wide
        case _:
            return 0.0


def decode_ops(d: Deployment, count: int, mixer: Mixer, B: Number, S: Number, SW: Number) -> list[Op]:
    """What ``count`` mixers do for ``B`` decoding sequences that see ``S`` keys in full layers, ``SW`` in windowed ones."""
    some = present(B)
    match mixer:
        case SoftmaxAttention():
            busiest = busiest_share(d, B)
            op = _softmax_op(d, "attention, decode", count, mixer, some, S, S, SW, SW, busiest)
            if d.eff.curves is None:
                return [op]
            keys = S if mixer.window is None else SW
            read = key_bytes(d, mixer)
            return [calibrated.decode_times(d, op, mixer, B * busiest, keys * busiest, bytes_per_key=read)]
        case LatentAttention():
            seen = S if mixer.indexer is None else SW
            op = _absorbed_op(d, "attention, decode", count, mixer, some, seen, seen)
            if d.eff.curves is not None and mixer.indexer is None:
                op = calibrated.decode_times(d, op, mixer, B, seen, bytes_per_key=key_bytes(d, mixer))
            return [*_indexer_ops(d, "indexer, decode", count, mixer, some, S, S), op]
        case _:
            return [_state_op(d, "state, decode", count, mixer, B)]


def prefill_ops(
    d: Deployment, count: int, mixer: Mixer, P: Number, A: Number, K: Number, AW: Number, KW: Number
) -> list[Op]:
    """What ``count`` mixers do for ``P`` chunks with ``A`` pairs over ``K`` keys, ``AW`` over ``KW`` in windowed layers."""
    name = "attention, prefill"
    match mixer:
        case SoftmaxAttention():
            # Gathered keys are on every chip that needs them: whole heads, of all tokens.
            each = d.gathers_keys and d.attended_kv_heads(mixer) / d.kv_heads_per_chip(mixer)
            op = _softmax_op(d, name, count, mixer, P, A, K, AW, KW, read=each or 1.0)
            if d.eff.curves is None:
                return [op]
            pairs, keys = (A, K) if mixer.window is None else (AW, KW)
            flops = 4 * mixer.n_heads / d.chips * mixer.head_dim
            read = key_bytes(d, mixer) * (each or 1.0)
            return [calibrated.prefill_times(d, op, mixer, P, pairs, keys, flops_per_pair=flops, bytes_per_key=read)]
        case LatentAttention():
            if mixer.indexer is not None:  # selected keys are gathered as latents, so prefill is absorbed too
                index = _indexer_ops(d, "indexer, prefill", count, mixer, P, A, K)
                return [*index, _absorbed_op(d, name, count, mixer, P, AW, KW)]
            op = _expanded_op(d, name, count, mixer, P, A, K)
            if d.eff.curves is None:
                return [op]
            heads = mixer.n_heads / d.chips
            flops = 2 * heads * (mixer.nope_dim + mixer.rope_dim + mixer.v_dim)
            expanded = heads * (mixer.nope_dim + mixer.v_dim) * d.precision.wide_bytes
            read = key_bytes(d, mixer) + (expanded if d.activation_traffic else 0.0)
            return [calibrated.prefill_times(d, op, mixer, P, A, K, flops_per_pair=flops, bytes_per_key=read)]
        case _:
            return [_state_op(d, "state, prefill", count, mixer, P)]


def context_ops(d: Deployment, count: int, mixer: Mixer, past: Number) -> list[Op]:
    """Expanding the latents of ``past`` earlier tokens for a prefill; their weights are read for the new tokens anyway."""
    if not isinstance(mixer, LatentAttention) or mixer.indexer is not None:
        return []
    m = mixer_matrices(d, mixer)["latent up-projection"]
    op = matmul_op(d, "latent up-projection, context", count, m, past, reads=0.0, linear=True)
    return [replace(op, copied_flops=op.flops, overhead_s=0.0)]  # the launch is that of the new tokens


def key_bytes(d: Deployment, mixer: SoftmaxAttention | LatentAttention) -> float:
    """Cache read per key and layer on one chip. [bytes]"""
    if isinstance(mixer, SoftmaxAttention):
        return d.kv_heads_per_chip(mixer) * d.precision.kv_head_bytes(mixer.head_dim)
    return latent_bytes(d, mixer)


def deals_sequences(d: Deployment) -> bool:
    """Whether a kernel of decode attention deals each sequence's keys to blocks of threads, by a schedule."""
    mixers = [mixer for _, mixer in d.mixers if isinstance(mixer, SoftmaxAttention | LatentAttention)]
    return any(curve is not None and curve.schedule != "" for curve in (calibrated.decode_curve(d, m) for m in mixers))


def decode_knots(d: Deployment) -> list[float]:
    """Keys at which the slope of decode attention changes, ascending. [keys]"""
    if d.eff.curves is None:
        return []
    found = set()
    for _, mixer in d.mixers:
        if isinstance(mixer, SoftmaxAttention) or (isinstance(mixer, LatentAttention) and mixer.indexer is None):
            found.add(calibrated.decode_knot(d, mixer, key_bytes(d, mixer)))
    return sorted(knot for knot in found if knot is not None)


def _softmax_op(
    d: Deployment,
    name: str,
    count: int,
    a: SoftmaxAttention,
    launches: Number,
    A: Number,
    K: Number,
    AW: Number,
    KW: Number,
    busiest: Number = 1.0,
    read: float = 1.0,
) -> Op:
    """Attention of a chip's heads; ``busiest``: work of the busiest chip against the mean, ``read``: keys, against those held."""
    pairs, keys = (A, K) if a.window is None else (AW, KW)
    kv, held = count * d.precision.kv_head_bytes(a.head_dim), d.kv_heads_per_chip(a) * read
    flops = pairs * (4 * count * a.n_heads / d.chips * a.head_dim)
    return attention_op(
        d,
        name,
        count,
        launches,
        flops=flops * busiest,
        copied_flops=flops * (busiest - 1.0),
        read_bytes=keys * (kv * held) * busiest,
        copied_bytes=keys * (kv * (held * busiest - a.n_kv_heads / d.chips)),
    )


def busiest_share(d: Deployment, B: Number) -> Number:
    """Sequences of the chip that has most of them, against the mean, where a chip holds whole sequences; else 1."""
    if d.kv_layout != "batch":
        return 1.0
    return np.where(np.greater(B, 0), np.ceil(np.divide(B, d.chips)) * d.chips / np.maximum(B, 1), 1.0)


def _expanded_op(
    d: Deployment, name: str, count: int, a: LatentAttention, launches: Number, pairs: Number, keys: Number
) -> Op:
    """Attention over keys and values expanded from the latents, which are written and read again per head."""
    heads = count * a.n_heads / d.chips
    latent = count * latent_bytes(d, a)
    return attention_op(
        d,
        name,
        count,
        launches,
        flops=pairs * (2 * heads * (a.nope_dim + a.rope_dim + a.v_dim)),
        read_bytes=keys * latent,
        copied_bytes=keys * (latent - latent / (d.latent_share * d.chips)),
        activation_bytes=keys * (heads * (a.nope_dim + a.v_dim) * d.precision.wide_bytes),
    )


def _absorbed_op(
    d: Deployment, name: str, count: int, a: LatentAttention, launches: Number, pairs: Number, keys: Number
) -> Op:
    """Attention over the latents themselves, the up-projection absorbed into queries and outputs: more FLOPs, fewer bytes."""
    heads = count * a.n_heads / d.chips
    latent = count * latent_bytes(d, a)
    absorbed = 2 * a.kv_rank + a.rope_dim
    saved = max(0, absorbed - (a.nope_dim + a.rope_dim + a.v_dim))  # by the expanded form, which is the model's own
    return attention_op(
        d,
        name,
        count,
        launches,
        flops=pairs * (2 * heads * absorbed),
        copied_flops=pairs * (2 * heads * saved),
        read_bytes=keys * latent,
        copied_bytes=keys * (latent - latent / (d.latent_share * d.chips)),
    )


def _indexer_ops(
    d: Deployment, name: str, count: int, a: LatentAttention, launches: Number, pairs: Number, keys: Number
) -> list[Op]:
    """Scores of every key by the indexer, on every chip alike."""
    if a.indexer is None:
        return []
    flops = pairs * (2 * count * a.indexer.n_heads * a.indexer.head_dim)
    index = count * index_bytes(d, a)
    return [
        attention_op(
            d,
            name,
            count,
            launches,
            flops=flops,
            copied_flops=flops * (1 - 1 / d.chips),
            read_bytes=keys * index,
            copied_bytes=keys * (index - index / (d.latent_share * d.chips)),
            dtype=d.index_dtype,
        )
    ]


def _state_op(d: Deployment, name: str, count: int, mixer: Mixer, sequences: Number) -> Op:
    """Reading and writing the whole state of each sequence; the recurrence's launch and FLOPs are among the dense ops."""
    state = sequences * (count * state_bytes(d, mixer))
    copied: Number = 0.0
    if isinstance(mixer, Mamba2):
        groups = d.groups_per_chip(mixer) - mixer.n_groups / d.chips
        copied = sequences * (count * (mixer.conv - 1) * 2 * groups * mixer.state_dim * d.precision.wide_bytes)
    return attention_op(d, name, count, 0.0, flops=0.0, read_bytes=state, written_bytes=state, copied_bytes=2 * copied)
