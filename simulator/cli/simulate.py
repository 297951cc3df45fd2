"""``chipseconds simulate``: run a scenario and say what users see and what a query costs."""

import os
import sys
import time
from pathlib import Path

import click

from simulator.cli.output import json_option, note, print_json

_EXAMPLES = """\b
Examples:
  chipseconds simulate llama-3-8b-azure-chat --out runs/first --plot runs/first/run.png
  chipseconds simulate llama-3-8b-azure-chat --set traffic.arrival.rate_per_s=20
  chipseconds simulate llama-3-8b-azure-chat --set traffic.trace=my-trace.csv
  chipseconds simulate llama-3-8b-azure-chat --set traffic.n_requests=10_000_000 --summary-only
"""


@click.command(epilog=_EXAMPLES)
@click.argument("scenario")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the scenario's run.seed.")
@click.option("--seeds", type=click.IntRange(min=1), help="Replications, for between-seed intervals.")
@click.option("--summary-only", is_flag=True, help="Keep no row per request: any number of them in constant memory.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this folder.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the run to a .png, .svg or .pdf file.")
@click.option("--workers", type=click.IntRange(min=1), help="Replicas simulated at a time; default: all cores.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@json_option
def simulate(
    scenario: str,
    overrides: tuple[str, ...],
    seed: int | None,
    seeds: int | None,
    summary_only: bool,
    out: Path | None,
    plot: Path | None,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Simulate SCENARIO: a name from `chipseconds scenarios`, a TOML file, or a result folder to run again."""
    from simulator.errors import InputError
    from simulator.report.tables import summary_text
    from simulator.results import check_writable, write_result
    from simulator.run import load_scenario, run_scenario

    if out is not None:
        check_writable(out)
    if plot is not None:
        from simulator.report.figures import check_figure_path

        check_figure_path(plot, made=out)
    loaded = load_scenario(scenario, overrides)
    if plot is not None and (summary_only or loaded.run.summary_only):
        raise InputError("--plot draws requests, of which a summary-only run keeps none; leave one of the two out")
    started = time.perf_counter()
    run = run_scenario(
        loaded,
        seed=seed,
        seeds=seeds,
        summary_only=summary_only or None,
        workers=workers or os.cpu_count() or 1,
        progress=None if quiet else _progress,
    )
    if not quiet:
        note(f"simulated {run.summary.requests.total:,} requests in {time.perf_counter() - started:.1f} s")
    if out is not None:
        write_result(run.result, out)
        note(f"result written to {out}")
    if plot is not None:
        from simulator.report.figures import save_figure
        from simulator.report.run_plot import draw_run

        save_figure(lambda: draw_run(run.result), plot)
        note(f"plot written to {plot}")
    if as_json:
        print_json(run.summary.model_dump(mode="json"))
    else:
        click.echo(summary_text(run.summary), nl=False)


def _progress(done: int, total: int, what: str) -> None:
    """One line per stage; on a terminal the line is overwritten."""
    if what == "done":
        if sys.stderr.isatty():
            click.echo("\r\033[K", err=True, nl=False)
        return
    text = f"[{done}/{total}] {what}"
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", err=True, nl=False)
    else:
        click.echo(text, err=True)
