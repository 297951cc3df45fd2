"""The prefix cache: what it must not change. How engines agree on it is in test_mixtures.py, its invariants in test_invariants.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings

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
