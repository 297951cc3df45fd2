"""A run of the reference engine that is watched: its parts are asked as they go what special situations they meet."""

from collections import defaultdict

from simulator.engine.reference import Replica
from simulator.engine.reference_cache import BlockPool
from simulator.engine.reference_scheduler import Scheduler
from tests.engine.situations import (
    of_meetings,
    of_ranks,
    of_result,
    of_scheduling,
    of_speculation,
    of_stages,
    of_steps,
)
from tests.engine.strategies import Case


def watch(case: Case, interval_s: float | None = None):
    """Run the reference; return its result, its steps, and the names of what it met."""
    steps = []
    replica = Replica(*case, steps.append)
    met: set[str] = set()
    for scheduler in replica.schedulers:
        watch_cache(case, replica, scheduler, met)
        watch_swap(replica, scheduler, met)
        watch_tiers(replica, scheduler, met)
        watch_windows(replica, scheduler, met)
    watch_clients(replica, met)
    watch_idling(replica, met)
    replica.advance()
    result = replica.result(interval_s)
    by_rank = defaultdict(list)
    for step in steps:
        by_rank[step.rank].append(step)
    for own in by_rank.values():
        met |= of_steps(case, own) | of_scheduling(case, own)
    met |= of_result(case, result, steps) | of_speculation(case, result, steps) | of_ranks(case, steps)
    met |= of_stages(case, result, steps) | of_meetings(case, result, met)
    return result, steps, met


def watch_cache(case: Case, replica: Replica, scheduler: Scheduler, met: set[str]) -> None:
    """Note what the prefix cache of a scheduler meets."""
    pool, block_size = scheduler.pool, case.settings.block_size
    if not isinstance(pool, BlockPool):
        return
    lookup, share, publish, release, publish_at_end = (
        pool.lookup,
        pool.share,
        pool.publish,
        pool.release,
        pool.publish_at_end,
    )

    def watched_lookup(row, longest):
        hits, request = lookup(row, longest), replica.rows[row]
        if hits == longest > 0 and (longest + 1) * block_size == request.known:
            met.add("full hit")
        if request.preemptions:
            met.add("hit after preemption" if hits else "no hit after preemption")
        return hits

    def watched_share(row, tables, passed):
        blocks = [block for table in tables for block in table if block is not None]
        met.update("hit in use" if block.owners else "hit from the queue" for block in blocks)
        hits = len(tables[-1])
        if replica.rows[row].cached_tokens > hits * block_size > 0:
            met.add("stated cache longer than the hits")
        if hits:
            met.add(f"hit on rank {scheduler.rank}")
            if case.settings.scheduling.batching != "chunked":
                met.add("whole prompt shortened by a hit")
        share(row, tables, passed)

    def doubles():
        return sum(len(same) > 1 for same in pool.published.values())

    def watched_publish(row, full):
        before = doubles()
        publish(row, full)
        if doubles() > before:
            met.add("two blocks under one id")
        if full * block_size > replica.rows[row].prompt_tokens and full <= len(pool.ids[row]):
            met.add("output block published")

    def watched_release(row):
        shared = any(block is not None and block.owners > 1 for table in pool.tables.get(row, ()) for block in table)
        release(row)
        if shared:
            met.add("block kept by another")

    def watched_publish_at_end(row, full):
        before = [list(table) for table in pool.tables[row]]
        publish_at_end(row, full)
        if before != pool.tables[row]:
            met.add("own block replaced by one in the tree")
        if case.settings.prefix_cache == "radix" and pool.queue and pool.blank:
            met.add("blank blocks beside cached ones")

    watched = (watched_lookup, watched_share, watched_publish, watched_release, watched_publish_at_end)
    pool.lookup, pool.share, pool.publish, pool.release, pool.publish_at_end = watched
    if pool.groups.windowed:
        watch_window_of_cache(pool, met)


def watch_window_of_cache(pool: BlockPool, met: set[str]) -> None:
    """Note what windows make of the prefix cache (W7 to W11)."""
    lookup, leave, groups = pool.lookup, pool.leave, pool.groups

    def run_of(row, longest, group):
        ids = pool.ids[row][:longest]
        return next((i for i, block_id in enumerate(ids) if (group, block_id) not in pool.published), len(ids))

    def watched_lookup(row, longest):
        hits = lookup(row, longest)
        by_group = [run_of(row, longest, group) for group in range(groups.count)]
        if groups.full and hits < by_group[-1]:
            met.add("a hit cut by what windows have lost")
        if hits > min(by_group):
            met.add("a hit without the blocks before its window")
        if groups.windowed > 1 and len(set(by_group[: groups.windowed])) > 1:
            met.add("windowed groups that have lost different blocks")
        return hits

    def watched_leave(passed):
        for row, places in passed:
            left = [
                table[place]
                for table in pool.tables[row][: groups.windowed]
                for place in range(pool.passed[row], places)
            ]
            ids = {block.id != -1 for block in left if block is not None}
            if True in ids:
                met.add("a window leaves published blocks")
            if any(block is not None and block.owners > 1 for block in left):
                met.add("a window leaves what others own")
            if len(ids) > 1:
                met.add("a window leaves published and other blocks at once")
        leave(passed)

    pool.lookup, pool.leave = watched_lookup, watched_leave


def watch_swap(replica: Replica, scheduler: Scheduler, met: set[str]) -> None:
    """Note what is copied to the host and back."""
    host = scheduler.host
    if host is None:
        return
    copy_out, copy_in, delay_s, forget = host.copy_out, host.copy_in, host.delay_s, host.forget

    def watched_out(row, blocks):
        kept, request = copy_out(row, blocks), replica.rows[row]
        met.add("swapped out" if kept else "host full")
        if kept and request.in_prefill:
            met.add("swapped out in prefill")
        if kept and request.start > request.cached_tokens:
            met.add("swapped out with a hit")
        return kept

    def watched_in(row, blocks):
        met.add("swapped in")
        if blocks < host.held[row]:
            met.add("part of it still cached")
        if replica.settings.scheduling.policy != "fcfs":
            met.add("swapped in under a policy")
        if replica.settings.scheduling.watermark:
            met.add("swap with a watermark")
        copy_in(row, blocks)

    def watched_delay(device_s):
        found_s = delay_s(device_s)
        if len(host.copies) > 1:
            met.add("several copies in a step")
        if host.copies and host.settings.overlapped and host.settings.block_s:
            met.add("copies waited for" if found_s else "copies hidden")
        return found_s

    def watched_forget(row):
        if row in host.held:
            met.add("left while swapped out")
        forget(row)

    host.copy_out, host.copy_in, host.delay_s, host.forget = watched_out, watched_in, watched_delay, watched_forget


def watch_tiers(replica: Replica, scheduler: Scheduler, met: set[str]) -> None:
    """Note what moves between HBM and the tiers below it."""
    tiers = scheduler.tiers
    if tiers is None:
        return
    load, keep, put, count = tiers.load, tiers.keep, tiers.put, scheduler.pool.count_admission
    were_put: set[int] = set()
    at_start = set(tiers.held[-1])

    def watched_load(run, now_s):
        met.add("load")
        if len({tier for _, tier in run}) > 1:
            met.add("load from two tiers")
        if any(tiers.link_free_s[tier] > now_s for _, tier in run):
            met.add("link shared")
        if scheduler.running:
            met.add("others run meanwhile")
        if were_put & {block_id for block_id, _ in run}:
            met.add("load of what was put")
        if at_start & {block_id for block_id, _ in run}:
            met.add("load of what was there at the start")
        if replica.settings.scheduling.policy != "fcfs":
            met.add("loaded under a policy")
        load(run, now_s)

    def watched_keep(block_id, tier=0):
        if tier < len(tiers.tiers) and block_id in tiers.held[tier]:
            met.add("still there")
        if tier == 1 < len(tiers.tiers):
            met.add("moved to the second tier")
        if tier == len(tiers.tiers):
            met.add("dropped")
        keep(block_id, tier)

    def watched_put(block_ids):
        if block_ids and any(tier.write_through for tier in tiers.tiers):
            met.add("put")
            were_put.update(block_ids)
        put(block_ids)

    def watched_count(known, hit_tokens):
        request = scheduler.running[-1]
        if request.loaded:
            met.add("hits in HBM overtook the load" if request.start > request.loaded else "starts after the load")
        count(known, hit_tokens)

    tiers.load, tiers.keep, tiers.put, scheduler.pool.count_admission = (
        watched_load,
        watched_keep,
        watched_put,
        watched_count,
    )


def watch_windows(replica: Replica, scheduler: Scheduler, met: set[str]) -> None:
    """Note what windows leave behind, and who gets it."""
    if not scheduler.settings.kv_groups.windowed:
        return
    leave, fits, release = scheduler.pool.leave, scheduler.fits, scheduler.release
    refused: set[int] = set()
    blocks_left: list[int] = []

    def watched_leave(passed):
        leave(passed)
        for row, _ in passed:
            in_prefill = replica.rows[row].in_prefill
            met.add("a prompt's window leaves blocks" if in_prefill else "a decode's window leaves blocks")
            blocks_left.append(row)

    def watched_fits(request, *sizes):
        found = fits(request, *sizes)
        if found and request.row in refused and blocks_left:
            met.add("room that a window has left")
        if not found and len(scheduler.running) < scheduler.settings.max_num_seqs:
            refused.add(request.row)
        blocks_left.clear()
        return found

    def watched_release(request):
        refused.clear()
        release(request)

    scheduler.pool.leave, scheduler.fits, scheduler.release = watched_leave, watched_fits, watched_release


def watch_clients(replica: Replica, met: set[str]) -> None:
    """Note in what state requests are whose clients leave."""
    let_go = replica.let_go

    def watched(request, status):
        if request.loading:
            met.add("left while loading")
        if replica.speculator is not None and request.emitted:
            met.add("left in the middle of speculation")
        if request.leaving and len(replica.stages) > 1:
            met.add("left while in flight")
        let_go(request, status)

    replica.let_go = watched


def watch_idling(replica: Replica, met: set[str]) -> None:
    """Note how a replica waits for loads."""
    close_piece, on_step = replica.close_piece, replica.on_step

    def watched_piece():
        loading = any(scheduler.loading for scheduler in replica.schedulers)
        if loading and not replica.in_progress and not replica.n_running:
            met.add("nothing to do but load")
        close_piece()

    def watched_step(step):
        seats = len(step.running) < replica.settings.max_num_seqs
        if seats and any(replica.rows[row].loaded for row in step.waiting[:1]):
            met.add("loaded, but no room")
        on_step(step)

    replica.close_piece, replica.on_step = watched_piece, watched_step
