"""``chipseconds reproduce``: published numbers beside ours."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import json_option, note, print_json, print_table
from simulator.errors import InfeasibleError, InputError, nearest

if TYPE_CHECKING:
    from simulator.reproduction.agent import Link, Simulated
    from simulator.reproduction.rows import Row

QUANTITY_WIDTH = 42
"""Of the first column, so that a table stays within 110."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Exit with 1 if a row misses.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a .md and a .csv file per table, and index.md, to this folder.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the waterfall of chip counts of napkin to a .png, .svg or .pdf file.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For accuracy: an accuracy.json of your own, as calibrate serving writes it.",
)
@json_option
def reproduce(
    names: tuple[str, ...], check: bool, out: Path | None, plot: Path | None, record: Path | None, as_json: bool
) -> None:
    """Print published numbers against ours; without NAMES one line per table, with NAMES every row.

    accuracy is a page of its own: the recorded errors of the shipped engine profiles. --out docs writes accuracy.md there and the
    table of a README.md beside it.

    gallery is a folder: --out reports/gallery makes the pages and pictures of the shipped scenarios there.

    Known: napkin, scaling-book, inference-math, gpus, parameters, kv-cache, gqa, pope, fastertransformer,
    scaling-laws, lifetime, training, economics, speculation, mlperf, trtllm, jetstream. Rows "as written" repeat the source's
    arithmetic, faults included; every other row calls the code it vouches for.
    """
    from simulator.reproduction.tables import TABLES, reproduce_table

    if "accuracy" in names:
        if len(names) > 1 or plot is not None:
            raise InputError("reproduce accuracy: a page of its own; ask for it alone, without --plot")
        _accuracy(record, out, as_json=as_json)
        return
    if record is not None:
        raise InputError("--record is of reproduce accuracy")
    if "gallery" in names:
        from simulator.cli.gallery import make_gallery

        if len(names) > 1 or plot is not None or check or as_json or out is None:
            raise InputError("reproduce gallery: ask for it alone, with --out FOLDER and no other option")
        make_gallery(out, note)
        return
    for name in names:
        if name not in TABLES:
            raise InputError(f"unknown reproduction {name!r}{nearest(name, [*TABLES, 'accuracy', 'gallery'])}")
    if plot is not None:
        if names and "napkin" not in names:
            raise InputError("--plot draws the waterfall of napkin: name napkin too")
        from simulator.report.figures import check_figure_path

        check_figure_path(plot)
    tables = {}
    for name in dict.fromkeys(names or TABLES):
        if TABLES[name].simulates and not as_json and sys.stderr.isatty():
            note(f"simulating {name} …")
        tables[name] = reproduce_table(name)
    agent = _agent(as_json=as_json) if "napkin" in names or plot is not None else None
    if plot is not None and agent is not None:
        _draw(*agent, plot)
    if out is not None:
        _write(tables, out)
    if as_json:
        print_json({name: _document(rows, agent if name == "napkin" else None) for name, rows in tables.items()})
    elif names:
        for name, rows in tables.items():
            _print_rows(name, rows)
            if name == "napkin" and agent is not None:
                _print_agent(*agent)
    else:
        _print_verdicts(tables)
    missed = [f"{name}/{row.id}" for name, rows in tables.items() for row in rows if row.verdict == "missed"]
    if check and missed:
        raise InfeasibleError(f"reproduce: {len(missed)} rows miss: {', '.join(missed)}")


README = Path("README.md")
MARKS = ("<!-- accuracy -->", "<!-- end of accuracy -->")
"""Between them stands the generated table of the README."""


def _accuracy(path: Path | None, out: Path | None, *, as_json: bool) -> None:
    """The recorded accuracy of the shipped profiles: printed, or written as a page and into the README beside its folder."""
    from simulator.reproduction.accuracy import (
        ERROR_COLUMNS,
        accuracy_markdown,
        load_accuracy,
        readme_table,
        summary_rows,
    )

    found = load_accuracy(path)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "accuracy.md").write_text(accuracy_markdown(found), encoding="utf-8")
        note(f"wrote {out / 'accuracy.md'}")
        readme = out.parent / README
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        if all(mark in text for mark in MARKS):
            before, rest = text.split(MARKS[0], 1)
            after = rest.split(MARKS[1], 1)[1]
            readme.write_text(f"{before}{MARKS[0]}\n{readme_table(found)}\n{MARKS[1]}{after}", encoding="utf-8")
            note(f"wrote the table of {readme}")
    if as_json:
        print_json(found)
    elif out is None:
        print_table("Predictions against measured serving runs", ("metric", "", *ERROR_COLUMNS), summary_rows(found))


def _document(rows: Sequence["Row"], agent: "Agent | None") -> dict[str, Any]:
    from simulator.reproduction.napkin import GOAL_S, QPS
    from simulator.reproduction.rows import tally

    document: dict[str, Any] = {
        "tally": asdict(tally(rows)),
        "rows": [asdict(row) | {"verdict": row.verdict, "difference": row.difference} for row in rows],
        "missed_rows": [row.id for row in rows if row.verdict == "missed"],
    }
    if agent is not None:
        chain, simulated = agent
        document |= {
            "waterfall": [asdict(link) | {"chips": link.chips} for link in chain],
            "simulated": [asdict(s) | {"missed_by": s.missed_by} for s in simulated],
            "goal_s": GOAL_S,
            "qps": QPS,
        }
    return document


def _write(tables: Mapping[str, Sequence["Row"]], out: Path) -> None:
    """Files of ``--out``; the index lists the tables asked for."""
    from simulator.reproduction.render import csv_text, index, markdown

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (out / f"{name}.md").write_text(markdown(name, rows), encoding="utf-8")
        (out / f"{name}.csv").write_text(csv_text(rows), encoding="utf-8")
    (out / "index.md").write_text(index(tables), encoding="utf-8")


def _print_verdicts(tables: Mapping[str, Sequence["Row"]]) -> None:
    from simulator.reproduction.render import TALLY_COLUMNS, tally_cells
    from simulator.reproduction.tables import TABLES

    rows = [
        (f"{name}: {_short(TABLES[name].title, 44 - len(name))}", *tally_cells(found)) for name, found in tables.items()
    ]
    print_table("Published numbers and ours", ("table", *TALLY_COLUMNS), rows)
    click.echo("\nchipseconds reproduce NAME prints every row; median error is over the reported rows.")


def _print_rows(name: str, rows: Sequence["Row"]) -> None:
    from simulator.reproduction.render import figure, verdict

    for section in dict.fromkeys(row.section for row in rows):
        cells = [
            (
                "\n".join(wrap(row.quantity, QUANTITY_WIDTH)),
                _short(row.printed, 13),
                f"{row.expected:.13g}",
                figure(row),
                row.unit,
                verdict(row),
            )
            for row in rows
            if row.section == section
        ]
        print_table(f"\n{name}, {section}", ("quantity", "printed", "expected", "ours", "unit", "verdict"), cells)
    for reason in dict.fromkeys(row.unpriced for row in rows if row.unpriced):
        click.echo("\n".join(wrap(f"not priced: {reason}", 108, subsequent_indent="  ")))
    count = {word: sum(row.verdict == word for row in rows) for word in ("held", "missed", "reported", "not priced")}
    click.echo(f"\n{name}: {len(rows)} rows, " + ", ".join(f"{n} {word}" for word, n in count.items() if n) + ".")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


Agent = tuple[list["Link"], list["Simulated"]]
"""The corrections of the napkin, and one replica simulated on several slices."""


def _agent(*, as_json: bool) -> "Agent":
    from simulator.reproduction.agent import CANDIDATES, corrections, simulate_agents

    chain = corrections()
    if not as_json and sys.stderr.isatty():
        note("simulating one replica per slice …")
    return chain, [found for spec in CANDIDATES if (found := simulate_agents(spec)) is not None]


def _draw(chain: Sequence["Link"], simulated: Sequence["Simulated"], plot: Path) -> None:
    from simulator.report.figures import save_figure
    from simulator.report.waterfall import draw_waterfall
    from simulator.reproduction.napkin import GOAL_S, QPS

    cheapest = min(simulated, key=lambda s: s.chips)
    bars = [(link.what, link.chips) for link in chain]
    bars.append((f"simulated: {cheapest.slice} at {cheapest.load:.0%} load, queueing and mixed steps", cheapest.chips))
    slow = sum(link.latency_s > GOAL_S for link in chain) + (cheapest.p50_s > GOAL_S)
    title = f"Web agent on Llama-3-70B and TPU v5e: chips for {QPS:,} queries per second"
    remark = f"128k context (8k new), 128 tokens out, int4. The last {slow} miss the {GOAL_S:g} s goal."
    save_figure(lambda: draw_waterfall(bars, title=title, note=remark), plot)


def _print_agent(chain: Sequence["Link"], simulated: Sequence["Simulated"]) -> None:
    from simulator.reproduction.napkin import GOAL_S, QPS

    cheapest = min(simulated, key=lambda s: s.chips)
    fastest = min(simulated, key=lambda s: s.p50_s)
    print_table(
        f"\nChips for {QPS:,} queries per second, correction by correction",
        ("after", "chip-s/query", "chips", "one query alone"),
        [
            (
                "\n".join(wrap(link.what, 66)),
                f"{link.chip_seconds:.3f}",
                f"{link.chips:,.0f}",
                f"{link.latency_s:.2f} s",
            )
            for link in chain
        ],
    )
    print_table(
        "\nSimulated: one replica that prefills and decodes, cached_tokens = 122,880, scaled to the fleet",
        (
            "slice",
            "agents in cache",
            "load",
            "chips",
            "busy chip-s/query",
            "alone",
            "p50",
            "p99",
            f"within {GOAL_S:g} s",
        ),
        [
            (
                s.slice,
                str(s.sequences),
                f"{s.load:.0%}",
                f"{s.chips:,.0f}",
                f"{s.busy_chip_seconds:.1f}",
                f"{s.alone_s:.2f} s",
                f"{s.p50_s:.1f} s",
                f"{s.p99_s:.1f} s",
                f"{s.share_met:.0%}",
            )
            for s in simulated
        ],
    )
    summary = (
        f"Cheapest simulated: {cheapest.chips:,.0f} chips on {cheapest.slice}, "
        f"{cheapest.chips / chain[0].chips:.1f} times the published {chain[0].chips:,.0f}; "
        f"its median query takes {cheapest.missed_by:.0f} times the {GOAL_S:g} s goal, "
        f"and even alone on {fastest.slice} a query takes {min(s.alone_s for s in simulated):.2f} s. "
        "Speculation and separate prefill and decode pools are not in this figure yet."
    )
    click.echo("\n" + "\n".join(wrap(summary, 110)))
