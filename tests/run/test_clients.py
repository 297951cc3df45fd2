"""Policies, clients and hosts through a whole run: scenario keys, summary, conservation."""

import numpy as np
import pytest

from simulator.engine.records import TIMED_OUT
from simulator.errors import InputError
from simulator.run import load_scenario, run_scenario
from simulator.run.clients import ClientOptions

FEW = ("traffic.n_requests=1500", "engine.num_gpu_blocks_override=2500")


def run(*overrides):
    return run_scenario(load_scenario("llama-3-8b-azure-chat", [*FEW, *overrides]))


def mean(values):
    return float(np.mean(values))


@pytest.fixture(scope="module")
def busy():
    """Arrival rate that keeps the small KV cache full without overloading it. [1/s]"""
    return 0.85 * run().summary.load.capacity_per_s


def test_classes_are_served_in_order(busy):
    rate = f"traffic.arrival.rate_per_s={busy}"
    plain = run(rate, "clients.priorities=[0.2, 0.8]")
    ranked = run(rate, "clients.priorities=[0.2, 0.8]", "engine.policy=priority", "engine.preempt_lower=true")

    def queue_s(result, chosen):
        table = result.result.requests
        return mean(table["queue_s"][table["priority"] == chosen])

    assert 0.1 < mean(plain.result.requests["priority"] == 0) < 0.3
    assert queue_s(ranked, 0) < 0.2 * queue_s(plain, 0)
    assert queue_s(ranked, 1) > queue_s(plain, 1)
    assert ranked.summary.requests.finished == 1500


def test_clients_that_give_up_are_counted_and_what_they_cost_is_too(busy):
    rate = f"traffic.arrival.rate_per_s={1.4 * busy}"
    found = run(rate, "clients.timeout_s=8.0", "clients.ttft_timeout_s=2.0", "clients.max_attempts=2").summary
    counts = found.requests
    assert counts.arrived == counts.finished + counts.rejected + counts.timed_out + counts.cancelled
    assert counts.timed_out > 0
    assert counts.retries > counts.timed_out
    assert 0 < found.chip_seconds_per_query.wasted < found.chip_seconds_per_query.busy
    assert any("timed out or were cancelled" in warning for warning in found.warnings)
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)
    assert found.utilisation.recomputed_flops > 0
    assert found.load.capacity_per_s == pytest.approx(run(rate).summary.load.capacity_per_s)  # patient clients


def test_users_cancel():
    result = run("clients.cancel_fraction=0.3", "clients.cancel_mean_s=1.0")
    assert 50 < result.summary.requests.cancelled < 500
    assert not (result.result.requests["status"] == TIMED_OUT).any()


def test_host_work_is_a_part_of_the_time():
    slow = run("engine.host.step_s=0.004", "engine.host.sequence_s=0.00002")
    hidden = run("engine.host.step_s=0.004", "engine.host.sequence_s=0.00002", "engine.host.asynchronous=true")
    plain = run()
    assert slow.summary.breakdown.fractions["host"] > hidden.summary.breakdown.fractions.get("host", 0.0)
    assert "host" not in plain.summary.breakdown.fractions
    assert sum(slow.summary.breakdown.fractions.values()) == pytest.approx(1)
    assert slow.summary.load.capacity_per_s < hidden.summary.load.capacity_per_s <= plain.summary.load.capacity_per_s
    assert any(a.what == "engine.host.step_s" for a in slow.summary.assumptions)


def test_an_oracle_is_declared():
    found = run("engine.policy=sjf").summary
    assert [a.value for a in found.assumptions if a.what == "output-length prediction"] == ["oracle: the true lengths"]
    noisy = run("engine.policy=sjf", "engine.length_prediction_sigma=0.5").summary
    assert [a.value for a in noisy.assumptions if a.what == "output-length prediction"] == [
        "log-normal error, sigma 0.5"
    ]


NONSENSE = (
    (["engine.policy=edf", "slo={}"], "engine.policy = 'edf' needs requests.deadline_s"),
    (["engine.policy=priority"], "needs requests.priority"),
    (["clients.priorities=[0.5, 0.4]"], "shares sum to 0.9"),
    (["clients.priorities=[0.5, 0.5]", "clients.deadlines_s=[1.0, 2.0, 3.0]"], "3 deadlines_s for 2 priorities"),
    (["clients.cancel_fraction=0.5"], "go together"),
    (["clients.max_attempts=2"], "only timeouts are tried again"),
    (["engine.batching=static", "engine.preempt_lower=true"], "only priorities have lower classes"),
)


@pytest.mark.parametrize(("overrides", "message"), NONSENSE)
def test_nonsense_is_refused_in_words(overrides, message):
    with pytest.raises(InputError, match=message):
        run(*overrides)


def test_rows_depend_on_themselves_alone():
    options = ClientOptions(priorities=[0.3, 0.7], tenants=[0.5, 0.5], cancel_fraction=0.5, cancel_mean_s=2.0)
    long = options.columns(np.arange(1, 5001), 3, prediction_sigma=0.4, ttft_s=None)
    short = options.columns(np.arange(1, 101), 3, prediction_sigma=0.4, ttft_s=None)
    for name, values in short.items():
        np.testing.assert_array_equal(long[name][:100], values)
    assert abs(mean(long["priority"] == 0) - 0.3) < 0.03
    error = np.log(long["predicted_tokens"] / np.arange(1, 5001))
    assert abs(error.std() - 0.4) < 0.02
    finite = np.isfinite(long["cancel_s"])
    assert abs(finite.mean() - 0.5) < 0.03
    assert abs(long["cancel_s"][finite].mean() - 2.0) < 0.15
