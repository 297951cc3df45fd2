"""What each table of kernel times is fitted with: rows → problems of a few parameters on one chip.

A problem is one op in one format: its rows, the model of :mod:`simulator.roofline.kernel_times` that prices them, which
parameters are free, and which rows belong to one shape. Formats' bytes and the chip format whose peak they run at are below.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from simulator.calibration.kernels_attention import attention_problems
from simulator.calibration.kernels_problems import (
    FORMATS,
    SHARPNESS,
    Array,
    Problem,
    Rows,
    Values,
    has_peak,
    numbered,
    steps,
    wide_bytes,
)
from simulator.calibration.kernels_tables import Table
from simulator.calibration.regression import Parameter
from simulator.catalog.chips import ChipSpec, quantity_si
from simulator.catalog.kernel_curves import CollectiveCurve, GemmCurve, GroupedCurve, VectorCurve
from simulator.roofline.kernel_times import (
    collective_s,
    grouped_waves,
    grouped_work,
    soft_max,
    spilled_share,
    tile_waves,
    tile_work,
    tiling_of,
)

LEAST_SHARE = 0.2
"""Of a row's time, what is left at least when measured parts are taken off."""
LARGE_ON_CHIP_S = 5e-5
"""On-die memory that HBM takes so long to fill holds whole inputs and outputs of products. Larger than that of H100, A100 and B200 (15
to 20 us), whose times grow evenly with the rows; on L40S and RTX PRO 6000 (111 and 71 us) they jump where this memory is full."""
ON_CHIP_WORTH = 0.85
"""Loss of a fit with the parameters of a large on-die memory, relative to that without, below which they are taken."""
SHORT_WAY_WORTH = 0.7
"""Loss of a collective's fit with a short way for small messages, relative to that without, below which it is taken."""
ROWS_PER_SIZE = 4
"""Rows for each parameter of a collective with two ways: one message size a row, from bytes to gigabytes, and little noise."""
MULTIPLIES_ALL_SELECTIONS = frozenset({"sglang"})
"""Frameworks whose tables, with experts spread over chips, hold products of every selection of a token that comes to the measured
chip. Selections of other chips' experts are marked in the input [1]_, and the times are those of products all the same: at 16,384
tokens they are 1, 1/2, 1/4 of those of all selections on 8, 16, 32 chips with 8 selections a token. A server skips them.

.. [1] ai-dynamo/aiconfigurator, collector/helper.py, ``build_rank0_local_workload``.
"""
LEAST_VECTORS = 5
"""Products of one row that a curve of their own takes."""


def problems(chip: ChipSpec, tables: list[Table]) -> Iterator[Problem]:
    """Every curve that the tables of one chip can fix; formats the chip has no peak for are passed over."""
    quantisation: dict[str, list[Table]] = {}
    for table in tables:
        if table.kind.startswith("act_quant_"):
            quantisation.setdefault(table.framework, []).append(table)
    for table in tables:
        match table.kind:
            case "gemm":
                for (dtype,) in table.groups("dtype"):
                    if has_peak(chip, dtype):
                        yield from _products(chip, table, dtype, quantisation.get(table.framework, []))
            case "moe":
                for (dtype,) in table.groups("dtype"):
                    if has_peak(chip, dtype):
                        yield _moe(chip, table, dtype)
            case "attention_prefill" | "mla_prefill" | "attention_decode" | "mla_decode":
                yield from attention_problems(chip, table)
            case "comm":
                yield from _collectives(chip, table)
            case _:
                pass


def _products(chip: ChipSpec, table: Table, dtype: str, quantisation: list[Table]) -> Iterator[Problem]:
    """All products; without matrix units those of one row apart, where enough of both kinds were measured."""
    own, one = table.columns["dtype"] == dtype, table.columns["m"] == 1
    if chip.has_matrix_units or min((own & one).sum(), (own & ~one).sum()) < LEAST_VECTORS:
        yield _gemm(chip, table, dtype, quantisation)
        return
    yield _gemv(chip, table.where(one), dtype)
    yield _gemm(chip, table.where(~one), dtype, quantisation)


def _gemv(chip: ChipSpec, table: Table, dtype: str) -> Problem:
    """Products of one row: the weights are read once, and nothing waits for arithmetic."""
    _, weight_bytes, input_bytes = FORMATS[dtype]
    hbm = chip.hbm_bandwidth_bytes_per_s
    rows = table.where(table.columns["dtype"] == dtype).columns
    n, k, time = rows["n"], rows["k"], rows["latency_s"]
    moved = n * k * weight_bytes + k * input_bytes + n * wide_bytes(dtype)
    keep = np.flatnonzero(time >= n * k * weight_bytes / hbm)

    def model(values: Values, among: Rows) -> Array:
        c, at = VectorCurve(**values), keep[among]
        return np.asarray(c.launch_s + (moved[at] + n[at] * c.depth * weight_bytes) / (hbm * c.hbm))

    free = (
        Parameter("hbm", 0.8, 0.01, 1),
        Parameter("launch_s", 2e-6, 1e-7, 1e-3),
        Parameter("depth", 50, 0.1, 5000),
    )
    return Problem(
        "gemv",
        dtype,
        "",
        table.framework,
        time[keep],
        model,
        free,
        {},
        numbered(n, k)[keep],
        "weight shapes (n, k)",
        steps(moved[keep], "bytes", 1e6, 1e7, 1e8),
        left_out=len(time) - len(keep),
        why="weights read faster than HBM can: they came from the on-die memory" if len(keep) < len(time) else "",
    )


def _gemm(chip: ChipSpec, table: Table, dtype: str, quantisation: list[Table]) -> Problem:
    """Products by tiles, waves and bandwidth; shapes some row of which was read faster than HBM can are cache-resident.

    Rows of fp8 hold the kernels that quantise the input with a scale per tensor. Engines fuse these into the op before, so
    their measured times are taken off; formats with a scale per block keep theirs.
    """
    fmt, weight_bytes, input_bytes = FORMATS[dtype]
    peak, hbm, units = chip.peak_flops_per_s(fmt), chip.hbm_bandwidth_bytes_per_s, chip.multiprocessor_count
    rows = table.where(table.columns["dtype"] == dtype).columns
    m, n, k, time = rows["m"], rows["n"], rows["k"], rows["latency_s"]
    why = ""
    if dtype == "fp8":
        time = np.maximum(time - sum(_table_times(scales, m, k) for scales in quantisation), LEAST_SHARE * time)
    shape = numbered(n, k)
    bound = np.maximum(2 * m * n * k / peak, n * k * weight_bytes / hbm)
    keep = ~np.isin(shape, shape[time < bound])
    left_out = int((~keep).sum())
    if left_out:
        why = "weights that some row reads faster than HBM can: they came from the on-die memory"
    m, n, k, time, shape = m[keep], n[keep], k[keep], time[keep], shape[keep]
    tiling = tiling_of(matrix_units=chip.has_matrix_units)
    tops = np.ceil(m / tiling.step) * tiling.step
    waves = tile_waves(tops, n, units, tiling)
    weights, moved = n * k * weight_bytes, m * k * input_bytes + m * n * wide_bytes(dtype)
    quantised = dtype not in {"float32", "bfloat16", "int8_wo", "int4_wo"} and not (dtype == "fp8" and quantisation)

    # What quantises reads 16 bits and writes the input.
    held = moved + (2.0 * m * k if quantised else 0.0)
    on_chip_bytes = quantity_si(chip.memory.on_chip) or 0.0

    def model(values: Values, at: Rows) -> Array:
        c = GemmCurve(**values)
        compute = tile_work(waves[at], tops[at], n[at], k[at], c, 1 / (hbm * c.hbm), peak * c.peak / units, tiling)
        out = spilled_share(held[at], c.resident * on_chip_bytes) if c.resident else np.zeros(len(at))
        inside = 1 / c.resident_speed if c.resident else 1.0
        memory = (weights[at] + moved[at] * (out + (1 - out) * inside) + c.fill_bytes) / (hbm * c.hbm)
        quantise = (m * k)[at] * (c.quantise + c.spill * out) / hbm + m[at] * c.row_s
        return np.asarray(c.launch_s + quantise + soft_max(compute, memory, c.sharpness))

    free = [
        Parameter("peak", 0.85, 0.05, 1),
        Parameter("hbm", 0.8, 0.05, 1),
        Parameter("launch_s", 2e-6, 1e-7, 1e-4),
        Parameter("fill_bytes", 1e5, 1e3, 1e8),
        Parameter("depth", 100, 1, 5000),
        Parameter("tile", 1000, 10, 1e5),
        Parameter("split_s", 2e-6, 1e-8, 1e-4),
    ]
    if quantised:
        free.append(Parameter("quantise", 3, 0.01, 100))
    optional: list[Parameter] = []
    if chip.has_matrix_units and on_chip_bytes > LARGE_ON_CHIP_S * hbm:
        if quantised:
            optional += [Parameter("spill", 1, 0.001, 100), Parameter("row_s", 1e-9, 1e-13, 1e-6)]
        optional += [Parameter("resident", 0.9, 0.1, 2), Parameter("resident_speed", 3, 1, 10)]
    problem = Problem(
        "gemm",
        dtype,
        "",
        table.framework,
        time,
        model,
        tuple(free),
        {"quantise": 0.0, "spill": 0.0, "row_s": 0.0, "resident": 0.0, "resident_speed": 1.0},
        shape,
        "weight shapes (n, k)",
        steps(m, "m", 1, 64, 512, 4096),
        ("sharpness", SHARPNESS),
        left_out=left_out,
        why=why,
    )
    if not optional:
        return problem
    return replace(problem, others=(replace(problem, free=(*free, *optional)),), worth=ON_CHIP_WORTH)


def _table_times(scales: Table, m: Array, k: Array) -> Array:
    """Times of a table over m and k, interpolated in their logarithms. [s]"""
    cm, ck, ct = (scales.columns[name] for name in ("m", "k", "latency_s"))
    heights, widths = np.unique(cm), np.unique(ck)
    grid = np.full((len(heights), len(widths)), np.nan)
    grid[np.searchsorted(heights, cm), np.searchsorted(widths, ck)] = np.log(ct)
    for column in grid.T:  # a few rows are below the clock's resolution
        seen = np.isfinite(column)
        if seen.any():
            column[~seen] = np.interp(np.log(heights[~seen]), np.log(heights[seen]), column[seen])
    at_height = np.array([np.interp(np.log(m), np.log(heights), column) for column in grid.T])
    x = np.clip(np.interp(np.log(k), np.log(widths), np.arange(len(widths))), 0, len(widths) - 1)
    low = np.minimum(x.astype(np.int64), len(widths) - 2) if len(widths) > 1 else np.zeros(len(x), dtype=np.int64)
    share = x - low
    rows = np.arange(len(m))
    high = np.minimum(low + 1, len(widths) - 1)
    return np.asarray(np.exp((1 - share) * at_height[low, rows] + share * at_height[high, rows]))


def _moe(chip: ChipSpec, table: Table, dtype: str) -> Problem:
    """One layer's routed experts: two grouped products, and gathering, activating and summing between them."""
    fmt, weight_bytes, input_bytes = FORMATS[dtype]
    peak, hbm, units = chip.peak_flops_per_s(fmt), chip.hbm_bandwidth_bytes_per_s, chip.multiprocessor_count
    every = table.columns
    rows = table.where((every["dtype"] == dtype) & (every["distribution"] == "balanced")).columns
    time, n, D, F = rows["latency_s"], rows["tokens"], rows["hidden"], rows["inter"] / rows["tp"]
    experts = rows["experts"] / rows["ep"]
    visits = np.maximum(1.0, n * rows["topk"] / rows["ep"])
    touched = np.minimum(experts, visits)
    others = np.zeros_like(visits)
    if table.framework in MULTIPLIES_ALL_SELECTIONS:
        others = np.maximum(0.0, n * rows["topk"] * np.minimum(1.0, rows["topk"] / rows["ep"]) - visits)
    wide = (1 + rows["gated"]) * F
    shape = numbered(D, rows["inter"], rows["experts"])
    up, down = (grouped_waves(visits / touched, touched, cols, units, others) for cols in (wide, D))
    weights = [touched * D * columns * weight_bytes for columns in (wide, F)]
    every_row = visits + others
    inputs = [every_row * (D * input_bytes + 2 * wide), every_row * (F * input_bytes + 2 * D)]
    other = every_row * 2 * (wide + F) + (every_row + n) * 2 * D
    bound = np.maximum(2 * visits * D * (wide + F) / peak, sum(weights) / hbm)
    keep = np.flatnonzero(time >= bound)

    def model(values: Values, among: Rows) -> Array:
        c, at = GroupedCurve(**values), keep[among]
        total = c.launch_s + c.expert_s * experts[at] + c.traffic * other[at] / hbm
        for waves, depth, weight, moved in ((up, D, weights[0], inputs[0]), (down, F, weights[1], inputs[1])):
            compute = grouped_work(waves[at], depth[at], c, peak * c.peak / units)
            memory = (weight[at] + moved[at] + c.fill_bytes) / (hbm * c.hbm)
            total = total + soft_max(compute, memory, c.sharpness)
        return np.asarray(total)

    free = (
        Parameter("peak", 0.7, 0.05, 1),
        Parameter("hbm", 0.8, 0.05, 1),
        Parameter("launch_s", 1.5e-5, 1e-6, 3e-4),
        Parameter("fill_bytes", 1e6, 1e3, 1e8),
        Parameter("depth", 100, 0.1, 5000),
        Parameter("tile", 1000, 1, 1e6),
        Parameter("traffic", 2, 1, 100),
        Parameter("expert_s", 1e-7, 1e-10, 1e-5),
    )
    return Problem(
        "moe",
        dtype,
        "",
        table.framework,
        time[keep],
        model,
        free,
        {},
        shape[keep],
        "(hidden, inter, experts)",
        steps(n[keep], "tokens", 1, 64, 512, 4096),
        ("sharpness", SHARPNESS),
        left_out=len(time) - len(keep),
        why="faster than weights can be read from HBM" if len(keep) < len(time) else "",
    )


_SHARES: dict[str, Callable[[float], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
}
"""Part of the buffer that crosses a chip's link."""


def _collectives(chip: ChipSpec, table: Table) -> Iterator[Problem]:
    """Latency and link rate of each collective, framework and number of chips; captured calls only."""
    if chip.scale_up is None:
        return
    link = chip.scale_up.achievable or chip.scale_up.bandwidth
    rate = link.si(f"{chip.name}: scale_up.bandwidth", "bytes/s")
    every = table.columns
    impl = np.array([_framework(name) for name in every["impl"]])
    for op in _SHARES:
        for framework in sorted({*impl[every["collective"] == op]} - {""}):
            for chips in sorted({*every["num_gpus"]}):
                keep = (every["collective"] == op) & (impl == framework) & (every["num_gpus"] == chips)
                if keep.sum() >= 8:
                    yield _collective(op, framework, int(chips), table.where(keep), rate)


def _framework(impl: str) -> str:
    """The framework of an implementation; empty for calls that were not captured in a graph."""
    if impl.endswith("_eager"):
        return ""
    return impl.split("_", maxsplit=1)[0].lower()


def _collective(op: str, framework: str, chips: int, table: Table, rate: float) -> Problem:
    """One collective. Small messages may go a short way of their own: NCCL's protocol of flagged words, or an all-reduce in one shot."""
    bytes_, time = table.columns["bytes"], table.columns["latency_s"]
    transfer = bytes_ * _SHARES[op](chips) / rate

    def model(values: Values, at: Rows) -> Array:
        return np.asarray(collective_s(transfer[at], CollectiveCurve(**values)))

    free = (
        Parameter("latency_s", float(np.clip(time.min(), 2e-7, 1e-3)), 1e-7, 1e-2),
        Parameter("link", 0.5, 0.001, 1),
        Parameter("sharpness", 0.7, 0.3, 8),
    )
    short = (Parameter("direct", chips / 2, 1, 100), Parameter("setup_s", 1e-5, 1e-8, 1e-2))
    kind = next(name for name in _SHARES if name == op)
    problem = Problem(
        kind,  # type: ignore[arg-type]  # a key of _SHARES, each a KernelOp
        "",
        "",
        framework,
        time,
        model,
        free,
        {"direct": 0.0, "setup_s": 0.0},
        numbered(bytes_),
        "message sizes",
        steps(bytes_, "bytes", 1e5, 1e7),
        chips=chips,
    )
    return replace(
        problem,
        others=(replace(problem, free=(*free, *short), rows_per_parameter=ROWS_PER_SIZE),),
        worth=SHORT_WAY_WORTH,
    )
