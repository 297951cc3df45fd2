"""Text for people: fits the page, shows what there is, and says why something is missing."""

import pytest

from simulator.report.forms import WIDTH, aligned, number, percent, seconds, usd
from simulator.report.tables import summary_text
from simulator.run import load_scenario, run_scenario


@pytest.fixture(scope="module")
def summary():
    scenario = load_scenario("llama-3-8b-azure-chat", ["traffic.n_requests=300", "prices.usd_per_kwh=0.1"])
    return run_scenario(scenario, seeds=2).summary


def test_every_section_fits_the_page(summary):
    text = summary_text(summary)
    assert max(map(len, text.splitlines())) <= WIDTH
    for heading in (
        "Answer",
        "Latency",
        "Throughput",
        "Engine",
        "Chip-seconds per query",
        "Price",
        "Energy",
        "Conservation",
    ):
        assert f"\n{heading}" in text
    assert "Between 2 seeds" in text
    assert "an interval needs" in text
    assert "of electricity" in text
    assert "efficiency.matmul" in text
    assert "efficiency.matmul" not in summary_text(summary, sources=False)


def test_missing_sections_are_said_not_dropped(summary):
    bare = summary.model_copy(update={"prices": None, "energy": None, "slo": None, "replications": None})
    text = summary_text(bare)
    assert "set prices.usd_per_chip_hour" in text
    assert "SLO" not in text


@pytest.mark.parametrize(
    ("render", "value", "text"),
    [
        (number, 999.6, "1,000"),
        (number, 5, "5"),
        (number, -0.0377, "-0.0377"),
        (number, 1e-9, "1.00e-09"),
        (seconds, 0.0, "0 s"),
        (seconds, 1234.5, "1,234 s"),
        (percent, 0.0, "0 %"),
        (percent, -0.5, "-50.0 %"),
        (usd, 0.0, "$0"),
    ],
)
def test_numbers_read_well(render, value, text):
    assert render(value) == text


def test_columns_line_up():
    assert aligned([["a", "1"], ["bbb", "22"]], indent=0) == ["a     1", "bbb  22"]
