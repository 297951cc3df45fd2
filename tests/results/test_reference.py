"""docs/results.md carries the tables that the schema's own definitions write."""

from pathlib import Path

import simulator.results.plan  # noqa: F401 - its sections are looked at too
from simulator.results.reference import reference_markdown
from simulator.results.summary import Section

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def test_the_reference_page_is_the_schema():
    text = DOCUMENT.read_text(encoding="utf-8")
    written = text.partition("<!-- reference -->")[2].strip()
    assert written == reference_markdown().strip(), "paste reference_markdown() below the marker in docs/results.md"


def test_figures_carry_their_unit_or_need_none():
    unitless = {"load", "headroom_fraction", "backlog_start", "backlog_end", "backlog_trend_p", "low", "high", "value"}
    unitless |= {
        "mfu",
        "mbu",
        "mfu_busy",
        "mbu_busy",
        "model_flops",
        "recomputed_flops",
        "speculative_flops",
        "tokens_per_pass",
        "drafts_per_pass",
        "draft_share_of_busy",
        "wasted_share_of_busy",
        "pue",
        "mean",
        "relative_error",
    }
    unitless |= {"mean_running", "mean_waiting", "mean_decode_batch", "mean_step_tokens", "ideal_share_of_provisioned"}
    unitless |= {"median", "level"}
    # Chip-seconds per query: the section's name has the unit.
    unitless |= {"ideal", "busy", "provisioned", "prefill", "cached", "recompute", "wasted", "decode"}
    # Of plans; queries per second are their own unit, percentiles stand in a section of latencies.
    unitless |= {"qps", "percentile", "peak_to_mean", "factor", "scale", "p50", "p95", "p99"}
    # Of lifetime studies: counts, ratios, and tokens, as the field writes them.
    unitless |= {
        "parameters",
        "tokens",
        "training_flops",
        "times",
        "probability",
        "worst_regret",
        "saving",
        "identity",
        "loss",
    }
    unitless |= {"elasticity_of_serving", "elastic_demand", "justified_demand", "queries", "valued_queries", "years"}
    unitless |= {"training_usd_per_flop", "interval_percent"}
    units = (
        "_s",
        "_usd",
        "_bytes",
        "_fraction",
        "_w",
        "_chip",
        "_hour",
        "_per_query",
        "_token",
        "_user",
        "_query_busy",
        "_kwh",
    )
    for record in Section.__subclasses__():
        for name, field in record.model_fields.items():
            if field.annotation in {float, float | None}:
                assert name in unitless or name.endswith(units), f"{record.__name__}.{name}"
