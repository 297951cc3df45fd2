"""Random mixtures of everything a replica can do: the compiled engine against the reference engine, with ``==``.

Features are drawn as subsets of :data:`simulator.engine.refusals.NAMES`: a new one needs a function in ``mixtures.py``, its special situations
in ``situations.py``, and no test of its own combinations.
"""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import new_engine, simulate
from simulator.engine.reference import simulate_reference
from simulator.engine.refusals import LASTING, NAMES, PENDING
from simulator.errors import InputError
from tests.engine.comparing import assert_equal, assert_results_equal, assert_timelines_close
from tests.engine.mixtures import mixtures, random_mixture, seeded_mixtures
from tests.engine.situations import MEETINGS, SITUATIONS, TOGETHER
from tests.engine.watching import watch

SEEDED_CASES = 80
"""Of each feature."""
MIXTURES = 300
FEATURES = tuple(NAMES)


@settings(max_examples=200, deadline=None)
@given(mixtures())
def test_engines_agree_exactly_on_drawn_mixtures(case):
    assert_equal(case)


@pytest.mark.parametrize("features", [*((name,) for name in FEATURES), *TOGETHER], ids=" and ".join)
def test_engines_agree_exactly_on_seeded_mixtures_with(features):
    counts = Counter()
    for seed in range(SEEDED_CASES):
        case, interval_s = random_mixture(seed, features), (None, 1.0, 7.5)[seed % 3]
        ours = simulate(*case, timeline_interval_s=interval_s)
        theirs, _, met = watch(case, ours.timeline_interval_s)
        counts.update(met)
        try:
            assert_results_equal(ours, theirs)
            if interval_s is not None:
                assert_timelines_close(ours, theirs, interval_s)
        except AssertionError as error:
            error.add_note(f"random_mixture({seed}, {features!r})")
            raise
    often = TOGETHER[features] if features in TOGETHER else SITUATIONS[features[0]]
    rare = {name: counts[name] for name in often if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


def test_special_situations_are_frequent_in_mixtures():
    counts = Counter()
    for seed in range(MIXTURES):
        counts.update(watch(random_mixture(seed, refusals=LASTING))[2])
    rare = {name: counts[name] / MIXTURES for name in SITUATIONS[""] if counts[name] < 0.05 * MIXTURES}
    assert not rare
    for seed in range(SEEDED_CASES):  # of what meets in one of a hundred mixtures
        counts.update(watch(random_mixture(seed, ("swap", "clients that leave"), LASTING))[2])
    assert not [name for name in MEETINGS if not counts[name]]


@settings(max_examples=60, deadline=None)
@given(case=seeded_mixtures(), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_cutting_and_resuming_changes_nothing(case, cuts):  # I9
    whole = simulate(*case)
    pieces = new_engine(*case)
    for share in sorted(cuts):
        pieces.advance(share * whole.end_s)
    pieces.advance()
    assert_results_equal(pieces.result(), whole)


@settings(max_examples=20, deadline=None)
@given(seeded_mixtures())
def test_the_same_case_gives_the_same_bytes(case):  # I14
    for run in (simulate, simulate_reference):
        one, other = run(*case), run(*case)
        for name, value in vars(one).items():
            if isinstance(value, np.ndarray):
                assert value.tobytes() == getattr(other, name).tobytes(), name
        assert one.totals == other.totals


def pairs(refusals):
    return [pair for refusal in refusals for pair in product(refusal.these, refusal.those)]


@pytest.mark.parametrize("pair", pairs((*LASTING, *PENDING)), ids=" and ".join)
def test_what_does_not_go_together_is_refused_by_name(pair):
    runs = (simulate, simulate_reference) if pair in pairs(LASTING) else (simulate,)
    for run in runs:
        with pytest.raises(InputError, match=r"not together with|a stage of \d ranks"):
            run(*random_mixture(1, pair, ()))


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_is_asked_for_is_there(feature):
    from simulator.engine.refusals import features_of

    for seed in range(10):
        assert feature in features_of(*random_mixture(seed, (feature,), LASTING))
