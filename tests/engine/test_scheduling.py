"""Policies, batching modes, hosts and clients: the compiled engine against the reference engine."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import Engine, simulate
from simulator.engine.event_log import record
from simulator.engine.scheduling import HostOverheads, Scheduling
from simulator.errors import InputError
from tests.engine.scheduling_cases import random_scheduled_case, scheduled_cases, scheduling_events_of
from tests.engine.strategies import Case, observe, random_case, real_case
from tests.engine.test_equivalence import SHARES, TIMES, assert_counts_equal, assert_equal, assert_shares_close
from tests.engine.test_event_log import assert_steps_are

SEEDED_CASES = 400
CLIENT_TOTALS = ("timeouts", "cancellations", "retries", "abandoned_tokens", "abandoned_outputs", "host_s")
FREQUENT = (
    "overtaking",
    "preemption by class",
    "victim that is not the last to run",
    "several unfinished prompts",
    "decodes that sit a step out",
    "waiting for a static batch",
    "host slower than device",
    "device overtakes the host",
    "host work in sequence",
    "timeouts",
    "cancellations",
    "retries",
    "left while decoding",
    "left without having run",
    "finished in a later attempt",
    "closed loop with clients that leave",
    "several tenants",
)


def assert_equal_with_clients(case, interval_s):
    """As ``assert_equal``, and what the clients and the host did too."""
    theirs, steps = assert_equal(case, interval_s)
    ours = simulate(*case)
    np.testing.assert_array_equal(ours.attempts, theirs.attempts)
    np.testing.assert_array_equal(ours.reused_tokens, theirs.reused_tokens)
    assert (np.abs(ours.wasted_s - theirs.wasted_s) <= 1e-9 * theirs.busy_s + 1e-12 * theirs.end_s).all()
    for name in CLIENT_TOTALS:
        assert ours.totals[name] == theirs.totals[name], name
    return theirs, steps


@settings(max_examples=150, deadline=None)
@given(scheduled_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_equal_with_clients(case, None)


def test_engines_agree_exactly_on_seeded_cases_in_which_special_situations_are_frequent():
    counts = Counter()
    for seed in range(SEEDED_CASES):
        case = random_scheduled_case(seed)
        try:
            result, steps = assert_equal_with_clients(case, (0.125, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        counts.update(scheduling_events_of(case, result, steps))
    rare = {name: counts[name] / SEEDED_CASES for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


def test_the_loop_with_policies_serves_a_plain_replica_as_the_plain_loop_does():
    almost_none = Scheduling(watermark=1e-9)  # of so few blocks, none: but the other loop runs
    for seed in range(200):
        cost, engine_settings, requests = random_case(seed)
        plain = simulate(cost, engine_settings, requests, timeline_interval_s=1.0)
        other = simulate(cost, replace(engine_settings, scheduling=almost_none), requests, timeline_interval_s=1.0)
        assert_counts_equal(other, plain)
        for name in TIMES:
            np.testing.assert_array_equal(getattr(other, name), getattr(plain, name), err_msg=name)
        assert_shares_close(other, plain, plain.end_s)


POLICIES_ON_REAL_COSTS = (
    {"policy": "priority", "preempt_lower": True},
    {"policy": "sjf", "long_prefill_token_threshold": 48},
    {"policy": "edf", "batching": "orca"},
    {"policy": "fair"},
    {"policy": "fair", "batching": "prefill_first"},
    {"batching": "static"},
)


@pytest.mark.parametrize("chosen", POLICIES_ON_REAL_COSTS, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_engines_agree_on_real_looking_costs(chosen):
    for seed in range(6):
        case = _with_columns(real_case(seed), seed, chosen)
        theirs, _, _ = observe(case)
        ours = simulate(*case)
        np.testing.assert_array_equal(ours.status, theirs.status)
        np.testing.assert_array_equal(ours.preemptions, theirs.preemptions)
        latency_s = np.nan_to_num(theirs.finish_s - theirs.arrival_s, nan=theirs.end_s)
        for name in TIMES:
            wrong_s = np.nan_to_num(np.abs(getattr(ours, name) - getattr(theirs, name)))
            assert (wrong_s <= 1e-9 * latency_s).all(), name
        assert_shares_close(ours, theirs, theirs.end_s)
        assert ours.itl_counts.sum() == theirs.itl_counts.sum()


def _with_columns(case: Case, seed: int, chosen: dict) -> Case:
    cost, engine_settings, requests = case
    rng = np.random.default_rng(seed)
    n = len(requests)
    columns = {
        "priority": rng.integers(0, 3, n),
        "predicted_tokens": requests.output_tokens * np.exp(rng.normal(0, 0.5, n)),
        "deadline_s": rng.exponential(2.0, n),
        "tenant": rng.integers(0, 3, n),
        "timeout_s": np.where(rng.random(n) < 0.2, rng.exponential(1.0, n), np.inf),
    }
    budget = engine_settings.max_num_batched_tokens
    if chosen.get("batching", "chunked") != "chunked":
        prompt = np.minimum(requests.prompt_tokens, budget // 2)
        output = np.minimum(requests.output_tokens, budget // 4)
        columns |= {"prompt_tokens": prompt, "output_tokens": output, "max_tokens": output}
        columns["cached_tokens"] = np.minimum(requests.cached_tokens, prompt - 1)
    scheduled = replace(engine_settings, scheduling=Scheduling(**chosen))
    return Case(cost, scheduled, replace(requests, **columns))


@settings(max_examples=100, deadline=None)
@given(case=scheduled_cases(), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_cutting_and_resuming_changes_nothing(case, cuts):  # I9
    whole = simulate(*case)
    engine = Engine(*case)
    for share in sorted(cuts):
        engine.advance(share * whole.end_s)
        assert engine.clock_s <= whole.end_s
    engine.advance()
    assert engine.done
    parts = engine.result()
    for name in (field.name for field in fields(whole)):
        one, other = getattr(whole, name), getattr(parts, name)
        if name in {"totals", "timeline"}:
            for key in one:
                if key != "segments":
                    assert np.allclose(one[key], other[key], rtol=1e-9, atol=1e-12), key
        elif name in {*SHARES, "wasted_s"}:
            assert np.allclose(one, other, rtol=1e-9, atol=1e-12), name
        else:
            assert np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f"), name


@settings(max_examples=100, deadline=None)
@given(scheduled_cases())
def test_a_run_by_policy_can_be_followed_step_by_step(case):
    cost, engine_settings, requests = case
    patient = replace(requests, ttft_timeout_s=None, timeout_s=None, cancel_s=None)
    host = replace(engine_settings.host, request_s=0.0, output_s=0.0)
    case = Case(cost, replace(engine_settings, host=host), patient)
    _, steps, _ = observe(case)
    assert_steps_are(record(Engine(*case)), steps, engine_settings.num_kv_blocks)


def test_a_run_that_clients_leave_cannot_be_followed():
    cost, engine_settings, requests = random_case(3)
    late = replace(engine_settings, host=HostOverheads(request_s=0.5))
    with pytest.raises(InputError, match="clients leave"):
        record(Engine(cost, late, requests))
