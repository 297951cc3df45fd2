"""What speculative decoding adds to a step: drafting, and verifying several tokens of a sequence at once.

A step of *level* l gives each decoding sequence q(l) tokens of the target model: its last one and its drafts (q = γ + 1 for a
chain, 1 + nodes for a tree). Level 0 drafts nothing. The levels of a deployment compile to :class:`SpeculationCost`, a table that the engines
put beside the :class:`~simulator.roofline.step_cost.StepCost`; ``docs/engine-speculation.md`` has the formulas.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, UnpriceableError
from simulator.roofline.blocks import state_bytes
from simulator.roofline.compile import compile_step_cost, dense_parts, hidden_s, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernels import Matrix, Number, Op, matmul_op, matrix_bytes
from simulator.roofline.memory import MemoryFit, memory_fit, weights_bytes
from simulator.roofline.mtp import input_ops, module_deployment, module_weights_bytes
from simulator.roofline.ops import context_attention_ops, decode_attention_ops, dense_ops, head_ops
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]
Tree = tuple[int, ...]
"""Draft nodes at each depth; (1, 1, 1) is a chain of three."""


@dataclass(frozen=True, eq=False)
class SpeculationCost:
    """Times of the levels of speculation of one deployment, beside its StepCost.

    With n tokens, of which c in prefill chunks, R rows, B decoding sequences whose contexts sum to S, a step of level l takes::

        dense_s[n] + head_s[R] + [B > 0]·(g_l(S) + window_slope_s[l]·SW + seq_s[l]·B + draft_s[l, B] + draft_slope_s[l]·S)
        + [P > 0]·(max_j(planes[j]·(A, K, P, AW, KW)) + chunk_s[c])

    Attributes
    ----------
    queries
        [L] tokens verified per sequence and pass, ascending from 1 (level 0).
    value_s, slope_s
        [L, m] g_l at the StepCost's knots, and its slope from there. Row 0 is the StepCost's. [s], [s per key]
    window_slope_s, seq_s
        [L] as in the StepCost. [s]
    draft_s
        [L, max_num_seqs + 1] drafting for B sequences, whatever their contexts. [s]
    draft_slope_s
        [L] drafting, per key of the contexts. [s]
    chunk_s
        [max_num_batched_tokens + 1] the drafter's own pass over c prompt tokens. [s]
    chunk_planes
        [q, 5] its attention, as ``StepCost.prefill_planes``; the engines add both by :func:`with_drafter`.
    draft_flops, draft_bytes, chunk_flops, chunk_bytes
        as ``draft_s`` and ``chunk_s``: FLOPs, and bytes that must cross HBM, all chips together.
    draft_flops_per_key, draft_bytes_per_key
        [L] as ``draft_slope_s``.
    chunk_flops_per_pair, chunk_bytes_per_key
        of the drafter's attention over prompts.
    """

    queries: NDArray[np.int64]
    value_s: Array
    slope_s: Array
    window_slope_s: Array
    seq_s: Array
    draft_s: Array
    draft_slope_s: Array
    chunk_s: Array
    chunk_planes: Array = field(default_factory=lambda: np.zeros((1, 5)))
    draft_flops: Array = field(default_factory=lambda: np.zeros((0, 0)))
    draft_bytes: Array = field(default_factory=lambda: np.zeros((0, 0)))
    draft_flops_per_key: Array = field(default_factory=lambda: np.zeros(0))
    draft_bytes_per_key: Array = field(default_factory=lambda: np.zeros(0))
    chunk_flops: Array = field(default_factory=lambda: np.zeros(0))
    chunk_bytes: Array = field(default_factory=lambda: np.zeros(0))
    chunk_flops_per_pair: float = 0.0
    chunk_bytes_per_key: float = 0.0

    def __post_init__(self) -> None:
        """Refuse tables that would give silently wrong times; figures of work default to zeros."""
        levels, seqs = self.draft_s.shape
        if self.queries[0] != 1 or (np.diff(self.queries) <= 0).any():
            raise InputError(f"SpeculationCost.queries = {self.queries}: must ascend from 1 (level 0 drafts nothing)")
        for name in ("queries", "value_s", "slope_s", "window_slope_s", "seq_s", "draft_slope_s"):
            if len(getattr(self, name)) != levels:
                raise InputError(f"SpeculationCost.{name} has {len(getattr(self, name))} levels, draft_s has {levels}")
        for name in ("slope_s", "window_slope_s", "draft_s", "draft_slope_s", "chunk_s", "chunk_planes"):
            table = getattr(self, name)
            if not (np.isfinite(table).all() and (table >= 0).all()):
                raise InputError(f"SpeculationCost.{name} must be finite and not negative")
        if self.draft_s[0].any() or self.draft_slope_s[0] or self.chunk_s[0]:
            raise InputError("SpeculationCost: level 0 drafts nothing, and no tokens take no time")
        sizes: dict[str, tuple[int, ...]] = {
            "draft_flops": (levels, seqs),
            "draft_bytes": (levels, seqs),
            "draft_flops_per_key": (levels,),
            "draft_bytes_per_key": (levels,),
            "chunk_flops": self.chunk_s.shape,
            "chunk_bytes": self.chunk_s.shape,
        }
        for name, shape in sizes.items():
            if getattr(self, name).size == 0:
                object.__setattr__(self, name, np.zeros(shape))

    @property
    def lookahead(self) -> int:
        """KV slots a pass may fill beyond that of the sequence's last token."""
        return int(self.queries[-1]) - 1

    def attention_s(self, level: int, knots: Array, S: float) -> float:
        """g_l(S): attention of the verifying queries. [s]"""
        j = int(np.searchsorted(knots, S, side="right")) - 1
        return float(self.value_s[level, j] + self.slope_s[level, j] * (S - knots[j]))

    def decode_s(self, level: int, knots: Array, *, B: int, S: float, SW: float = 0) -> float:
        """Verification's attention and drafting of one step. [s]"""
        if not B:
            return 0.0
        verify = self.attention_s(level, knots, S) + self.window_slope_s[level] * SW + self.seq_s[level] * B
        return float(verify + self.draft_s[level, B] + self.draft_slope_s[level] * S)


@dataclass(frozen=True)
class Drafter:
    """What drafts, and where.

    Attributes
    ----------
    kind
        ``model``: a model of its own; ``layer``: one layer of the target's kind with a [2D, D] projection, as EAGLE heads
        and multi-token-prediction modules are; ``heads``: Medusa's, one residual block and one output head per depth, all at once;
        ``lookup``: n-grams of the prompt, on the host.
    deployment
        of the model or layer; None for heads and lookup.
    same_slice
        whether it shares the target's chips and memory; otherwise prompts are drafted beside the target's own steps.
    step_s, sequence_s
        host time per drafting step, and per sequence and drafting step, such as lookup, or the way to another slice. [s]
    modules
        layers held in memory, each with a cache of its own.
    """

    kind: Literal["model", "layer", "heads", "lookup"]
    deployment: Deployment | None = None
    same_slice: bool = True
    step_s: float = 0.0
    sequence_s: float = 0.0
    modules: int = 1


def with_drafter(cost: StepCost, speculation: SpeculationCost) -> StepCost:
    """The StepCost with the drafter's prompt attention in its planes: max_i a_i + max_j b_j = max_ij (a_i + b_j)."""
    if not speculation.chunk_planes.any():
        return cost
    planes = cost.prefill_planes[:, None, :] + speculation.chunk_planes[None, :, :]
    return replace(cost, prefill_planes=planes.reshape(-1, cost.prefill_planes.shape[1]))


def chain_levels(draft_tokens: int) -> list[Tree]:
    """Levels of a chain: 0 … γ drafts.

    >>> chain_levels(2)
    [(), (1,), (1, 1)]
    """
    return [(1,) * depth for depth in range(draft_tokens + 1)]


def layer_drafter(target: Deployment, *, modules: int = 1, step_s: float = 0.0, sequence_s: float = 0.0) -> Drafter:
    """An EAGLE-style head or a prediction module (MTP) beside its target, in the target's precision.

    Its steps have the launches of their kernels but not the scheduler's overhead per step: they run inside the target's.
    ``modules`` are held in memory; further depths run the last one again.
    """
    return Drafter("layer", module_deployment(target), step_s=step_s, sequence_s=sequence_s, modules=modules)


def model_drafter(
    draft: Deployment, *, same_slice: bool = True, step_s: float = 0.0, sequence_s: float = 0.0
) -> Drafter:
    """A draft model; its steps run inside the target's, without the scheduler's overhead.

    Raises
    ------
    UnpriceableError
        If it has windowed layers, whose keys the engine counts for the target alone.
    """
    if draft.window:
        raise UnpriceableError(
            f"draft model {draft.architecture.name}: has layers with a window, priced for the target alone; "
            "choose a draft model with full attention"
        )
    eff = replace(draft.eff, step_overhead_s=0.0)
    return Drafter("model", replace(draft, efficiency=eff), same_slice, step_s, sequence_s)


def compile_speculation(target: Deployment, cost: StepCost, drafter: Drafter, levels: list[Tree]) -> SpeculationCost:
    """Tables of the levels of ``target`` with ``drafter``.

    Parameters
    ----------
    cost
        the target's compiled table.
    levels
        draft nodes by depth of each level; the first is empty.
    """
    seqs = target.max_num_seqs
    queries = np.array([1 + sum(tree) for tree in levels], dtype=np.int64)
    verify = [verify_terms(target, int(q)) for q in queries]
    plain = verify[0]
    base = cost.decode_value_s[0]
    ratio = np.array([[terms.key_s / plain.key_s if plain.key_s else 1.0] for terms in verify])
    drafts = [_draft_work(target, drafter, tree, np.arange(seqs + 1, dtype=np.float64)) for tree in levels]
    chunk = _chunk_work(drafter, target.max_num_batched_tokens)
    return SpeculationCost(
        queries=queries,
        value_s=base + ratio * (cost.decode_value_s - base),
        slope_s=ratio * cost.decode_slope_s,
        window_slope_s=np.array(
            [cost.window_slope_s * (terms.seen_s / plain.seen_s if plain.seen_s else 1.0) for terms in verify]
        ),
        seq_s=np.array([cost.decode_seq_s + (terms.sequence_s - plain.sequence_s) for terms in verify]),
        draft_s=np.array([work.time_s for work in drafts]),
        draft_slope_s=np.array([work.key_s for work in drafts]),
        draft_flops=np.array([work.flops for work in drafts]),
        draft_bytes=np.array([work.bytes for work in drafts]),
        draft_flops_per_key=np.array([work.key_flops for work in drafts]),
        draft_bytes_per_key=np.array([work.key_bytes for work in drafts]),
        **chunk,
    )


@dataclass(frozen=True)
class VerifyTerms:
    """Attention of q queries per sequence: seconds per key, per windowed key, and per sequence."""

    key_s: float
    seen_s: float
    sequence_s: float


def verify_terms(d: Deployment, queries: int) -> VerifyTerms:
    """Attention of ``queries`` tokens per sequence that share one reading of its cache.

    Per op and key max(q·compute, memory). Query j of a sequence at context t sees t + j keys: q(q − 1)/2 more pairs and q − 1 more
    keys per sequence, whose bound is added to the keys' (never less than the bound of both together, and
    less than (q − 1)/t above it). Recurrent state is read and written once per pass.
    """
    launch, key, seen = (decode_attention_ops(d, *x) for x in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    expansion_s = float(sum_over(op.roofline_s for op in context_attention_ops(d, 1.0)))
    more = queries * (queries - 1) / 2

    def longest(ops: list[Op], pairs: float, keys: float) -> float:
        return float(sum_over(np.maximum(pairs * op.compute_s, keys * op.memory_s) for op in ops))

    state_s = float(sum_over(op.roofline_s for op in launch))
    return VerifyTerms(
        key_s=longest(key, queries, 1),
        seen_s=longest(seen, queries, 1),
        sequence_s=state_s + queries * expansion_s + longest(key, more, queries - 1),
    )


@dataclass(frozen=True)
class _Work:
    """Drafting of one level, over the number of sequences."""

    time_s: Array
    key_s: float
    flops: Array
    bytes: Array
    key_flops: float
    key_bytes: float


def _draft_work(target: Deployment, drafter: Drafter, tree: Tree, B: Array) -> _Work:
    """One drafting step per depth (Medusa's heads: one in all); the step at a depth runs the nodes of the depth before."""
    some = np.greater(B, 0) * 1.0
    if not tree:
        return _Work(0 * B, 0.0, 0 * B, 0 * B, 0.0, 0.0)
    host = drafter.step_s * some + drafter.sequence_s * B
    if drafter.kind == "lookup":
        return _Work(host, 0.0, 0 * B, 0 * B, 0.0, 0.0)
    if drafter.kind == "heads":
        ops = medusa_ops(target, len(tree), B)
        return _Work(host + sum_over(op.time_s for op in ops), 0.0, *_sums(ops, target.chips), 0.0, 0.0)
    d = drafter.deployment
    if d is None:
        raise InputError(f"drafter {drafter.kind}: needs a deployment")
    time, flops, moved = 0 * B, 0 * B, 0 * B
    key_s = key_flops = key_bytes = 0.0
    for depth, nodes in enumerate((1, *tree[:-1])):
        n = B * nodes
        dense, head = dense_ops(d, n), head_ops(d, n)
        if drafter.kind == "layer":
            dense = [*dense, *input_ops(d, n)]
        terms = verify_terms(d, nodes)
        launch = decode_attention_ops(d, 1.0, 0.0, 0.0)
        # At this depth the sequence is longer by the drafts before it.
        time = time + host + sum_over(dense_parts(d, dense).values())
        time = time + sum_over(op.time_s for op in head) - hidden_s(d, head)
        # MLA: terms.sequence_s has the expansion that compiled tables leave out of dense_s; here it is all there.
        expansion_s = nodes * float(sum_over(op.roofline_s for op in context_attention_ops(d, 1.0)))
        time = time + some * float(sum_over(op.overhead_s for op in launch))
        time = time + B * (terms.sequence_s - expansion_s + depth * terms.key_s)
        key_s += terms.key_s
        keys = decode_attention_ops(d, 0.0, 1.0, 0.0)
        pair_flops = float(sum_over(op.flops - op.copied_flops for op in keys)) * nodes * d.chips
        read = float(sum_over(op.kv_read_bytes for op in keys)) * d.chips
        key_flops, key_bytes = key_flops + pair_flops, key_bytes + read
        step_flops, step_bytes = _sums([*dense, *head], d.chips)
        flops = flops + step_flops + B * (depth * pair_flops)
        moved = moved + step_bytes + B * (depth * read)
    return _Work(time, key_s, flops, moved, key_flops, key_bytes)


def _sums(ops: list[Op], chips: int) -> tuple[Array, Array]:
    """Model FLOPs, and the bytes that must cross HBM, of all chips."""
    flops = chips * sum_over(op.flops - op.copied_flops for op in ops)
    return flops, chips * sum_over(op.weight_bytes + op.kv_write_bytes for op in ops)


def medusa_ops(d: Deployment, heads: int, B: Number) -> list[Op]:
    """Medusa's heads: for each depth a residual [D, D] block and an output head of its own."""
    block, head = _medusa_matrices(d)
    return [matmul_op(d, "Medusa blocks", heads, block, B), matmul_op(d, "Medusa heads", heads, head, B)]


def _medusa_matrices(d: Deployment) -> tuple[Matrix, Matrix]:
    width, vocabulary = d.architecture.d_model, d.architecture.vocab_size
    return Matrix(width, width / d.chips), Matrix(width, vocabulary / d.chips, form="head")


def _chunk_work(drafter: Drafter, max_tokens: int) -> dict[str, Any]:
    """The drafter's own pass over prompts; none on another slice, which does it meanwhile, and for drafters without a cache."""
    c = np.arange(max_tokens + 1, dtype=np.float64)
    d = drafter.deployment
    if d is None or not drafter.same_slice:
        return {"chunk_s": 0 * c}
    table = compile_step_cost(replace(d, max_num_batched_tokens=max_tokens))
    time, flops, moved = table.dense_s, table.dense_flops, table.dense_bytes
    if drafter.kind == "layer":
        inputs = input_ops(d, c)
        more_flops, more_bytes = _sums(inputs, d.chips)
        time, flops, moved = time + sum_over(op.time_s for op in inputs), flops + more_flops, moved + more_bytes
    return {
        "chunk_s": time,
        "chunk_planes": table.prefill_planes,
        "chunk_flops": flops,
        "chunk_bytes": moved,
        "chunk_flops_per_pair": table.attention_flops_per_pair,
        "chunk_bytes_per_key": table.kv_bytes_per_token,
    }


def drafter_weights_bytes(target: Deployment, drafter: Drafter, depth: int) -> float:
    """Weights of a drafter on one chip of the target's slice. [bytes]

    A layer shares the target's embedding and head; Medusa has one block and one head per depth; another slice holds its own.
    """
    if not drafter.same_slice:
        return 0.0
    if drafter.kind == "heads":
        return depth * sum(matrix_bytes(target.precision, m) for m in _medusa_matrices(target))
    d = drafter.deployment
    if d is None:
        return 0.0
    return weights_bytes(d) if drafter.kind == "model" else drafter.modules * module_weights_bytes(target)


def memory_with_drafter(target: Deployment, drafter: Drafter, depth: int) -> MemoryFit:
    """How target and drafter fill each chip: weights of both, and each token's KV in both caches."""
    fit = memory_fit(target)
    weights = drafter_weights_bytes(target, drafter, depth)
    d = drafter.deployment if drafter.same_slice else None
    if d is None:
        return replace(fit, weights_bytes=fit.weights_bytes + weights)
    state = sum(count * state_bytes(d, mixer) for count, mixer in d.mixers)
    return replace(
        fit,
        weights_bytes=fit.weights_bytes + weights,
        kv_bytes_per_token=fit.kv_bytes_per_token + drafter.modules * d.kv_bytes_per_token,
        reserved_bytes=fit.reserved_bytes + target.max_num_seqs * state,
    )


def pass_time_s(cost: StepCost, speculation: SpeculationCost, level: int, batch: int, context: float) -> float:
    """Time of a step in which ``batch`` sequences of ``context`` tokens take a pass of ``level``. [s]"""
    tokens = batch * int(speculation.queries[level])
    S, SW = batch * context, batch * min(context, cost.window)
    inner = speculation.decode_s(level, cost.decode_knots, B=batch, S=S, SW=SW)
    return float(cost.dense_s[tokens] + cost.head_s[tokens]) + inner


def speedup(
    cost: StepCost, speculation: SpeculationCost, level: int, tokens: float, batch: int, context: float
) -> float:
    """Tokens per second with speculation at ``level``, ``tokens`` per pass, over those without, at one batch and context."""
    plain = pass_time_s(cost, speculation, 0, batch, context)
    return tokens * plain / pass_time_s(cost, speculation, level, batch, context)


def best_levels(
    cost: StepCost, speculation: SpeculationCost, tokens_by_level: Array, *, max_num_seqs: int, context: float
) -> NDArray[np.int64]:
    """[max_num_seqs + 1] the level with the most tokens per second at each batch; 0 where speculation costs time.

    Parameters
    ----------
    tokens_by_level
        [L] mean tokens per pass.
    context
        tokens of every sequence; the roofline of a batch depends on them.
    """
    found = np.zeros(max_num_seqs + 1, dtype=np.int64)
    for batch in range(1, max_num_seqs + 1):
        legal = [
            level
            for level, queries in enumerate(speculation.queries)
            if batch * queries <= min(cost.max_tokens, cost.max_rows) or level == 0
        ]
        found[batch] = max(legal, key=lambda i: tokens_by_level[i] / pass_time_s(cost, speculation, i, batch, context))
    found[0] = found[1]
    return found
