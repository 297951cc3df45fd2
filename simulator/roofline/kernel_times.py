"""Time of one kernel from its shape: tiles, waves, bandwidth and launches.

Pure functions of shapes, datasheet rates and a fitted curve (:mod:`simulator.catalog.kernel_curves`). None is ever below the
roofline bound of its FLOPs at peak, its bytes at full bandwidth, or its messages at full link rate, whatever the curve.

*Tiles and waves.* A product of m x n outputs over an inner dimension k is cut into tiles, one per multiprocessor at a time. The
tiles of a shape run in ⌈tiles/multiprocessors⌉ waves, and the last wave is rarely full. A small tile fills more
multiprocessors but costs more per output; the inner dimension may be split s ways to make more tiles, at the price of
summing s partial results. Libraries choose among such variants, so the time is the least over :data:`TILES` and :data:`SPLITS`
[1]_.

.. [1] NVIDIA, "Matrix Multiplication Background User's Guide", on tile and wave quantisation: recalled, not opened.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.kernel_curves import CollectiveCurve, GemmCurve, GroupedCurve

Array = NDArray[np.float64]
Number = float | Array

TILES = ((256, 256), (256, 128), (128, 256), (128, 128), (64, 128), (128, 64), (64, 64), (16, 64))
"""Rows and columns of the tiles that libraries choose from."""
SPLITS = (1, 2, 4, 8, 16)
"""Ways to split the inner dimension."""
GROUPED_TILES = ((8, 128), (16, 128), (32, 128), (64, 128), (128, 128), (128, 256), (256, 128))
"""Tiles of grouped products."""
ROW_STEP = 16
"""Rows of the smallest tile of matrix units; all others are multiples, so tile counts only change there."""
VECTOR_TILES = ((4, 64), (8, 64), *TILES)
"""Tiles where there are no matrix units: few rows cost little."""
VECTOR_ROW_STEP = 4
"""As :data:`ROW_STEP` without matrix units."""
_SPLITS = np.array(SPLITS, dtype=np.float64)
_GM, _GN = (np.array(side, dtype=np.float64) for side in zip(*GROUPED_TILES, strict=True))


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles that a chip's libraries choose from; compared by identity, as there is one for each kind of chip.

    Attributes
    ----------
    rows, columns
        of each tile.
    step
        rows of the smallest; all others are multiples.
    """

    rows: Array
    columns: Array
    step: int


def _tiling(tiles: tuple[tuple[int, int], ...], step: int) -> Tiling:
    rows, columns = (np.array(side, dtype=np.float64) for side in zip(*tiles, strict=True))
    return Tiling(rows, columns, step)


MATRIX_UNITS = _tiling(TILES, ROW_STEP)
VECTOR_UNITS = _tiling(VECTOR_TILES, VECTOR_ROW_STEP)


def tiling_of(*, matrix_units: bool) -> Tiling:
    """Tiles of a chip with or without matrix units."""
    return MATRIX_UNITS if matrix_units else VECTOR_UNITS


def present(n: Number) -> Number:
    """1 where ``n`` counts something and 0 where not; the number 1 for an array without zeros, which saves arrays of ones.

    >>> present(3.0), present(np.array([1.0, 2.0])), present(np.array([0.0, 2.0]))
    (1.0, 1.0, array([0., 1.]))
    """
    if not isinstance(n, np.ndarray):
        return 1.0 if n > 0 else 0.0
    some = n > 0
    return 1.0 if some.all() else some.astype(np.float64)


def soft_max(one: Number, other: Number, sharpness: float) -> Number:
    """The p-norm of two times: at least the longer, at most the sum for p of 1 or more.

    >>> float(soft_max(3.0, 4.0, 2.0)), soft_max(3.0, 4.0, 1.0)
    (5.0, 7.0)
    """
    if sharpness == 1:
        return one + other
    joined: Number
    if sharpness in {2, 4}:
        one, other = one * one, other * other
        joined = np.sqrt(one + other) if sharpness == 2 else np.sqrt(np.sqrt(one * one + other * other))
    else:
        joined = (np.power(one, sharpness) + np.power(other, sharpness)) ** (1 / sharpness)
    return joined


def tile_waves(m: Array, n: Array, multiprocessors: float, tiling: Tiling = MATRIX_UNITS) -> Array:
    """Waves of every variant, [rows, tiles, splits], of m x n outputs."""
    tiles = np.ceil(m[:, None] / tiling.rows) * np.ceil(n[:, None] / tiling.columns)
    waves: Array = np.ceil(tiles[:, :, None] * _SPLITS / multiprocessors)
    return waves


def tile_work(
    waves: Array, m: Array, n: Array, k: Array, curve: GemmCurve, split_bytes_s: float, rate: float,
    tiling: Tiling = MATRIX_UNITS,
) -> Array:  # fmt: skip
    """Compute time of products, the least over variants. [s]

    Parameters
    ----------
    waves
        from :func:`tile_waves`.
    split_bytes_s
        time of one byte of partial sums. [s]
    rate
        FLOP/s that one multiprocessor reaches in large tiles. [FLOP/s]
    tiling
        that the waves were counted with.
    """
    area = tiling.rows * tiling.columns + curve.tile
    time = waves * (area[:, None] * (2 / rate)) * (k[:, None, None] / _SPLITS + curve.depth)
    extra = (_SPLITS > 1) * curve.split_s + (_SPLITS > 1) * _SPLITS * (4 * split_bytes_s) * (m * n)[:, None, None]
    least: Array = (time + extra).min(axis=(1, 2))
    return least


@lru_cache(maxsize=512)
def _work_of_rows(
    rows: int, n: float, k: float, curve: GemmCurve, multiprocessors: float, rate: float, split_bytes_s: float,
    tiling: Tiling,
) -> Array:  # fmt: skip
    """Compute time of 0, 1, 2 … steps of rows of one weight matrix; read-only. [s]"""
    m = np.arange(rows + 1, dtype=np.float64) * tiling.step
    columns, depth = np.full_like(m, n), np.full_like(m, k)
    waves = tile_waves(m, columns, multiprocessors, tiling)
    # Partial sums are of the rows asked for; the top of the step is taken, so that time rises by steps alone.
    work = tile_work(waves, m, columns, depth, curve, split_bytes_s, rate / multiprocessors, tiling)
    work[0] = 0.0
    work.flags.writeable = False
    return work


def gemm_compute_s(
    m: Number,
    n: float,
    k: float,
    curve: GemmCurve,
    *,
    peak_flops_per_s: float,
    hbm_bytes_per_s: float,
    multiprocessors: float,
    tiling: Tiling = MATRIX_UNITS,
) -> Number:
    """Compute time of ``[m, k] @ [k, n]``, in steps of the tiling's rows. [s]

    >>> curve = GemmCurve(peak=0.8, hbm=0.8, launch_s=0.0)
    >>> round(1e6 * float(gemm_compute_s(4096.0, 4096, 4096, curve, peak_flops_per_s=989e12, hbm_bytes_per_s=3.35e12, multiprocessors=132)))
    175
    """
    split_bytes_s, rate = 1 / (hbm_bytes_per_s * curve.hbm), peak_flops_per_s * curve.peak
    if isinstance(m, np.ndarray):
        steps = np.ceil(m * (1 / tiling.step)).astype(np.intp)
        return _work_of_rows(int(steps.max()), n, k, curve, multiprocessors, rate, split_bytes_s, tiling).take(steps)
    return _work_of_step(ceil(m / tiling.step), n, k, curve, multiprocessors, rate, split_bytes_s, tiling)


@lru_cache(maxsize=65536)  # a search over shardings asks for the same products again and again
def _work_of_step(
    step: int, n: float, k: float, curve: GemmCurve, multiprocessors: float, rate: float, split_bytes_s: float,
    tiling: Tiling,
) -> float:  # fmt: skip
    """One entry of :func:`_work_of_rows`. [s]"""
    if step == 0:
        return 0.0
    rows, columns, depth = (np.array([float(x)]) for x in (step * tiling.step, n, k))
    waves = tile_waves(rows, columns, multiprocessors, tiling)
    return float(tile_work(waves, rows, columns, depth, curve, split_bytes_s, rate / multiprocessors, tiling)[0])


def grouped_waves(
    rows_per_group: Array, groups: Array, n: Array, multiprocessors: float, further: float | Array = 0.0
) -> Array:
    """Waves of every tile, [rows, tiles], of grouped products with just so many rows in each group, and ``further`` in one more."""
    high = groups[:, None] * np.ceil(rows_per_group[:, None] / _GM) + np.ceil(np.asarray(further)[..., None] / _GM)
    waves: Array = np.ceil(high * np.ceil(n[:, None] / _GN) / multiprocessors)
    return waves


def grouped_work(waves: Array, k: Array, curve: GroupedCurve, rate: float) -> Array:
    """Compute time of grouped products, the least over tiles. [s]"""
    area = _GM * _GN + curve.tile
    least: Array = (waves * area).min(axis=1) * (k + curve.depth) * (2 / rate)
    return least


def grouped_compute_s(
    visits: Number,
    groups: Number,
    n: float,
    k: float,
    curve: GroupedCurve,
    *,
    peak_flops_per_s: float,
    multiprocessors: float,
) -> Number:
    """Compute time of ``visits`` rows spread over ``groups`` matrices of ``[k, n]`` as routing scatters them. [s]

    Loads that scatter touch half a tile more than their mean on average, and so does the last wave; the time is at least
    that of the bare products at the curve's rate.

    >>> curve = GroupedCurve(peak=0.8, hbm=0.8, launch_s=0.0)
    >>> round(1e6 * grouped_compute_s(4096.0, 8.0, 4096, 4096, curve, peak_flops_per_s=989e12, multiprocessors=132))
    176
    """
    rate = peak_flops_per_s * curve.peak / multiprocessors
    if isinstance(visits, np.ndarray) or isinstance(groups, np.ndarray):
        return _work_of_groups(visits, groups, n, k, curve, multiprocessors, rate)
    return _work_of_loads(float(visits), float(groups), n, k, curve, multiprocessors, rate)


@lru_cache(maxsize=65536)  # as for _work_of_step
def _work_of_loads(
    visits: float, groups: float, n: float, k: float, curve: GroupedCurve, multiprocessors: float, rate: float
) -> float:
    return float(_work_of_groups(visits, groups, n, k, curve, multiprocessors, rate))


def _work_of_groups(
    visits: Number, groups: Number, n: float, k: float, curve: GroupedCurve, multiprocessors: float, rate: float
) -> Number:
    best: Number = np.inf
    for rows, columns in GROUPED_TILES:
        full = visits * (1 / rows)
        tiles = np.maximum(groups, full + 0.5 * np.minimum(groups, full))
        waves = np.maximum(1.0, tiles * (ceil(n / columns) / multiprocessors) + 0.5)
        best = np.minimum(best, waves * (rows * columns + curve.tile))
    floor = visits * (2 * n * k / (rate * multiprocessors))
    return present(visits) * np.maximum(best * ((k + curve.depth) * (2 / rate)), floor)


def spilled_share(moved_bytes: Number, room_bytes: float) -> Number:
    """Share of inputs and outputs that find no place in ``room_bytes`` of on-die memory: none well below its size, all well above.

    >>> [round(float(spilled_share(x, 100.0)), 3) for x in (0.0, 50.0, 100.0, 200.0)]
    [0.0, 0.004, 0.5, 0.996]
    """
    if room_bytes == 0:
        return present(moved_bytes)
    over: Number = np.minimum(moved_bytes / room_bytes, 100.0) ** 8
    return over / (1 + over)


def memory_s(moved_bytes: Number, fill_bytes: Number, hbm: float, hbm_bytes_per_s: float) -> Number:
    """Time to move bytes, those needed to fill the memory's pipeline included. [s]"""
    return (moved_bytes + fill_bytes) / (hbm_bytes_per_s * hbm)


def collective_s(transfer_s: Number, curve: CollectiveCurve) -> Number:
    """Time of a collective whose messages take ``transfer_s`` at the full link rate; 0 for none. [s]

    The faster of two ways, where there are two: the short one, or, after setting up, the long one.

    >>> collective_s(0.0, CollectiveCurve(5e-6, 0.7))
    0.0
    >>> [round(1e6 * collective_s(x, CollectiveCurve(5e-6, 1.0, direct=2.0, setup_s=20e-6))) for x in (10e-6, 20e-6, 30e-6)]
    [25, 45, 55]
    """
    latency, transfer = present(transfer_s) * curve.latency_s, transfer_s / curve.link
    joined = soft_max(latency, transfer, curve.sharpness)
    if curve.direct:
        joined = np.minimum(latency + curve.direct * transfer_s, present(transfer_s) * curve.setup_s + joined)
    return joined if isinstance(transfer_s, np.ndarray) else float(joined)
