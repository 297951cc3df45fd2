"""What the prefix cache of an engine does in a run, entry by entry: what :meth:`tests.engine.block_manager.Manager.follow` replays."""

from typing import NamedTuple

from simulator.engine.block_runs import ADMITS, FREES, GIVES, LEAVES, PUBLISHES, TAKES
from simulator.engine.records import EngineResult
from simulator.engine.reference import Replica
from simulator.engine.reference_cache import NOBODY
from simulator.engine.reference_scheduler import Scheduler
from simulator.engine.single import Engine
from tests.engine.strategies import Case


class Log(NamedTuple):
    """Entries of kind, row and two amounts (the second of ``PUBLISHES`` is a moment), and of each admission the tokens that were there without the cache."""

    entries: list[tuple[int, int, int, int]]
    brought: list[int]


def reference_logs(case: Case) -> tuple[EngineResult, list[Log]]:
    """Run the reference engine; return its result, and the log of each rank's cache."""
    replica = Replica(*case)
    logs = [record(scheduler) for scheduler in replica.schedulers]
    replica.advance()
    return replica.result(), logs


def compiled_log(case: Case, log_size: int = 600_000) -> tuple[EngineResult, Log]:
    """Run the compiled engine, on a plain replica without host memory; return its result and its log."""
    engine = Engine(*case, log_size=log_size)
    engine.advance()
    entries = [tuple(entry) for entry in engine.cache_log.tolist()]
    assert len(entries) < log_size
    return engine.result(), Log(
        entries, [case.requests.cached_tokens[entry[1]] for entry in entries if entry[0] == ADMITS]
    )


def record(scheduler: Scheduler) -> Log:
    """Let a scheduler of the reference engine keep a log."""
    pool, log = scheduler.pool, Log([], [])
    take, take_in, leave, publish, release = pool.take, scheduler.take_in, pool.leave, pool.publish, pool.release

    def note(kind, row, amount, more=0):
        log.entries.append((kind, row, amount, more))

    def noted_take(row, places):
        before = pool.free
        take(row, places)
        note(TAKES, -1, before - pool.free)

    def noted_take_in(request, hits, start, computed):
        note(ADMITS, request.row, hits, request.known)
        log.brought.append(max(request.cached_tokens, request.saved))
        take_in(request, hits, start, computed)

    def noted_leave(passed):
        windows = [(table, places) for row, places in passed for table in pool.tables[row][: pool.groups.windowed]]
        left = [block for table, places in windows for block in table[:places] if block is not None]
        note(GIVES, -1, sum(block.id == NOBODY for block in left))
        for row, places in passed:
            note(LEAVES, row, places)
        leave(passed)

    def noted_publish(row, full):
        note(PUBLISHES, row, full, len(log.entries))
        publish(row, full)

    def noted_release(row):
        if row in pool.tables:
            note(FREES, row, pool.owned(row), pool.passed[row])
        release(row)

    pool.take, pool.leave, pool.publish, pool.release = noted_take, noted_leave, noted_publish, noted_release
    scheduler.take_in = noted_take_in
    return log
