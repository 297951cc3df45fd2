"""``chipseconds reproduce``: published numbers beside ours."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from simulator.cli.output import json_option, note, print_json, print_table
from simulator.errors import InfeasibleError, InputError, nearest

NAMES = ("napkin",)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Exit with 1 if a row misses the digits given.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the waterfall of chip counts to a .png, .svg or .pdf file."
)
@json_option
def reproduce(names: tuple[str, ...], check: bool, plot: Path | None, as_json: bool) -> None:
    """Print published numbers against ours; without NAMES all of them. Known: napkin.

    Rows "as written" repeat the source's arithmetic, faults included; every other row calls the code it vouches for.
    """
    for name in names:
        if name not in NAMES:
            raise InputError(f"unknown reproduction {name!r}{nearest(name, NAMES)}")
    _napkin(check=check, plot=plot, as_json=as_json)


def _napkin(*, check: bool, plot: Path | None, as_json: bool) -> None:
    from simulator.reproduction.agent import CANDIDATES, corrections, simulate_agents
    from simulator.reproduction.napkin import GOAL_S, QPS, rows_ours
    from simulator.reproduction.rows import reproduce_rows

    if plot is not None:
        from simulator.report.figures import check_figure_path

        check_figure_path(plot)
    rows = reproduce_rows("napkin", rows_ours())
    chain = corrections()
    if not as_json and sys.stderr.isatty():
        note("simulating one replica per slice …")
    simulated = [found for spec in CANDIDATES if (found := simulate_agents(spec)) is not None]
    cheapest = min(simulated, key=lambda s: s.chips)
    fastest = min(simulated, key=lambda s: s.p50_s)
    missed = [row for row in rows if not row.holds]
    if plot is not None:
        from simulator.report.figures import save_figure
        from simulator.report.waterfall import draw_waterfall

        bars = [(link.what, link.chips) for link in chain]
        bars.append(
            (f"simulated: {cheapest.slice} at {cheapest.load:.0%} load, queueing and mixed steps", cheapest.chips)
        )
        slow = sum(link.latency_s > GOAL_S for link in chain) + (cheapest.p50_s > GOAL_S)
        title = f"Web agent on Llama-3-70B and TPU v5e: chips for {QPS:,} queries per second"
        remark = f"128k context (8k new), 128 tokens out, int4. The last {slow} miss the {GOAL_S:g} s goal."
        save_figure(lambda: draw_waterfall(bars, title=title, note=remark), plot)
    if as_json:
        print_json(
            {
                "napkin": {
                    "rows": [asdict(row) | {"holds": row.holds} for row in rows],
                    "waterfall": [asdict(link) | {"chips": link.chips} for link in chain],
                    "simulated": [asdict(s) | {"missed_by": s.missed_by} for s in simulated],
                    "goal_s": GOAL_S,
                    "qps": QPS,
                    "missed_rows": [row.id for row in missed],
                }
            }
        )
    else:
        for section in dict.fromkeys(row.section for row in rows):
            print_table(
                f"\nNapkin, {section}",
                ("quantity", "printed", "expected", "ours", "unit", "holds"),
                [
                    (r.quantity, r.printed, f"{r.expected:.10g}", f"{r.ours:.10g}", r.unit, "yes" if r.holds else "NO")
                    for r in rows
                    if r.section == section
                ],
            )
        print_table(
            f"\nChips for {QPS:,} queries per second, correction by correction",
            ("after", "chip-s/query", "chips", "one query alone"),
            [
                (link.what, f"{link.chip_seconds:.3f}", f"{link.chips:,.0f}", f"{link.latency_s:.2f} s")
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
        click.echo(
            f"\n{len(rows) - len(missed)} of {len(rows)} rows hold to the digits given. "
            f"Cheapest simulated: {cheapest.chips:,.0f} chips on {cheapest.slice}, "
            f"{cheapest.chips / chain[0].chips:.1f} times the published {chain[0].chips:,.0f}; "
            f"its median query takes {cheapest.missed_by:.0f} times the {GOAL_S:g} s goal, "
            f"and even alone on {fastest.slice} a query takes {min(s.alone_s for s in simulated):.2f} s. "
            "Speculation and separate prefill and decode pools are not in this figure yet."
        )
    if check and missed:
        raise InfeasibleError(f"reproduce napkin: {len(missed)} rows miss: {', '.join(row.id for row in missed)}")
