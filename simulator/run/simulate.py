"""Run a scenario: resolve, drive its replicas, summarise."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from simulator import __version__
from simulator.catalog.architecture import Architecture
from simulator.engine.records import FINISHED, Requests
from simulator.errors import InfeasibleError, InputError
from simulator.fleet.records import Served
from simulator.results.store import Result
from simulator.results.summary import Figure, Replications, Summary
from simulator.results.tables import Table
from simulator.roofline.intervals import DRAWS, check_level
from simulator.run.fleets import (
    ResolvedFleet,
    follows_paths,
    link_assumptions,
    looks_at_replicas,
    resolve_fleet,
    serve_fleet,
)
from simulator.run.options import RunOptions
from simulator.run.outcome import Outcome, requests_table
from simulator.run.resolve import Resolved, check_contradictions, facts, resolve
from simulator.run.scenario import Scenario
from simulator.run.serving import (
    as_requests,
    outcome_of,
    queued_at_once,
    serve_equal,
    serve_paths,
    served_at_once,
    with_seed,
)
from simulator.run.statistics import between_seeds
from simulator.run.summarise import summarise
from simulator.traffic import Stream, stream_blocks

if TYPE_CHECKING:
    from simulator.run.intervals import OnePool, Pools

#: Called with (steps done, steps in all, what is done now).
Progress = Callable[[int, int, str], None]

#: Packages whose versions a result depends on.
_PACKAGES = ("numpy", "numba", "duckdb")


@dataclass(frozen=True)
class Run:
    """One simulated scenario: the result to write or print, and what it was made from."""

    result: Result
    resolved: Resolved
    outcome: Outcome
    """Of the first seed."""
    served: Served | None
    """What each replica did, of the first seed; None of a run in blocks."""

    @property
    def summary(self) -> Summary:
        """The run's summary."""
        return self.result.summary


def run_scenario(
    scenario: Scenario,
    *,
    architecture: Architecture | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    summary_only: bool | None = None,
    interval: float | None = None,
    interval_draws: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Run:
    """Simulate a scenario.

    Parameters
    ----------
    architecture
        the model itself, in place of the one that ``scenario.model`` names.
    seed, seeds
        instead of the scenario's own; the resolved scenario of the result carries them. With several seeds, tables and
        figures are of the first, and the summary gets between-seed intervals of every figure.
    summary_only
        instead of the scenario's own: serve the requests block by block and keep none of them.
    interval, interval_draws
        instead of the scenario's own: percent of draws of the calibrated parameters that an interval of each headline
        figure holds, and how many draws. Of the first seed.
    workers
        replicas, or draws, simulated at the same time. The result does not depend on it.

    Raises
    ------
    InputError, UnpriceableError
        If the scenario is malformed, contradicts itself or cannot be priced.
    InfeasibleError
        If the model does not fit on the slice, or no request fits into the engine.
    """
    for name, value, least in (("seed", seed, 0), ("seeds", seeds, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} = {value}: must be at least {least}")
    if workers < 1:
        raise InputError(f"workers = {workers}: must be at least 1")
    if interval is not None:
        check_level(interval)
    stated = {
        "seed": seed,
        "seeds": seeds,
        "summary_only": summary_only,
        "interval": interval,
        "interval_draws": interval_draws,
    }
    changes = {name: value for name, value in stated.items() if value is not None}
    scenario = scenario.model_copy(update={"run": _changed(scenario.run, changes)})
    first, n_seeds = scenario.run.seed, scenario.run.seeds
    say = progress or _silent
    total = 2 * n_seeds + 1
    say(0, total, "compiling step costs")
    fleet = resolve_fleet(scenario, architecture=architecture) if follows_paths(scenario) else None
    if fleet is not None and scenario.run.summary_only:
        raise InputError(
            f"{scenario.name}: a run in blocks knows one pool of equal replicas; leave pools, store and agents out, or keep the "
            "requests (summary_only = false)"
        )
    resolved = resolve(scenario, architecture=architecture) if fleet is None else fleet.pools[-1]
    pools = (resolved,) if fleet is None else fleet.pools
    if scenario.run.interval is not None:
        from simulator.run.intervals import check  # noqa: PLC0415 - imports this module

        for one in pools:
            check(one)
    for one in pools:
        prepare_engine(partial(say, 0, total), one)
    if scenario.all_replicas > 1 and looks_at_replicas(scenario):
        say(0, total, "loading the engine for fleets (some 25 s the first time)")
    runs: list[tuple[Summary, Table, Table, Outcome, Served | None]] = []
    for k in range(n_seeds):
        say(1 + 2 * k, total, f"simulating, seed {first + k}")
        tell = partial(say, 2 + 2 * k, total)
        if fleet is not None:
            runs.append(_run_fleet(fleet, first + k, workers, tell))
        elif scenario.run.summary_only:
            runs.append(_run_summary_only(resolved, first + k, workers, tell))
        else:
            runs.append(_run_once(resolved, first + k, workers, tell))
    say(total, total, "done")
    summary, requests, timeline, outcome, served = runs[0]
    if n_seeds > 1:
        summary = summary.model_copy(update={"replications": _replications([run[0] for run in runs], first)})
    result = Result(
        scenario=scenario.as_toml(),
        summary=summary,
        requests=requests,
        timeline=timeline,
        seed=first,
        versions=versions(),
        inputs=_input_digests(scenario),
    )
    return Run(result=result, resolved=resolved, outcome=outcome, served=served)


def _changed(options: RunOptions, changes: Mapping[str, Any]) -> RunOptions:
    """Options with some changed, checked again."""
    try:
        return RunOptions.model_validate({**options.model_dump(), **changes})
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(("run", *map(str, item["loc"])))
        raise InputError(f"{where}: {item['msg'].removeprefix('Value error, ')}") from None


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


SECONDS_TO_COMPILE = {
    "plain": 6,
    "policies": 9,
    "features": 15,
    "ranks": 11,
    "ranks-features": 19,
    "stages": 12,
    "stages-features": 18,
}
"""What each of the engine's loops takes, about, when it is the first on this machine. [s]"""


def prepare_engine(say: Callable[[str], None], resolved: Resolved) -> None:
    """Compile what the run needs, and say so."""
    from simulator.engine import compiled, jit  # noqa: PLC0415 - numba takes a while to import

    if not jit.is_compiled_mode():
        say("Numba is absent or switched off: the engine runs as plain Python, slowly, with the same results")
        return
    leave = resolved.scenario.clients.may_leave
    cost, settings = resolved.engine_cost, resolved.settings
    # The capacity of a run is measured with clients who stay.
    for form in sorted({compiled.form_of(cost, settings, clients_leave=leaving) for leaving in (leave, False)}):
        if not jit.is_warm(form):
            say(f"compiling the engine's loop for {form} (about {SECONDS_TO_COMPILE[form]} s, once per version)")
            compiled.warm_up(form)


def _run_once(
    resolved: Resolved, seed: int, workers: int, say: Callable[[str], None]
) -> tuple[Summary, Table, Table, Outcome, Served]:
    scenario = resolved.scenario
    resolved = with_seed(resolved, seed)
    serving = serve_equal(resolved, seed, workers)
    stream, requests, window = serving.stream, serving.requests, serving.itl_window_s
    outcome = outcome_of(serving.served)
    finished = int((outcome.column("status") == FINISHED).sum())
    if finished == 0:
        raise InfeasibleError(_nothing_fits(resolved, requests))
    say(f"measuring capacity, seed {seed}")
    at_once = served_at_once(resolved, outcome, workers=workers, seed=seed)
    about = facts(resolved, seed=seed, traffic=_source(stream.source, scenario), notes=_notes(stream, scenario))
    summary, table, timeline = summarise(outcome, at_once, about)
    if scenario.run.interval is not None and seed == scenario.run.seed:
        from simulator.run.intervals import OnePool  # noqa: PLC0415 - imports this module

        summary = _with_intervals(OnePool(resolved, requests, about, window), summary, seed, workers, say)
    return summary, table, timeline, outcome, serving.served


def _with_intervals(
    subject: "OnePool | Pools", summary: Summary, seed: int, workers: int, say: Callable[[str], None]
) -> Summary:
    """The summary with intervals over draws of the parameters."""
    from simulator.run.intervals import parameter_intervals  # noqa: PLC0415 - imports this module

    options = subject.scenario.run
    n = options.interval_draws or DRAWS
    say(f"drawing parameters {n} times")
    found = parameter_intervals(subject, summary, level=options.interval or 0.0, n=n, seed=seed, workers=workers)
    return summary.model_copy(update={"intervals": found})


def _notes(stream: Stream, scenario: Scenario) -> tuple[str, ...]:
    notes = stream.notes
    if stream.blocks is not None and scenario.engine.prefix_cache == "off":
        notes += ('the traffic says which prompts share a prefix; engine.prefix_cache = "off" makes no use of it',)
    return notes


def _run_fleet(
    resolved: ResolvedFleet, seed: int, workers: int, say: Callable[[str], None]
) -> tuple[Summary, Table, Table, Outcome, Served]:
    """As :func:`_run_once`, for pools, a store, or clients who wait for a router that looks at replicas."""
    from simulator.run.fleet_summary import summarise_fleet  # noqa: PLC0415 - imports the engine, which imports numba

    scenario = resolved.scenario
    serving = serve_paths(resolved, seed, workers)
    stream, requests, served = serving.stream, serving.requests, serving.served
    agents, window = serving.agents, serving.itl_window_s
    if not served.finished.any():
        raise InfeasibleError(_nothing_fits(resolved.pools[-1], requests))
    say(f"measuring capacity, seed {seed}")
    at_once = serve_fleet(resolved, queued_at_once(requests), None, seed=seed, workers=workers, itl_window_s=None)
    source = _source(stream.source, scenario)
    if scenario.agents is not None:
        source = f"{source.rpartition('; arrivals: ')[0]}; {scenario.agents.in_words}"
    about = [
        replace(facts(pool, seed=seed, traffic=source, notes=_notes(stream, scenario)), role=options.role)
        for options, pool in zip(resolved.options, resolved.pools, strict=True)
    ]
    about[-1] = replace(about[-1], assumptions=(*about[-1].assumptions, *link_assumptions(resolved)))
    tasks = scenario.agents is not None
    found = summarise_fleet(served, at_once, about, window_s=window, agents=agents, tasks=tasks)
    if scenario.run.interval is not None and seed == scenario.run.seed:
        from simulator.run.intervals import Pools  # noqa: PLC0415 - imports this module

        subject = Pools(resolved, requests, agents, tuple(about), window, seed)
        return _with_intervals(subject, found[0], seed, workers, say), *found[1:], served
    return *found, served


def _run_summary_only(
    resolved: Resolved, seed: int, workers: int, say: Callable[[str], None]
) -> tuple[Summary, Table, Table, Outcome, None]:
    """As :func:`_run_once`, block by block: the requests table is empty."""
    from simulator.run.streaming import EqualReplicas, run_streaming  # noqa: PLC0415 - imports the engine, which imports numba

    resolved.demand_plain("run.summary_only")
    scenario = resolved.scenario
    if scenario.replicas > 1 and scenario.router.policy != "round-robin":
        raise InputError(
            f"{scenario.name}: router.policy = {scenario.router.policy!r}: a run in blocks sends request i to replica i mod N; use "
            "round-robin, or keep the requests (summary_only = false)"
        )
    if scenario.clients.may_leave:
        raise InputError(
            f"{scenario.name}: a run in blocks knows only clients who wait; leave the timeouts and cancellations of [clients] "
            "out, or keep the requests (summary_only = false)"
        )
    blocks = stream_blocks(scenario.traffic, seed, base_folder=Path.cwd())
    check_contradictions(scenario, blocks.concurrency)
    if len(blocks) < scenario.replicas:
        raise InputError(f"{scenario.name}: {len(blocks)} requests cannot occupy replicas = {scenario.replicas}")
    fleet = EqualReplicas(resolved.cost, resolved.settings, scenario.replicas, workers)
    about = facts(resolved, seed=seed, traffic=_source(blocks.source, scenario), notes=blocks.notes())
    found = run_streaming(fleet, blocks, about, say)
    if found is None:
        raise InfeasibleError(_nothing_fits(resolved, as_requests(next(blocks.blocks()))))
    summary, timeline, outcome = found
    return summary, requests_table(replace(outcome, replicas=outcome.replicas[:1])), timeline, outcome, None


def _source(text: str, scenario: Scenario) -> str:
    """Where requests come from, with a file's name in place of its path: results do not depend on folders."""
    trace = scenario.traffic.trace
    for path in (trace.file if trace else None, scenario.traffic.mix):
        if path:
            text = text.replace(path, Path(path).name)
    return text


def _nothing_fits(resolved: Resolved, requests: Requests) -> str:
    settings = resolved.settings
    shortest = int((requests.prompt_tokens + requests.max_tokens).min())
    tokens = settings.longest_tokens
    limit = f" and max_model_len = {settings.max_model_len}" if settings.max_model_len else ""
    return (
        f"{resolved.scenario.name}: all {len(requests)} requests were rejected: the shortest has {shortest} tokens, "
        f"the KV cache of a replica holds {tokens:.0f}{limit}; use a larger slice or a narrower precision"
    )


def _replications(summaries: Sequence[Summary], first: int) -> Replications:
    statuses: dict[str, int] = {}
    for summary in summaries:
        statuses[summary.status] = statuses.get(summary.status, 0) + 1
    collected: dict[str, list[float]] = {}
    for summary in summaries:
        for path, value in figures(summary).items():
            collected.setdefault(path, []).append(value)
    found = {}
    for path, values in collected.items():
        mean, low, high = between_seeds(values)
        found[path] = Figure(mean=mean, low=low, high=high, n=len(values))
    return Replications(seeds=list(range(first, first + len(summaries))), statuses=statuses, figures=found)


_SECTIONS = (
    "load",
    "latency",
    "slo",
    "throughput",
    "occupancy",
    "utilisation",
    "prefix_cache",
    "speculation",
    "kv_memory",
    "chip_seconds_per_query",
    "prices",
    "energy",
    "breakdown",
)


def figures(summary: Summary) -> dict[str, float]:
    """Every numeric figure of a summary by its path, e.g. ``latency.ttft_s.p99``; an estimate gives its value."""
    found: dict[str, float] = {}

    def walk(path: str, item: object) -> None:
        if isinstance(item, dict):
            if "value" in item and "reason" in item:
                walk(path, item["value"])
                return
            for key, value in item.items():
                walk(f"{path}.{key}", value)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            found[path] = float(item)

    document = summary.model_dump(mode="json")
    for section in _SECTIONS:
        walk(section, document[section])
    return found


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"chipseconds": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _input_digests(scenario: Scenario) -> dict[str, str]:
    """SHA-256 of the user's own files that a scenario names."""
    chip = scenario.slice.rpartition(":")[0]
    trace = scenario.traffic.trace
    drafting = scenario.engine.speculation
    candidates = {
        "model": scenario.model,
        "engine.speculation.model": drafting.model if drafting else None,
        "engine.speculation.slice": (drafting.slice or "").rpartition(":")[0] if drafting else None,
        "slice": chip,
        **{f"pool {pool.name}, slice": (pool.slice or "").rpartition(":")[0] for pool in scenario.pool},
        "traffic.mix": scenario.traffic.mix,
        "traffic.trace": trace.file if trace else None,
    }
    return {
        name: hashlib.sha256(Path(text).read_bytes()).hexdigest()
        for name, text in candidates.items()
        if isinstance(text, str) and Path(text).is_file()
    }
