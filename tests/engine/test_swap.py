"""Swapping of preempted requests: conservation, limits and a worked example. How engines agree on it is in test_mixtures.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from simulator.engine.kv_memory import HostSwap
from simulator.engine.records import EngineSettings
from simulator.engine.refusals import LASTING
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.mixtures import seeded_mixtures
from tests.engine.strategies import observe, requests_of, step_cost


@settings(max_examples=60, deadline=None)
@given(seeded_mixtures(("swap",), LASTING))
def test_what_is_copied_adds_up(case):  # E4, E5, I4
    result, _, _ = observe(case)
    assert result.totals["swap_in_blocks"] <= result.totals["swap_out_blocks"]
    if case.settings.prefix_cache == "off" and not case.requests.clients_may_leave:
        assert result.totals["swap_in_blocks"] == result.totals["swap_out_blocks"]
    assert result.totals["max_host_blocks"] <= case.settings.swap.blocks
    assert result.swap_s.sum() == pytest.approx(result.totals["swap_s"])
    assert result.busy_s.sum() + result.idle_s == pytest.approx(result.end_s)


@settings(max_examples=60, deadline=None)
@given(seeded_mixtures(("swap",), LASTING))
def test_with_room_in_the_host_nothing_is_computed_twice(case):
    room = HostSwap(1 << 30, block_s=case.settings.swap.block_s)
    result, _, _ = observe(case._replace(settings=replace(case.settings, swap=room)))
    assert result.totals["recomputed_tokens"] == result.totals["swap_fallbacks"] == 0


@settings(max_examples=60, deadline=None)
@given(seeded_mixtures(("swap",)))
def test_without_host_memory_it_is_recomputation(case):
    none = HostSwap(0, block_s=case.settings.swap.block_s)
    for name in NAMES:
        ours = engine(name)(*case._replace(settings=replace(case.settings, swap=none)))
        theirs = engine(name)(*case._replace(settings=replace(case.settings, swap=None)))
        np.testing.assert_array_equal(ours.finish_s, theirs.finish_s)
        assert ours.totals["swap_fallbacks"] == theirs.totals["preemptions"]
        assert ours.totals["swap_s"] == 0


SWAP_COUNTS = ("swap_out_blocks", "swap_in_blocks", "swap_fallbacks", "max_host_blocks")


@pytest.mark.parametrize("name", NAMES)
def test_worked_example(name):
    """Two prompts of 4 tokens in 4 blocks of 2. A step takes 1 s, copying a block 0.25 s."""
    cost = step_cost([0.0] + [1.0] * 8, [0.0] * 3)
    plain = EngineSettings(max_num_seqs=2, max_num_batched_tokens=8, block_size=2, num_kv_blocks=4)
    requests = requests_of([0, 0], [4, 4], [4, 3])
    swapped = replace(plain, swap=HostSwap(8, block_s=0.25))
    result = engine(name)(cost, swapped, requests)
    # Step 1 [0, 1]: both prompts. Step 2 needs a third block each: the second's 2 blocks are copied out, [1, 2.5]. The first
    # goes on alone, [2.5, 3.5] and [3.5, 4.5], and is done. Then the 2 blocks come in: [4.5, 6], [6, 7].
    np.testing.assert_array_equal(result.finish_s, [4.5, 7.0])
    np.testing.assert_array_equal(result.swap_s, [0.0, 1.0])
    assert [result.totals[name] for name in SWAP_COUNTS] == [2, 2, 0, 2]
    assert result.totals["swap_s"] == 1.0
    hidden = replace(plain, swap=HostSwap(8, block_s=0.25, overlapped=True))
    np.testing.assert_array_equal(engine(name)(cost, hidden, requests).finish_s, [4.0, 6.0])
    full = replace(plain, swap=HostSwap(1, block_s=0.25))
    again = engine(name)(cost, full, requests)
    np.testing.assert_array_equal(again.finish_s, [4.0, 6.0])
    assert again.totals["swap_fallbacks"] == 1
    assert again.totals["recomputed_tokens"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"blocks": -1}, "host_blocks = -1"), ({"blocks": 1, "block_s": np.inf}, "finite and not negative")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        HostSwap(**change)
