"""The prefix cache through a whole run: scenario keys, summary, conservation, and what it saves."""

from dataclasses import replace
from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.run import load_scenario, run_scenario
from simulator.run.consumption import saved_chip_seconds
from simulator.run.resolve import resolve
from simulator.run.serving import as_requests, queued_at_once, simulate_fleet
from simulator.traffic import build_stream

SESSIONS = (
    "traffic.n_requests=600",
    "traffic.arrival.rate_per_s=0.3",
    "traffic.sessions={turns=6, turn_gap_s=20.0, shared_tokens=1000, opening=3000}",
)


def summary(*overrides, workers=1):
    return run_scenario(load_scenario("llama-3-8b-azure-chat", overrides), workers=workers).summary


def test_sessions_are_served_faster_with_a_prefix_cache():
    without = summary(*SESSIONS)
    found = summary(*SESSIONS, "engine.prefix_cache=blocks")
    cache = found.prefix_cache
    assert without.prefix_cache is None
    assert any("makes no use of it" in warning for warning in without.warnings)
    assert 0.5 < cache.hit_fraction < 1
    assert found.requests.cached_tokens == cache.hit_tokens  # nobody was preempted
    assert found.ledger.busy_chip_s < without.ledger.busy_chip_s
    assert found.load.capacity_per_s > 1.5 * without.load.capacity_per_s
    assert found.latency.ttft_s.p50.value < without.latency.ttft_s.p50.value
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)


def test_chip_seconds_saved_are_those_that_a_full_queue_gets_back():
    scenario = load_scenario("llama-3-8b-azure-chat", [*SESSIONS, "engine.prefix_cache=blocks"])
    resolved = resolve(scenario)
    plain = replace(resolved, settings=replace(resolved.settings, prefix_cache="off"))
    requests = queued_at_once(as_requests(build_stream(scenario.traffic, 1, base_folder=Path())))
    found, without = simulate_fleet(resolved, requests), simulate_fleet(plain, requests)
    saved = saved_chip_seconds(found, resolved.cost, resolved.settings.max_num_batched_tokens)
    assert without.busy_s - found.busy_s == pytest.approx(saved, rel=0.03)


def test_without_output_blocks_fewer_tokens_are_found():
    hits = [
        summary(*SESSIONS, "engine.prefix_cache=blocks", f"engine.cache_outputs={on}").prefix_cache.hit_tokens
        for on in ("true", "false")
    ]
    assert hits[0] > hits[1] > 0


@pytest.mark.parametrize(("name", "rows"), [("conversation", 12_031), ("synthetic", 3_993)])
def test_a_trace_with_hash_ids_runs_with_its_own_blocks(shared, name, rows):
    trace = shared / "data" / "traces" / f"mooncake_{name}_trace.jsonl.gz"
    found = summary(
        f"traffic.trace={trace}", "replicas=4", "engine.prefix_cache=blocks", "engine.block_size=512", workers=2
    )
    assert found.requests.finished + found.requests.rejected == rows
    assert found.prefix_cache.hit_tokens % 512 == 0
    assert 0 < found.prefix_cache.hit_fraction < 1
    assert found.requests.cached_tokens > 0


def test_a_prefix_cache_without_anything_to_go_by_is_refused():
    with pytest.raises(InputError, match="no block hashes"):
        summary("traffic.n_requests=50", "engine.prefix_cache=blocks")
    with pytest.raises(InputError, match="a divisor or a multiple of 16"):
        summary(*SESSIONS, "engine.prefix_cache=blocks", "engine.block_size=24")
