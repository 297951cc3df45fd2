"""From a scenario to its requests, and through its replicas: what was done, before anything is summed up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.architecture import Architecture
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import Requests
from simulator.errors import InputError
from simulator.fleet.records import Agents, Fleet, Router, Served
from simulator.run.fleet_options import PoolOptions
from simulator.run.fleets import ResolvedFleet, agents_of, follows_paths, pool_of, resolve_fleet, serve_fleet
from simulator.run.outcome import Outcome
from simulator.run.resolve import Resolved, check_contradictions, resolve
from simulator.run.scenario import Scenario
from simulator.run.speculation import with_acceptance
from simulator.run.window import cut_window
from simulator.traffic import Stream, TrafficSpec, build_stream


@dataclass(frozen=True)
class Serving:
    """A scenario's requests, and what its replicas did with them.

    ``itl_window_s`` is the stretch whose inter-token latencies were counted by themselves, if there was one. [s]
    """

    stream: Stream
    requests: Requests
    served: Served
    agents: Agents | None
    itl_window_s: tuple[float, float] | None


def serve_scenario(
    scenario: Scenario, *, architecture: Architecture | None = None, seed: int | None = None, workers: int = 1
) -> Serving:
    """Serve a scenario's requests, as :func:`run_scenario` does, and sum nothing up."""
    seed = scenario.run.seed if seed is None else seed
    if follows_paths(scenario):
        return serve_paths(resolve_fleet(scenario, architecture=architecture), seed, workers)
    return serve_equal(resolve(scenario, architecture=architecture), seed, workers)


def _stream(scenario: Scenario, traffic: TrafficSpec, seed: int) -> Stream:
    stream = build_stream(traffic, seed, base_folder=Path.cwd())
    if len(stream) == 0:
        raise InputError(f"{scenario.name}: the traffic has no requests")
    return stream


def with_seed(resolved: Resolved, seed: int) -> Resolved:
    """The same deployment, with what is drawn for its steps drawn from ``seed``."""
    if not resolved.settings.expert_skew.on:
        return resolved
    skew = replace(resolved.settings.expert_skew, seed=seed)
    return replace(resolved, settings=replace(resolved.settings, expert_skew=skew))


def serve_equal(resolved: Resolved, seed: int, workers: int) -> Serving:
    """Equal replicas."""
    scenario = resolved.scenario
    stream = _stream(scenario, scenario.traffic, seed)
    check_contradictions(scenario, stream.concurrency)
    requests = scenario_requests(scenario, stream, seed)
    window = measured_stretch_s(requests, scenario)
    found = serve_pool(with_seed(resolved, seed), requests, workers=workers, itl_window_s=window, seed=seed)
    return Serving(stream, requests, found, None, window)


def serve_paths(resolved: ResolvedFleet, seed: int, workers: int) -> Serving:
    """Pools, a store, or clients who wait for a router that looks at replicas."""
    scenario = resolved.scenario
    traffic = scenario.traffic
    if scenario.agents is not None:
        traffic = traffic.model_copy(update={"arrival": scenario.agents.arrival})
    stream = _stream(scenario, traffic, seed)
    # Where answers are decoded says what the scheduler and the drafts must know of each request.
    agents, requests = agents_of(scenario, scenario_requests(resolved.pools[-1].scenario, stream, seed), seed)
    window = None if agents is not None else measured_stretch_s(requests, scenario)
    served = serve_fleet(resolved, requests, agents, seed=seed, workers=workers, itl_window_s=window)
    return Serving(stream, requests, served, agents, window)


def scenario_requests(scenario: Scenario, stream: Stream, seed: int) -> Requests:
    """A scenario's stream as the engine takes it, with what its clients add and what is drawn for each request."""
    requests = as_requests(stream, client_columns(scenario, stream.output_tokens, seed))
    if scenario.engine.stored_prefix_tokens:
        stored = np.minimum(requests.prompt_tokens, scenario.engine.stored_prefix_tokens)
        requests = replace(requests, stored_tokens=stored)
    return with_acceptance(requests, scenario.engine.speculation, seed)


def client_columns(scenario: Scenario, output_tokens: NDArray[np.int64], seed: int) -> dict[str, NDArray[Any]]:
    """What a scenario's clients add to a stream of requests."""
    engine = scenario.engine
    sigma = engine.length_prediction_sigma if engine.policy == "sjf" else None
    ttft_s = scenario.slo.ttft_s if engine.policy == "edf" else None
    return scenario.clients.columns(output_tokens, seed, prediction_sigma=sigma, ttft_s=ttft_s)


def as_requests(stream: Stream, columns: Mapping[str, NDArray[Any]] = MappingProxyType({})) -> Requests:
    """A traffic stream as the engine takes it, with what the clients add to it."""
    return Requests(
        arrival_s=stream.arrival_s,
        prompt_tokens=stream.prompt_tokens,
        output_tokens=stream.output_tokens,
        cached_tokens=stream.cached_tokens,
        max_tokens=stream.max_tokens,
        concurrency=stream.concurrency,
        hashes=None if stream.blocks is None else BlockHashes(**vars(stream.blocks)),
        **columns,
    )


def queued_at_once(requests: Requests) -> Requests:
    """The same requests, all queued at t = 0, from clients who wait: what capacity is measured with."""
    return replace(
        requests,
        arrival_s=np.zeros(len(requests)),
        concurrency=0,
        ttft_timeout_s=None,
        timeout_s=None,
        cancel_s=None,
    )


def simulate_fleet(
    resolved: Resolved,
    requests: Requests,
    *,
    workers: int = 1,
    itl_window_s: tuple[float, float] | None = None,
    router: Router | None = None,
    seed: int | None = None,
) -> Outcome:
    """What :func:`serve_pool` does, side by side."""
    return outcome_of(
        serve_pool(resolved, requests, workers=workers, itl_window_s=itl_window_s, router=router, seed=seed)
    )


def outcome_of(served: Served) -> Outcome:
    """The one pool of a fleet without paths."""
    (pool,) = served.pools
    rows = None if served.fleet.router.policy == "round-robin" else pool.rows
    return Outcome(served.requests, pool.replicas, pool.pool.chips, served.itl_counts, rows)


def serve_pool(
    resolved: Resolved,
    requests: Requests,
    *,
    workers: int = 1,
    itl_window_s: tuple[float, float] | None = None,
    router: Router | None = None,
    seed: int | None = None,
) -> Served:
    """Serve a stream with the scenario's equal replicas, sent there by ``router``, or else by the scenario's.

    ``itl_window_s``: count the inter-token latencies of the steps that start in this stretch of time by themselves. [s]
    """
    from simulator.fleet import serve  # noqa: PLC0415 - numba takes a while to import

    scenario = resolved.scenario
    n = scenario.replicas
    if len(requests) < n:
        raise InputError(f"{scenario.name}: {len(requests)} requests cannot occupy replicas = {n}")
    router = router or scenario.router.entry
    pool = pool_of(PoolOptions(name="replicas", replicas=n), resolved, carried=False)
    seed = scenario.run.seed if seed is None else seed
    return serve(Fleet((pool,), router), requests, seed=seed, workers=workers, itl_window_s=itl_window_s)


def served_at_once(resolved: Resolved, outcome: Outcome, *, workers: int = 1, seed: int | None = None) -> Outcome:
    """The requests of an outcome, all queued at t = 0: what capacity is measured with. The outcome itself, if they were."""
    requests = outcome.requests
    if requests.concurrency == 0 and float(requests.arrival_s[-1]) == 0:
        return outcome
    # Requests that are there at once find all replicas alike: who looks at them takes turns.
    entry = resolved.scenario.router.entry
    router = entry if entry.state_free else Router()
    return simulate_fleet(resolved, queued_at_once(requests), workers=workers, router=router, seed=seed)


def measured_stretch_s(requests: Requests, scenario: Scenario) -> tuple[float, float] | None:
    """The measured window of an open loop, known from its arrivals; None for a closed loop, or if all arrive at once. [s]"""
    if requests.concurrency:
        return None
    first, last = float(requests.arrival_s[0]), float(requests.arrival_s[-1])
    options = scenario.run
    window, offline = cut_window(
        first, last, np.nan, warm_up_fraction=options.warm_up_fraction, drain_fraction=options.drain_fraction
    )
    return None if offline else (window.start_s, window.stop_s)
