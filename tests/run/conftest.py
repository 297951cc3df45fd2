"""A made-up deployment whose costs are easy to check, and a way to run requests on it."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.economics import PowerModel, price_by_hand, resolve_site
from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests
from simulator.results.summary import Deployment
from simulator.roofline.step_cost import StepCost
from simulator.run.options import RunOptions, SloOptions
from simulator.run.outcome import Outcome, split
from simulator.run.summarise import Facts, summarise

SETTINGS = EngineSettings(max_num_seqs=16, max_num_batched_tokens=64, block_size=4, num_kv_blocks=200)


def make_cost(slowdown=1.0, chips=2):
    """1 ms per step, 0.1 ms per token, small heads and attention; all of it ``slowdown`` times as slow."""
    tokens, rows = np.arange(65.0), np.arange(17.0)
    per_step, per_token = 1e-3 * (tokens > 0) * slowdown, 1e-4 * tokens * slowdown
    return StepCost(
        dense_s=per_step + per_token,
        head_s=2e-5 * rows * slowdown,
        decode_knots=np.array([0.0]),
        decode_value_s=np.array([1e-5 * slowdown]),
        decode_slope_s=np.array([1e-7 * slowdown]),
        decode_seq_s=0.0,
        prefill_planes=np.array([[1e-7, 2e-8, 1e-6]]) * slowdown,
        chips=chips,
        dense_flops=tokens * 1e9,
        dense_bytes=(tokens > 0) * 1e9 + tokens * 1e3,
        head_flops=rows * 1e8,
        head_bytes=(rows > 0) * 1e8,
        attention_flops_per_pair=1e5,
        kv_bytes_per_token=1e4,
        peak_flops_per_s=2e13,
        hbm_bandwidth_bytes_per_s=2e12,
        dense_parts={"launch": per_step, "matmul": per_token},
    )


def make_requests(rate=20.0, n=600, seed=0, *, prompt=30, output=20, cached=0, concurrency=0):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(max(prompt // 2, cached + 1), prompt * 2, n)
    outputs = rng.integers(1, output * 2, n)
    arrival = np.zeros(n) if concurrency or rate is None else np.cumsum(rng.exponential(1 / rate, n))
    return Requests(arrival, prompts, outputs, np.full(n, cached), outputs, concurrency)


def make_outcome(requests, cost, settings=SETTINGS, replicas=1):
    parts = [simulate(cost, settings, part) for part in split(requests, replicas)]
    return Outcome(requests, tuple(parts), cost.chips)


def make_facts(cost, settings=SETTINGS, **changes):
    facts = Facts(
        scenario="made-up",
        seed=0,
        deployment=Deployment(
            model="m",
            slice="s",
            chip="c",
            chips_per_replica=cost.chips,
            replicas=1,
            precision="p",
            sharding="tp=2",
            num_kv_blocks=settings.num_kv_blocks,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            traffic="t",
        ),
        cost=cost,
        ideal_cost=make_cost(0.5),
        settings=settings,
        slo=SloOptions(ttft_s=1.0, tpot_s=0.1),
        options=RunOptions(),
        price=price_by_hand("c", 3.6),
        power=PowerModel(210.0, 700.0, 100.0, 300.0, 700.0, 700.0, 350.0, "C", "test"),
        site=resolve_site(),
    )
    return replace(facts, **changes)


class Bench:
    """What the tests of the run room work with."""

    settings = SETTINGS
    cost = staticmethod(make_cost)
    requests = staticmethod(make_requests)
    outcome = staticmethod(make_outcome)
    facts = staticmethod(make_facts)

    @staticmethod
    def summary(requests, *, settings=SETTINGS, replicas=1, **changes):
        cost = make_cost()
        outcome = make_outcome(requests, cost, settings, replicas)
        at_once = make_outcome(
            replace(requests, arrival_s=np.zeros(len(requests)), concurrency=0), cost, settings, replicas
        )
        return summarise(outcome, at_once, make_facts(cost, settings, **changes))


@pytest.fixture(scope="session")
def bench():
    return Bench
