"""``chipseconds plan``: a rate of queries and latency targets → the cheapest fleet."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import price_options, price_overrides
from simulator.cli.output import json_option, note, print_json, print_table, show_progress
from simulator.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    from simulator.planning import PlanOptions
    from simulator.results.plan import Plan, PlannedFleet, Targets
    from simulator.run import Scenario

_EXAMPLES = """\b
Examples:
  chipseconds plan llama-3-8b-azure-chat --qps 1000
  chipseconds plan llama-3-8b-azure-chat --qps 1000 --chips all --ttft 0.5@95 --tpot 0.05@95 --peak 2 --spare 1
  chipseconds plan llama-3-70b-v5e-chat --qps 200 --chips tpu-v5e,tpu-v6e,h100-sxm --precisions w8a16kv8,bf16
  chipseconds plan web-agent --qps 10000 --out plan.json
"""

_METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}


@click.command(epilog=_EXAMPLES)
@click.argument("scenario")
@click.option("--qps", type=float, required=True, help="Queries per second, mean over the day.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--ttft", metavar="S[@P]", help="Time to first token at most: seconds, and percent of requests within.")
@click.option("--tpot", metavar="S[@P]", help="Time per output token at most.")
@click.option("--e2e", metavar="S[@P]", help="End-to-end latency at most.")
@click.option("--goodput-share", type=float, help="Share of requests that must keep all limits together, 0 to 1.")
@click.option("--chips", help="Names or files, by commas, or all. Default: the scenario's chip.")
@click.option("--slices", help="Slices of a replica, by commas. Default: every legal one.")
@click.option("--precisions", help="By commas: bf16,w8a16kv8. Default: the scenario's.")
@click.option("--max-chips", type=click.IntRange(1), help="Chips of one replica at most. Default: 64.")
@click.option("--shardings", help="Kinds, by commas: tp, pp, ep. Default: all.")
@click.option("--pools", help="unified, disaggregated (prefill and decode pools), or both by commas. Default: unified.")
@click.option("--batch-limits", help="max_num_seqs to try, by commas. Default: 16,32,64,128,256.")
@click.option("--token-budgets", help="max_num_batched_tokens to try, by commas. Default: 512,2048,8192.")
@click.option("--peak", type=float, help="Rate of the busiest hour ÷ mean rate of the day. Default: 1.")
@click.option("--profile", help="Rates of the hours of a day, by commas, in any unit; instead of --peak.")
@click.option(
    "--headroom", type=float, help="Part of the rate within the targets left free at the peak. Default: 0.05."
)
@click.option("--spare", type=click.IntRange(0), help="Replicas of each pool beyond those needed (N + k). Default: 0.")
@click.option("--failed-share", type=float, help="Share of the slices that may be down at the peak. Default: 0.")
@price_options
@click.option("--price", "by_hand", multiple=True, metavar="CHIP=USD", help="USD per chip-hour; may be repeated.")
@click.option("--rank", type=click.Choice(["cost", "chips"]), default="cost", show_default=True, help="What decides.")
@click.option("--requests", type=click.IntRange(200), help="Requests of a simulation, at least. Default: 3000.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the scenario's run.seed.")
@click.option(
    "--interval", type=float, metavar="PERCENT", help="Interval of the chips over draws of the calibrated parameters."
)
@click.option("--draws", type=click.IntRange(min=16, max=4096), help="Draws of --interval; default: 64.")
@click.option("--workers", type=click.IntRange(min=1), help="Chips searched at a time; default: all cores.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan to this JSON file.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw a feasible plan: its waterfall, and cost against latency.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@json_option
def plan(
    scenario: str,
    qps: float,
    overrides: tuple[str, ...],
    out: Path | None,
    plot: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""The cheapest fleet that serves --qps within latency targets, for the model and traffic of SCENARIO.

    Chips × slices × shardings × precisions × batch limits are searched: roofline bounds drop what cannot be, simulation
    decides. Targets are the scenario's [slo], unless --ttft, --tpot, --e2e or --goodput-share state others: S@P wants P percent
    of the requests within S seconds (without @P, the scenario's slo.percentile); with --goodput-share, limits
    without @P must be kept together by that share.

    Exit code 1 if no fleet keeps the targets; the answer then says what is nearest.
    """
    from simulator.planning import plan as make_plan
    from simulator.results.plan import write_plan
    from simulator.run import load_scenario

    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: folder {str(out.parent)!r} does not exist")
    if plot is not None:
        from simulator.report.figures import check_figure_path

        check_figure_path(plot)
    loaded = load_scenario(scenario, (*overrides, *price_overrides(options["price_file"], options["term"])))
    found = make_plan(
        loaded.model,
        loaded.traffic,
        targets(loaded, options),
        qps,
        chips(loaded, options["chips"]),
        options=plan_options(loaded, options),
        template=loaded,
        workers=options["workers"] or os.cpu_count() or 1,
        progress=None if quiet else show_progress,
    )
    if out is not None:
        write_plan(found, out)
        note(f"plan written to {out}")
    if plot is not None and found.feasible:
        from simulator.report.figures import save_figure
        from simulator.report.plan_plot import draw_plan

        save_figure(lambda: draw_plan(found), plot)
        note(f"plot written to {plot}")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print(found)
    if not found.feasible:
        raise InfeasibleError(_verdict(found))


def targets(scenario: "Scenario", options: dict[str, Any]) -> "Targets":
    """What the options state, or else what the scenario's ``[slo]`` does."""
    from simulator.catalog.files import parse
    from simulator.planning import targets_of
    from simulator.results.plan import Targets

    share = options["goodput_share"]
    stated = {name: options[name] for name in _METRICS if options[name] is not None}
    if not stated and share is None:
        return targets_of(scenario.slo)
    if not stated:
        limits = [{"metric": name, "limit_s": limit} for name, limit in scenario.slo.limits.items()]
        if not limits:
            raise InputError(
                "--goodput-share: state limits to keep with --ttft, --tpot or --e2e; the scenario has none"
            )
    else:
        default = None if share is not None else scenario.slo.percentile
        limits = [_limit(name, text, default) for name, text in stated.items()]
    return parse(Targets, {"limits": limits, "joint_fraction": share}, "targets")


def _limit(name: str, text: str, default: float | None) -> dict[str, Any]:
    limit, at, percentile = text.partition("@")
    try:
        limit_s, share = float(limit), float(percentile) if at else default
    except ValueError:
        raise InputError(f"--{name} {text!r}: write SECONDS or SECONDS@PERCENT, e.g. 0.5@95") from None
    if not 0 < limit_s < math.inf:
        raise InputError(f"--{name} {text!r}: the limit must be positive and finite")
    if share is not None and not 0 < share <= 100:
        raise InputError(f"--{name} {text!r}: the percentile must be above 0 and at most 100")
    return {"metric": _METRICS[name], "limit_s": limit_s, "percentile": share}


def chips(scenario: "Scenario", text: str | None) -> list[str]:
    """Chips that the option names; the scenario's own without it."""
    from simulator.catalog.chips import chip_names

    if text is None:
        return [scenario.slice.rpartition(":")[0]]
    return chip_names() if text.strip() == "all" else _words("--chips", text)


def plan_options(scenario: "Scenario", options: dict[str, Any]) -> "PlanOptions":
    """The options of the search that were stated."""
    from simulator.catalog.files import parse
    from simulator.planning import PlanOptions

    data: dict[str, Any] = {"rank_by": options["rank"], "seed": scenario.run.seed}
    same = {
        "max_chips": "max_chips",
        "headroom": "headroom",
        "spare": "spare_replicas",
        "failed_share": "failed_fraction",
        "requests": "requests",
        "seed": "seed",
        "peak": "peak_to_mean",
        "interval": "interval",
        "draws": "interval_draws",
    }
    data |= {field: options[name] for name, field in same.items() if options[name] is not None}
    for name in ("slices", "precisions", "shardings"):
        if options[name] is not None:
            data[name] = _words(f"--{name}", options[name])
    if options["pools"] is not None:
        data["kinds"] = _words("--pools", options["pools"])
    for name in ("batch_limits", "token_budgets"):
        if options[name] is not None:
            data[name] = [int(n) for n in _numbers(f"--{name.replace('_', '-')}", options[name], whole=True)]
    if options["profile"] is not None:
        if options["peak"] is not None:
            raise InputError("--profile and --peak: state one of them")
        hours = _numbers("--profile", options["profile"])
        if max(hours) <= 0:
            raise InputError(f"--profile {options['profile']!r}: at least one rate must be above 0")
        data["peak_to_mean"] = max(hours) / (sum(hours) / len(hours))
    if options["draws"] is not None and options["interval"] is None:
        raise InputError(f"--draws {options['draws']}: only with --interval")
    if options["by_hand"]:
        data["usd_per_chip_hour"] = dict(_price(text) for text in options["by_hand"])
    return parse(PlanOptions, data, "plan")


def _words(option: str, text: str) -> list[str]:
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise InputError(f"{option} {text!r}: an empty name; write names by commas")
    return found


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    try:
        found = [float(int(word)) if whole else float(word) for word in _words(option, text)]
    except ValueError:
        raise InputError(f"{option} {text!r}: write {'whole ' if whole else ''}numbers by commas") from None
    if not all(0 <= x < math.inf for x in found):
        raise InputError(f"{option} {text!r}: numbers must be finite and not negative")
    return found


def _price(text: str) -> tuple[str, float]:
    chip, equals, usd = text.partition("=")
    try:
        price = float(usd)
    except ValueError:
        price = math.nan
    if not equals or not chip.strip() or not 0 < price < math.inf:
        raise InputError(f"--price {text!r}: write CHIP=USD, e.g. h100-sxm=2.50")
    from simulator.catalog.chips import load_chip

    load_chip(chip.strip())
    return chip.strip(), price


def _verdict(found: "Plan") -> str:
    from simulator.report.plan_tables import targets_text, words

    where = ", ".join(outcome.chip for outcome in found.by_chip)
    text = f"{found.name}: {targets_text(found.targets)} cannot be kept on {where}"
    if found.nearest:
        return f"{text}; nearest: {words(found.nearest[0].what)} ({_in_short(found.nearest[0].fleet)})"
    return f"{text}, and nothing near it can"


def _in_short(fleet: "PlannedFleet") -> str:
    pools = " + ".join(f"{p.replicas:,} × {p.slice} {p.sharding} {p.precision}" for p in fleet.pools)
    money = "" if fleet.usd_per_hour is None else f", {fleet.usd_per_hour:,.0f} USD/h"
    return f"{fleet.chips:,} chips: {pools}{money}"


def _fleets(title: str, rows: list[tuple[tuple[str, ...], "PlannedFleet"]], lead: tuple[str, ...] = ()) -> None:
    """A table of fleets, each behind the cells that ``lead`` names."""
    from simulator.report.plan_tables import FLEET_COLUMNS, FLEET_TEXTS, fleet_cells

    click.echo()
    print_table(
        title,
        [*lead, *FLEET_COLUMNS],
        [[*cells, *fleet_cells(fleet)] for cells, fleet in rows],
        left=len(lead) + FLEET_TEXTS,
    )


def _print(found: "Plan") -> None:
    from simulator.report.plan_tables import provisioning_text, rate_text, targets_text

    rate = rate_text(found.provisioning.qps)
    click.echo(f"{found.name}: {found.model} at {rate} queries/s, {targets_text(found.targets)}")
    click.echo(provisioning_text(found.provisioning))
    if found.best is None:
        _print_infeasible(found)
    else:
        _print_best(found, found.best)
    _print_chips(found)
    s = found.searched
    note(
        f"{s.considered:,} deployments: {s.illegal:,} illegal, {s.unfit:,} do not fit, {s.pruned_by_latency:,} dropped by a bound on "
        f"latency, {s.pruned_by_cost:,} by one on chips, {s.simulated:,} simulated in {s.simulations:,} runs"
    )
    for text in found.warnings:
        note(f"note: {text}")


def _print_best(found: "Plan", best: "PlannedFleet") -> None:
    from simulator.report.forms import number, seconds, usd
    from simulator.report.plan_tables import front_table, metric_text

    _fleets("the plan" if found.rank_by == "cost" else "the plan, by chips", [((), best)])
    if best.usd_per_hour is not None:
        low, high = best.low_usd_per_hour, best.high_usd_per_hour
        spread = "" if low == high else f" ({usd(low)} … {usd(high)} an hour over the range of the price)"
        click.echo(f"price: {best.usd_per_chip_hour:g} USD per chip-hour, {best.price_source}{spread}")
    if found.chips_interval is not None:
        from simulator.report.intervals import interval_text

        span = interval_text(found.chips_interval, number)
        reason = f"; {found.chips_interval.reason}" if found.chips_interval.reason else ""
        click.echo(f"{found.interval_percent:g} % of draws of the calibrated parameters: {span} chips{reason}")
    consumed, verified = found.consumption, found.verification
    if consumed is not None:
        joules = "" if consumed.joules_per_query is None else f"; {consumed.joules_per_query:,.4g} J per query"
        click.echo(
            f"\nchip-seconds per query: {consumed.provisioned_chip_s:.4g} provisioned, {consumed.busy_chip_s:.4g} busy, "
            f"{consumed.ideal_chip_s:.4g} ideal{joules}"
        )
    if verified is not None:
        held = "held" if verified.kept else "MISSED"
        grown = f", after {verified.added_replicas} replicas were added" if verified.added_replicas else ""
        click.echo(
            f"verified with seed {verified.seed}, {verified.requests:,} requests at {verified.rate_per_s:.4g}/s for "
            f"{' + '.join(map(str, verified.replicas))} replica{'s' if sum(verified.replicas) > 1 else ''}: targets {held}"
            f"{grown}; {100 * verified.kept_fraction:.2f} % kept every limit"
        )
        latency = verified.latency
        cells = [
            [
                metric_text(name),
                *(seconds(getattr(getattr(latency, name), q).value) for q in ("p50", "p95", "p99")),
            ]
            for name in ("ttft_s", "tpot_s", "e2e_s")
            if latency is not None
        ]
        print_table("", ["", "p50", "p95", "p99"], cells)
    click.echo()
    print_table(
        "from the roofline to the bill",
        ["step", "factor", "chip-s/query"],
        [[f"{s.name}: {s.meaning}", f"{s.factor:.3f}", f"{s.chip_s_per_query:.4g}"] for s in found.waterfall],
    )
    if found.runners_up:
        _fleets("runners-up among those simulated", [((), f) for f in found.runners_up])
    if found.front:
        columns, rows, texts = front_table(found)
        click.echo()
        title = "cost against latency: the cheapest fleet when every limit is so many times as long"
        print_table(title, columns, rows, left=texts)


def _print_chips(found: "Plan") -> None:
    from simulator.report.plan_tables import words

    if len(found.by_chip) > 1 and any(o.fleet for o in found.by_chip):
        _fleets("the best of each chip", [((o.chip,), o.fleet) for o in found.by_chip if o.fleet], ("chip",))
    rest = [o for o in found.by_chip if o.reason]
    if rest:
        click.echo()
    for outcome in rest:
        click.echo(f"{outcome.chip}: {outcome.status.replace('_', ' ')}: {words(outcome.reason)}")


def _print_infeasible(found: "Plan") -> None:
    from simulator.report.forms import seconds
    from simulator.report.plan_tables import metric_text, words

    click.echo("\nno fleet of the chips asked keeps these targets")
    for name, value in found.idle_latency_s.items():
        limit = next(t for t in found.targets.limits if t.metric == name)
        percentile = limit.percentile or 100 * (found.targets.joint_fraction or 1)
        click.echo(
            f"{metric_text(name)} p{percentile:g} of the best deployment, one request at a time: {seconds(value)}, "
            f"{value / limit.limit_s:.3g} times the limit of {seconds(limit.limit_s)}"
        )
    if found.nearest:
        _fleets("nearest that is feasible", [((words(n.what),), n.fleet) for n in found.nearest], ("change",))
