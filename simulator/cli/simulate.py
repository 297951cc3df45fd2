"""``chipseconds simulate``: run a scenario and say what users see and what a query costs."""

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulator.cli.costs import price_options, price_overrides
from simulator.cli.output import json_option, note, print_json, show_progress

if TYPE_CHECKING:
    from simulator.results import Result
    from simulator.run import Run

_EXAMPLES = """\b
Examples:
  chipseconds simulate llama-3-8b-azure-chat --out runs/first --plot runs/first/run.png
  chipseconds simulate llama-3-8b-azure-chat --set traffic.arrival.rate_per_s=20
  chipseconds simulate llama-3-8b-azure-chat --set traffic.trace=my-trace.csv
  chipseconds simulate llama-3-8b-azure-chat --set traffic.n_requests=10_000_000 --summary-only
  chipseconds simulate llama-3-8b-azure-chat --interval 80
  chipseconds simulate llama-3-8b-azure-chat --term spot --prices prices.toml
  chipseconds simulate llama-3-8b-azure-chat --trace trace.json --trace-window 600:610 --timeline timeline.png
"""


@click.command(epilog=_EXAMPLES)
@click.argument("scenario")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the scenario's run.seed.")
@click.option("--seeds", type=click.IntRange(min=1), help="Replications, for between-seed intervals.")
@click.option(
    "--interval", type=float, metavar="PERCENT", help="Interval of each figure over draws of the calibrated parameters."
)
@click.option("--draws", type=click.IntRange(min=16, max=4096), help="Draws of --interval; default: 64.")
@click.option("--summary-only", is_flag=True, help="Keep no row per request: any number of them in constant memory.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this folder.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the run to a .png, .svg or .pdf file.")
@click.option(
    "--timeline", type=click.Path(path_type=Path), help="Draw batch, queue, KV use and preemptions over time."
)
@click.option("--trace", type=click.Path(path_type=Path), help="Write steps and requests as a trace for Perfetto.")
@click.option(
    "--trace-window", metavar="FROM:TO", help="Simulated seconds that --trace covers; default: from the start."
)
@price_options
@click.option(
    "--workers", type=click.IntRange(min=1), help="Replicas, or draws, simulated at a time; default: all cores."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@json_option
def simulate(
    scenario: str,
    overrides: tuple[str, ...],
    seed: int | None,
    seeds: int | None,
    interval: float | None,
    draws: int | None,
    summary_only: bool,
    out: Path | None,
    plot: Path | None,
    timeline: Path | None,
    trace: Path | None,
    trace_window: str | None,
    price_file: str | None,
    term: str | None,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Simulate SCENARIO: a name from `chipseconds scenarios`, a TOML file, or a result folder to run again."""
    from simulator.report.tables import summary_text
    from simulator.results import check_writable, write_result
    from simulator.run import load_scenario, run_scenario

    if out is not None:
        check_writable(out)
    loaded = load_scenario(scenario, (*overrides, *price_overrides(price_file, term)))
    window = _check_pictures(
        plot, timeline, trace, trace_window, out, rows_kept=not (summary_only or loaded.run.summary_only)
    )
    started = time.perf_counter()
    run = run_scenario(
        loaded,
        seed=seed,
        seeds=seeds,
        summary_only=summary_only or None,
        interval=interval,
        interval_draws=draws,
        workers=workers or os.cpu_count() or 1,
        progress=None if quiet else show_progress,
    )
    if not quiet:
        note(f"simulated {run.summary.requests.total:,} requests in {time.perf_counter() - started:.1f} s")
    if out is not None:
        write_result(run.result, out)
        note(f"result written to {out}")
    if plot is not None or timeline is not None:
        _draw(run.result, plot, timeline)
    if trace is not None:
        _write_trace(run, trace, window)
    if as_json:
        print_json(run.summary.model_dump(mode="json"))
    else:
        click.echo(summary_text(run.summary), nl=False)


def _check_pictures(
    plot: Path | None,
    timeline: Path | None,
    trace: Path | None,
    trace_window: str | None,
    out: Path | None,
    *,
    rows_kept: bool,
) -> tuple[float, float]:
    """Refuse, before the run, what could not be drawn or written after it; return the trace's window. [s]"""
    from simulator.errors import InputError
    from simulator.report.figures import check_figure_path

    for option, path in (("--plot", plot), ("--timeline", timeline)):
        if path is not None:
            check_figure_path(path, made=out, option=option)
    for option, path in (("--plot", plot), ("--trace", trace)):
        if path is not None and not rows_kept:
            raise InputError(
                f"{option} shows requests, of which a summary-only run keeps none; leave one of the two out"
            )
    if trace is None:
        if trace_window is not None:
            raise InputError(f"--trace-window {trace_window}: nothing is traced without --trace FILE")
    elif not trace.parent.is_dir() and (out is None or trace.absolute().parent != out.absolute()):
        raise InputError(f"--trace {trace}: folder {str(trace.parent)!r} does not exist")
    return _window(trace_window)


def _window(text: str | None) -> tuple[float, float]:
    """Read FROM:TO; either may be left out. [s]"""
    from simulator.errors import InputError

    if text is None:
        return 0.0, math.inf
    first, colon, last = text.partition(":")
    try:
        start, stop = float(first or 0), float(last or math.inf)
    except ValueError:
        start, stop = math.nan, math.nan
    if not colon or not 0 <= start < stop:
        raise InputError(f"--trace-window {text}: write FROM:TO in simulated seconds, 0 <= FROM < TO, e.g. 100:110")
    return start, stop


def _draw(result: "Result", plot: Path | None, timeline: Path | None) -> None:
    from simulator.report.figures import save_figure
    from simulator.report.run_plot import draw_run
    from simulator.report.timeline import draw_timeline

    if plot is not None:
        save_figure(lambda: draw_run(result), plot)
        note(f"plot written to {plot}")
    if timeline is not None:
        save_figure(lambda: draw_timeline(result), timeline, option="--timeline")
        note(f"timeline written to {timeline}")


def _write_trace(run: "Run", path: Path, window: tuple[float, float]) -> None:
    from simulator.report.trace import Track, Transfer, trace_document, write_trace
    from simulator.run.replay import all_carried, logs_of, replicas_of

    if run.served is None:  # refused before
        return
    table, scenario = run.result.requests, run.summary.scenario
    replicas = replicas_of(run.served)
    logs = logs_of(replicas, *window)
    names = [f"{scenario}: {one.name}" if len(replicas) > 1 else scenario for one in replicas]

    def about(request: int) -> dict[str, int]:
        columns = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "attempts")
        return {name: int(table[name][request]) for name in columns}

    document = trace_document(
        [
            Track(name, log, one.rows, one.settings.num_kv_blocks)
            for name, one, log in zip(names, replicas, logs, strict=True)
        ],
        name=scenario,
        transfers=[
            Transfer(one.request, one.link, replicas[one.target].name, one.asked_s, one.sent_s, one.there_s)
            for one in all_carried(run.served, replicas, window[0], min(window[1], max(log.end_s for log in logs)))
        ],
        about=about,
    )
    write_trace(document, path)
    steps = sum(len(log.steps) for log in logs)
    note(f"trace of {steps:,} steps written to {path}; open it in ui.perfetto.dev or chrome://tracing")
    if not all(log.complete for log in logs):
        end_s = min(log.end_s for log in logs if not log.complete)
        note(f"the trace ends at {end_s:.6g} s, after as many steps as a viewer can show: choose a --trace-window")
