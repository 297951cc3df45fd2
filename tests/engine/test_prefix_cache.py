"""The prefix cache: what it must not change. How engines agree on it is in test_mixtures.py, its invariants in test_invariants.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from tests.engine.engines import NAMES, engine
from tests.engine.mixtures import seeded_mixtures


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(case=seeded_mixtures(("prefix cache",)))
def test_ids_that_nobody_shares_change_nothing(name, case):
    alone = replace(case.requests.hashes, ids=np.arange(len(case.requests.hashes.ids)))
    requests = replace(case.requests, hashes=alone)
    cached = replace(case.settings, tiers=())
    with_cache, without = (engine(name)(case.cost, s, requests) for s in (cached, replace(cached, prefix_cache="off")))
    # Who is preempted, or tries again, may find its own blocks.
    assume(not without.totals["preemptions"] and not without.totals["retries"])
    np.testing.assert_array_equal(with_cache.finish_s, without.finish_s)
    assert with_cache.totals["steps"] == without.totals["steps"]
    assert with_cache.totals["cache_hit_tokens"] == 0


ROWS = st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=8)
"""Any numbers, also those that are no hashes because they follow different ones."""


@settings(deadline=None)
@given(rows=ROWS, longest=st.integers(1, 5))
def test_a_row_with_a_part_of_a_unit_has_all_before_it(rows, longest):
    ids = np.array([block for row in rows for block in row], dtype=np.int64)
    hashes = BlockHashes(ids, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64), 1)
    units, offsets, lengths = hashes.units(longest)
    assert (lengths <= longest).all()
    parts: dict[int, tuple[int, int]] = {}
    for row, start, stop in zip(rows, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        whole = [(int(units[k]), part) for k in range(start, stop) for part in range(lengths[k])]
        assert len(whole) == len(row)
        for block, place in zip(row, whole, strict=True):
            assert parts.setdefault(block, place) == place
    assert len(set(parts.values())) == len(parts)


def test_what_always_follows_is_one_unit():
    ids = [3, 4, 5, 6, 3, 4, 9, 10, 4]
    hashes = BlockHashes(np.array(ids), np.array([0, 4, 8, 8, 9]), 1)
    units, offsets, lengths = hashes.units(8)  # the last row has 4 without 3 before it
    assert lengths.tolist() == [1, 3, 1, 1, 2, 1]
    assert offsets.tolist() == [0, 2, 5, 5, 6]
    assert units[1] == units[3] == units[5]
