"""Scenarios with several pools, a store of KV caches, or agents: from the scenario to a fleet, and through its run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator.catalog.architecture import Architecture
from simulator.catalog.records import Quantity
from simulator.engine.records import Requests
from simulator.errors import InputError
from simulator.fleet.records import STATE_FREE, Agents, Fleet, Pool, Router, Served
from simulator.results.summary import Assumption
from simulator.run.fleet_options import PoolOptions, growing_context, growing_hashes
from simulator.run.kv_memory import block_bytes
from simulator.run.resolve import Resolved, resolve
from simulator.run.scenario import Scenario
from simulator.traffic.arrivals import Closed
from simulator.units import format_si


@dataclass(frozen=True)
class ResolvedFleet:
    """A scenario's pools, ready to run."""

    scenario: Scenario
    options: tuple[PoolOptions, ...]
    pools: tuple[Resolved, ...]
    fleet: Fleet

    def with_pools(self, pools: Sequence[Resolved]) -> "ResolvedFleet":
        """The same fleet with other costs and settings of its replicas."""
        changed = [
            replace(pool, cost=resolved.engine_cost, settings=resolved.settings)
            for pool, resolved in zip(self.fleet.pools, pools, strict=True)
        ]
        return replace(self, pools=tuple(pools), fleet=replace(self.fleet, pools=tuple(changed)))


def follows_paths(scenario: Scenario) -> bool:
    """Whether a scenario is more than equal replicas that requests come to: then the whole path of each is followed."""
    waits = isinstance(scenario.traffic.arrival, Closed) and scenario.router.policy != "round-robin"
    return bool(scenario.pool) or scenario.store is not None or scenario.agents is not None or waits


def looks_at_replicas(scenario: Scenario) -> bool:
    """Whether somebody looks at replicas while they run."""
    names = [scenario.router.policy, *([scenario.router.decode] if scenario.disaggregated else [])]
    return scenario.agents is not None or any(name not in STATE_FREE for name in names)


def kv_block_bytes(resolved: Resolved) -> float:
    """Bytes of one KV block on the chips that hold it, copies included: what crosses a link. [bytes]

    Raises
    ------
    InputError
        For pipeline stages, whose parts of the cache are not all alike.
    """
    if resolved.sharding.pp > 1:
        raise InputError(
            f"{resolved.scenario.name}: sharding.pp = {resolved.sharding.pp}: KV caches that cross links are those of replicas "
            "without pipeline stages"
        )
    return block_bytes(resolved.place)


def pool_of(options: PoolOptions, resolved: Resolved, *, carried: bool) -> Pool:
    """A pool as the fleet takes it; ``carried``: KV caches cross links."""
    return Pool(
        name=options.name,
        role=options.role,
        cost=resolved.engine_cost,
        settings=resolved.settings,
        replicas=options.replicas,
        chips=resolved.cost.chips,
        kv_block_bytes=kv_block_bytes(resolved) if carried else 0.0,
        layers=resolved.deployment.architecture.n_layers,
    )


def resolve_fleet(scenario: Scenario, *, architecture: Architecture | None = None) -> ResolvedFleet:
    """Load, check and compile every pool of a scenario; without ``[[pool]]``, its one.

    Parameters
    ----------
    architecture
        the model itself, in place of the one that ``scenario.model`` names.

    Raises
    ------
    InputError, UnpriceableError, InfeasibleError
        As :func:`simulator.run.resolve.resolve`; if KV caches cannot go from one pool to another.
    """
    options = scenario.pool or (PoolOptions(name="replicas", replicas=scenario.replicas),)
    pools = tuple(resolve(scenario.of_pool(pool), architecture=architecture) for pool in options)
    order = sorted(range(len(options)), key=lambda i: options[i].role == "decode")
    options, pools = tuple(options[i] for i in order), tuple(pools[i] for i in order)
    if scenario.disaggregated:
        formats = {resolved.deployment.precision.kv for resolved in pools}
        if len(formats) > 1:
            raise InputError(
                f"{scenario.name}: pools hold KV caches as {', '.join(sorted(map(str, formats)))}: a cache is decoded as it was written; "
                "give them one precision for KV"
            )
    drafting = [resolved.scenario.engine.speculation for resolved in pools]
    differ = any(other != drafting[0] for other in drafting)
    prefills = [o.role == "prefill" and r.speculation is not None for o, r in zip(options, pools, strict=True)]
    if any(prefills) or (differ and not scenario.disaggregated):
        raise InputError(
            f"{scenario.name}: engine.speculation: the same for all unified pools, or of decode pools alone: a prefill replica decodes nothing"
        )
    carried = scenario.disaggregated or scenario.store is not None
    fleet = Fleet(
        pools=tuple(pool_of(o, r, carried=carried) for o, r in zip(options, pools, strict=True)),
        router=scenario.router.entry,
        decode_router=Router(scenario.router.decode),
        link=None if scenario.link is None else scenario.link.link(pools[0].slice),
        store=None if scenario.store is None else scenario.store.link,
        first_token="prefill" if scenario.link is None else scenario.link.first_token,
    )
    return ResolvedFleet(scenario, options, pools, fleet)


def link_assumptions(resolved: ResolvedFleet) -> list[Assumption]:
    """Where bandwidths and latencies of links come from: the scenario, or the chips' network."""
    scenario, found = resolved.scenario, []
    chip = resolved.pools[0].slice.chip

    def note(what: str, value: str, quantity: Quantity | None) -> None:
        if quantity is None:
            found.append(Assumption(what=what, value=value, kind="assumed", source="scenario"))
            return
        source = f"{quantity.source}, {quantity.locator}" if quantity.locator else quantity.source
        found.append(Assumption(what=what, value=value, kind=quantity.kind, source=source))

    stated, link, network = scenario.link, resolved.fleet.link, chip.scale_out
    if stated is not None and link is not None:
        own = stated.bandwidth_bytes_per_s is None and network is not None
        rate = format_si(link.bandwidth_bytes_per_s, "B/s")
        note("link bandwidth", f"{rate} per link", network.bandwidth if own and network else None)
        own = stated.latency_s is None and network is not None
        note("link latency", format_si(link.latency_s, "s"), network.latency if own and network else None)
    if resolved.fleet.store is not None:
        note("store bandwidth", f"{format_si(resolved.fleet.store.bandwidth_bytes_per_s, 'B/s')} per link", None)
        note("store latency", format_si(resolved.fleet.store.latency_s, "s"), None)
    return found


def agents_of(scenario: Scenario, requests: Requests, seed: int) -> tuple[Agents | None, Requests]:
    """Who sends the requests, and the requests as they send them; None: the traffic, by itself."""
    n = len(requests)
    if scenario.agents is not None:
        agents = scenario.agents.agents(n, seed)
        if scenario.agents.growing:
            requests, before = growing_context(scenario.agents, agents, requests, seed)
            requests = replace(requests, cached_tokens=before if scenario.store is not None else np.zeros_like(before))
            engines = [scenario.engine, *(scenario.of_pool(pool).engine for pool in scenario.pool)]
            if scenario.router.policy == "prefix-affinity" or any(e.prefix_cache != "off" for e in engines):
                requests = replace(requests, hashes=growing_hashes(scenario.agents, agents, requests))
        return agents, requests
    if requests.concurrency:
        return Agents(requests.concurrency, np.ones(n, dtype=np.int64), requests.arrival_s), requests
    return None, requests


def serve_fleet(
    resolved: ResolvedFleet,
    requests: Requests,
    agents: Agents | None,
    *,
    seed: int,
    workers: int,
    itl_window_s: tuple[float, float] | None,
) -> Served:
    """Run a fleet, by the driver that it needs."""
    from simulator.fleet import serve, serve_agents  # noqa: PLC0415 - imports the engine, which imports numba

    if agents is not None:
        return serve_agents(resolved.fleet, requests, agents, seed=seed)
    return serve(resolved.fleet, requests, seed=seed, workers=workers, itl_window_s=itl_window_s)
