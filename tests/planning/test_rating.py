"""The rate within targets: against queueing theory, and as its definition demands."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.records import EngineSettings, Requests
from simulator.planning.rating import GRID, LATENCIES, LOWEST, Bench, Load, Sample, rate_within_targets
from simulator.randomness import draw
from simulator.results.plan import Target, Targets
from simulator.roofline.step_cost import StepCost
from simulator.run.resolve import resolve
from simulator.run.scenario import load_scenario

#: Any deployment; only its name and its one replica are kept.
DEPLOYED = resolve(load_scenario("llama-3-8b-azure-chat"))
SERVICE_S = 0.125
ONE = EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, num_kv_blocks=10)


def replica(*, per_step_s=SERVICE_S, slots=1):
    """Every step takes as long; a request of one token in and out takes one step."""
    table = np.arange(slots + 1.0)
    cost = StepCost(
        dense_s=per_step_s * (table > 0),
        head_s=0 * table,
        decode_knots=np.zeros(1),
        decode_value_s=np.zeros(1),
        decode_slope_s=np.zeros(1),
        decode_seq_s=0.0,
        prefill_planes=np.zeros((1, 3)),
        chips=1,
        dense_flops=table,
        dense_bytes=table,
        head_flops=table,
        head_bytes=table,
        attention_flops_per_pair=0.0,
        kv_bytes_per_token=0.0,
        peak_flops_per_s=1.0,
        hbm_bandwidth_bytes_per_s=1.0,
    )
    limits = replace(ONE, max_num_seqs=slots, max_num_batched_tokens=slots)
    return replace(DEPLOYED, engine_cost=cost, cost=cost, settings=limits)


def poisson(n, output=1):
    gaps = draw(3, "arrival", 0, n, lambda rng, size: rng.standard_exponential(size))
    one = np.ones(n, dtype=np.int64)
    return Load(Requests(np.cumsum(gaps), one, output * one, 0 * one, output * one), 1.0)


def md1_within(rate, wait_s, service_s):
    """P(wait <= t) of M/D/1, Erlang's formula (A. K. Erlang, 1909)."""
    total = 0.0
    for k in range(math.floor(wait_s / service_s) + 1):
        x = rate * (wait_s - k * service_s)
        total += (-x) ** k / math.factorial(k) * math.exp(x)
    return (1 - rate * service_s) * total


def md1_rate(share, limit_s, service_s):
    low, high = 0.0, 1 / service_s
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if md1_within(middle, limit_s - service_s, service_s) >= share else (low, middle)
    return low


@pytest.mark.parametrize(("percentile", "steps"), [(90, 3.0), (95, 3.5), (99, 6.0)])
def test_rate_of_one_server_is_that_of_md1(percentile, steps):
    targets = Targets(limits=(Target(metric="e2e_s", limit_s=steps * SERVICE_S, percentile=percentile),))
    found = rate_within_targets(replica(), poisson(60_000), targets)
    assert found.rate_per_s == pytest.approx(md1_rate(percentile / 100, steps * SERVICE_S, SERVICE_S), rel=0.03)
    assert found.saturated_per_s == pytest.approx(1 / SERVICE_S)
    assert found.binding == (f"e2e_s p{percentile}",)


def test_without_targets_the_rate_is_the_capacity():
    found = rate_within_targets(replica(), poisson(500), Targets())
    assert found.rate_per_s == found.saturated_per_s == pytest.approx(1 / SERVICE_S)
    assert found.binding == ("capacity",)


def test_a_limit_below_the_service_time_is_kept_at_no_rate():
    targets = Targets(limits=(Target(metric="e2e_s", limit_s=0.9 * SERVICE_S, percentile=50),))
    found = rate_within_targets(replica(), poisson(500), targets)
    assert found.rate_per_s == 0
    assert found.binding == ("e2e_s p50",)
    scale = found.sample.least_scale(targets, ("e2e_s",))
    assert scale == pytest.approx(1 / 0.9)
    assert rate_within_targets(replica(), poisson(500), targets.scaled(scale * (1 + 1e-9))).rate_per_s > 0


BENCH = Bench(replica(slots=4), poisson(400, output=6))


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.2, 4),
    st.floats(1, 4),
    st.sampled_from(LATENCIES),
    st.sampled_from([50, 90, 95, 99, 100]),
    st.booleans(),
)
def test_looser_targets_never_rate_lower(limit_s, factor, metric, percentile, joint):
    limits = Target(metric=metric, limit_s=limit_s, percentile=None if joint else percentile)
    tight = Targets(limits=(limits,), joint_fraction=percentile / 100 if joint else None)
    slow, fast = (BENCH.rate(targets) for targets in (tight, tight.scaled(factor)))
    assert slow.rate_per_s <= fast.rate_per_s
    for demand in (0.5, 0.999, 1.0):  # giving up early never loses what would have been enough
        again = BENCH.rate(tight, at_least_per_s=demand * slow.rate_per_s)
        assert slow.rate_per_s == 0 or again == slow
    assert BENCH.rate(tight, at_least_per_s=max(slow.rate_per_s, 1e-6) * 1.02) is None


class Erratic(Bench):
    """A bench whose latencies at a rate have nothing to do with those at others."""

    saturated_per_s = 1.0

    def sample(self, step):
        latency_s = draw(5, "latency", step - LOWEST, step - LOWEST + 1, lambda rng, size: rng.random(size))
        return Sample(dict.fromkeys(LATENCIES, latency_s))


@given(st.floats(0, 1), st.floats(0, 1))
def test_looser_targets_never_rate_lower_even_if_runs_are_erratic(one, other):
    bench = Erratic(DEPLOYED, poisson(2))
    rates = [
        bench.rate(Targets(limits=(Target(metric="e2e_s", limit_s=limit_s, percentile=50),)))
        for limit_s in sorted((max(one, 1e-9), max(other, 1e-9)))
    ]
    assert rates[0].rate_per_s <= rates[1].rate_per_s


def test_the_same_requests_arrive_at_every_rate():
    load = poisson(50)
    slow, fast = load.at(0.5), load.at(2.0)
    assert (slow.arrival_s == 4 * fast.arrival_s).all()
    assert (slow.prompt_tokens == fast.prompt_tokens).all()
    assert BENCH.rate_per_s(LOWEST) == BENCH.saturated_per_s * 2.0 ** (LOWEST / GRID)


def test_requests_not_served_keep_nothing_and_one_token_outputs_keep_any_tpot():
    sample = Sample(
        {
            "ttft_s": np.array([1.0, 1.0, np.inf, 3.0]),
            "tpot_s": np.array([np.nan, 0.1, np.inf, 0.3]),
            "e2e_s": np.array([1.0, 2.0, np.inf, 4.0]),
        }
    )
    ttft = Target(metric="ttft_s", limit_s=1.0, percentile=50)
    tpot = Target(metric="tpot_s", limit_s=0.1, percentile=50)
    assert sample.holds(Targets(limits=(ttft, tpot)))
    assert sample.kept_fraction(Targets(limits=(ttft, tpot))) == 0.5
    most = Targets(limits=(ttft.model_copy(update={"percentile": None}),), joint_fraction=0.75)
    assert sample.missed(most) == ["ttft_s within the joint share"]
    assert sample.least_scale(most, ("ttft_s",)) == 3.0
    assert sample.least_scale(Targets(limits=(ttft.model_copy(update={"percentile": 99}),)), ("ttft_s",)) == math.inf
    assert sample.percentiles()["e2e_s"].p50 == 2.0
    assert sample.percentiles()["e2e_s"].p99 is None
