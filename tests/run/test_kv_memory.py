"""KV blocks below HBM through a whole run: scenario keys, bandwidths, summary, conservation, and what they are worth."""

from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.roofline.kv_groups import KvGroups
from simulator.run import load_scenario, run_scenario
from simulator.run.explain import explain
from simulator.run.kv_memory import block_bytes
from simulator.run.resolve import resolve
from simulator.run.serving import as_requests, simulate_fleet
from simulator.traffic import build_stream

TIGHT = ("traffic.n_requests=300", "engine.num_gpu_blocks_override=600")
SWAP = ("engine.preemption=swap", "engine.host_blocks=100000")
SESSIONS = (
    "traffic.n_requests=300",
    "traffic.arrival.rate_per_s=0.3",
    "traffic.sessions={turns=6, turn_gap_s=20.0, shared_tokens=1000, opening=3000}",
    "engine.prefix_cache=blocks",
    "engine.num_gpu_blocks_override=2000",
)
STORE = 'engine.cache_tiers=[{name="host", capacity_bytes=1e10}, {name="store", blocks=1000000, bandwidth_bytes_per_s=5e9, latency_s=0.02}]'


def summary(*overrides):
    return run_scenario(load_scenario("llama-3-8b-azure-chat", overrides)).summary


def test_swapping_spares_recomputation():
    without, found = summary(*TIGHT), summary(*TIGHT, *SWAP)
    assert without.kv_memory is None
    assert without.requests.recomputed_tokens > 0
    assert found.requests.recomputed_tokens == 0
    assert found.requests.preemptions > 0
    assert found.kv_memory.swap_out_bytes == found.kv_memory.swap_in_bytes > 0
    assert 0 < found.kv_memory.swap_time_fraction < 0.5
    assert found.breakdown.fractions["swap"] > 0
    assert sum(found.breakdown.fractions.values()) == pytest.approx(1)
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)


def test_the_bandwidth_is_that_of_pcie_unless_stated():
    swap = resolve(load_scenario("llama-3-8b-azure-chat", SWAP)).settings.swap
    # Llama-3-8B keeps 2 × 32 layers × 8 heads × 128 values of 2 bytes = 128 KiB per token: 2 MiB a block of 16, at 64 GB/s.
    assert swap.block_s == pytest.approx(2 * 2**20 / 64e9)
    slower = resolve(
        load_scenario("llama-3-8b-azure-chat", (*SWAP, "engine.swap_bandwidth_bytes_per_s=1e9"))
    ).settings.swap
    assert slower.block_s == pytest.approx(2 * 2**20 / 1e9)


def test_a_store_gives_back_what_hbm_has_no_room_for():
    without, found = summary(*SESSIONS), summary(*SESSIONS, STORE)
    host, store = found.kv_memory.tiers
    assert (host.name, store.name) == ("host", "store")
    assert host.hit_tokens > 0
    assert host.loaded_bytes == pytest.approx(host.hit_tokens * 128 * 1024)
    assert found.prefix_cache.hit_fraction > without.prefix_cache.hit_fraction
    assert found.kv_memory.loads > 0
    assert found.kv_memory.mean_load_s > 0
    assert found.ledger.busy_chip_s < without.ledger.busy_chip_s


def test_what_is_written_through_needs_no_eviction():
    roomy = (*SESSIONS, "engine.num_gpu_blocks_override=100000")
    behind, through = (STORE, STORE.replace("latency_s=0.02", "latency_s=0.02, write_through=true"))
    assert summary(*roomy, behind).kv_memory.loads == 0
    found = run_scenario(load_scenario("llama-3-8b-azure-chat", (*roomy, through)))
    assert found.summary.kv_memory.loads == 0  # HBM has it all, so nobody asks; but the store has it too
    host, store = found.summary.kv_memory.tiers
    assert host.stored_bytes == 0
    assert store.stored_bytes > 0


def test_a_warm_store_spares_the_first_prompts_their_prefix():
    always = (*SESSIONS, STORE, "engine.load_policy=always")
    cold, warm = summary(*always), summary(*always, "engine.stored_prefix_tokens=1000")
    assert warm.kv_memory.tiers[-1].hit_tokens >= cold.kv_memory.tiers[-1].hit_tokens + 900
    assert warm.ledger.busy_chip_s < cold.ledger.busy_chip_s


def test_blocks_of_ranks_and_stages_lie_on_all_their_chips():
    sliced = (*SWAP, "model=llama-3-70b", "slice=h100-sxm:2x8")
    whole = resolve(load_scenario("llama-3-8b-azure-chat", (*SWAP, "model=llama-3-70b", "slice=h100-sxm:8")))
    stages = resolve(load_scenario("llama-3-8b-azure-chat", (*sliced, "sharding.pp=2")))
    # 80 layers × 2 × 8 heads × 128 values of 2 bytes × 16 tokens, over the links of 8 chips, or of 16.
    assert whole.settings.swap.block_s == pytest.approx(80 * 2 * 8 * 128 * 2 * 16 / (8 * 64e9))
    assert stages.settings.swap.block_s == pytest.approx(whole.settings.swap.block_s / 2)
    moe = ("model=qwen3-235b-a22b", "precision=fp8", "slice=h100-sxm:8", "sharding.tp=4", "sharding.ep=8")
    ranks = resolve(load_scenario("llama-3-8b-azure-chat", (*SWAP, *moe, "sharding.dp=2")))
    assert ranks.place.n_chips == 4


def test_everything_at_once_is_conserved():
    mixed = (
        "engine.policy=priority",
        "clients.priorities=[0.2, 0.8]",
        "engine.preempt_lower=true",
        "engine.host.step_s=0.001",
        'engine.speculation={method="ngram", num_speculative_tokens=3, acceptance_rate=0.6}',
    )
    found = summary(*SESSIONS, STORE, *SWAP, *mixed)
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)
    assert sum(found.breakdown.fractions.values()) == pytest.approx(1)
    assert found.requests.finished == 300


def test_explain_names_the_load():
    scenario = load_scenario("llama-3-8b-azure-chat", (*SESSIONS, STORE))
    resolved = resolve(scenario)
    requests = as_requests(build_stream(scenario.traffic, scenario.run.seed, base_folder=Path()))
    load_s = simulate_fleet(resolved, requests).column("load_s")
    row = int(load_s.argmax())
    explained = explain(scenario, row)
    parts = {part.what: part.time_s for part in explained.parts}
    assert parts["queue: KV blocks were loaded"] == pytest.approx(load_s[row])
    assert sum(parts.values()) == pytest.approx(explained.e2e_s, abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine.preemption=swap",), "host_blocks"),
        (("engine.host_blocks=5",), "host_blocks"),
        ((STORE,), "prefix_cache"),
        (("engine.prefix_cache=blocks", "engine.stored_prefix_tokens=100"), "cache_tiers"),
        (("engine.prefix_cache=blocks", 'engine.cache_tiers=[{name="x"}]'), "'x'.*one of blocks and capacity_bytes"),
        (("engine.prefix_cache=blocks", "engine.cache_tiers=[{capacity_bytes=10.0}]"), "less than a block"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        resolve(load_scenario("llama-3-8b-azure-chat", overrides))


GEMMA = ("model=gemma-2-9b", "slice=h100-sxm:1", "traffic.n_requests=200")


def test_windowed_layers_give_blocks_back_unless_told_otherwise():
    pooled = resolve(load_scenario("llama-3-8b-azure-chat", GEMMA))
    kept = resolve(load_scenario("llama-3-8b-azure-chat", (*GEMMA, "engine.disable_hybrid_kv_cache_manager=true")))
    asked = resolve(load_scenario("llama-3-8b-azure-chat", (*GEMMA, "engine.disable_hybrid_kv_cache_manager=false")))
    assert pooled.settings.kv_groups == asked.settings.kv_groups == KvGroups(1, 1, 4096)
    assert kept.settings.kv_groups == KvGroups()
    # A block is one of 21 layers instead of all 42: half the bytes, twice the blocks but for the null block.
    assert block_bytes(kept.place) == 2 * block_bytes(pooled.place)
    assert pooled.settings.num_kv_blocks + 1 in {2 * (kept.settings.num_kv_blocks + 1) + one for one in (0, 1)}


def test_a_drafters_layer_lies_in_the_groups():
    def drafting(method):
        options = f"engine.speculation={{method='{method}', num_speculative_tokens=3, acceptance_rate=0.5}}"
        return resolve(load_scenario("llama-3-8b-azure-chat", (*GEMMA, options)))

    alone = resolve(load_scenario("llama-3-8b-azure-chat", GEMMA))
    assert drafting("ngram").settings.kv_groups == drafting("eagle").settings.kv_groups == KvGroups(1, 1, 4096)
    assert block_bytes(drafting("ngram").place) == block_bytes(alone.place)
    # EAGLE's layer sees everything: 22 full layers beside 21 with a window, and blocks of 22.
    assert block_bytes(drafting("eagle").place) * 21 == block_bytes(alone.place) * 22
    assert drafting("eagle").settings.num_kv_blocks < drafting("ngram").settings.num_kv_blocks


def test_windows_are_not_given_back_beside_what_no_rule_covers():
    tiers = ("engine.prefix_cache=blocks", 'engine.cache_tiers=[{name="host", capacity_bytes=1e12}]')
    for beside in (("engine.prefix_cache=radix",), tiers):
        chosen = (*GEMMA, *beside)
        assert resolve(load_scenario("llama-3-8b-azure-chat", chosen)).settings.kv_groups == KvGroups()
        with pytest.raises(InputError, match=r"disable_hybrid_kv_cache_manager = false.*not modelled with engine"):
            resolve(load_scenario("llama-3-8b-azure-chat", (*chosen, "engine.disable_hybrid_kv_cache_manager=false")))
    cached = resolve(load_scenario("llama-3-8b-azure-chat", (*GEMMA, "engine.prefix_cache=blocks")))
    assert cached.settings.kv_groups == KvGroups(1, 1, 4096)


def test_stages_give_windows_back_too():
    stages = ("model=gpt-oss-20b", "slice=h100-sxm:2", "sharding={tp=1, pp=2}", "traffic.mix=random-8k-1k")
    few = ("engine.gpu_memory_utilization=0.34", "traffic.n_requests=60", "traffic.arrival={process='offline'}")
    pooled, kept = (
        load_scenario("llama-3-8b-azure-chat", (*stages, *few, f"engine.disable_hybrid_kv_cache_manager={told}"))
        for told in ("false", "true")
    )
    found = resolve(pooled)
    assert found.settings.kv_groups == KvGroups(1, 1, 128)
    # A block is one of 12 layers, 6 in each stage, of 2 × 8 heads × 64 values of 2 bytes for 16 tokens.
    assert block_bytes(found.place) == 12 * 2 * 8 * 64 * 2 * 16
    pooled, kept = run_scenario(pooled).summary, run_scenario(kept).summary
    assert pooled.occupancy.peak_running > 1.5 * kept.occupancy.peak_running
    assert pooled.throughput.requests_per_s > kept.throughput.requests_per_s


def test_a_crowded_replica_serves_long_contexts_faster_when_windows_give_back():
    traffic = ("traffic.mix=random-8k-1k", "traffic.arrival={process='offline'}", "traffic.n_requests=150")
    long = ("model=gemma-3-12b", *traffic)
    pooled, kept = (summary(*long, *more) for more in ((), ("engine.disable_hybrid_kv_cache_manager=true",)))
    assert pooled.occupancy.peak_running > 2 * kept.occupancy.peak_running
    assert pooled.throughput.requests_per_s > 1.2 * kept.throughput.requests_per_s


def test_a_prefix_cache_holds_more_prompts_when_windows_give_back():
    gemma = ("model=gemma-3-27b", "slice=h100-sxm:4", "sharding={tp=4}", "engine.gpu_memory_utilization=0.35")
    few = ("traffic.n_requests=800",)
    kept = ("engine.disable_hybrid_kv_cache_manager=true",)
    scenarios = (load_scenario("coding-agents", (*gemma, *few, *more)) for more in ((), kept))
    pooled, keeping = (run_scenario(scenario).summary.prefix_cache.hit_fraction for scenario in scenarios)
    assert pooled > 2 * keeping > 0.1
