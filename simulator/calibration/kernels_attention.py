"""What tables of attention's times are fitted with: whole prompts, and single tokens by how kernels deal their keys out.

The models are those of :mod:`simulator.roofline.attention_times`, on the shapes that were measured: prices average over what
depends on the last tile of a length.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from simulator.calibration.kernels_problems import (
    FORMATS,
    KV_BYTES,
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
from simulator.catalog.kernel_curves import SCHEDULES, DecodeCurve, KernelOp, PrefillCurve, Schedule
from simulator.roofline.attention_times import (
    QUERY_TILE,
    block_key_s,
    busiest_s,
    deal,
    decode_blocks,
    padded_heads,
)
from simulator.roofline.kernel_times import soft_max

MLA_LATENT, MLA_ROPE, MLA_QK, MLA_V = 512, 64, 192, 128
"""DeepSeek's latent attention: cached values per token, and widths of an expanded head."""
SCHEDULE_WORTH = 0.7
"""Loss of a fit with a schedule, relative to that without, below which it is taken."""
MOST_HEADS_PER_KV_HEAD = 16
"""Beyond this some frameworks fall back to another kernel, which few models need."""
LEAST_ROWS = 120
"""Rows of one width of heads from which it is fitted on its own."""
LEAST_MULTIPROCESSORS = 16
"""Chips with fewer are no GPUs, and the schedules are GPU libraries'."""
OTHER_KERNEL_UNSHARED = frozenset({"trtllm"})
"""Frameworks that send query heads which share no keys to a kernel of its own (TensorRT-LLM: masked multi-head attention)."""


def attention_problems(chip: ChipSpec, table: Table) -> Iterator[Problem]:
    """The curves of one table of attention: one for each format and width of heads that there is enough of."""
    for dtype, kv_dtype in table.groups("dtype", "kv_dtype"):
        if not has_peak(chip, dtype) or kv_dtype not in KV_BYTES:
            continue
        of = table.where((table.columns["dtype"] == dtype) & (table.columns["kv_dtype"] == kv_dtype))
        if table.kind.endswith("prefill"):
            for width, rows in _widths(of):
                yield replace(_prefill(chip, rows, dtype, kv_dtype), head_dim=width)
            continue
        for op, some in _kernels(of):
            for width, rows in _widths(some):
                yield _decode(chip, rows, dtype, kv_dtype, op, width)


def _kernels(table: Table) -> Iterator[tuple[KernelOp, Table]]:
    """A table of decode attention by kernel."""
    if table.kind == "mla_decode":
        yield "mla_decode", table
        return
    shared = table.columns["heads"] > table.columns["kv_heads"]
    if table.framework not in OTHER_KERNEL_UNSHARED or min(shared.sum(), (~shared).sum()) < LEAST_ROWS:
        yield "attention_decode", table
        return
    yield "attention_decode", table.where(shared)
    yield "mha_decode", table.where(~shared)


def _widths(table: Table) -> list[tuple[int, Table]]:
    """A table of attention by width of heads, if there is enough of each; latent attention has one, and is 0."""
    widths = table.columns.get("head_dim")
    if widths is None or np.unique(widths, return_counts=True)[1].min() < LEAST_ROWS:
        return [(0, table)]
    return [(int(width), table.where(widths == width)) for width in np.unique(widths)]


def _prefill(chip: ChipSpec, table: Table, dtype: str, kv_dtype: str) -> Problem:
    """Attention of whole prompts: pairs, softmax, the last tile's walk, and reading and writing of tokens."""
    fmt = FORMATS[dtype][0]
    peak, hbm, units = chip.peak_flops_per_s(fmt), chip.hbm_bandwidth_bytes_per_s, chip.multiprocessor_count
    rows = table.columns
    time, batch, seq, heads = (rows[name] for name in ("latency_s", "batch", "seq", "heads"))
    if table.kind == "mla_prefill":
        op: KernelOp = "mla_prefill"
        kv_heads, flops, width = (
            np.ones_like(heads),
            2.0 * heads * (MLA_QK + MLA_V),
            (MLA_QK + MLA_V) / 2 * np.ones_like(heads),
        )
        key_bytes = (MLA_LATENT + MLA_ROPE) * KV_BYTES[kv_dtype] + heads * (MLA_QK - MLA_ROPE + MLA_V) * 2.0
        token_bytes = heads * 2.0 * (2 * MLA_QK + 2 * MLA_V)
        shape, by = numbered(heads), "heads"
    else:
        op, kv_heads, width = "attention_prefill", rows["kv_heads"], rows["head_dim"]
        flops, key_bytes = 4.0 * heads * width, 2 * kv_heads * width * KV_BYTES[kv_dtype]
        token_bytes = wide_bytes(dtype) * 2 * heads * width + key_bytes
        shape, by = numbered(heads, kv_heads, width), "head configurations (heads, kv_heads, head_dim)"
    history = rows.get("history", np.zeros_like(seq))
    pairs, tokens = batch * seq * (history + (seq + 1) / 2), batch * seq
    few = heads / kv_heads <= MOST_HEADS_PER_KV_HEAD if op == "attention_prefill" else np.ones(len(time), dtype=bool)
    fast = pairs * flops / peak > time
    keep = np.flatnonzero(few & ~fast)

    def model(values: Values, among: Rows) -> Array:
        c, at = PrefillCurve(**values), keep[among]
        products = pairs[at] * (flops[at] + 4 * heads[at] * c.softmax) / (peak * c.peak)
        walk = c.serial * 4 * QUERY_TILE * width[at] * units / peak
        keys = (history + seq)[at] * np.maximum(walk, key_bytes[at] / hbm)
        return np.asarray(c.launch_s + products + keys + c.traffic * tokens[at] * token_bytes[at] / hbm)

    free = (
        Parameter("peak", 0.6, 0.02, 1),
        Parameter("softmax", 20, 0.1, 500),
        Parameter("launch_s", 8e-6, 1e-7, 2e-4),
        Parameter("serial", 0.5, 0.001, 50),
        Parameter("traffic", 1.5, 1, 100),
    )
    return Problem(
        op,
        dtype,
        kv_dtype,
        table.framework,
        time[keep],
        model,
        free,
        {},
        shape[keep],
        by,
        steps(seq[keep], "seq", 64, 512, 2048, 8192),
        left_out=len(time) - len(keep),
        why=f"more than {MOST_HEADS_PER_KV_HEAD} query heads per KV head, or faster than the format's peak"
        if len(keep) < len(time)
        else "",
    )


def _decode(chip: ChipSpec, table: Table, dtype: str, kv_dtype: str, op: KernelOp, head_dim: int) -> Problem:
    """Attention of single tokens: reading keys, a ramp, and work per sequence and head; or keys dealt to blocks by a schedule."""
    fmt = FORMATS[dtype][0]
    peak, hbm, units = chip.peak_flops_per_s(fmt), chip.hbm_bandwidth_bytes_per_s, chip.multiprocessor_count
    cache_bytes = quantity_si(chip.memory.on_chip) or 0.0
    rows = table.columns
    time, batch, length, heads = (rows[name] for name in ("latency_s", "batch", "kv_len", "heads"))
    latent = op == "mla_decode"
    if latent:
        kv_heads, width = np.ones_like(heads), np.full_like(heads, MLA_LATENT + MLA_ROPE / 2)
        key_bytes = (MLA_LATENT + MLA_ROPE) * KV_BYTES[kv_dtype] * np.ones_like(heads)
        shape, by, few = numbered(heads), "heads", np.ones(len(time), dtype=bool)
    else:
        kv_heads, width = rows["kv_heads"], rows["head_dim"]
        key_bytes = 2 * kv_heads * width * KV_BYTES[kv_dtype]
        shape, by = numbered(heads, kv_heads, width), "head configurations (heads, kv_heads, head_dim)"
        few = heads / kv_heads <= MOST_HEADS_PER_KV_HEAD
    padded = np.array(
        [padded_heads(h, k, matrix_units=chip.has_matrix_units) for h, k in zip(heads, kv_heads, strict=True)]
    )
    keys = batch * length
    read = keys * key_bytes
    flops = 4 * keys * padded * width
    blocks = batch * np.asarray(decode_blocks(heads, kv_heads, latent=latent))
    keep = np.flatnonzero(few)

    def inside(c: DecodeCurve, at: Rows) -> Array:
        """Share of reads that came from the on-die memory."""
        if not (cache_bytes and c.resident):
            return np.zeros(len(at))
        return np.asarray(1 / (1 + (read[at] / (c.resident * cache_bytes)) ** 8))

    def loads(
        values: Values, among: Rows, schedule: Schedule = ""
    ) -> tuple[DecodeCurve, Rows, Array, Array, Array, Array]:
        """The curve, its rows, and their times of reading, of multiplying, of the ramp and of what has neither keys nor ramp."""
        c, at = DecodeCurve(**dict(values), schedule=schedule), keep[among]
        ramp = c.ramp_s * np.minimum(1.0, read[at] / c.ramp_bytes)
        each = batch[at] * (kv_heads[at] * c.kv_head_s + heads[at] * c.head_s)
        return c, at, read[at] / (hbm * c.hbm), flops[at] / (peak * c.peak), ramp, c.launch_s + each

    def even(values: Values, among: Rows) -> Array:
        c, at, reading, products, ramp, rest = loads(values, among)
        near = inside(c, at)
        return np.asarray(
            rest + np.maximum((1 - near) * (reading + ramp) + near * reading / c.resident_speed, products + ramp)
        )

    def dealt_by(schedule: Schedule) -> Problem:
        dealt = deal(schedule, blocks[keep], length[keep], units)

        def model(values: Values, among: Rows) -> Array:
            c, at, reading, products, ramp, rest = loads(values, among, schedule)
            some, near = dealt.at(among), inside(c, at)
            load = (1 - near) * np.maximum(reading, products) + near * np.maximum(reading / c.resident_speed, products)
            key_s = block_key_s(width[at], c)
            work = soft_max(busiest_s(some, key_s, c), load, c.sharpness)
            return np.asarray(rest + ramp + work + c.split_s * some.split)

        of_blocks = [
            Parameter("item_s", 1e-6, 1e-9, 1e-4),
            Parameter("walk_s", 5e-9, 1e-12, 1e-6),
            Parameter("pair", 1.5, 1, 2),
        ]
        if schedule != "whole":
            of_blocks.append(Parameter("split_s", 3e-6, 1e-8, 1e-4))
        return replace(
            plain,
            model=model,
            free=(*(p for p in plain.free if latent or p.name not in {"kv_head_s", "peak"}), *of_blocks),
            held={"peak": 1.0, **plain.held},  # of plain attention the products are in the walk
            choices=("sharpness", SHARPNESS),
            schedule=schedule,
        )

    free = [
        Parameter("hbm", 0.85, 0.05, 1),
        Parameter("peak", 0.2, 0.005, 1),
        Parameter("launch_s", 8e-6, 1e-7, 1e-4),
        Parameter("ramp_s", 5e-6, 1e-8, 1e-4),
        Parameter("ramp_bytes", 1e7, 1e6, 1e9),
        Parameter("head_s", 1e-9, 1e-11, 1e-6),
    ]
    if not latent:
        free.append(Parameter("kv_head_s", 1e-8, 1e-11, 1e-6))
    if cache_bytes:
        free += [Parameter("resident", 0.8, 0.1, 2), Parameter("resident_speed", 3, 1, 10)]
    plain = Problem(
        op,
        dtype,
        kv_dtype,
        table.framework,
        time[keep],
        even,
        tuple(free),
        {
            "kv_head_s": 0.0,
            "resident": 0.0,
            "resident_speed": 1.0,
            "item_s": 0.0,
            "walk_s": 0.0,
            "pair": 2.0,
            "split_s": 0.0,
            "sharpness": 1.0,
        },
        shape[keep],
        by,
        steps(read[keep], "bytes", 1e6, 1e7, 1e8, 1e9),
        head_dim=head_dim,
        left_out=len(time) - len(keep),
        why=f"more than {MOST_HEADS_PER_KV_HEAD} query heads per KV head: often another kernel"
        if len(keep) < len(time)
        else "",
    )
    many = chip.has_matrix_units and units >= LEAST_MULTIPROCESSORS
    others = tuple(dealt_by(name) for name in SCHEDULES if name) if many else ()
    return replace(plain, others=others, worth=SCHEDULE_WORTH)
