"""Bounds are bounds: no simulated request is faster, no saturated replica serves more."""

import numpy as np
import pytest

from simulator.catalog.models import load_model
from simulator.planning.bounds import fitting, floors
from simulator.planning.loads import Loads
from simulator.planning.rating import Bench
from simulator.run.resolve import resolve
from simulator.run.scenario import load_scenario
from simulator.run.serving import queued_at_once, simulate_fleet

N = 400
#: One deployment of each kind of cost table: plain, tensor parallel on a torus, windows of both kinds, latents, experts over ranks,
#: pipeline stages, uneven chunks, narrow weights.
DEPLOYMENTS = {
    "plain": ["model=llama-3-8b", "slice=h100-sxm:1"],
    "small batch, small budget": [
        "model=llama-3-8b",
        "slice=l4:1",
        "engine.max_num_seqs=4",
        "engine.max_num_batched_tokens=100",
    ],
    "torus": ["model=llama-3-70b", "slice=tpu-v5e:4x4", "precision=w8a16kv8"],
    "sliding window": ["model=gemma-2-9b", "slice=a100-80-sxm:1"],
    "chunked window": ["model=llama-4-scout", "slice=h200-sxm:8"],
    "latents": ["model=deepseek-v2-lite", "slice=h100-sxm:1"],
    "experts over ranks": [
        "model=qwen3-30b-a3b",
        "slice=h100-sxm:4",
        "sharding.tp=1",
        "sharding.dp=4",
        "sharding.ep=4",
        "engine.max_num_seqs=16",
    ],
    "stages": [
        "model=llama-3-8b",
        "slice=l40s:4",
        "sharding.tp=2",
        "sharding.pp=2",
        "engine.max_num_batched_tokens=512",
    ],
    "stages, few seats": [
        "model=llama-3-8b",
        "slice=a10g:4",
        "sharding.tp=1",
        "sharding.pp=4",
        "engine.max_num_seqs=8",
    ],
    "recurrent": ["model=nemotron-h-8b", "slice=h100-sxm:1"],
    "engine profile": ["model=llama-3-8b", "slice=h100-sxm:1", "engine.profile=vllm"],
    "host": ["model=llama-3-8b", "slice=h100-sxm:1", "engine.host.step_s=0.001", "engine.host.request_s=0.01"],
    "few blocks": ["model=llama-3-8b", "slice=h100-sxm:1", "engine.num_gpu_blocks_override=500"],
}
MIXES = {
    "chat": [],
    "cached": ["traffic.mix=web-agent", "engine.max_model_len=0"],
    "long outputs": ["traffic.mix=random-1k-8k", "traffic.arrival={process='poisson', rate_per_s=1.0}"],
}


def deployed(deployment, mix="chat"):
    scenario = load_scenario("llama-3-8b-azure-chat", [*DEPLOYMENTS[deployment], *MIXES[mix]])
    return resolve(scenario), Loads(scenario, 1, N).first(N)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_nothing_simulated_beats_the_bounds(deployment, mix):
    resolved, load = deployed(deployment, mix)
    bounds = floors(resolved.engine_cost, resolved.settings, load.requests)
    at_once = simulate_fleet(resolved, queued_at_once(load.requests))
    finished = at_once.column("status") == 0
    assert (finished == bounds.accepted).all()
    if not finished.any():
        assert bounds.requests_per_s == 0
        return
    saturated = finished.sum() / at_once.end_s
    assert saturated <= bounds.requests_per_s
    for share in (0.02, 0.5, 1.5):
        outcome = simulate_fleet(resolved, load.at(share * saturated))
        done = outcome.column("status") == 0
        arrival, first, finish = (outcome.column(name)[done] for name in ("arrival_s", "first_token_s", "finish_s"))
        gaps = load.requests.output_tokens[done] - 1
        assert (first - arrival >= bounds.ttft_s[done]).all()
        assert (finish - arrival >= bounds.e2e_s[done]).all()
        several = gaps > 0
        assert ((finish - first)[several] / gaps[several] >= bounds.tpot_s[done][several]).all()


@pytest.mark.parametrize("deployment", ["plain", "torus", "latents"])
def test_bounds_are_not_idle(deployment):
    """Alone, a request takes little more than its bound, and a saturated replica comes near its own."""
    resolved, load = deployed(deployment)
    bounds = floors(resolved.engine_cost, resolved.settings, load.requests)
    outcome = simulate_fleet(resolved, load.at(1e-3))
    e2e = outcome.column("finish_s") - outcome.column("arrival_s")
    assert np.median(e2e / bounds.e2e_s) < 1.1
    assert Bench(resolved, load).saturated_per_s > 0.3 * bounds.requests_per_s


def test_seats_bound_a_pipeline_that_its_busiest_stage_does_not():
    resolved, load = deployed("stages, few seats")
    bounds = floors(resolved.engine_cost, resolved.settings, load.requests)
    seats_per_s = resolved.settings.max_num_seqs / bounds.e2e_s.mean()
    assert bounds.requests_per_s == pytest.approx(seats_per_s)
    assert Bench(resolved, load).saturated_per_s > 0.6 * bounds.requests_per_s


@pytest.mark.parametrize("changes", [["engine.batching=static"], ["engine.prefix_cache=blocks"]])
def test_where_they_may_not_hold_there_are_none(changes):
    scenario = load_scenario("llama-3-8b-azure-chat", changes)
    resolved, load = resolve(scenario), Loads(scenario, 1, N).first(N)
    bounds = floors(resolved.engine_cost, resolved.settings, load.requests)
    assert bounds.requests_per_s == np.inf
    assert not bounds.ttft_s.any()
    assert not bounds.e2e_s.any()


def test_rejections_are_those_of_the_engine():
    scenario = load_scenario(
        "llama-3-8b-azure-chat",
        ["engine.num_gpu_blocks_override=60", "engine.max_model_len=1000", "traffic.max_tokens=300"],
    )
    resolved, load = resolve(scenario), Loads(scenario, 1, N).first(N)
    accepted = fitting(resolved.settings, load.requests)
    assert 0 < accepted.sum() < N
    assert ((simulate_fleet(resolved, load.requests).column("status") == 0) == accepted).all()


def test_smaller_limits_share_the_tables_of_larger_ones():
    from simulator.run.resolve import with_limits

    for name in ("plain", "stages", "experts over ranks", "engine profile"):
        scenario = load_scenario("llama-3-8b-azure-chat", DEPLOYMENTS[name])
        engine = scenario.engine.model_copy(update={"max_num_seqs": 8, "max_num_batched_tokens": 256})
        small = scenario.model_copy(update={"engine": engine})
        fresh, shared = resolve(small), with_limits(resolve(scenario), small)
        assert fresh.settings == shared.settings
        load = Loads(scenario, 1, N).first(N).requests
        a, b = (simulate_fleet(r, load) for r in (fresh, shared))
        assert (a.column("finish_s") == b.column("finish_s")).all()
        assert load_model(scenario.model).name == fresh.deployment.architecture.name
