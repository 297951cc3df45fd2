"""A stream fed in blocks is the same run: the same schedule, counts and times, wherever the blocks end."""

from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import core
from simulator.engine.compiled import simulate
from simulator.engine.records import FINISHED, NOT_ARRIVED, Requests
from simulator.engine.streaming import Retired, StreamingEngine
from simulator.errors import InputError
from tests.engine.strategies import dyadic_cases, random_case, real_case

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
EXACT = ("status", "arrival_s", "scheduled_s", "first_token_s", "finish_s", "preemptions")
SHARES = ("busy_s", "busy_prefill_s", "busy_cached_s", "recompute_s")


def part(requests, start, stop):
    """Rows of a stream as a block."""
    return replace(requests, **{name: getattr(requests, name)[start:stop] for name in COLUMNS})


def streamed(cost, limits, requests, edges, cut_rows, interval_s=None):
    """Run a stream in blocks that end at ``edges``; return every row in stream order, the result and the engine."""
    batches = []
    engine = StreamingEngine(
        cost,
        limits,
        batches.append,
        concurrency=requests.concurrency,
        timeline_interval_s=interval_s,
        cut_rows=cut_rows,
    )
    for start, stop in pairwise(sorted({0, len(requests), *edges})):
        engine.feed(part(requests, start, stop))
    result = engine.finish()
    rows = Retired(*(np.concatenate(columns) for columns in zip(*batches, strict=True)))
    order = np.argsort(rows.row)
    return Retired(*(column[order] for column in rows)), result, engine


def assert_same_run(whole, rows, result):
    assert np.array_equal(rows.row, np.arange(len(whole.status)))
    for name in EXACT:
        ours, theirs = getattr(rows, name), getattr(whole, name)
        assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"), name
    for name in SHARES:
        assert np.allclose(getattr(rows, name), getattr(whole, name), rtol=1e-9, atol=1e-12), name
    for name in ("steps_by_tokens", "steps_by_rows", "itl_counts"):
        assert np.array_equal(getattr(result, name), getattr(whole, name)), name
    assert (result.end_s, result.idle_s, result.itl_max_s) == (whole.end_s, whole.idle_s, whole.itl_max_s)
    for name, total in whole.totals.items():
        if name != "segments":
            assert result.totals[name] == pytest.approx(total, rel=1e-9, abs=1e-12), name
    for name, column in whole.timeline.items():
        assert np.allclose(result.timeline[name], column, rtol=1e-9, atol=1e-12), name
    assert len(result.status) == 0


@settings(max_examples=200, deadline=None)
@given(case=dyadic_cases(), shares=st.lists(st.floats(0, 1), max_size=6), cut_rows=st.integers(1, 5))
def test_blocks_change_nothing(case, shares, cut_rows):
    cost, limits, requests = case
    interval_s = 2.0**-6
    whole = simulate(cost, limits, requests, timeline_interval_s=interval_s)
    edges = [round(share * len(requests)) for share in shares]
    rows, result, _ = streamed(cost, limits, requests, edges, cut_rows, interval_s)
    assert_same_run(whole, rows, result)


def test_the_cases_above_carry_rows_of_every_kind_from_block_to_block():
    carried = Counter()
    cases = 300
    for seed in range(cases):
        cost, limits, requests = random_case(seed)
        retired = []
        engine = StreamingEngine(cost, limits, retired.append, concurrency=requests.concurrency, cut_rows=2)
        seen = set()
        for start in range(0, len(requests), 3):
            engine.feed(part(requests, start, start + 3))
            ints = engine._state.ints
            waiting = ints[core.FIFO_TAIL] - ints[core.FIFO_HEAD]
            kinds = {
                "running": ints[core.N_RUNNING],
                "waiting": waiting,
                "preempted": ints[core.N_PREEMPTED],
                "client on its way": requests.concurrency and ints[core.N_PENDING],
                "forgotten": retired,
            }
            seen |= {kind for kind, number in kinds.items() if number}
        carried.update(seen)
    assert len(carried) == 5
    assert min(carried.values()) >= 0.05 * cases, carried


@pytest.mark.parametrize("seed", range(24))
def test_wherever_blocks_end_the_figures_are_the_same_to_the_last_bit(seed):
    cost, limits, requests = real_case(seed)
    rng = np.random.default_rng(seed)
    one, one_result, _ = streamed(cost, limits, requests, [], 4, 0.25)
    for _ in range(3):
        edges = rng.integers(0, len(requests), 5).tolist()
        other, other_result, engine = streamed(cost, limits, requests, edges, 4, 0.25)
        for ours, theirs in zip(one, other, strict=True):
            assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")
        for field in fields(one_result):
            if field.name != "timeline":
                ours, theirs = getattr(one_result, field.name), getattr(other_result, field.name)
                assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs, field.name
        assert engine.live_rows == 0
    whole = simulate(cost, limits, requests, timeline_interval_s=0.25)
    assert np.array_equal(one.status, whole.status)
    e2e = whole.finish_s - whole.arrival_s
    assert np.nanmax(np.abs(one.finish_s - whole.finish_s) / e2e) < 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_a_queue_that_never_empties_is_a_closed_loop_of_enough_clients(seed):
    """All requests queued at t = 0, fed in blocks: 2·max_num_seqs + 1 clients keep the queue as full as it matters."""
    cost, limits, requests = random_case(seed) if seed % 2 else real_case(seed)
    at_once = replace(requests, arrival_s=np.zeros(len(requests)), concurrency=0)
    whole = simulate(cost, limits, at_once)
    clients = replace(at_once, concurrency=2 * limits.max_num_seqs + 1)
    rows, result, _ = streamed(cost, limits, clients, range(0, len(requests), 5), 3)
    for name in ("status", "scheduled_s", "first_token_s", "finish_s", "preemptions"):
        assert np.allclose(getattr(rows, name), getattr(whole, name), rtol=1e-12, equal_nan=True), name
    assert result.end_s == pytest.approx(whole.end_s, rel=1e-12)
    assert result.totals["steps"] == whole.totals["steps"]


def test_the_frame_holds_the_block_and_the_live_rows_only():
    n = 4000
    cost, limits, _ = random_case(5)
    arrival = np.arange(n) * 1e3
    ones = np.ones(n, dtype=np.int64)
    requests = Requests(arrival, ones, ones, 0 * ones, ones)
    rows, _, engine = streamed(cost, limits, requests, range(0, n, 50), 10)
    assert (rows.status == FINISHED).all()
    assert engine.largest_frame <= 50 + 10


def test_a_block_earlier_than_the_last_is_refused():
    cost, limits, _ = random_case(5)
    engine = StreamingEngine(cost, limits, lambda _: None)
    one = np.ones(1, dtype=np.int64)
    engine.feed(Requests(np.array([5.0]), one, one, 0 * one, one))
    with pytest.raises(InputError, match=r"arrival_s\[1\] = 4.0: is earlier"):
        engine.feed(Requests(np.array([4.0]), one, one, 0 * one, one))
    with pytest.raises(InputError, match="cut_rows = 0"):
        StreamingEngine(cost, limits, lambda _: None, cut_rows=0)
    assert NOT_ARRIVED not in engine.finish().status
