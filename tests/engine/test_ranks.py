"""Attention ranks in lock-step and uneven experts: the compiled engine against the reference, and against limits."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.grouped import RankEngine
from simulator.engine.reference_ranks import LockStep
from simulator.engine.scheduling import Scheduling
from simulator.errors import InputError
from tests.engine.engines import engine
from tests.engine.strategies import Case, Pick, dyadic_case, events_of, one_of, real_case, requests_of, step_cost
from tests.engine.test_equivalence import (
    SHARES,
    TIMES,
    assert_counts_equal,
    assert_shares_close,
    assert_timelines_close,
)

SEEDED_CASES = 300
RANK_SECONDS = ("padding_s", "imbalance_s")


def rank_case(pick: Pick) -> Case:
    """A dyadic case on one to four ranks, with fewer blocks and seats on each."""
    cost, engine_settings, requests = dyadic_case(pick)
    ranks = pick(1, 4)
    experts = cost.dense_s * one_of(pick, (0.25, 0.5, 1.0))
    skew = ExpertSkew(1 + pick(1, 4) / 4, sigma=0.75, seed=pick(0, 99)) if pick(0, 2) == 0 else ExpertSkew()
    changes = {"rank_routing": one_of(pick, ("round-robin", "least-loaded")), "expert_skew": skew}
    return Case(replace(cost, ranks=ranks, expert_s=experts), replace(engine_settings, **changes), requests)


def seeded(seed: int) -> Case:
    rng = np.random.default_rng([seed, 11])
    return rank_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def rank_cases(draw: st.DrawFn) -> Case:
    return rank_case(lambda low, high: draw(st.integers(low, high)))


def observe_ranks(case: Case, interval_s=None):
    """Run the reference; return its result and the records of every lock-step."""
    steps = []
    replica = LockStep(*case, on_steps=steps.append)
    replica.advance()
    return replica.result(interval_s), steps


def run(case: Case, interval_s=None):
    whole = RankEngine(*case, timeline_interval_s=interval_s)
    whole.advance()
    return whole.result()


def assert_same(case: Case, interval_s):
    ours = run(case, interval_s)
    theirs, steps = observe_ranks(case, ours.timeline_interval_s)
    assert_counts_equal(ours, theirs)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.itl_max_s == theirs.itl_max_s
    assert_shares_close(ours, theirs, theirs.end_s)
    for name in RANK_SECONDS:
        assert ours.totals[name] == pytest.approx(theirs.totals[name], rel=1e-9, abs=1e-9), name
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps


@settings(max_examples=100, deadline=None)
@given(rank_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_same(case, None)


def test_engines_agree_exactly_on_seeded_cases():
    for seed in range(SEEDED_CASES):
        try:
            assert_same(seeded(seed), (None, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


FREQUENT = (
    "preemption",
    "full token budget",
    "knot crossed during a run",
    "window saturated during decode",
    "chunk window wrapped",
    "max_num_seqs full",
    "admission blocked by memory",
    "mixed step",
    "rejection",
    "closed loop",
    "an idle rank",
    "ranks of unequal tokens",
    "another rank becomes the slowest",
    "several steps at once",
    "uneven experts",
    "least-loaded",
)


def rank_events(case: Case) -> set[str]:
    """Special situations of a run, those of each rank by itself and those between them."""
    result, steps = observe_ranks(case)
    found = set()
    for g in range(case.cost.ranks):
        found |= events_of(case, result, [together[g] for together in steps if g in together])
    steps = [list(together.values()) for together in steps]
    if any(len(together) < case.cost.ranks for together in steps):
        found.add("an idle rank")
    if any(len({step.n for step in together}) > 1 for together in steps):
        found.add("ranks of unequal tokens")
    slowest = [(max(together, key=lambda step: step.S).running, len(together)) for together in steps]
    if len(set(slowest)) > 2 and case.cost.ranks > 1:
        found.add("another rank becomes the slowest")
    if run(case).totals["segments"] < len(steps):
        found.add("several steps at once")
    if case.settings.expert_skew.on:
        found.add("uneven experts")
    if case.settings.rank_routing == "least-loaded" and case.cost.ranks > 1:
        found.add("least-loaded")
    return found


def test_special_situations_are_frequent_in_the_seeded_cases():
    counts = Counter()
    for seed in range(0, SEEDED_CASES, 2):
        counts.update(rank_events(seeded(seed)))
    rare = {name: counts[name] for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES / 2}
    assert not rare


@pytest.mark.parametrize("seed", range(8))
def test_one_rank_is_a_plain_replica_bit_for_bit(seed):
    case = real_case(seed)
    plain, one = engine("compiled")(*case), run(case)
    assert_counts_equal(one, replace(plain, totals=plain.totals | dict.fromkeys(RANK_SECONDS, 0.0)))
    for name in (*TIMES, *SHARES):
        np.testing.assert_array_equal(getattr(one, name), getattr(plain, name), err_msg=name)
    assert (one.end_s, one.idle_s) == (plain.end_s, plain.idle_s)
    for name in ("running_s", "waiting_s", "kv_blocks_s", "segments"):
        assert one.totals[name] == plain.totals[name], name


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_ranks_are_one_rank(ranks):
    for seed in (1, 2, 3):
        cost, engine_settings, requests = real_case(seed)
        twins = requests.__class__(
            *(
                np.repeat(getattr(requests, name), ranks)
                for name in ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
            )
        )
        plain = engine("compiled")(cost, engine_settings, requests)
        found = run(Case(replace(cost, ranks=ranks), engine_settings, twins))
        for name in TIMES:
            np.testing.assert_array_equal(getattr(found, name)[::ranks], getattr(plain, name), err_msg=name)
        np.testing.assert_allclose(found.busy_s[::ranks] * ranks, plain.busy_s, rtol=1e-12)
        assert found.totals["padding_s"] == 0
        assert found.idle_s == pytest.approx(plain.idle_s, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_time_is_conserved_and_every_part_of_it_accounted_for(seed):
    cost, engine_settings, requests = real_case(seed)
    cost = replace(cost, ranks=3, expert_s=0.6 * cost.dense_s)
    skew = ExpertSkew(1.3) if seed % 2 else ExpertSkew()
    found = run(Case(cost, replace(engine_settings, expert_skew=skew, rank_routing="least-loaded"), requests))
    assert found.busy_s.sum() + found.idle_s == pytest.approx(found.end_s, rel=1e-12)
    tables_s = found.steps_by_tokens @ cost.dense_s[: len(found.steps_by_tokens)]
    tables_s += found.steps_by_rows @ cost.head_s[: len(found.steps_by_rows)]
    names = ("decode_attention_s", "prefill_attention_s", *RANK_SECONDS)
    parts_s = tables_s / 3 + sum(found.totals[name] for name in names)
    assert parts_s == pytest.approx(found.end_s - found.idle_s, rel=1e-12)
    assert (found.totals["imbalance_s"] > 0) == bool(seed % 2)
    assert found.totals["steps"] % 3 == 0


def test_a_lone_request_keeps_one_of_two_ranks_busy():
    cost, engine_settings, requests = real_case(1)
    first = requests.__class__(
        *(
            getattr(requests, name)[:1]
            for name in ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
        )
    )
    plain = engine("compiled")(cost, engine_settings, first)
    found = run(Case(replace(cost, ranks=2), engine_settings, first))
    assert found.finish_s[0] == plain.finish_s[0]
    assert found.busy_s[0] == pytest.approx(plain.busy_s[0] / 2, rel=1e-12)
    assert found.steps_by_tokens[0] == plain.totals["steps"]


def test_a_decode_waits_for_the_prompt_of_another_rank():
    """Two ranks, dense 1 s + 1/8 s a token, attention 1/64 s a pair: the prompt's step is the decode's step."""
    cost = step_cost([0, *(1 + n / 8 for n in range(1, 9))], [0, 0, 0], planes=((1 / 64, 0, 0),))
    engine_settings = real_case(0).settings
    engine_settings = replace(engine_settings, max_num_seqs=2, max_num_batched_tokens=8, num_kv_blocks=99)
    found = run(Case(replace(cost, ranks=2), engine_settings, requests_of([0, 0.5], [1, 8], [3, 1])))
    alone_s = 1 + 1 / 8 + 1 / 64
    together_s = 1 + 8 / 8 + 36 / 64
    assert found.first_token_s[0] == alone_s
    assert found.scheduled_s[1] == alone_s
    assert found.first_token_s[1] == found.finish_s[1] == alone_s + together_s
    assert found.finish_s[0] == alone_s + together_s + 1 + 1 / 8
    # G4: the decode pays for a padded step, not for the other's attention.
    assert found.busy_s[0] == pytest.approx((alone_s + (1 + 8 / 8) + (1 + 1 / 8)) / 2)
    assert found.busy_s[1] == pytest.approx(together_s / 2)
    assert found.totals["padding_s"] == pytest.approx((8 / 8 - 1 / 8) / 2)


def test_least_loaded_counts_a_waiting_request_four_times():
    cost = replace(step_cost([0, *(n / 8 for n in range(1, 9))], [0] * 5), ranks=2)
    base = replace(real_case(0).settings, max_num_seqs=4, max_num_batched_tokens=8, num_kv_blocks=99)
    # The second request is gone at 1 s. The fourth goes to its rank; so does the fifth, unless the fourth still waits there.
    loads = {}
    for routing in ("round-robin", "least-loaded"):
        for last_s in (1.0, 1.5):
            requests = requests_of([0, 0, 0, 1.0, last_s], [1] * 5, [40, 2, 40, 40, 40])
            case = Case(cost, replace(base, rank_routing=routing), requests)
            replica = LockStep(*case)
            replica.advance(3.0)
            loads[routing, last_s] = [len(rank.running) for rank in replica.ranks]
            assert_same(case, None)
    assert loads == {
        ("round-robin", 1.0): [3, 1],
        ("round-robin", 1.5): [3, 1],
        ("least-loaded", 1.0): [3, 1],
        ("least-loaded", 1.5): [2, 2],
    }


def test_even_skew_is_a_slower_table():
    cost, engine_settings, requests = real_case(5)
    cost = replace(cost, expert_s=0.5 * cost.dense_s)
    skew = ExpertSkew(mean=1.25, sigma=0.0)
    found = run(Case(cost, replace(engine_settings, expert_skew=skew), requests))
    slower = replace(cost, dense_s=cost.dense_s + 0.25 * cost.expert_s)
    plain = engine("compiled")(slower, engine_settings, requests)
    np.testing.assert_allclose(found.finish_s, plain.finish_s, rtol=1e-12)
    np.testing.assert_allclose(found.busy_s, plain.busy_s, rtol=1e-9)


def test_skew_slows_by_its_mean_and_depends_on_nothing_but_its_seed():
    cost, engine_settings, requests = real_case(7)
    cost = replace(cost, expert_s=0.5 * cost.dense_s)
    ends = {}
    for seed in (0, 1):
        skew = ExpertSkew(mean=1.5, sigma=0.3, seed=seed)
        case = Case(cost, replace(engine_settings, expert_skew=skew), requests)
        found = run(case)
        ends[seed] = found.end_s
        tables_s = found.steps_by_tokens @ cost.expert_s[: len(found.steps_by_tokens)]
        assert found.totals["imbalance_s"] / tables_s == pytest.approx(0.5, rel=0.1)
        assert run(case).end_s == found.end_s
    assert ends[0] != ends[1]


def test_cutting_a_run_changes_nothing():
    for seed in range(0, 60, 3):
        case = seeded(seed)
        whole = run(case)
        pieces = RankEngine(*case)
        for cut_s in np.linspace(0, whole.end_s, 5):
            pieces.advance(cut_s)
        pieces.advance()
        assert_counts_equal(pieces.result(), whole)
        np.testing.assert_array_equal(pieces.result().finish_s, whole.finish_s)


def test_what_ranks_cannot_do_is_refused():
    cost, engine_settings, requests = real_case(0)
    with pytest.raises(InputError, match=r"engine.prefix_cache = 'blocks'"):
        RankEngine(replace(cost, ranks=2), replace(engine_settings, prefix_cache="blocks"), requests)
    with pytest.raises(InputError, match=r"only with engine\.policy"):
        RankEngine(replace(cost, ranks=2), replace(engine_settings, scheduling=Scheduling(policy="sjf")), requests)
    with pytest.raises(InputError, match=r"engine.expert_skew.mean = 2"):
        RankEngine(cost, replace(engine_settings, expert_skew=ExpertSkew(2.0)), requests)
    with pytest.raises(InputError, match="least-loaded"):
        replace(engine_settings, rank_routing="least-loded")
    with pytest.raises(InputError, match=r"expert_skew.mean = 0.5"):
        ExpertSkew(0.5)
    with pytest.raises(InputError, match=r"StepCost.expert_s"):
        replace(cost, expert_s=2 * cost.dense_s)
