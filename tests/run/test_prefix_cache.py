"""The prefix cache through a whole run: scenario keys, summary, conservation, and what it saves."""

import pytest

from simulator.errors import InputError
from simulator.run import load_scenario, run_scenario

SESSIONS = (
    "traffic.n_requests=600",
    "traffic.arrival.rate_per_s=0.5",
    'traffic.sessions={turns=6, turn_gap_s=20.0, shared_tokens=1000, opening=3000}',
)


def summary(*overrides, workers=1):
    return run_scenario(load_scenario("llama-3-8b-azure-chat", overrides), workers=workers).summary


def test_sessions_are_served_faster_with_a_prefix_cache_and_by_as_much_as_it_says():
    without = summary(*SESSIONS)
    found = summary(*SESSIONS, "engine.prefix_cache=blocks")
    cache = found.prefix_cache
    assert without.prefix_cache is None
    assert any("makes no use of it" in warning for warning in without.warnings)
    assert 0.5 < cache.hit_fraction < 1
    assert found.requests.cached_tokens == cache.hit_tokens  # nobody was preempted
    saved = without.ledger.busy_chip_s - found.ledger.busy_chip_s
    assert 0 < cache.saved_chip_s < saved  # a lower bound: steps are not full
    assert found.latency.ttft_s.p50.value < without.latency.ttft_s.p50.value
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)


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
