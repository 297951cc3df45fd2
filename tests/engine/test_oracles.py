"""The engine against queueing theory and other results known in closed form. What each proves: docs/oracles.md."""

from itertools import accumulate
from math import sqrt

import numpy as np
import pytest

from simulator.engine.records import EngineSettings
from simulator.randomness import uniform
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import real_case, requests_of, step_cost

REPLICATIONS = 20
T_QUANTILE = 3.883
"""Student's t at 0.9995 with 19 degrees of freedom: two-sided 99.9 % intervals."""
WARM_UP_FRACTION = 0.2
STEP_S = 1 / 3
"""Not dyadic on purpose: oracles hold for floats as they come."""

ONE_AT_A_TIME = EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, block_size=16, num_kv_blocks=100_000)
ONE_STEP_PER_TOKEN = step_cost([0.0, STEP_S], [0.0, 0.0])


def exponential(seed: int, cause: str, count: int) -> np.ndarray:
    return -np.log1p(-uniform(seed, cause, 0, count))


def single_server(name: str, seed: int, load: float, stop_probability: float, customers: int):
    """Run Poisson arrivals through a batch of one; one prompt token, a geometric number of outputs, a step for each."""
    draws = uniform(seed, "output", 0, customers)
    if stop_probability < 1:
        output = 1 + np.floor(np.log1p(-draws) / np.log1p(-stop_probability)).astype(int)
    else:
        output = np.ones(customers, dtype=int)
    rate_per_s = load * stop_probability / STEP_S
    arrival_s = np.cumsum(exponential(seed, "arrival", customers)) / rate_per_s
    return engine(name)(
        ONE_STEP_PER_TOKEN, ONE_AT_A_TIME, requests_of(arrival_s, np.ones(customers, dtype=int), output)
    )


def pollaczek_khinchine_wait_s(load: float, stop_probability: float) -> float:
    """Mean wait of M/G/1, λE[S²]/(2(1 − ρ)), for a geometric number of steps: E[S²] = (2 − p)/p² steps². [s]

    p = 1 is M/D/1. For p → 0 the service becomes exponential and the wait that of M/M/1, ρ/(μ − λ).
    """
    rate_per_s = load * stop_probability / STEP_S
    second_moment_s2 = (2 - stop_probability) / stop_probability**2 * STEP_S**2
    return rate_per_s * second_moment_s2 / (2 * (1 - load))


def assert_mean_is(samples: list[float], expected: float, largest_half_width: float) -> None:
    """Assert that the 99.9 % interval of the replications' mean covers the theory, and is narrow enough to mean it."""
    half_width = T_QUANTILE * float(np.std(samples, ddof=1)) / sqrt(len(samples))
    assert half_width <= largest_half_width * expected
    assert abs(np.mean(samples) - expected) <= half_width


def after_warm_up(values: np.ndarray) -> np.ndarray:
    return values[int(WARM_UP_FRACTION * len(values)) :]


#: engine, load, stop probability, customers per replication, widest half interval allowed (share of the mean)
QUEUES = [
    pytest.param("reference", 0.5, 1.0, 1_000, 0.15, id="reference-M/D/1"),
    pytest.param("reference", 0.5, 0.5, 600, 0.25, id="reference-M/Geo/1"),
    pytest.param("compiled", 0.5, 1.0, 100_000, 0.015, id="compiled-M/D/1-load-0.5"),
    pytest.param("compiled", 0.8, 1.0, 200_000, 0.02, id="compiled-M/D/1-load-0.8"),
    pytest.param("compiled", 0.5, 0.01, 100_000, 0.02, id="compiled-M/M/1-load-0.5"),
    pytest.param("compiled", 0.8, 0.01, 200_000, 0.05, id="compiled-M/M/1-load-0.8"),
]


@pytest.mark.parametrize(("name", "load", "stop_probability", "customers", "largest_half_width"), QUEUES)
def test_mean_wait_of_a_single_server_queue(name, load, stop_probability, customers, largest_half_width):
    waits_s, queue_lengths = [], []
    for seed in range(REPLICATIONS):
        result = single_server(name, seed, load, stop_probability, customers)
        waits_s.append(float(after_warm_up(result.scheduled_s - result.arrival_s).mean()))
        queue_lengths.append(result.totals["waiting_s"] / result.end_s)
    expected_s = pollaczek_khinchine_wait_s(load, stop_probability)
    assert_mean_is(waits_s, expected_s, largest_half_width)
    rate_per_s = load * stop_probability / STEP_S
    assert_mean_is(queue_lengths, rate_per_s * expected_s, largest_half_width)  # Little's law, by the time integral


def test_sojourn_times_of_m_m_1_are_exponential():
    """M/M/1: P(T > x) = exp(−(μ − λ)x). Steps make service geometric, which shifts quantiles by a step at most."""
    load, stop_probability = 0.6, 0.002
    result_of = [single_server("compiled", seed, load, stop_probability, 100_000) for seed in range(REPLICATIONS)]
    mean_s = STEP_S / stop_probability / (1 - load)
    for survival in (0.5, 0.1, 0.01):
        shares = [
            float((after_warm_up(r.finish_s - r.arrival_s) > -mean_s * np.log(survival)).mean()) for r in result_of
        ]
        half_width = T_QUANTILE * float(np.std(shares, ddof=1)) / sqrt(REPLICATIONS)
        discretisation = survival * STEP_S / mean_s * 2
        assert half_width <= 0.1 * survival
        assert abs(np.mean(shares) - survival) <= half_width + discretisation


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_littles_law_over_a_run_that_empties(name, seed):
    """L = λW holds on every path that starts and ends empty, so here to rounding: batching and preemption included."""
    result = engine(name)(*real_case(seed))
    present = (result.totals["running_s"] + result.totals["waiting_s"]) / result.end_s
    rate_per_s = len(result.status) / result.end_s
    assert present == pytest.approx(rate_per_s * (result.finish_s - result.arrival_s).mean(), rel=1e-12)


def keys_seen(cost, context: int) -> range:
    """Positions, from 1, of the keys that the query at ``context`` sees in the windowed layers: a mask's row."""
    window = cost.window or 1
    first = (context - 1) // window * window + 1 if cost.window_chunked else max(1, context - window + 1)
    return range(first, context + 1) if cost.window else range(0)


@pytest.mark.parametrize("seed", [0, 1, 2], ids=["no window", "sliding window", "chunked window"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompt", "cached"), [(1, 0), (100, 0), (100, 99), (64, 0), (500, 0), (500, 130)])
def test_ttft_without_load_is_the_time_of_the_prefill_steps(name, prompt, cached, seed):
    budget = 64
    cost = real_case(seed).cost
    settings = EngineSettings(max_num_seqs=2, max_num_batched_tokens=budget, num_kv_blocks=1000)
    result = engine(name)(cost, settings, requests_of([0.7], [prompt], [3], cached=[cached]))
    starts = list(range(cached, prompt, budget))
    stops = [*starts[1:], prompt]
    ttft_s = sum(
        cost.step_s(
            n=stop - start,
            P=1,
            A=sum(range(start + 1, stop + 1)),  # the token at position i attends to i tokens, itself included
            K=stop,
            R=int(stop == prompt),
            AW=sum(len(keys_seen(cost, i)) for i in range(start + 1, stop + 1)),
            KW=len(set().union(*(keys_seen(cost, i) for i in range(start + 1, stop + 1)))),
        )
        for start, stop in zip(starts, stops, strict=True)
    )
    assert result.first_token_s[0] - 0.7 == pytest.approx(ttft_s, rel=1e-12)
    decode_s = [cost.step_s(n=1, B=1, S=prompt + i, R=1, SW=len(keys_seen(cost, prompt + i))) for i in (1, 2)]
    assert result.finish_s[0] - result.first_token_s[0] == pytest.approx(sum(decode_s), rel=1e-9)
    assert result.busy_s[0] == pytest.approx(ttft_s + sum(decode_s), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("think_s", [0.0, 0.3])
def test_one_client_gets_one_request_per_latency_and_think_time(name, think_s):
    """The response time law for one client: X = 1/(R + Z)."""
    count, prompt, output = 20, 40, 30
    cost, settings = real_case(2).cost, EngineSettings(max_num_seqs=2, max_num_batched_tokens=64, num_kv_blocks=1000)
    alone = engine(name)(cost, settings, requests_of([0], [prompt], [output]))
    requests = requests_of([think_s] * count, [prompt] * count, [output] * count, concurrency=1)
    result = engine(name)(cost, settings, requests)
    expected_s = list(accumulate([think_s + alone.end_s] * count))
    np.testing.assert_allclose(result.finish_s, expected_s, rtol=1e-12)
    assert count / result.end_s == pytest.approx(1 / (think_s + alone.end_s), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_clients_without_think_time_keep_their_number_in_the_system(name):
    clients, count = 5, 100
    cost, settings = real_case(3).cost, EngineSettings(max_num_seqs=3, max_num_batched_tokens=64, num_kv_blocks=1000)
    output = 5 + np.floor(20 * uniform(7, "output", 0, count)).astype(int)
    requests = requests_of([0.0] * count, [30] * count, output, concurrency=clients)
    result = engine(name)(cost, settings, requests)
    assert result.idle_s == 0
    last_release_s = result.arrival_s.max()
    present = ((result.arrival_s <= last_release_s) & (result.finish_s > last_release_s)).sum()
    assert present == clients
    time_in_system_s = np.minimum(result.finish_s, last_release_s) - result.arrival_s
    assert time_in_system_s.sum() == pytest.approx(clients * last_release_s, rel=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3], ids=["sliding window", "chunked window", "no window"])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_batch_decodes_at_the_speed_of_its_steps(name, seed):
    """Equal requests all there at time 0: one prefill, then output − 1 steps of the whole batch."""
    prompt, output = 10, 150  # past the end of either window
    cost = real_case(seed).cost
    batch = min(6, cost.max_rows)
    settings = EngineSettings(max_num_seqs=batch, max_num_batched_tokens=64, num_kv_blocks=1000)
    result = engine(name)(cost, settings, requests_of([0] * batch, [prompt] * batch, [output] * batch))
    pairs = batch * prompt * (prompt + 1) // 2
    window_pairs = batch * sum(len(keys_seen(cost, i)) for i in range(1, prompt + 1))
    window_keys = batch * len(set().union(*(keys_seen(cost, i) for i in range(1, prompt + 1))))
    prefill_s = cost.step_s(
        n=batch * prompt, P=batch, A=pairs, K=batch * prompt, R=batch, AW=window_pairs, KW=window_keys
    )
    decodes_s = [
        cost.step_s(n=batch, B=batch, S=batch * context, R=batch, SW=batch * len(keys_seen(cost, context)))
        for context in range(prompt + 1, prompt + output)
    ]
    np.testing.assert_allclose(result.first_token_s, prefill_s, rtol=1e-12)
    np.testing.assert_allclose(result.finish_s, prefill_s + sum(decodes_s), rtol=1e-11)
    np.testing.assert_allclose(result.busy_s, (prefill_s + sum(decodes_s)) / batch, rtol=1e-11)
    assert result.itl_max_s == pytest.approx(max(decodes_s), rel=1e-9)
