"""Policies and batching modes: two loops of the compiled engine, real-looking costs, and the log of a run. Mixtures are in test_mixtures.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from simulator.engine.compiled import simulate
from simulator.engine.event_log import record
from simulator.engine.refusals import LASTING, MEMORY, PENDING, Refusal
from simulator.engine.scheduling import Scheduling
from simulator.engine.single import Engine
from tests.engine.comparing import TIMES, assert_counts_equal, assert_shares_close
from tests.engine.mixtures import mixtures
from tests.engine.strategies import Case, observe, random_case, real_case
from tests.engine.test_event_log import assert_steps_are

ALONE = (
    *LASTING,
    *PENDING,
    Refusal(("policy",), (*MEMORY, "speculation", "uneven experts", "ranks", "stages"), "not followed"),
)
"""What a log of a run by policy does not follow."""


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


@settings(max_examples=60, deadline=None)
@given(mixtures(("policy",), ALONE))
def test_a_run_by_policy_can_be_followed_step_by_step(case):
    cost, engine_settings, requests = case
    patient = replace(requests, ttft_timeout_s=None, timeout_s=None, cancel_s=None)
    host = replace(engine_settings.host, request_s=0.0, output_s=0.0)
    case = Case(cost, replace(engine_settings, host=host), patient)
    _, steps, _ = observe(case)
    assert_steps_are(record(Engine(*case)), steps, engine_settings.num_kv_blocks)
