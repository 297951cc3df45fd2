"""Attention ranks in lock-step and uneven experts, against limits and worked examples. How engines agree on them is in test_mixtures.py."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.grouped import RankEngine
from simulator.engine.reference import Replica
from simulator.errors import InputError
from tests.engine.comparing import SHARES, TIMES, assert_counts_equal, assert_equal
from tests.engine.engines import engine
from tests.engine.strategies import Case, real_case, requests_of, step_cost

RANK_SECONDS = ("padding_s", "imbalance_s")


def run(case: Case):
    return engine("compiled")(*case)


@pytest.mark.parametrize("seed", range(8))
def test_one_rank_is_a_plain_replica_bit_for_bit(seed):
    case = real_case(seed)
    plain, whole = engine("compiled")(*case), RankEngine(*case)
    whole.advance()
    one = whole.result()
    assert_counts_equal(one, replace(plain, totals=plain.totals | dict.fromkeys(RANK_SECONDS, 0.0)))
    for name in (*TIMES, *SHARES):
        np.testing.assert_array_equal(getattr(one, name), getattr(plain, name), err_msg=name)
    assert (one.end_s, one.idle_s) == (plain.end_s, plain.idle_s)
    assert one.totals["segments"] == plain.totals["segments"]
    for name in ("running_s", "waiting_s", "kv_blocks_s"):  # sums over all ranks, added in another order
        assert one.totals[name] == pytest.approx(plain.totals[name], rel=1e-12), name


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
            replica = Replica(*case)
            replica.advance(3.0)
            loads[routing, last_s] = [len(rank.running) for rank in replica.schedulers]
            assert_equal(case)
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


def test_what_ranks_cannot_do_is_refused():
    cost, engine_settings, requests = real_case(0)
    with pytest.raises(InputError, match=r"engine.expert_skew.mean = 2"):
        RankEngine(cost, replace(engine_settings, expert_skew=ExpertSkew(2.0)), requests)
    with pytest.raises(InputError, match="least-loaded"):
        replace(engine_settings, rank_routing="least-loded")
    with pytest.raises(InputError, match=r"expert_skew.mean = 0.5"):
        ExpertSkew(0.5)
    with pytest.raises(InputError, match=r"StepCost.expert_s"):
        replace(cost, expert_s=2 * cost.dense_s)
