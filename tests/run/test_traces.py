"""Real traces, unmodified and whole, through a whole run: ties, long prompts and bursts included."""

import pytest

from simulator.run import load_scenario, run_scenario


@pytest.mark.parametrize(
    ("file", "rows", "replicas"),
    [
        ("AzureLLMInferenceTrace_conv.csv.gz", 19_366, 1),
        ("AzureLLMInferenceTrace_code.csv.gz", 8_819, 1),
        ("mooncake_conversation_trace.jsonl.gz", 12_031, 4),
        ("mooncake_synthetic_trace.jsonl.gz", 3_993, 2),
        ("llmservingsim_sharegpt-llama-3.1-8b-300-sps10.csv", 300, 1),
    ],
)
def test_a_trace_runs_as_it_is(shared, file, rows, replicas):
    trace = shared / "data" / "traces" / file
    summary = run_scenario(
        load_scenario("llama-3-8b-azure-chat", [f"traffic.trace={trace}", f"replicas={replicas}"]), workers=2
    ).summary
    assert summary.requests.total == summary.requests.arrived == rows
    assert summary.requests.finished + summary.requests.rejected == rows
    assert summary.load.load > 0
    assert summary.ledger.busy_chip_s + summary.ledger.idle_chip_s == pytest.approx(summary.ledger.chip_s, rel=1e-9)
