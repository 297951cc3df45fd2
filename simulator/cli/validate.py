"""``chipseconds validate``: measured serving runs through the simulator."""

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import json_option, note, plain, print_json, print_table
from simulator.errors import InfeasibleError, InputError, nearest

if TYPE_CHECKING:
    from simulator.calibration.measurements import Measurement
    from simulator.calibration.validate import ErrorSummary, Validation
    from simulator.catalog.engines import EngineProfile

HEADLINES = {"tpot_s": "TPOT", "ttft_s": "TTFT", "e2e_s": "E2E", "output_tokens_per_s": "output tokens/s"}

GROUPS: dict[str, "Callable[[Measurement], str]"] = {
    "table": lambda m: m.table,
    "model": lambda m: m.model,
    "chip": lambda m: m.chip,
    "engine": lambda m: f"{m.engine} {m.engine_version}".strip(),
    "load": lambda m: m.load_class,
    "group": lambda m: " · ".join(m.group),
}


def read_profiles(paths: Iterable[str]) -> "dict[str, EngineProfile]":
    """Profiles of ``--engine-profile`` by the engine they stand for."""
    from simulator.catalog.engines import load_engine

    found = {}
    for path in paths:
        spec = load_engine(path)
        if spec.name in found:
            raise InputError(f"--engine-profile {path}: a profile of {spec.name} is given twice")
        found[spec.name] = spec.profile
    return found


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--engine-profile",
    "profiles",
    multiple=True,
    metavar="FILE",
    help="Profile to use for the engine it names; repeatable.",
)
@click.option("--by", default="table,group", show_default=True, help=f"Groupings, by commas: {', '.join(GROUPS)}.")
@click.option("--workers", type=click.IntRange(1), help="Processes. Default: one per core.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Write rows, errors and plots to this folder."
)
@json_option
def validate(
    data: Path, profiles: tuple[str, ...], by: str, workers: int | None, out: Path | None, as_json: bool
) -> None:
    """Run every measured row of DATA (a table or a folder of them) through the simulator, and print how far off it is.

    \b
    chipseconds validate measurements/ --out validation
    chipseconds validate my-benchmark.json --engine-profile my-vllm.toml

    Rows are simulated as they were measured: closed loops with random lengths, queued batches, replayed logs. A per-request
    log or a result of `vllm bench serve --save-result` needs a TOML file of its name beside it, with model, slice,
    precision and engine. Rows that cannot run are listed with the reason.
    """
    from simulator.calibration.tables import read_measurements
    from simulator.calibration.validate import summarise_errors
    from simulator.calibration.validate import validate as run

    wanted = [name.strip() for name in by.split(",") if name.strip()]
    for name in wanted:
        if name not in GROUPS:
            raise InputError(f"--by {name!r}{nearest(name, GROUPS)}")
    used = read_profiles(profiles)
    rows = read_measurements(data)
    say = _progress() if sys.stderr.isatty() and not as_json else None
    found = run(rows, profiles=used, workers=workers or os.cpu_count() or 1, progress=say)
    if not found.rows:
        reasons = "; ".join(dict.fromkeys(u.reason for u in found.unsupported))
        raise InfeasibleError(f"validate {data}: none of {len(found.unsupported)} rows can be simulated: {reasons}")
    groups = {"all": summarise_errors(found.rows)} | {
        name: summarise_errors(found.rows, GROUPS[name]) for name in wanted
    }
    if out is not None:
        _write(found, out)
    if as_json:
        print_json(_document(found, groups))
        return
    for name, summaries in groups.items():
        print_table(
            f"\nError by {name}" if name != "all" else f"{len(found.rows)} rows simulated",
            ("", "metric", "rows", "median", "mean", "p90", "bias"),
            [cells for group, errors in summaries.items() for cells in _cells(str(group), errors)],
        )
    click.echo(f"\ncoverage {found.coverage:.1%}: {len(found.rows)} of {len(found.rows) + len(found.unsupported)} rows")
    for (table, reason), n in Counter((u.table, u.reason) for u in found.unsupported).most_common():
        click.echo(f"left out: {n} of {table}: {reason}")


def _progress() -> "Callable[[int, int], None]":
    def say(done: int, total: int) -> None:
        click.echo(f"\r{done} of {total} rows", nl=done == total, err=True)

    return say


def _cells(group: str, errors: "list[ErrorSummary]") -> list[tuple[str, ...]]:
    return [
        (
            group if i == 0 else "",
            HEADLINES[e.metric],
            str(e.rows),
            f"{e.median:.1%}",
            f"{e.mean:.1%}",
            f"{e.p90:.1%}",
            f"{e.bias:+.1%}",
        )
        for i, e in enumerate(e for e in errors if e.metric in HEADLINES)
    ]


def _document(found: "Validation", groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "coverage": found.coverage,
        "errors": {
            name: {str(group): [asdict(e) for e in errors] for group, errors in summaries.items()}
            for name, summaries in groups.items()
        },
        "rows": [_row(row) for row in found.rows],
        "unsupported": [asdict(u) for u in found.unsupported],
    }


def _row(row: Any) -> dict[str, Any]:
    m = row.measurement
    return {
        "id": m.id,
        "table": m.table,
        "model": m.model,
        "chip": m.chip,
        "chips": m.chips,
        "engine": m.engine,
        "engine_version": m.engine_version,
        "precision": m.precision,
        "sharding": " + ".join(map(str, m.pools)),
        "load": m.load,
        "clients": m.clients,
        "prompt_tokens": m.prompt_tokens,
        "output_tokens": m.output_tokens,
        "measured": dict(m.measured),
        "predicted": {k: row.predicted[k] for k in m.measured if k in row.predicted},
        "error": row.errors,
    }


def _write(found: "Validation", out: Path) -> None:
    """``rows.csv`` (a line per row and metric), ``unsupported.csv`` and a plot."""
    from simulator.report.figures import save_figure
    from simulator.report.validation_plot import draw_validation

    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in found.rows:
        document = plain(_row(row))
        values = {name: document.pop(name) for name in ("measured", "predicted", "error")}
        lines += [
            document | {"metric": metric, **{name: by_metric[metric] for name, by_metric in values.items()}}
            for metric in values["error"]
        ]
    _write_csv(out / "rows.csv", lines)
    _write_csv(out / "unsupported.csv", [asdict(u) for u in found.unsupported])
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in lines:
        if line["metric"] in HEADLINES:
            what = HEADLINES[line["metric"]] + (
                " (s)" if line["metric"].endswith("_s") and "per" not in line["metric"] else ""
            )
            groups = panels.setdefault(what, {})
            measured, predicted = groups.setdefault(f"{line['model']} · {line['chip']} · {line['engine']}", ([], []))
            measured.append(line["measured"])
            predicted.append(line["predicted"])
    save_figure(lambda: draw_validation(panels, f"{len(found.rows)} measured serving runs"), out / "validation.png")
    note(f"wrote {out}/rows.csv, unsupported.csv, validation.png")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        path.write_text("", encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
