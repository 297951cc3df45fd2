"""The arrays that an engine starts from: its state, its prefix cache, its speculation; from settings and requests."""

import numpy as np
from numpy.typing import NDArray

from simulator.engine import block_runs, core, speculation, tiers
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import (
    EngineSettings,
    Requests,
)
from simulator.roofline.step_cost import StepCost

TIMELINE_INTERVALS = 1024


def new_cache(
    hashes: BlockHashes | None, settings: EngineSettings, requests: Requests, log_size: int, *, by_epoch: bool
) -> block_runs.Cache:
    """An empty prefix cache; ``log_size`` as for :class:`~simulator.engine.single.Engine`, ``by_epoch`` in a pipeline."""
    parts, longest, counts, lengths = 1, 1, None, (requests.prompt_tokens, requests.output_tokens)
    late = (
        settings.prefix_cache == "blocks"
        and settings.speculation is None
        and hashes is not None
        and hashes.covers_output
    )
    if hashes is not None:
        blocks_of_id = hashes.block_tokens // settings.block_size
        if settings.tiers or not 0 < blocks_of_id < 1 << block_runs.PART_BITS:
            hashes = hashes.at_block_size(settings.block_size, *lengths)
        else:  # blocks of one id, and of those that follow it, stay together as far as they are
            parts, counts, hashes = blocks_of_id, hashes.counts_at(settings.block_size, *lengths), hashes.renumbered()
            longest = 1 if late else max(1, block_runs.LONG_UNIT // parts)
    return block_runs.new_cache(
        hashes,
        num_blocks=settings.num_kv_blocks,
        max_num_seqs=settings.max_num_seqs,
        block_size=settings.block_size,
        n=len(requests),
        groups=settings.kv_groups,
        parts=parts,
        longest=longest,
        counts=counts,
        radix=settings.prefix_cache == "radix",
        prompts_first=settings.scheduling.batching in {"prefill_first", "static"},
        late=late,
        by_epoch=by_epoch,
        tiers=settings.tiers,
        log_size=log_size,
    )


def warm_store(cache: block_runs.Cache, requests: Requests) -> None:
    """F10: let the last tier hold the leading prompt blocks that requests say are stored, of each the last first."""
    if requests.stored_tokens is None:
        return
    stored = np.minimum(requests.stored_tokens, requests.prompt_tokens) // cache.block_size
    blocks = np.minimum(stored, np.diff(cache.offsets))
    last = np.repeat(cache.offsets[:-1] + blocks - 1, blocks)
    tiers.warm_up(cache.tiers, cache.ids[last - (np.arange(len(last)) - np.repeat(np.cumsum(blocks) - blocks, blocks))])


def new_state(n: int, n_pending: int, settings: EngineSettings) -> core.State:
    """State before the first step of a replica of ``n`` requests, of which at most ``n_pending`` are on their way at a time."""
    m = settings.max_num_seqs
    ints = np.zeros(core.N_INTS, dtype=np.int64)
    ints[core.FREE_BLOCKS] = settings.num_kv_blocks
    ints[[core.FIRST, core.LAST, core.PARTIAL]] = -1
    ints[core.N_FREE_SLOTS] = m
    ints[core.STOP_ROW] = np.iinfo(np.int64).max

    slots = np.zeros((m, core.N_SLOT_COLUMNS), dtype=np.int64)
    slots[:, [core.FINISH_STEP, core.AFTER, core.BEFORE, core.EVENT_STEP]] = -1
    slots[:, core.FREE_SLOT] = np.arange(m)[::-1]
    bits = np.zeros(1)
    return core.State(
        ints=ints,
        floats=np.zeros(core.N_FLOATS),
        fifo=np.zeros(n, dtype=np.int64),
        pending_time=np.zeros(n_pending + 1),
        pending_row=np.zeros(n_pending + 1, dtype=np.int64),
        heap=np.zeros(2 * m + 2, dtype=np.int64),
        residues=np.zeros(settings.block_size * (3 if settings.kv_groups.windowed else 1), dtype=np.int64),
        row=np.zeros(m, dtype=np.int64),
        slots=slots,
        sums=np.zeros((m, core.N_SUMS)),
        events=np.zeros(2 * m + 2, dtype=np.int64),
        chunks=np.zeros((m, core.N_CHUNK_COLUMNS), dtype=np.int64),
        timeline=np.zeros((5, TIMELINE_INTERVALS)),
        bits_f=bits,
        bits_i=bits.view(np.int64),
    )


def new_spec(cost: StepCost, settings: EngineSettings, requests: Requests) -> speculation.Spec:
    """Tables and empty state of speculative decoding; ``on`` is False, and arrays are empty, without it."""
    plan = settings.speculation
    m = settings.max_num_seqs if plan is not None else 0
    ring = 1 << settings.block_size.bit_length()  # more than block_size
    n = len(requests) if plan is not None else 0

    def whole(table: NDArray[np.int64] | None, dimensions: int) -> NDArray[np.int64]:
        empty = np.zeros((0,) * dimensions, dtype=np.int64)
        return empty if table is None else np.ascontiguousarray(table, dtype=np.int64)

    def real(table: NDArray[np.float64] | None, dimensions: int) -> NDArray[np.float64]:
        return np.zeros((0,) * dimensions) if table is None else np.ascontiguousarray(table, dtype=np.float64)

    prices = None if plan is None else plan.cost
    levels = 0 if prices is None else len(prices.queries)
    columns = np.zeros((levels, speculation.N_LEVEL_COLUMNS))
    value = slope = curve = None
    if prices is not None:
        value = prices.value_s + prices.draft_value_s
        slope = prices.slope_s + prices.draft_slope_s
        curve = np.stack([prices.draft_value_s, prices.draft_slope_s])
        columns[:, speculation.QUERIES] = prices.queries
        columns[:, speculation.SEQ] = prices.seq_s
        columns[:, speculation.WINDOW_SLOPE] = prices.window_slope_s
    ring_of_none = np.zeros((speculation.N_RING_ROWS, ring), dtype=np.int64)
    ring_of_none[[speculation.TAKES, speculation.GIVES]] = -1
    slots = np.zeros((m, speculation.N_SLOT_COLUMNS), dtype=np.int64)
    slots[:, [speculation.NEED_STEP, speculation.EVENT_STEP]] = -1
    batch = speculation.Batch(
        ints=np.zeros(speculation.N_SPEC_INTS, dtype=np.int64),
        slots=slots,
        ring=ring_of_none,
        events=np.zeros(2 * m + 2, dtype=np.int64),
        lookahead=settings.lookahead,
        mask=ring - 1,
        block_size=settings.block_size,
        groups=settings.kv_groups.count,
        windowed=settings.kv_groups.windowed,
        window=cost.window,
        chunked=cost.window_chunked,
    )
    tariff = speculation.Tariff(
        levels=columns,
        value=real(value, 2),
        slope=real(slope, 2),
        draft_curve=real(curve, 3),
        draft=real(prices.draft_s if prices else None, 2),
        chunk=real(prices.chunk_s if prices else None, 1),
        floats=np.zeros(speculation.N_SPEC_FLOATS),
        v=np.zeros((m, 3)),
        wasted=np.zeros(n),
        passes=np.zeros((levels, m + 1), dtype=np.int64),
        keys=np.zeros((2, levels)),
        chunk_steps=np.zeros(settings.max_num_batched_tokens + 1 if plan else 0, dtype=np.int64),
    )
    return speculation.Spec(
        on=plan is not None,
        batch=batch,
        tariff=tariff,
        level_by_batch=whole(plan.levels(m, settings.max_num_batched_tokens) if plan else None, 1),
        rates=whole(plan.rates if plan else None, 2),
        classes=whole(requests.acceptance_class if plan else None, 1),
        fraction=np.zeros(n, dtype=np.int64),
    )
