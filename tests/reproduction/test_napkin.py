"""The published napkin estimate of the web agent: its arithmetic, its corrections, and the simulated answer."""

import json
from itertools import pairwise

import pytest

from simulator.errors import InputError
from simulator.reproduction import agent, napkin
from simulator.reproduction.rows import last_digit, reproduce_rows
from simulator.run import load_scenario, run_scenario

ROWS = reproduce_rows("napkin", napkin.rows_ours())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_row_holds_to_the_digits_given(row):
    assert row.holds, f"{row.quantity}: expected {row.expected} {row.unit}, ours {row.ours} ({row.difference:+.2e})"


def test_what_the_slide_prints_rounds_from_its_own_arithmetic():
    written = napkin.as_written()
    printed = {
        "nparam": "68.8",
        "prefill_1": "5.7",
        "token_budget": "3.06",
        "full_step": "6.89",
        "chip_seconds": "8.86",
    }
    for name, text in printed.items():
        assert round(written[name], len(text.partition(".")[2])) == float(text)
    assert round(written["chips"], -4) == 90_000


def test_rows_without_a_partner_are_refused():
    ours = dict(napkin.rows_ours())
    ours.pop("chips")
    with pytest.raises(InputError, match="chips"):
        reproduce_rows("napkin", ours)
    with pytest.raises(InputError, match="extra"):
        reproduce_rows("napkin", napkin.rows_ours() | {"extra": float})


def test_a_wrong_figure_would_be_seen():
    ours = dict(napkin.rows_ours())
    right = ours["corrected_step"]()
    ours["corrected_step"] = lambda: right * (1 + 1e-6)
    assert [row.id for row in reproduce_rows("napkin", ours) if not row.holds] == ["corrected_step"]


def test_last_digit():
    assert [last_digit(t) for t in ("5.7", "1.121503962e15", "230927", "0.00770")] == [0.1, 1e6, 1.0, 1e-5]


def test_the_chain_starts_at_the_published_count_and_passes_the_corrected_ones():
    chain = agent.corrections()
    assert chain[0].chips == pytest.approx(88_622.36, abs=0.01)
    assert chain[3].chips == pytest.approx(230_927, abs=1)
    assert chain[4].chip_seconds == pytest.approx(26.643814, abs=1e-6)
    # Interconnect, scales and efficiency only ever add; sharing a decode step among agents only ever takes away.
    assert all(later.chip_seconds > earlier.chip_seconds for earlier, later in pairwise(chain[4:8]))
    assert chain[-1].chip_seconds < chain[-2].chip_seconds
    assert chain[-1].latency_s > chain[-2].latency_s


def test_simulation_conserves_and_cannot_beat_the_bound():
    found = agent.simulate_agents("tpu-v5e:4x4", requests=600)
    assert found is not None
    assert found.busy_chip_seconds * found.rate_per_s <= found.chips_per_replica
    assert found.chips == pytest.approx(10_000 * found.chips_per_replica / found.rate_per_s)
    assert found.p99_s > found.p50_s > found.alone_s > 1.0
    ideal = agent.AGENT_OVERHEAD_S + napkin.prefill_s(16) + napkin.OUTPUT * napkin.decode_step_s() / 2
    assert found.alone_s > ideal
    assert found.share_met == 0.0


def test_the_shipped_scenario_is_the_same_replica():
    run = run_scenario(load_scenario("web-agent", ["traffic.n_requests=400"]))
    found = agent.simulate_agents(run.summary.deployment.slice, requests=400)
    assert found is not None
    assert run.summary.deployment.model == "llama-3-70b"
    assert run.summary.load.capacity_per_s == pytest.approx(found.capacity_per_s, rel=1e-6)


def test_a_slice_that_cannot_hold_one_agent():
    with pytest.raises(InputError):
        agent.simulate_agents("tpu-v5e:3x3")
    assert agent.simulate_agents("tpu-v5e:1", requests=10) is None


def test_command(run_cli):
    done = run_cli("reproduce", "napkin", "--json", "--check")
    document = json.loads(done.stdout)["napkin"]
    assert document["missed_rows"] == []
    assert document["waterfall"][0]["chips"] == pytest.approx(88_622.36, abs=0.01)
    assert run_cli("reproduce", "napkins", code=2).stderr.count("\n") == 1
