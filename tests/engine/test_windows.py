"""Windowed layers that give KV blocks back, by hand: rules W1 to W6 of docs/engine-kv-memory.md."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.compiled import simulate
from simulator.engine.records import FINISHED, REJECTED, EngineSettings
from simulator.engine.reference import simulate_reference
from simulator.errors import InputError
from simulator.roofline.kv_groups import KvGroups
from tests.engine.strategies import Case, observe, requests_of, step_cost
from tests.engine.test_speculation_rules import chain, flat_cost, limits

BOTH = pytest.mark.parametrize("run", [simulate, simulate_reference])


def case(groups: KvGroups, requests, **settings) -> Case:
    """A replica of which each step takes a second, of blocks of 2 tokens."""
    limits = EngineSettings(**({"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 2} | settings))
    steps = np.array([0.0] + [1.0] * limits.max_num_batched_tokens)
    window = {"window": groups.window, "window_chunked": groups.chunked} if groups.windowed else {}
    planes = ((0, 0, 0, 0, 0),) if groups.windowed else ((0, 0, 0),)
    cost = step_cost(steps, np.zeros(limits.max_num_seqs + 1), planes=planes, **window)
    return Case(cost, replace(limits, kv_groups=groups), requests)


def assert_owned(one: Case, owned: list[int]) -> None:
    """The first request, alone, owns as many blocks in each step, in both engines."""
    _, steps, _ = observe(one)
    assert [step.blocks[0] for step in steps] == owned
    for run in (simulate, simulate_reference):
        totals = run(*one).totals
        assert totals["kv_blocks_s"] == sum(owned)
        assert totals["max_kv_blocks"] == max(owned)


# One request of 5 prompt and 6 output tokens; one full group, two windowed ones with W = 3.
#   step   computed  blocks of a group  passed: ⌊(before − 2)/2⌋  owned: 3·blocks − 2·passed
#   chunk  0 → 5     3                  0                         9; then ⌊3/2⌋ = 1 is left
#   decode 5 → 6     3                  1                         7; ⌊4/2⌋ = 2
#   decode 6 → 7     4                  2                         8; ⌊5/2⌋ = 2
#   decode 7 → 8     4                  2                         8; ⌊6/2⌋ = 3
#   decode 8 → 9     5                  3                         9; 3
#   decode 9 → 10    5                  3                         9
SLIDING = ([9, 7, 8, 8, 9, 9], KvGroups(1, 2, 3))
# The same with chunks of 4 tokens: at 8 tokens two blocks of the second chunk are left as well.
#   0 → 5: 9, then 4 tokens or 2 blocks are left; 5 → 6: 3·3 − 4; 7: 3·4 − 4; 8: 8, then 4 are left; 9: 3·5 − 8; 10: 7
CHUNKED = ([9, 5, 8, 8, 7, 7], KvGroups(1, 2, 4, chunked=True))


@pytest.mark.parametrize(("owned", "groups"), [SLIDING, CHUNKED])
def test_blocks_of_one_request_by_hand(owned, groups):
    one = case(groups, requests_of([0], [5], [6]), num_kv_blocks=30)
    assert_owned(one, owned)
    at_rest = groups.blocks(np.arange(5, 11), 2)
    in_step = groups.blocks_in_step(np.arange(6, 11), 2)
    assert in_step.tolist() == owned[1:]
    assert (
        at_rest[:-1] + 3 * (np.arange(6, 11) % 2) == in_step
    ).all()  # a block of each group begins with an odd token


# The first case with passes of two drafts, so G = 2: a pass at c computed tokens has ⌈(c + 3)/2⌉ blocks of each group.
#   all accepted, 3 tokens a pass: chunk 9, then at c = 5: 3·4 − 2·1; 8: 3·6 − 2·3; 11: 3·7 − 2·4
#   none accepted, 1 token a pass:  chunk 9, then at c = 5: 3·4 − 2·1; 6: 3·5 − 2·2; 7: 3·5 − 2·2; 8: 3·6 − 2·3
@pytest.mark.parametrize(("rate", "output", "owned"), [(1.0, 10, [9, 10, 12, 13]), (0.0, 5, [9, 10, 11, 11, 12])])
def test_windows_go_by_accepted_tokens_and_blocks_by_those_looked_ahead(rate, output, owned):
    settings = limits(chain(2, rate), block_size=2, num_kv_blocks=30, kv_groups=KvGroups(1, 2, 3))
    one = Case(flat_cost(window=3, planes=((0, 0, 0, 0, 0),)), settings, requests_of([0], [5], [output]))
    assert_owned(one, owned)


@BOTH
def test_a_pass_longer_than_a_step_has_room_in_a_window(run):
    # W6 with W = 3, G = 6 and 4 tokens a step: 3 − 1 + 7 tokens need ⌈9/2⌉ + 1 = 6 blocks, where a step's would need 4.
    plan = limits(chain(6, 1.0), block_size=2, kv_groups=KvGroups(0, 1, 3), max_num_batched_tokens=4, max_num_seqs=1)
    cost = flat_cost(window=3, planes=((0, 0, 0, 0, 0),))
    enough, short = (run(cost, replace(plan, num_kv_blocks=n), requests_of([0], [9], [9])).status for n in (6, 5))
    assert (enough.tolist(), short.tolist()) == ([FINISHED], [REJECTED])


@BOTH
def test_a_window_makes_room_for_the_next_while_others_decode(run):
    # Two prompts of 4 tokens; W = 1, windowed groups alone: 2 blocks each in the first step, 1 after it; three blocks are there.
    groups = KvGroups(0, 1, 1)
    result = run(*case(groups, requests_of([0, 0], [4, 4], [3, 3]), num_kv_blocks=3, scheduler_reserve_full_isl=False))
    assert result.scheduled_s.tolist() == [0.0, 1.0]
    kept = run(*case(KvGroups(), requests_of([0, 0], [4, 4], [3, 3]), num_kv_blocks=3))
    assert kept.scheduled_s.tolist() == [0.0, 3.0]


@BOTH
def test_requests_are_rejected_by_what_they_hold_at_most(run):
    # W4 with W = 3 and 8 tokens a step: a windowed group holds ⌈10/2⌉ + 1 = 6 blocks at most, a full one ⌈t/2⌉.
    groups = KvGroups(1, 2, 3)
    requests = requests_of([0, 0], [40, 60], [1, 1])
    result = run(*case(groups, requests, num_kv_blocks=20 + 12))
    assert result.status.tolist() == [FINISHED, REJECTED]
    assert groups.longest(32, 2, 8) == 40
    alone = run(*case(KvGroups(0, 1, 3), requests_of([0], [1000], [500]), num_kv_blocks=6))
    assert alone.status.tolist() == [FINISHED]
    assert KvGroups(0, 1, 3).longest(6, 2, 8) == np.inf


@pytest.mark.parametrize("groups", [KvGroups(), KvGroups(1, 6, 5), KvGroups(0, 1, 4), KvGroups(2, 1, 6, chunked=True)])
def test_no_way_of_cutting_takes_more_than_the_bound(groups):
    block, step = 3, 7
    for last in range(1, 60):
        ways = [groups.count * -(-last // block)] if last <= step else []
        for before in range(max(0, last - step), last):
            passed = before // groups.window * groups.window if groups.chunked else max(0, before - groups.window + 1)
            ways.append(
                groups.count * -(-last // block) - groups.windowed * (passed // block if groups.windowed else 0)
            )
        assert max(ways) <= groups.most_blocks(last, block, step)


@BOTH
def test_a_window_that_is_not_the_tables_is_refused(run):
    cost, settings, requests = case(KvGroups(1, 1, 4), requests_of([0], [1], [1]))
    with pytest.raises(InputError, match=r"a window of 5 tokens.*the cost table has one of 4"):
        run(cost, replace(settings, kv_groups=KvGroups(1, 1, 5)), requests)


@pytest.mark.parametrize("wrong", [(2, 0), (0, 0), (-1, 2, 3), (1, 1), (1, 0, 4)])
def test_impossible_groups_are_refused(wrong):
    with pytest.raises(InputError, match="kv_groups"):
        KvGroups(*wrong)
