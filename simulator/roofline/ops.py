"""The ops of one step of a decoder under tensor parallelism: the blocks of its layers, put together.

Everything is *per chip and step*; all chips do the same. One op stands for its ``count`` kernels over all layers; equal
blocks of different layer groups are one op. Kernels are priced in :mod:`simulator.roofline.kernels`, blocks in
:mod:`simulator.roofline.blocks`; the formulas, op by op, are in ``docs/roofline.md``. Norms, rotary embeddings,
activation functions and sampling are counted as memory traffic, without FLOPs.
"""

import math
from dataclasses import dataclass, replace

from simulator.catalog.architecture import LatentAttention, Mixer, SoftmaxAttention
from simulator.errors import InputError
from simulator.roofline.blocks import (
    context_ops,
    decode_ops,
    ffn_ops,
    head_matrix,
    mixer_ops,
    mixer_vectors,
    norm_parameters,
    prefill_ops,
)
from simulator.roofline.collectives import all_gather_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.exchange import keys_gather_ops, layer_exchange_ops, sequence_exchange_ops
from simulator.roofline.kernel_times import present
from simulator.roofline.kernels import (
    Kind,
    Matrix,
    Number,
    Op,
    all_reduce_ops,
    collective_op,
    matmul_op,
    memory_op,
    sum_ops,
    times,
)
from simulator.roofline.step_cost import window_keys, window_pairs

__all__ = [
    "Kind",
    "Matrix",
    "Number",
    "Op",
    "StepShape",
    "context_attention_ops",
    "decode_attention_ops",
    "dense_ops",
    "head_ops",
    "merge_ops",
    "prefill_attention_ops",
    "step_op_groups",
    "step_ops",
]


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
    SW: float = 0
    AW: float = 0
    KW: float = 0

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        for name in vars(self):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"step.{name} = {getattr(self, name)}: must be finite and not negative")

    @classmethod
    def decode(cls, batch: int, context: float, *, window: int = 0, chunked: bool = False) -> "StepShape":
        """``batch`` sequences that each attend to ``context`` keys, the new token's own included.

        ``window`` and ``chunked`` are those of the deployment's windowed layers, as for :meth:`prefill`.

        >>> StepShape.decode(4, 1000).S
        4000
        """
        if batch < 1 or context < 1:
            raise InputError(f"decode batch {batch} at context {context}: both must be at least 1")
        seen = float(window_keys(int(context), window, chunked=chunked))
        return cls(n=batch, B=batch, S=batch * context, R=batch, SW=batch * seen)

    @classmethod
    def prefill(
        cls, tokens: int, past: int = 0, *, completes: bool = True, window: int = 0, chunked: bool = False
    ) -> "StepShape":
        """One chunk of ``tokens`` on ``past`` cached ones; ``completes``: it ends its prompt and emits a token.

        >>> StepShape.prefill(8192, 131072 - 8192).A
        1040191488.0
        """
        if tokens < 1 or past < 0:
            raise InputError(f"prefill of {tokens} tokens on {past} earlier ones: need at least 1, and not below 0")
        pairs = float(tokens * past + tokens * (tokens + 1) // 2)
        windowed = [float(window_pairs(t, window, chunked=chunked)) for t in (past, past + tokens)]
        read = past % window + tokens if window and chunked else min(past + tokens, tokens + window - 1)
        return cls(
            n=tokens,
            P=1,
            A=pairs,
            K=past + tokens,
            R=float(completes),
            AW=windowed[1] - windowed[0],
            KW=read if window else 0,
        )

    def __add__(self, other: "StepShape") -> "StepShape":
        """Both in one step."""
        return StepShape(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


def dense_ops(d: Deployment, n: Number) -> list[Op]:
    """Ops that depend on the number of tokens ``n`` alone, per-step overhead included. Nothing for n = 0."""
    ops = embedding_ops(d, n) if d.is_first_stage else []
    vectors = [(count, *mixer_vectors(d, mixer)) for count, mixer in d.mixers]
    ops.append(norm_op(d, d.part.norms, n, *(sum(v[0] * v[i] for v in vectors) for i in (1, 2))))
    for count, mixer in d.mixers:
        ops += mixer_ops(d, count, mixer, n)
    for count, ffn in d.ffns:
        ops += ffn_ops(d, count, ffn, n)
    return [*ops, *layer_exchange_ops(d, n), overhead_op(d, n)]


def embedding_ops(d: Deployment, n: Number) -> list[Op]:
    """Lookup of the tokens' rows, and the exchange that completes them."""
    p, arch, some = d.precision, d.architecture, present(n)
    D, wide = arch.d_model, p.wide_bytes
    row_bytes = p.matrix_bytes(D, 1, head=True) / d.chips + (wide / d.chips * D if arch.learned_positions else 0)
    moved = n * (row_bytes + _own_tokens(d) * D * wide)
    return [
        memory_op(d, "embedding lookup", 1, some, activation_bytes=moved),
        *all_reduce_ops(d, "all-reduce, embed.", 1, n),
    ]


def norm_op(d: Deployment, count: int, n: Number, vectors: float = 0.0, copied_vectors: float = 0.0) -> Op:
    """``count`` norms with their residuals. The parameters of ``vectors`` inside mixers, held partly elsewhere, count as theirs."""
    D, wide, some = d.architecture.d_model, d.precision.wide_bytes, present(n)
    held = count * norm_parameters(d.architecture)
    return memory_op(
        d,
        "norms, residuals",
        count,
        some,
        weight_bytes=some * ((held + vectors) * wide),
        copied_weight_bytes=times(some, (held * (1 - 1 / d.chips) + copied_vectors) * wide),
        activation_bytes=n * (count * _own_tokens(d) * 4 * D * wide),
    )


def overhead_op(d: Deployment, n: Number) -> Op:
    """Fixed time of a step."""
    return Op("step overhead", "overhead", overhead_s=present(n) * d.eff.step_overhead_s)


def _own_tokens(d: Deployment) -> float:
    """Share of the tokens whose norms and residuals this chip does."""
    return 1 / d.chips if d.splits_tokens else 1.0


def head_ops(d: Deployment, R: Number) -> list[Op]:
    """Output head, logits exchange and sampling for ``R`` rows. Nothing for R = 0, or before the last stage."""
    if not d.is_last_stage:
        return []
    vocabulary, some = d.architecture.vocab_size, present(R)
    ops = [matmul_op(d, "output head", 1, head_matrix(d), R)]
    if d.chips > 1:
        size = R * (vocabulary * d.precision.wide_bytes)
        moved = size * (1 - 1 / d.chips)
        ops.append(collective_op(d, "all-gather, logits", "all_gather", 1, size, d.slice.domains, comm_bytes=moved))
    # The sampler reads FP32 logits twice, on every chip.
    sampling = memory_op(d, "sampling", 1, some, activation_bytes=R * (2.0 * 4 * vocabulary))
    return [*ops, replace(sampling, overhead_s=sampling.overhead_s + R * d.eff.row_overhead_s)]


def decode_attention_ops(d: Deployment, B: Number, S: Number, SW: Number = 0.0) -> list[Op]:
    """Mixing of ``B`` decoding sequences over ``S`` keys in all, ``SW`` in windowed layers; none for B = 0."""
    ops = [op for count, mixer in d.mixers for op in decode_ops(d, count, mixer, B, S, SW)]
    return ops + [op for count, mixer in d.mixers for op in sequence_exchange_ops(d, count, mixer, B)]


def prefill_attention_ops(
    d: Deployment, P: Number, A: Number, K: Number, AW: Number = 0.0, KW: Number = 0.0
) -> list[Op]:
    """Mixing of ``P`` prefill chunks: ``A`` (query, key) pairs, ``K`` keys read, ``AW`` and ``KW`` in windowed layers."""
    ops = [op for count, mixer in d.mixers for op in prefill_ops(d, count, mixer, P, A, K, AW, KW)]
    return ops + [op for count, mixer in d.mixers for op in keys_gather_ops(d, count, mixer, P, K, KW)]


def context_attention_ops(d: Deployment, past: Number) -> list[Op]:
    """Expansion of the cached latents of ``past`` tokens that prefill chunks stand on."""
    return [op for count, mixer in d.mixers for op in context_ops(d, count, mixer, past)]


def context_gather_ops(d: Deployment, K: Number, KW: Number) -> list[Op]:
    """Gathers of the keys and values that chips with other parts of a prompt hold, ``KW`` of them in windowed layers."""
    if not d.context_domains:
        return []
    layers = sum(count for count, mixer in d.mixers if isinstance(mixer, SoftmaxAttention | LatentAttention))
    size = K * d.kv_bytes(windowed=False) + KW * d.kv_bytes(windowed=True)
    time = layers * all_gather_s(size / layers, d.context_domains, link=d.eff.link)
    chips = math.prod(domain.size for domain in d.context_domains)
    return [
        Op(
            "all-gather, keys",
            "collective",
            layers,
            comm_bytes=size * (1 - 1 / chips),
            network_s=time,
            roofline_s=time,
            overhead_s=present(size) * (layers * d.eff.collective_latency_s),
        )
    ]


def step_op_groups(d: Deployment, step: StepShape) -> tuple[list[Op], list[Op], list[Op]]:
    """Every op of one step, in three lists: dense ops, attention, output head.

    Raises
    ------
    InputError
        If the deployment has windowed layers and the step does not say what they see.
    """
    check_windows(d, step)
    attention = [op for count, mixer in d.mixers for op in attention_ops(d, count, mixer, step)]
    if step.P:
        attention += context_gather_ops(d, step.K, step.KW)
    return dense_ops(d, step.n), attention, head_ops(d, step.R) if step.R else []


def check_windows(d: Deployment, step: StepShape) -> None:
    """Refuse a step that does not say what windowed layers see, if the deployment has some."""
    if d.window and ((step.S and not step.SW) or (step.A and not (step.AW and step.KW))):
        raise InputError(
            f"{d.architecture.name} has layers with a window of {d.window} keys: the step needs SW, AW and KW; give "
            "window and chunked to StepShape.decode and StepShape.prefill"
        )


def attention_ops(d: Deployment, count: int, mixer: Mixer, step: StepShape) -> list[Op]:
    """What ``count`` mixers do for the sequences of a step, decodes and chunks."""
    ops: list[Op] = []
    if step.B:
        ops += decode_ops(d, count, mixer, step.B, step.S, step.SW)
        ops += sequence_exchange_ops(d, count, mixer, step.B)
    if step.P:
        ops += prefill_ops(d, count, mixer, step.P, step.A, step.K, step.AW, step.KW)
        ops += keys_gather_ops(d, count, mixer, step.P, step.K, step.KW)
        ops += context_ops(d, count, mixer, max(0.0, step.K - (step.n - step.B)))
    return ops


def step_ops(d: Deployment, step: StepShape) -> list[Op]:
    """Every op of one step in the order of the network, ops of equal name added up."""
    return merge_ops(step_op_groups(d, step))


def merge_ops(groups: tuple[list[Op], list[Op], list[Op]]) -> list[Op]:
    """One list of a step's ops in the order of the network, ops of equal name added up."""
    (*dense, overhead), attention, head = groups
    before = {"rotary, KV write", "recurrence, gate"}
    at = next((i for i, op in enumerate(dense) if op.name in before), 0) + 1
    merged: dict[str, Op] = {}
    for op in [*dense[:at], *attention, *dense[at:], *head, overhead]:
        merged[op.name] = sum_ops(merged[op.name], op) if op.name in merged else op
    return list(merged.values())
