"""How far predictions are from measured serving runs, as recorded when the shipped engine profiles were fitted.

The record (``data/accuracy.json``) is what ``chipseconds calibrate serving DATA --splits random,release,group --out DIR``
writes; it has errors and parameters, and nothing of the measurements themselves.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from simulator.errors import InputError

METRICS = {
    "tpot_s": "TPOT",
    "ttft_s": "TTFT",
    "e2e_s": "E2E",
    "e2e_s_p50": "E2E, median",
    "e2e_s_p90": "E2E, p90",
    "output_tokens_per_s": "output tokens/s",
}
SPLITS = {
    "random": "random rows left out",
    "release": "engine version left out",
    "group": "model, chip, engine, formats left out",
}


def load_accuracy(path: Path | None = None) -> dict[str, Any]:
    """The record that ships with the package, or another one.

    Raises
    ------
    InputError
        If the file is none.
    """
    file = files("simulator.reproduction") / "data" / "accuracy.json" if path is None else path
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no record of accuracy: {error}") from None
    if not {"splits", "groups", "in_sample", "parameters"} <= set(found):
        raise InputError(f"{file}: no record of accuracy: write one with chipseconds calibrate serving --out")
    return found


Rows = list[tuple[str, ...]]


def summary_rows(record: Mapping[str, Any]) -> Rows:
    """Errors of every way of leaving rows out, the fit itself, and the noise floor, by metric."""
    stages = [("repeats of one configuration", record["noise_floor"]), ("in sample", record["in_sample"])]
    stages += [(text, record["splits"][name]["all"]) for name, text in SPLITS.items() if name in record["splits"]]
    return [
        (METRICS[metric], stage, *_cells(errors[metric]))
        for metric in METRICS
        for stage, errors in stages
        if metric in errors
    ]


def group_rows(record: Mapping[str, Any], which: str) -> Rows:
    """Errors by ``groups``, ``tables`` or ``loads``."""
    return [
        (name, METRICS[metric], *_cells(errors[metric]))
        for name, errors in record[which].items()
        for metric in METRICS
        if metric in errors
    ]


def left_out_rows(record: Mapping[str, Any], split: str) -> Rows:
    """Errors of each part of a split, by the fit that has not seen it."""
    parts = record["splits"].get(split, {"parts": {}})["parts"]
    return [
        (part, METRICS[metric], *_cells(errors[metric]))
        for part, errors in sorted(parts.items())
        for metric in METRICS
        if metric in errors
    ]


def ranking_rows(record: Mapping[str, Any]) -> Rows:
    """What choosing by prediction forgoes, by split."""
    return [
        (SPLITS[name], str(r["choices"]), f"{r['median_loss']:.1%}", f"{r['p90_loss']:.1%}", f"{r['missed']:.1%}")
        for name, split in record["splits"].items()
        if (r := split["ranking"]) is not None
    ]


COVERAGE_COLUMNS = ("rows", "in 50 %", "in 80 %", "in 95 %", "half width of 80 %")


def coverage_rows(record: Mapping[str, Any]) -> Rows:
    """How often intervals of left-out rows contain the measurement: all rows, without the residual, and by group."""
    found = record["intervals"]
    stages = [
        ("all", found["all"]),
        ("all, drawn parameters alone", found["parameters_only"]),
        *found["groups"].items(),
    ]
    return [row for name, metrics in stages for row in _covered(name, metrics)]


def unfitted_coverage_rows(record: Mapping[str, Any]) -> Rows:
    """The same of tables that were not fitted."""
    return [row for name, metrics in record["intervals"]["tables"].items() for row in _covered(name, metrics)]


def residual_rows(record: Mapping[str, Any]) -> Rows:
    """What the residual is drawn from, by kind of model."""
    found = record["intervals"]
    kinds = {**found["left_out"], "chips outside the fit": found["other_chips"]}
    return [
        (
            name,
            str(r["groups"]),
            str(r["rows"]),
            *(f"{r[f'{what}_scale']:.1%}, {_TAILS[r[f'{what}_tail']]}" for what in ("step", "first_token")),
            f"{r['within_group']:.0%}",
        )
        for name, r in kinds.items()
        if r is not None
    ]


_TAILS = {0: "normal", 2: "t₂", 4: "t₄"}


def _covered(name: str, metrics: Mapping[str, Any]) -> Rows:
    return [
        (
            name,
            METRICS[metric],
            str(c["rows"]),
            *(f"{c['covered'][level]:.0%}" for level in ("50", "80", "95")),
            f"×/÷ {1 + c['half_width']:.2f}",
        )
        for metric, c in metrics.items()
    ]


def _intervals_section(record: Mapping[str, Any]) -> str:
    """The section on intervals; empty for a record without groups left out."""
    if "intervals" not in record:
        return ""
    text = (files("simulator.reproduction") / "data" / "intervals.md.in").read_text(encoding="utf-8")
    tables = {
        "groups": markdown_table(
            ("model · chip · engine · formats", "metric", *COVERAGE_COLUMNS), coverage_rows(record)
        ),
        "tables": markdown_table(("table", "metric", *COVERAGE_COLUMNS), unfitted_coverage_rows(record)),
        "residual": markdown_table(
            ("models", "groups", "rows", "step", "first token besides", "common to a group"), residual_rows(record)
        ),
        "draws": str(record["intervals"]["draws"]),
    }
    for name, value in tables.items():
        text = text.replace("{{" + name + "}}", value)
    return text.rstrip() + "\n\n"


def _cells(e: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(e["rows"]), *(f"{e[k]:.1%}" for k in ("median", "mean", "p90")), f"{e['bias']:+.1%}")


ERROR_COLUMNS = ("rows", "median", "mean", "p90", "bias")


def readme_table(record: Mapping[str, Any]) -> str:
    """The short table of the README: random rows and whole groups left out."""
    wanted = {SPLITS["random"], SPLITS["group"], "repeats of one configuration"}
    rows = [row for row in summary_rows(record) if row[1] in wanted and row[0] in {"TPOT", "TTFT", "output tokens/s"}]
    return markdown_table(("metric", "", *ERROR_COLUMNS), rows)


def accuracy_markdown(record: Mapping[str, Any]) -> str:
    """``docs/accuracy.md``: the tables of the record between the text that explains them."""
    n = len(record["parameters"])
    parameters = [
        (
            p["engine"] or "every engine",
            p["name"],
            f"{p['value']:.4g}",
            f"{p['standard_error']:.2g}",
            f"{p['prior']:.4g}",
        )
        for p in record["parameters"]
    ]
    refused = [(r["table"], str(r["rows"]), r["reason"]) for r in record["unsupported"]]
    tables = {
        "summary": markdown_table(("metric", "", *ERROR_COLUMNS), summary_rows(record)),
        "groups": markdown_table(
            ("model · chip · engine · formats", "metric", *ERROR_COLUMNS), group_rows(record, "groups")
        ),
        "left_out": markdown_table(
            ("model · chip · engine · formats", "metric", *ERROR_COLUMNS), left_out_rows(record, "group")
        ),
        "release": markdown_table(("engine and version", "metric", *ERROR_COLUMNS), left_out_rows(record, "release")),
        "tables": markdown_table(("table", "metric", *ERROR_COLUMNS), group_rows(record, "tables")),
        "ranking": markdown_table(
            ("predicted with", "choices", "median loss", "p90", "limit missed"), ranking_rows(record)
        ),
        "loads": markdown_table(("load", "metric", *ERROR_COLUMNS), group_rows(record, "loads")),
        "parameters": markdown_table(("engine", "parameter", "value", "standard error", "before any row"), parameters),
        "warnings": "\n".join(f"- {w}" for w in record["warnings"]) or "None.",
        "unsupported": markdown_table(("table", "rows", "reason"), refused),
        "intervals": _intervals_section(record),
    }
    figures = {
        "command": record["command"],
        "rows": f"{record['rows']:,}",
        "simulated": f"{record['rows_simulated']:,}",
        "coverage": f"{record['coverage']:.1%}",
        "fitted": f"{record['rows_fitted']:,}",
        "n": str(n),
    }
    text = (files("simulator.reproduction") / "data" / "accuracy.md.in").read_text(encoding="utf-8")
    for name, value in (figures | tables).items():
        text = text.replace("{{" + name + "}}", value)
    return text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
