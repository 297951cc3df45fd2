"""``chipseconds explain``: where one request's time went."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulator.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from simulator.run.explain import Explanation
    from simulator.run.scenario import Scenario

_EXAMPLES = """\b
Examples:
  chipseconds explain llama-3-8b-azure-chat 4211
  chipseconds explain runs/first 4211 --json
"""


@click.command(epilog=_EXAMPLES)
@click.argument("run")
@click.argument("request", type=click.IntRange(min=0))
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the scenario's run.seed.")
@json_option
def explain(run: str, request: int, overrides: tuple[str, ...], seed: int | None, as_json: bool) -> None:
    """Tell where the time of request REQUEST of RUN went, and who was ahead of it.

    RUN is a scenario or a result folder, REQUEST the index of the request in the stream: the column `request` of a result.
    The parts of its latency sum to it exactly.
    """
    from dataclasses import asdict

    from simulator.run import explain as look
    from simulator.run import load_scenario

    scenario = load_scenario(run, overrides)
    found = look.explain(scenario, request, seed=seed, workers=os.cpu_count() or 1)
    if not overrides and seed is None:
        _demand_same(found, run)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found, scenario)


def _demand_same(found: "Explanation", run: str) -> None:
    """Refuse to explain a stored result with another run: versions of this program may differ in their figures."""
    from simulator.errors import InputError
    from simulator.results import is_result, read_result

    if not is_result(Path(run)):
        return
    finish = read_result(Path(run)).requests["finish_s"]
    if (
        found.state == "finished"
        and len(finish)
        and not abs(finish[found.request] - found.finish_s) <= 1e-9 * found.finish_s
    ):
        raise InputError(
            f"{run}: request {found.request} finished at {finish[found.request]:.6g} s there and at {found.finish_s:.6g} s now: "
            "the result is of another version; run its scenario.toml again"
        )


def _print(found: "Explanation", scenario: "Scenario") -> None:
    cached = f" ({found.cached_tokens:,} cached)" if found.cached_tokens else ""
    lost = f", preempted {found.preemptions} times" if found.preemptions else ""
    tried = f", {found.attempts} attempts" if found.attempts > 1 else ""
    gone = "" if found.state == "finished" else f", {found.state}"
    several = len(found.stops) > 1
    runs = ("prefill", "decode", "recompute")
    waits = any(part.stalled_s for part in found.parts)
    rows = [
        (
            f"{part.where}: {part.what}" if part.where and several else part.what,
            f"{part.time_s:.6f}",
            f"{part.time_s / found.e2e_s:.1%}",
            f"{part.steps:,}" if part.steps else "",
            "" if part.own_s is None else f"{part.own_s:.6f}",
            f"{part.with_chunks_s:.6f}" if part.with_chunks_s else "",
            *([f"{part.stalled_s:.6f}" if part.what in runs else ""] if waits else []),
        )
        for part in found.parts
    ]
    end = "last token" if found.state == "finished" else "departure"
    rows.append((f"arrival to {end}", f"{found.e2e_s:.6f}", "100.0%", *[""] * (len(rows[0]) - 3)))
    heads = (
        "where the time went",
        "time [s]",
        "share",
        "steps",
        "its own share of them [s]",
        "in steps with prefill [s]",
    )
    times = {
        "arrived": found.arrival_s,
        "first step": found.scheduled_s,
        "first token": found.first_token_s,
        end: found.finish_s,
    }
    print_table(
        f"request {found.request} of {scenario.name}{_way(found, scenario)}: {found.prompt_tokens:,} prompt tokens{cached}, "
        f"{found.output_tokens:,} output tokens{lost}{tried}{gone}",
        (*heads, *(["nobody worked for it [s]"] if waits else [])),
        rows,
        note=", ".join(f"{name} {time_s:.6f} s" for name, time_s in times.items() if math.isfinite(time_s)),
    )
    click.echo()
    print_table(
        f"ahead of it: {found.running_ahead} running, {found.waiting_ahead} waiting"
        + (f"; overtaken by {found.overtaken_by} later ones" if found.overtaken_by else ""),
        ("request", "it was", "prompt tokens", "output tokens", "there until [s after its arrival]"),
        [
            (str(one.request), one.state, f"{one.prompt_tokens:,}", f"{one.output_tokens:,}", f"{one.left_s:.3f}")
            for one in found.ahead
        ],
        note="those that stayed longest" if found.running_ahead + found.waiting_ahead > len(found.ahead) else "",
    )


def _way(found: "Explanation", scenario: "Scenario") -> str:
    """The replicas that it came to, and who chose them."""
    if scenario.all_replicas == 1:
        return "".join(f", rank {stop.rank}" for stop in found.stops if stop.rank)
    ways = []
    for stop in found.stops:
        pool = f"pool {stop.pool}, " if scenario.pool else ""
        rank = f", rank {stop.rank}" if stop.rank else ""
        ways.append(f"{pool}replica {stop.replica}{rank} (by {stop.router})")
    return ", " + ", then ".join(ways)
