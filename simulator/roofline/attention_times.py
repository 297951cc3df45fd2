"""Time of attention kernels from shapes: pairs and walks of prompts; keys, blocks of threads and waves of decodes.

Pure functions, as those of :mod:`simulator.roofline.kernel_times`; none is below its bound of FLOPs at peak or bytes at full bandwidth.

*Schedules of decode attention.* A kernel has so many blocks of threads per sequence and deals the sequence's keys to them in so
many parts. Blocks run side by side on the multiprocessors, and the kernel takes as long as the busiest one, or as reading everything.
How many parts is each library's own rule:

``whole``
    one: TensorRT-LLM's for latent attention [1]_ and, as their times tell, for an 8-bit cache on L40S and RTX PRO 6000.
``waves``
    so many that no block has fewer than :data:`WAVES_TILE` keys, at most √(8 · their number), and all blocks make at most
    :data:`MOST_WAVES` waves: TensorRT-LLM's for queries that share keys [1]_.
``shares``
    blocks of equal shares of all keys, :data:`SHARES_MARGIN` of what a multiprocessor has on average, in whole tiles of
    :data:`SHARES_TILE` keys; sequences of at most :data:`UNSPLIT_TILES` tiles stay whole: FlashAttention-3's [2]_.

.. [1] NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention/decoderXQAImplCommon.h,
   ``computeMultiBlockCount`` and ``computeMultiBlockCountForMLA``.
.. [2] Dao-AILab/flash-attention, hopper/flash_prepare_scheduler.cu, hopper/heuristics.h (``num_splits_heuristic``) and
   hopper/tile_size.h (``tile_size_fwd_sm8x``).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.kernel_curves import DecodeCurve, PrefillCurve, Schedule
from simulator.roofline.kernel_times import Number, soft_max

Array = NDArray[np.float64]

QUERY_TILE = 128
"""Queries of one tile of prefill attention."""
PAD_HEADS = 16
"""Query heads per KV head that decode attention computes at least."""
LATENT_HEADS, LATENT_BLOCKS = 64, 2
"""Query heads that a block of threads takes of latent decode attention, and blocks that share the width of their values."""
WAVES_TILE, MOST_WAVES = 128, 8
"""Keys of a block at least, and waves of blocks at most, of the schedule ``waves``."""
SHARES_TILE, SHARES_MARGIN, UNSPLIT_TILES = 112, 1.1, 4
"""Of the schedule ``shares``: keys of a tile (of heads 128 wide), a block's share of keys over a multiprocessor's, tiles not worth splitting."""
WALK_WIDTH = 128
"""Width of the heads that a curve's time per key in a block is of."""
SHARES_STEP = 64
"""Keys that a block of it walks at once."""
PRICED_KEYS = tuple(256.0 * 2**i for i in range(7))
"""Lengths of sequences over which the price of a schedule is the nearest straight line. [keys]"""


def padded_heads(heads: float, kv_heads: float, *, matrix_units: bool = True) -> float:
    """Query heads that decode attention computes, of ``heads`` that share ``kv_heads``.

    Without matrix units heads that share nothing are matrix-vector products, which need no padding; preparing keys for
    products with several queries takes such units as long as about a tile of them.

    >>> padded_heads(32, 8), padded_heads(128, 1), padded_heads(32, 8, matrix_units=False), padded_heads(8, 8, matrix_units=False)
    (128, 128, 128, 8)
    """
    if heads <= kv_heads and not matrix_units:
        return heads
    return kv_heads * PAD_HEADS * ceil(heads / kv_heads / PAD_HEADS)


def decode_key_s(
    bytes_per_key: float, flops_per_key: float, curve: DecodeCurve, *, peak_flops_per_s: float, hbm_bytes_per_s: float
) -> float:
    """Time per key of decode attention, its ramp apart: the longer of reading and multiplying. [s]"""
    return max(bytes_per_key / (hbm_bytes_per_s * curve.hbm), flops_per_key / (peak_flops_per_s * curve.peak))


def decode_blocks(heads: Number, kv_heads: Number, *, latent: bool) -> Number:
    """Blocks of threads per sequence of decode attention that does not split its keys.

    >>> float(decode_blocks(32, 8, latent=False)), float(decode_blocks(128, 1, latent=True))
    (8.0, 4.0)
    """
    each: Number = np.ceil(heads / LATENT_HEADS) if latent else np.ceil(heads / kv_heads / PAD_HEADS)
    return each * (LATENT_BLOCKS if latent else kv_heads)


def decode_splits(schedule: Schedule, blocks: Array, keys: Array, multiprocessors: float) -> Array:
    """Parts that each sequence's keys are dealt in, of sequences with ``blocks`` blocks of threads in all.

    >>> keys = np.array([256.0, 8192.0, 16384.0])
    >>> [decode_splits(name, np.full(3, 32.0), keys, 108).tolist() for name in ("whole", "waves", "shares")]
    [[1.0, 1.0, 1.0], [2.0, 23.0, 27.0], [1.0, 3.0, 4.0]]
    """
    if schedule == "waves":
        parts = np.maximum(1.0, np.floor(keys / WAVES_TILE))
        parts = np.minimum(parts, np.round(np.sqrt(8 * parts)))
        waves = blocks * parts / multiprocessors
        return np.asarray(np.maximum(1.0, np.floor(parts / np.maximum(1.0, waves / MOST_WAVES))))
    if schedule == "shares":
        tiles = np.ceil(keys / SHARES_TILE)
        share = np.maximum(1.0, np.ceil(SHARES_MARGIN * blocks * tiles / multiprocessors))
        return np.where(tiles <= UNSPLIT_TILES, 1.0, np.maximum(1.0, np.ceil(tiles / share)))
    return np.ones(np.broadcast_shapes(blocks.shape, keys.shape))


@dataclass(frozen=True)
class Dealt:
    """Decode attention dealt to blocks of threads.

    Attributes
    ----------
    split
        whether sequences are dealt in several parts.
    waves
        blocks on the busiest multiprocessor.
    keys
        that each block walks.
    """

    split: NDArray[np.bool_]
    waves: Array
    keys: Array

    def at(self, rows: NDArray[np.int64]) -> "Dealt":
        """Some of the rows."""
        return Dealt(self.split[rows], self.waves[rows], self.keys[rows])


def deal(schedule: Schedule, blocks: Array, keys: Array, multiprocessors: float) -> Dealt:
    """Sequences of so many keys, with ``blocks`` blocks of threads in all, dealt to multiprocessors."""
    parts = decode_splits(schedule, blocks, keys, multiprocessors)
    step = {"waves": WAVES_TILE, "shares": SHARES_STEP}.get(schedule, 1)
    return Dealt(parts > 1, np.ceil(blocks * parts / multiprocessors), np.ceil(np.ceil(keys / parts) / step) * step)


def busiest_s(dealt: Dealt, key_s: Number, curve: DecodeCurve) -> Array:
    """Time of the busiest multiprocessor, whose blocks run two at a time, at ``key_s`` for a key in a block. [s]

    >>> curve = DecodeCurve(hbm=0.8, peak=0.2, launch_s=0.0, item_s=1e-6, pair=1.5, schedule="whole")
    >>> dealt = deal("whole", np.array([10.0, 100.0, 110.0, 210.0]), np.full(4, 1000.0), 100)
    >>> (1e6 * busiest_s(dealt, 1e-9, curve)).round(3).tolist()
    [2.0, 2.0, 3.0, 5.0]
    """
    together = curve.pair * np.floor(dealt.waves / 2) + dealt.waves % 2
    return np.asarray(together * (curve.item_s + dealt.keys * key_s))


def block_key_s(width: Number, curve: DecodeCurve) -> Number:
    """Time of a key of heads so wide in a block of threads alone on a multiprocessor. [s]"""
    return curve.walk_s * (width / WALK_WIDTH)


class Line(NamedTuple):
    """The price of a schedule: straight in the keys for each number of sequences.

    Attributes
    ----------
    launch_s, sequence_s
        of a call, :attr:`DecodeCurve.launch_s` apart, and per sequence. [s]
    table
        time per key of each of 0, 1, 2 … sequences that decode together; read-only. [s]
    """

    launch_s: float
    sequence_s: float
    table: Array


@lru_cache(maxsize=4096)
def scheduled_line(curve: DecodeCurve, blocks: float, key_s: float, block_s: float, multiprocessors: float) -> Line:
    """The price that is nearest to a schedule's times.

    Servers' sequences differ in length and grow, so what each length's last wave and last tile lose is averaged over
    :data:`PRICED_KEYS`, by least squares of relative errors: the time per sequence is that of crowds of them; that of a call fits 1, 2,
    4 … sequences, and the one per key each number of them. A key takes no less than ``key_s``, and a step no less than one of
    fewer sequences. The table ends where no schedule splits any more and the last wave hardly counts; beyond it times are
    in proportion.

    Parameters
    ----------
    blocks
        of threads, per sequence.
    key_s
        time per key of all sequences together: reading or multiplying. [s]
    block_s
        :func:`block_key_s`. [s]
    """
    keys = np.array(PRICED_KEYS)
    crowd = curve.pair / 2 * blocks / multiprocessors
    many = np.asarray(soft_max(crowd * (curve.item_s + keys * block_s), keys * key_s, curve.sharpness))
    sequence_s = _beside_keys(np.ones_like(many)[None], many[None], many[None], keys)
    batch = np.arange(1.0, ceil(MOST_WAVES * multiprocessors / blocks) + 1)[:, None]
    dealt = deal(curve.schedule, blocks * batch, keys[None, :], multiprocessors)
    work = soft_max(busiest_s(dealt, block_s, curve), batch * keys * key_s, curve.sharpness)
    took = np.asarray(work + curve.split_s * dealt.split, dtype=np.float64)
    rest = took - batch * sequence_s
    rungs = 2 ** np.arange(int(np.log2(len(batch))) + 1) - 1
    launch_s = _beside_keys(np.ones_like(took)[rungs], rest[rungs], took[rungs], keys)
    slope = ((rest - launch_s) * keys / took**2).sum(axis=1) / ((keys / took) ** 2).sum(axis=1)
    table = np.maximum.accumulate(np.append(0.0, np.maximum(batch[:, 0] * key_s, slope)))
    table.flags.writeable = False
    return Line(launch_s, sequence_s, table)


def _beside_keys(figure: Array, times: Array, scale: Array, keys: Array) -> float:
    """How much of ``figure`` and, row by row, of a time per key give the times, relative to ``scale``: least squares, not negative.

    >>> keys = np.array([1.0, 2.0, 4.0])
    >>> round(_beside_keys(np.ones((1, 3)), 5 + 3 * keys[None], 5 + 3 * keys[None], keys), 6)
    5.0
    """
    per_key = keys / scale
    square = (per_key**2).sum(axis=1, keepdims=True)
    left, target = (
        x / scale - per_key * ((x / scale * per_key).sum(axis=1, keepdims=True) / square) for x in (figure, times)
    )
    return max(0.0, float((left * target).sum() / (left * left).sum()))


def scheduled_key_s(sequences: Number, table: Array, key_s: float) -> Number:
    """Time per key of all sequences together, by the table of :func:`scheduled_line`. [s]"""
    last = len(table) - 1
    many = np.maximum(sequences, 1.0)
    found = table[np.minimum(np.ceil(many), last).astype(np.intp)] * np.maximum(1.0, many / last) / many
    return np.where(sequences > 0, np.maximum(found, key_s), key_s)


def prefill_pair_s(flops_per_pair: float, heads: float, curve: PrefillCurve, peak_flops_per_s: float) -> float:
    """Time per (query, key) pair of prefill attention, softmax included. [s]"""
    return (flops_per_pair + 4 * heads * curve.softmax) / (peak_flops_per_s * curve.peak)


def prefill_key_s(
    head_dim: float, kv_bytes_per_key: float, curve: PrefillCurve, *,
    peak_flops_per_s: float, hbm_bytes_per_s: float, multiprocessors: float,
) -> float:  # fmt: skip
    """Time per key that prefill attention stands on: the last tile's walk, or reading the keys once if longer. [s]"""
    walk = curve.serial * 4 * QUERY_TILE * head_dim * multiprocessors / peak_flops_per_s
    return max(walk, kv_bytes_per_key / hbm_bytes_per_s)
