"""A deployment over a grid: decode steps of many batches and contexts at once, and what fits.

A decode step gives each of its sequences one token, so the step's time is the latency per token, and throughput is
batch ÷ time. Prefill is not in these figures; simulate it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.step_cost import StepCost, window_keys

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class DecodeSweep:
    """Decode steps at every point of a grid; all arrays have the shape of batch and context broadcast together.

    Attributes
    ----------
    batch, context
        sequences in the step, and keys each attends to, its new token's included.
    step_s
        time of the step, which is the latency per token. [s]
    tokens_per_s_per_chip
        new tokens per second and chip. [1/s]
    fits
        whether the KV cache holds all sequences at that context.
    """

    batch: Counts
    context: Counts
    step_s: Array
    tokens_per_s_per_chip: Array
    fits: Mask


@dataclass(frozen=True)
class DecodeCurve:
    """Decode steps of one deployment at one context, over every batch from 1 to ``max_num_seqs``.

    ``max_batch`` is how many sequences the KV cache holds, which may be more than ``sweep`` has, or none.
    """

    deployment: Deployment
    context: int
    sweep: DecodeSweep
    max_batch: int

    @property
    def largest(self) -> int:
        """The largest batch that both the memory and the settings allow; 0: nothing fits."""
        return min(self.max_batch, len(self.sweep.batch))


def decode_curves(d: Deployment, contexts: Sequence[int]) -> list[DecodeCurve]:
    """The curves over batch of one deployment, one per context."""
    cost, fit = compile_step_cost(d), memory_fit(d)
    grid = sweep_decode(cost, fit, np.arange(1, min(cost.max_rows, cost.max_tokens) + 1), np.array(contexts)[:, None])
    return [
        DecodeCurve(d, context, DecodeSweep(*(getattr(grid, f.name)[i] for f in fields(grid))), int(limit))
        for i, (context, limit) in enumerate(zip(contexts, max_batch(fit, contexts), strict=True))
    ]


def sweep_decode(cost: StepCost, fit: MemoryFit, batch: ArrayLike, context: ArrayLike) -> DecodeSweep:
    """Price decode steps of ``batch`` sequences at ``context`` keys each, whether they fit in memory or not.

    Equals :meth:`StepCost.step_s` at every point.

    Parameters
    ----------
    cost, fit
        table and memory of one deployment.
    batch, context
        whole numbers from 1, in shapes that broadcast together; ``batch[:, None]`` and ``context`` make a grid.

    Raises
    ------
    InputError
        If a number is not whole, below 1, or a batch beyond what the table covers.
    """
    B, C = np.broadcast_arrays(_counts("batch", batch), _counts("context", context))
    most = min(cost.max_tokens, cost.max_rows)
    if B.size and B.max() > most:
        raise InputError(
            f"sweep: batch = {B.max()}: the deployment's steps hold at most {most} sequences; raise max_num_seqs or "
            "max_num_batched_tokens"
        )
    S = (B * C).astype(np.float64)
    if len(cost.decode_knots) == 1:
        attention_s = cost.decode_value_s[0] + cost.decode_slope_s[0] * S
    else:
        knot = np.searchsorted(cost.decode_knots, S, side="right") - 1
        attention_s = cost.decode_value_s[knot] + cost.decode_slope_s[knot] * (S - cost.decode_knots[knot])
    step_s = (cost.dense_s[: most + 1] + cost.head_s[: most + 1])[B]
    step_s += attention_s
    if cost.decode_walk_s.any():
        step_s += cost.decode_walk_s[B] * S
    if cost.decode_seq_s:
        step_s += cost.decode_seq_s * B
    if cost.window_slope_s:
        step_s += cost.window_slope_s * (B * window_keys(C, cost.window, chunked=cost.window_chunked))
    per_chip = B / (cost.chips * step_s)
    return DecodeSweep(B, C, step_s, per_chip, max_batch(fit, C) >= B)


def max_batch(fit: MemoryFit, context: ArrayLike) -> Counts:
    """Sequences of ``context`` tokens that the KV cache holds, in whole blocks, past windows given back; 0 if not even one.

    >>> from simulator.roofline.memory import MemoryFit
    >>> max_batch(MemoryFit(100.0, 100.0, 0.0, 0.0, 0.0, 1.0, 4), [1, 4, 5, 97]).tolist()  # 24 blocks
    [24, 24, 12, 0]
    """
    return fit.kv_blocks // fit.groups.blocks_in_step(_counts("context", context), fit.block_size)


def pareto_front(latency_s: ArrayLike, throughput: ArrayLike) -> Mask:
    """Which points no other beats: none is as fast with more throughput, or faster with as much. Equal points all stay.

    >>> pareto_front([1.0, 2.0, 2.0, 3.0], [5.0, 4.0, 6.0, 6.0]).tolist()
    [True, False, True, False]
    """
    x, y = np.asarray(latency_s, dtype=np.float64), np.asarray(throughput, dtype=np.float64)
    order = np.lexsort((-y, x))
    best = np.maximum.accumulate(y[order])
    # Beaten by an earlier (faster) point, or by an equally fast one with more.
    earlier = np.concatenate([[-np.inf], best[:-1]])
    same = (np.diff(x[order], prepend=np.nan) == 0) & (np.diff(y[order], prepend=np.nan) == 0)
    front = y[order] > earlier
    for i in np.flatnonzero(same):
        front[i] = front[i - 1]
    kept = np.empty(len(x), dtype=np.bool_)
    kept[order] = front
    return kept


def batch_ladder(largest: int) -> list[int]:
    """Batch sizes to show between 1 and ``largest``: powers of two, and ``largest`` itself.

    >>> batch_ladder(43)
    [1, 2, 4, 8, 16, 32, 43]
    """
    return [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest]


def _counts(name: str, values: ArrayLike) -> Counts:
    found = np.asarray(values)
    if found.dtype.kind not in "iu":
        whole = found.astype(np.float64)
        if not (np.isfinite(whole).all() and (whole == np.floor(whole)).all()):
            raise InputError(f"sweep: {name} = {values!r}: must be whole numbers")
    if found.size and found.min() < 1:
        raise InputError(f"sweep: {name} = {found.min()}: must be at least 1")
    return found.astype(np.int64, copy=False)
