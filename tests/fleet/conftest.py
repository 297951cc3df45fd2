"""Small deployments for fleets: smooth made-up costs, dyadic random cases, and replicas that are servers of queueing theory."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.records import EngineSettings, Requests
from simulator.fleet import Pool
from simulator.roofline.step_cost import StepCost

SETTINGS = EngineSettings(max_num_seqs=16, max_num_batched_tokens=64, block_size=4, num_kv_blocks=200)


def make_cost(step_s=1e-3, token_s=1e-4, key_s=1e-7, tokens=64, rows=16):
    n, m = np.arange(tokens + 1.0), np.arange(rows + 1.0)
    return StepCost(
        dense_s=step_s * (n > 0) + token_s * n,
        head_s=2e-5 * m * (token_s > 0),
        decode_knots=np.array([0.0]),
        decode_value_s=np.array([0.0]),
        decode_slope_s=np.array([key_s]),
        decode_seq_s=0.0,
        prefill_planes=np.array([[key_s, key_s / 4, 0.0]]),
        chips=1,
        dense_flops=n,
        dense_bytes=n,
        head_flops=m,
        head_bytes=m,
        attention_flops_per_pair=1.0,
        kv_bytes_per_token=1.0,
        peak_flops_per_s=1e9,
        hbm_bandwidth_bytes_per_s=1e9,
    )


def make_requests(n=600, rate=60.0, seed=0, *, prompt=30, output=20, cached=0):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(max(prompt // 2, cached + 1), prompt * 2, n)
    outputs = rng.integers(1, output * 2, n)
    arrival = np.zeros(n) if rate is None else np.cumsum(rng.exponential(1 / rate, n))
    return Requests(arrival, prompts, outputs, np.full(n, cached), outputs)


class Fleets:
    settings = SETTINGS
    cost = staticmethod(make_cost)
    requests = staticmethod(make_requests)

    @staticmethod
    def pool(role="unified", replicas=1, *, cost=None, settings=SETTINGS, chips=2, **more):
        more = {"kv_block_bytes": 4e4, "layers": 4} | more
        return Pool(role, role, cost or make_cost(), settings, replicas, chips=chips, **more)

    @staticmethod
    def servers(count):
        """Replicas that serve one request at a time, a step per token, all steps alike: ``count`` servers."""
        settings = replace(SETTINGS, max_num_seqs=1, max_num_batched_tokens=1, num_kv_blocks=1 << 20)
        cost = make_cost(step_s=1.0, token_s=0.0, key_s=0.0, tokens=1, rows=1)
        return Pool("servers", "unified", cost, settings, count)

    @staticmethod
    def customers(n, rate, mean_steps, seed):
        """Poisson arrivals of geometric work; one-token prompts. [n]"""
        rng = np.random.default_rng(seed)
        steps = rng.geometric(1 / mean_steps, n)
        one = np.ones(n, dtype=np.int64)
        return Requests(np.cumsum(rng.exponential(1 / rate, n)), one, steps, one * 0, steps)


@pytest.fixture(scope="session")
def fleets():
    return Fleets
