"""Prefill and decode pools: what each sees, and the whole they make."""

import numpy as np
import pytest

from simulator.planning import PlanOptions, plan
from simulator.planning.loads import Loads
from simulator.planning.pools import Handover, RoleLoads, of_role, small_fleet
from simulator.planning.rating import Sample
from simulator.results.plan import Target, Targets
from simulator.run.outcome import requests_table
from simulator.run.resolve import resolve
from simulator.run.scenario import load_scenario
from simulator.run.serving import simulate_fleet

SCENARIO = load_scenario("llama-3-8b-azure-chat")
TARGETS = Targets(
    limits=(
        Target(metric="ttft_s", limit_s=0.3, percentile=95),
        Target(metric="tpot_s", limit_s=0.02, percentile=95),
        Target(metric="e2e_s", limit_s=20.0, percentile=95),
    )
)
SMALL = PlanOptions(
    requests=600,
    batch_limits=(64,),
    token_budgets=(2048,),
    max_chips=1,
    shardings=("tp",),
    front=(),
    look_elsewhere=False,
)


def planned(qps, kinds, chips=("h100-sxm",), **options):
    chosen = SMALL.model_copy(update={"kinds": kinds} | options)
    return plan("llama-3-8b", SCENARIO.traffic, TARGETS, qps, chips, options=chosen, template=SCENARIO)


@pytest.fixture(scope="module")
def both():
    return planned(400.0, ("unified", "disaggregated"), spare_replicas=1, peak_to_mean=1.5)


@pytest.fixture(scope="module")
def split():
    return planned(400.0, ("disaggregated",), spare_replicas=1, peak_to_mean=1.5)


def test_each_role_sees_its_part_of_every_request():
    whole = Loads(SCENARIO, 1, 500).first(500).requests
    prompts = RoleLoads(SCENARIO, 1, 500, "prefill").first(500).requests
    assert (prompts.prompt_tokens == whole.prompt_tokens).all()
    assert (prompts.output_tokens == 1).all()
    way = Handover(prefill_s=0.2, latency_s=0.01, seconds_per_block=0.001, block_size=16)
    loads = RoleLoads(SCENARIO, 1, 500, "decode", way)
    load = loads.first(500)
    rows = whole.output_tokens > 1
    assert loads.share == pytest.approx(rows.mean())
    assert (load.requests.cached_tokens == whole.prompt_tokens[rows]).all()
    assert (load.requests.output_tokens == whole.output_tokens[rows] - 1).all()
    assert load.transfer_s == pytest.approx(0.01 + 0.001 * np.ceil(whole.prompt_tokens[rows] / 16))
    inside = Sample({name: np.full(len(load.measured), 2.0) for name in ("ttft_s", "tpot_s", "e2e_s")})
    seen = load.seen(inside).latency
    assert seen["e2e_s"] == pytest.approx(2.2 + load.transfer_s[load.measured])
    assert seen["tpot_s"] == pytest.approx(
        (2 + load.transfer_s[load.measured]) / load.requests.output_tokens[load.measured]
    )


def test_targets_are_divided_by_role():
    assert [t.metric for t in of_role(TARGETS, "prefill").limits] == ["ttft_s"]
    assert [t.metric for t in of_role(TARGETS, "decode").limits] == ["tpot_s", "e2e_s"]
    joint = Targets(limits=(Target(metric="ttft_s", limit_s=1.0),), joint_fraction=0.9)
    assert of_role(joint, "prefill").limits[0].percentile == 90
    assert of_role(joint, "decode") == Targets()


def test_a_split_fleet_is_simulated_whole_and_adds_up(split):
    best = split.best
    prefill, decode = best.pools
    assert best.kind == "disaggregated"
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert best.chips == prefill.chips + decode.chips
    for p in best.pools:
        assert p.replicas == p.needed_replicas + 1
        assert p.needed_replicas * p.rate_per_s * 0.95 >= 600.0 * (1 - 1e-9)
    steps = split.waterfall
    assert steps[0].chip_s_per_query * split.total_factor == pytest.approx(best.chips / 400.0, rel=1e-12)
    verified = split.verification
    assert verified.kept
    assert tuple(verified.replicas) == small_fleet((prefill.needed_replicas, decode.needed_replicas))
    assert [p["role"] for p in split.scenario["pool"]] == ["prefill", "decode"]
    assert verified.latency.tpot_s.p50.value < decode.latency["tpot_s"].p50


def test_a_decode_pool_by_itself_foretells_what_users_of_the_fleet_see(split):
    decode, verified = split.best.pools[1], split.verification
    scenario = load_scenario(
        "llama-3-8b-azure-chat",
        [
            f"engine.max_num_seqs={decode.max_num_seqs}",
            f"engine.max_num_batched_tokens={decode.max_num_batched_tokens}",
        ],
    )
    loads = RoleLoads(scenario, 2, 3000, "decode")
    load = loads.first(3000)
    rate = verified.rate_per_s * loads.share / verified.replicas[1]
    table = requests_table(simulate_fleet(resolve(scenario), load.at(rate)))
    alone = load.seen(Sample.of(table, load.measured)).percentiles()["tpot_s"]
    assert verified.latency.tpot_s.p50.value == pytest.approx(alone.p50, rel=0.05)
    assert verified.latency.tpot_s.p95.value == pytest.approx(alone.p95, rel=0.1)


def test_the_cheaper_kind_wins(both, split):
    unified = planned(400.0, ("unified",), spare_replicas=1, peak_to_mean=1.5)
    assert both.by_chip[0].fleet.chips == min(unified.by_chip[0].fleet.chips, split.by_chip[0].fleet.chips)
    kinds = {both.best.kind, *(f.kind for f in both.runners_up)}
    assert kinds == {"unified", "disaggregated"}
    names = ("considered", "simulated", "simulations")
    for name in names:
        parts = [getattr(p.searched, name) for p in (unified, split)]
        assert getattr(both.searched, name) == sum(parts)


def test_more_queries_never_take_fewer_replicas_of_either_role():
    fleets = [planned(qps, ("disaggregated",)).best for qps in (5.0, 50.0, 500.0)]
    for role in (0, 1):
        counts = [f.pools[role].needed_replicas for f in fleets]
        assert counts == sorted(counts)


def test_chips_without_a_network_have_no_split_fleet():
    found = planned(10.0, ("disaggregated",), chips=("rtx-4090",))
    assert found.best is None


def test_small_fleets_keep_the_ratio():
    for needed in ((300, 500), (7, 700), (13, 2), (6, 6)):
        p, d = small_fleet(needed)
        assert p + d <= 12
        assert p / d == pytest.approx(needed[0] / needed[1], rel=0.35) or 1 in {p, d}
