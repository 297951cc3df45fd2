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
from simulator.roofline.blocks import decode_knots, state_bytes
from simulator.roofline.compile import compile_part, dense_parts, hidden_s, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernels import Matrix, Number, Op, matmul_op, matrix_bytes
from simulator.roofline.memory import DrafterMemory, MemoryFit, memory_fit, weights_bytes
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

        dense_s[n] + head_s[R] + [B > 0]·(g_l(S) + decode_walk_s[B]·S + window_slope_s[l]·SW + seq_s[l]·B + draft_s[l, B] + h_l(S))
        + [P > 0]·(max_j(planes[j]·(A, K, P, AW, KW)) + chunk_s[c])

    Attributes
    ----------
    queries
        [L] tokens verified per sequence and pass, ascending from 1 (level 0).
    knots
        [m] ascending S from 0 at which the slope of an attention curve changes, target's and drafter's.
    value_s, slope_s
        [L, m] g_l there, and its slope from there on. Row 0 is the StepCost's. [s], [s per key]
    window_slope_s, seq_s
        [L] as in the StepCost. [s]
    draft_s
        [L, max_num_seqs + 1] drafting for B sequences, whatever their contexts. [s]
    draft_value_s, draft_slope_s
        [L, m] h_l, the attention of drafting, as ``value_s`` and ``slope_s``.
    chunk_s
        [max_num_batched_tokens + 1] the drafter's own pass over c prompt tokens. [s]
    chunk_planes
        [q, 5] its attention, as ``StepCost.prefill_planes``; the engines add both by :func:`with_drafter`.
    draft_flops, draft_bytes, chunk_flops, chunk_bytes
        as ``draft_s`` and ``chunk_s``: FLOPs, and bytes that must cross HBM, all chips together.
    draft_flops_per_key, draft_bytes_per_key
        [L] of the drafter's attention, per key of the contexts.
    chunk_flops_per_pair, chunk_bytes_per_key
        of the drafter's attention over prompts.
    """

    queries: NDArray[np.int64]
    knots: Array
    value_s: Array
    slope_s: Array
    window_slope_s: Array
    seq_s: Array
    draft_s: Array
    draft_value_s: Array
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
        for name in ("queries", "value_s", "slope_s", "window_slope_s", "seq_s", "draft_value_s", "draft_slope_s"):
            table = getattr(self, name)
            if len(table) != levels or (table.ndim == 2 and table.shape[1] != len(self.knots)):
                raise InputError(
                    f"SpeculationCost.{name} has shape {table.shape}: there are {levels} levels, {len(self.knots)} knots"
                )
        if self.knots[0] != 0 or (np.diff(self.knots) <= 0).any():
            raise InputError(f"SpeculationCost.knots must ascend from 0, got {self.knots}")
        for name in (
            "slope_s",
            "window_slope_s",
            "draft_s",
            "draft_value_s",
            "draft_slope_s",
            "chunk_s",
            "chunk_planes",
        ):
            table = getattr(self, name)
            if not (np.isfinite(table).all() and (table >= 0).all()):
                raise InputError(f"SpeculationCost.{name} must be finite and not negative")
        if self.draft_s[0].any() or self.draft_slope_s[0].any() or self.draft_value_s[0].any() or self.chunk_s[0]:
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

    def attention_s(self, level: int, S: float) -> float:
        """g_l(S): attention of the verifying queries. [s]"""
        j = self._piece(S)
        return float(self.value_s[level, j] + self.slope_s[level, j] * (S - self.knots[j]))

    def drafting_s(self, level: int, *, B: int, S: float) -> float:
        """Drafting for ``B`` sequences. [s]"""
        j = self._piece(S)
        keys_s = self.draft_value_s[level, j] + self.draft_slope_s[level, j] * (S - self.knots[j])
        return float(self.draft_s[level, B] + keys_s) if B else 0.0

    def decode_s(self, level: int, *, B: int, S: float, SW: float = 0) -> float:
        """Verification's attention and drafting of one step. [s]"""
        if not B:
            return 0.0
        verify = self.attention_s(level, S) + self.window_slope_s[level] * SW + self.seq_s[level] * B
        return float(verify) + self.drafting_s(level, B=B, S=S)

    def _piece(self, S: float) -> int:
        return int(np.searchsorted(self.knots, S, side="right")) - 1


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
        whether it shares the target's chips, or some of them, and their memory; otherwise prompts are drafted beside the target's own steps.
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
    """The StepCost as the engines run it beside its drafter.

    The drafter's prompt attention is in the planes, max_i a_i + max_j b_j = max_ij (a_i + b_j), and the decode curve has the
    drafter's knots too.
    """
    planes = cost.prefill_planes[:, None, :] + speculation.chunk_planes[None, :, :]
    return replace(
        cost,
        prefill_planes=planes.reshape(-1, cost.prefill_planes.shape[1]),
        decode_knots=speculation.knots,
        decode_value_s=speculation.value_s[0],
        decode_slope_s=speculation.slope_s[0],
    )


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

    Of lock-step attention ranks ``target`` is one rank, and so are the tables: what it takes to draft for its own sequences. Where a drafter's experts are spread
    over all ranks, the others draft for as many.

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
    d = drafter.deployment
    knots = np.unique([*cost.decode_knots, *(decode_knots(d) if d is not None else ())])
    piece = np.searchsorted(cost.decode_knots, knots, side="right") - 1
    more = np.array([[terms.key_s] for terms in verify])
    drafts = [_draft_work(target, drafter, tree, np.arange(seqs + 1, dtype=np.float64), knots) for tree in levels]
    return SpeculationCost(
        queries=queries,
        knots=knots,
        value_s=np.array([cost.decode_attention_s(knot) for knot in knots]) + more * knots,
        slope_s=cost.decode_slope_s[piece] + more,
        window_slope_s=np.array([cost.window_slope_s + terms.seen_s for terms in verify]),
        seq_s=np.array([cost.decode_seq_s + terms.sequence_s for terms in verify]),
        draft_s=np.array([work.time_s for work in drafts]),
        draft_value_s=np.array([work.keys_s for work in drafts]),
        draft_slope_s=np.array([work.key_s for work in drafts]),
        draft_flops=np.array([work.flops for work in drafts]),
        draft_bytes=np.array([work.bytes for work in drafts]),
        draft_flops_per_key=np.array([work.key_flops for work in drafts]),
        draft_bytes_per_key=np.array([work.key_bytes for work in drafts]),
        **_chunk_work(drafter, target.max_num_batched_tokens),
    )


@dataclass(frozen=True)
class VerifyTerms:
    """What q queries per sequence take beyond one: seconds per key, per windowed key, and per sequence."""

    key_s: float
    seen_s: float
    sequence_s: float


def verify_terms(d: Deployment, queries: int) -> VerifyTerms:
    """What ``queries`` tokens per sequence, which share one reading of its cache, add to the attention of one.

    Per op and key max(q·compute, memory) − max(compute, memory). Query j of a sequence at context t sees t + j keys: q(q − 1)/2
    more pairs and q − 1 more keys per sequence, whose bound is added to the keys' (never less than the bound of both together, and less than
    (q − 1)/t above it). Recurrent state is read and written once per pass; latents are expanded for every query.
    """
    key, seen = (decode_attention_ops(d, *x) for x in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    expansion_s = float(sum_over(op.roofline_s for op in context_attention_ops(d, 1.0)))

    def longest(ops: list[Op], pairs: float, keys: float) -> float:
        return float(sum_over(np.maximum(pairs * op.compute_s, keys * op.memory_s) for op in ops))

    return VerifyTerms(
        key_s=longest(key, queries, 1) - longest(key, 1, 1),
        seen_s=longest(seen, queries, 1) - longest(seen, 1, 1),
        sequence_s=(queries - 1) * expansion_s + longest(key, queries * (queries - 1) / 2, queries - 1),
    )


@dataclass(frozen=True)
class _Work:
    """Drafting of one level, over the number of sequences."""

    time_s: Array
    keys_s: Array
    """[m] attention at each knot."""
    key_s: Array
    """[m] and its slope from there."""
    flops: Array
    bytes: Array
    key_flops: float = 0.0
    key_bytes: float = 0.0


def _draft_work(target: Deployment, drafter: Drafter, tree: Tree, B: Array, knots: Array) -> _Work:
    """One drafting step per depth (Medusa's heads: one in all); the step at a depth runs the nodes of the depth before.

    A drafter's keys are priced as if its sequences filled the chip: what waves of few blocks take longer is in no table of drafts.
    """
    some, none = np.greater(B, 0) * 1.0, 0 * knots
    if not tree:
        return _Work(0 * B, none, none, 0 * B, 0 * B)
    host = drafter.step_s * some + drafter.sequence_s * B
    if drafter.kind == "lookup":
        return _Work(host, none, none, 0 * B, 0 * B)
    if drafter.kind == "heads":
        ops = medusa_ops(target, len(tree), B)
        return _Work(host + sum_over(op.time_s for op in ops), none, none, *_sums(ops, target.chips))
    d = drafter.deployment
    if d is None:
        raise InputError(f"drafter {drafter.kind}: needs a deployment")
    plain_s = np.array([_keys_s(d, S) for S in knots])
    ends = np.array([*knots[1:], 2 * knots[-1] + 1])
    slope_s = (np.array([_keys_s(d, S) for S in ends]) - plain_s) / (ends - knots)
    launch = decode_attention_ops(d, 1.0, 0.0, 0.0)
    launch_s, sequence_s = (
        float(sum_over(x)) for x in ([o.overhead_s for o in launch], [o.roofline_s for o in launch])
    )
    read_key = decode_attention_ops(d, 0.0, 1.0, 0.0)
    flops_of_key = d.chips * float(sum_over(op.flops - op.copied_flops for op in read_key))
    bytes_of_key = d.chips * float(sum_over(op.kv_read_bytes for op in read_key))
    found = _Work(0 * B, none, none, 0 * B, 0 * B)
    for depth, nodes in enumerate((1, *tree[:-1])):
        n = B * nodes
        dense, head = dense_ops(d, n), head_ops(d, n)
        if drafter.kind == "layer":
            dense = [*dense, *input_ops(d, n)]
        terms = verify_terms(d, nodes)
        # At this depth a sequence is longer by the drafts before it, far beyond where the curve bends. A compiled table leaves
        # the expansion of MLA's latents out of dense_s and has it per sequence; here the dense ops have all of it.
        expansion_s = (nodes - 1) * float(sum_over(op.roofline_s for op in context_attention_ops(d, 1.0)))
        each_s = sequence_s + terms.sequence_s - expansion_s + depth * (slope_s[-1] + terms.key_s)
        step_flops, step_bytes = _sums([*dense, *head], d.chips)
        found = _Work(
            time_s=found.time_s
            + host
            + sum_over(dense_parts(d, dense).values())
            + (sum_over(op.time_s for op in head) - hidden_s(d, head))
            + some * launch_s
            + B * each_s,
            keys_s=found.keys_s + plain_s + terms.key_s * knots,
            key_s=found.key_s + slope_s + terms.key_s,
            flops=found.flops + step_flops + B * (depth * nodes * flops_of_key),
            bytes=found.bytes + step_bytes + B * (depth * bytes_of_key),
            key_flops=found.key_flops + nodes * flops_of_key,
            key_bytes=found.key_bytes + bytes_of_key,
        )
    return found


def _keys_s(d: Deployment, S: float) -> float:
    """Attention over ``S`` keys, launches left out. [s]"""
    return float(sum_over(op.roofline_s for op in decode_attention_ops(d, 0.0, S, 0.0)))


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
    table = compile_part(replace(d, max_num_batched_tokens=max_tokens))
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
    """How target and drafter fill each chip, or the fullest if not all have the drafter: weights of both, and each token's KV in both caches.

    The drafter's layers lie in the target's groups of layers, where it has some with a window.
    """
    weights = drafter_weights_bytes(target, drafter, depth)
    d = drafter.deployment if drafter.same_slice else None
    if d is None:
        return memory_fit(target, DrafterMemory(weights))
    full, windowed = (drafter.modules * d.kv_bytes(windowed=kind) for kind in (False, True))
    state = sum(count * state_bytes(d, mixer) for count, mixer in d.mixers)
    return memory_fit(target, DrafterMemory(weights, full, windowed, target.max_num_seqs * state))


def pass_time_s(cost: StepCost, speculation: SpeculationCost, level: int, batch: int, context: float) -> float:
    """Time of a step in which ``batch`` sequences of ``context`` tokens, of each rank, take a pass of ``level``. [s]"""
    tokens = batch * int(speculation.queries[level])
    S, SW = batch * context, batch * min(context, cost.window)
    inner = speculation.decode_s(level, B=batch, S=S, SW=SW) + float(cost.decode_walk_s[batch]) * S
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
