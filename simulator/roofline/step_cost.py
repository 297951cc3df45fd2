"""StepCost: one deployment's cost of a step, compiled to a small table.

The engine sees a deployment only through this record (design: a step's cost is a small table, compiled once).
A step is described by few integers:

===== ==========================================================================================
``n`` tokens through the dense layers: decode tokens plus prefill-chunk tokens
``B`` decoding sequences (one token each)
``S`` sum over those sequences of the keys each one attends to, the new token's own included
``P`` prefill chunks in the step
``A`` attention pairs of the chunks: a chunk of ``c`` tokens on ``p`` earlier ones has c·p + c(c+1)/2
``K`` KV tokens the chunks read: the sum of p + c
``R`` logit rows: decoding sequences plus chunks that complete their prompt
===== ==========================================================================================

Layers that see only a window of W keys (sliding or chunked-local attention, the selected keys of sparse attention) read fewer: a
query at context t (itself included) sees w(t) = min(t, W) keys when sliding, ((t − 1) mod W) + 1 when chunked. So there are

====== =========================================================================================
``SW`` as S, with w(t) in place of t
``AW`` as A: the sum of w(t) over the chunks' queries
``KW`` as K: keys the chunks' windowed layers read, min(p + c, c + W − 1) when sliding, (p mod W) + c when chunked
====== =========================================================================================

and the time of a step is::

    dense_s[n] + head_s[R] + [B > 0]·(g(S) + decode_walk_s[B]·S + window_slope_s·SW + decode_seq_s·B) + [P > 0]·max_j(planes[j]·(A, K, P, AW, KW))

with ``g`` the piecewise linear curve through the decode knots. Each term is at least its own roofline bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

Array = NDArray[np.float64]


Counts = int | NDArray[np.int64]


def window_keys(context: Counts, window: int, *, chunked: bool) -> Counts:
    """Keys a query at ``context`` (itself included) sees through a window: w(t) above; 0 without a window.

    >>> [window_keys(t, 4, chunked=False) for t in (1, 4, 5, 9)], [window_keys(t, 4, chunked=True) for t in (1, 4, 5, 9)]
    ([1, 4, 4, 4], [1, 4, 1, 1])
    """
    if window == 0:
        return 0 * context
    if chunked:
        return (context - 1) % window + 1
    return min(context, window) if isinstance(context, int) else np.minimum(context, window)


def window_pairs(context: Counts, window: int, *, chunked: bool) -> Counts:
    """Windowed (query, key) pairs of the first ``context`` tokens of a sequence: the sum of w(t) over t = 1 … context.

    >>> [window_pairs(t, 4, chunked=False) for t in (0, 4, 6)], [window_pairs(t, 4, chunked=True) for t in (0, 4, 6)]
    ([0, 10, 18], [0, 10, 13])
    """
    if window == 0:
        return 0 * context
    if chunked:
        cycles, rest = context // window, context % window
        return cycles * (window * (window + 1) // 2) + rest * (rest + 1) // 2
    short = window_keys(context, window, chunked=False)
    return short * (short + 1) // 2 + (context - short) * window


@dataclass(frozen=True)
class StepCost:
    """Times of one deployment's steps, and the FLOPs and bytes behind them.

    Attributes
    ----------
    dense_s
        [max_num_batched_tokens + 1] time of everything that depends on ``n`` alone: matrix products, norms,
        collectives, per-step overhead. ``dense_s[0] == 0``. [s]
    head_s
        [max_num_seqs + 1] output head and sampling for ``R`` rows. ``head_s[0] == 0``. [s]
    decode_knots, decode_value_s, decode_slope_s
        [m] ascending S of each knot (the first is 0), g there [s], and the slope from there on [s per key].
        g is continuous and the last slope holds to infinity.
    decode_seq_s
        time per decoding sequence that depends on neither n nor S. [s]
    decode_walk_s
        [max_num_seqs + 1] further seconds per key while B sequences decode: kernels that deal each sequence's keys to
        blocks of threads fill the chip by waves of them. Zeros if left out.
    prefill_planes
        [q, 5] seconds per attention pair (A), per KV token read (K), per chunk (P), per windowed pair (AW) and per
        windowed token read (KW); the time is the largest plane. Three columns are read as five, the last two 0.
    chips
        chips of the replica; chip-seconds are step seconds times this.
    ranks
        attention ranks that step together: queues of their own with tokens of their own, whose experts are one. Above
        1, FLOPs and bytes below are those of one rank's chips, times those of a step in which every rank has n tokens.
    stages
        pipeline stages whose times the tables sum (:attr:`simulator.roofline.pipeline_cost.PipelineCost.total`).
    expert_s
        as ``dense_s``: the part of it spent in routed experts; empty without any.
    dense_flops, dense_bytes
        as ``dense_s``: model FLOPs, and the bytes that must cross HBM, of n dense tokens, all chips together.
    head_flops, head_bytes
        as ``head_s``.
    attention_flops_per_pair, kv_bytes_per_token
        FLOPs per (query, key) pair over all layers; KV-cache bytes read per key (written per token), all chips.
    peak_flops_per_s, hbm_bandwidth_bytes_per_s
        of the whole replica; the denominators of MFU and MBU.
    window, window_chunked
        W in keys (0: no layer has a window), and whether windows are chunks of the context instead of sliding.
    window_slope_s
        time per windowed key of the decoding sequences. [s]
    window_flops_per_pair, window_kv_bytes_per_token
        as ``attention_flops_per_pair`` and ``kv_bytes_per_token``, of the windowed layers.
    decode_seq_bytes
        bytes moved per sequence whatever its context (recurrent state), all chips: by a decode step as by a chunk.
    dense_parts
        named shares of ``dense_s`` (same shape each, summing to it), e.g. matmul, collective, overhead.
    """

    dense_s: Array
    head_s: Array
    decode_knots: Array
    decode_value_s: Array
    decode_slope_s: Array
    decode_seq_s: float
    prefill_planes: Array
    chips: int
    dense_flops: Array
    dense_bytes: Array
    head_flops: Array
    head_bytes: Array
    attention_flops_per_pair: float
    kv_bytes_per_token: float
    peak_flops_per_s: float
    hbm_bandwidth_bytes_per_s: float
    dense_parts: Mapping[str, Array] = field(default_factory=dict)
    window: int = 0
    window_chunked: bool = False
    window_slope_s: float = 0.0
    window_flops_per_pair: float = 0.0
    window_kv_bytes_per_token: float = 0.0
    decode_seq_bytes: float = 0.0
    ranks: int = 1
    stages: int = 1
    expert_s: Array = field(default_factory=lambda: np.zeros(0))
    decode_walk_s: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        """Refuse tables that would give silently wrong times."""
        if self.prefill_planes.ndim == 2 and self.prefill_planes.shape[1] == 3:
            object.__setattr__(self, "prefill_planes", np.pad(self.prefill_planes, ((0, 0), (0, 2))))
        if self.window < 0 or not self.window_slope_s >= 0:
            raise InputError(f"StepCost.window = {self.window}, window_slope_s = {self.window_slope_s}: not below 0")
        if self.window == 0 and (self.window_slope_s > 0 or self.prefill_planes[:, 3:].any()):
            raise InputError("StepCost: windowed terms without a window")
        for name in ("dense_s", "head_s"):
            table = getattr(self, name)
            if table.ndim != 1 or len(table) < 2 or table[0] != 0:
                raise InputError(f"StepCost.{name} must be a one-dimensional table starting at 0, got {table[:3]}")
            if not (np.isfinite(table).all() and (table >= 0).all()):
                raise InputError(f"StepCost.{name} must be finite and not negative")
        if not (self.dense_s[1:] > 0).all():
            raise InputError("StepCost.dense_s must be positive from one token on: a step takes time")
        if not len(self.decode_walk_s):
            object.__setattr__(self, "decode_walk_s", np.zeros(len(self.head_s)))
        walk = self.decode_walk_s
        if walk.shape != self.head_s.shape or walk[0] != 0 or not (np.isfinite(walk) & (walk >= 0)).all():
            raise InputError(
                "StepCost.decode_walk_s must be as long as head_s, start at 0, finite and not negative; or empty"
            )
        if self.ranks < 1:
            raise InputError(f"StepCost.ranks = {self.ranks}: must be at least 1")
        if len(self.expert_s) and (
            self.expert_s.shape != self.dense_s.shape
            or not ((self.expert_s >= 0) & (self.expert_s <= self.dense_s)).all()
        ):
            raise InputError("StepCost.expert_s must be a part of dense_s, entry by entry, or empty")
        knots = self.decode_knots
        if knots[0] != 0 or (np.diff(knots) <= 0).any():
            raise InputError(f"StepCost.decode_knots must ascend from 0, got {knots}")
        if not (self.decode_slope_s >= 0).all() or self.decode_value_s[0] < 0:
            raise InputError("StepCost.decode_slope_s and decode_value_s must not be negative")
        if self.prefill_planes.ndim != 2 or self.prefill_planes.shape[1] != 5 or not (self.prefill_planes >= 0).all():
            raise InputError("StepCost.prefill_planes must be a [q, 5] table without negative entries")

    @property
    def parts(self) -> int:
        """Ranks or stages: parts of the replica that work side by side, whose seconds the tables count."""
        return self.ranks * self.stages

    @property
    def max_tokens(self) -> int:
        """Largest n the table covers."""
        return len(self.dense_s) - 1

    @property
    def max_rows(self) -> int:
        """Largest R the table covers."""
        return len(self.head_s) - 1

    def decode_attention_s(self, S: float, B: int = 0) -> float:
        """g(S), and what its keys cost on top while ``B`` sequences decode: their attention time. [s]"""
        j = int(np.searchsorted(self.decode_knots, S, side="right")) - 1
        g = self.decode_value_s[j] + self.decode_slope_s[j] * (S - self.decode_knots[j])
        return float(g + self.decode_walk_s[B] * S)

    def prefill_attention_s(self, A: float, K: float, P: float, AW: float = 0, KW: float = 0) -> float:
        """Attention time of the prefill chunks. [s]"""
        return float((self.prefill_planes @ np.array([A, K, P, AW, KW])).max()) if P else 0.0

    def step_s(
        self,
        *,
        n: int,
        B: int = 0,
        S: float = 0,
        P: int = 0,
        A: float = 0,
        K: float = 0,
        R: int = 0,
        SW: float = 0,
        AW: float = 0,
        KW: float = 0,
    ) -> float:
        """Time of one step. [s]"""
        decode = self.decode_attention_s(S, B) + self.window_slope_s * SW + self.decode_seq_s * B if B else 0.0
        return float(self.dense_s[n] + self.head_s[R]) + decode + self.prefill_attention_s(A, K, P, AW, KW)
