"""Requests that come whatever becomes of those before them: stage by stage, in compiled code.

Nothing goes back from a later stage to an earlier one, so each stage is served whole before the next. Where nobody looks at its
replicas, their requests are streams of their own: engines of any kind serve them, several at a time. Elsewhere replicas are
advanced together from arrival to arrival (:mod:`simulator.engine.many`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine import many
from simulator.engine.compiled import new_engine
from simulator.engine.one_by_one import new_replicas
from simulator.engine.records import FINISHED, EngineResult, Requests
from simulator.engine.replicas import Kind
from simulator.errors import InputError
from simulator.fleet.records import Fleet, Served
from simulator.fleet.stages import Plan, StageResult, admissible, goes_on, served, stages_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def serve(
    fleet: Fleet,
    requests: Requests,
    *,
    seed: int = 1,
    workers: int = 1,
    itl_window_s: tuple[float, float] | None = None,
) -> Served:
    """Serve a stream of requests.

    Parameters
    ----------
    requests
        an open loop; or a closed one whose clients are divided over the replicas of one pool by turns.
    seed
        of the routers that choose at random.
    workers
        replicas simulated at a time where nobody looks at them. The result does not depend on it.
    itl_window_s
        count the inter-token latencies of the steps that start in this stretch of time by themselves. [s]

    Raises
    ------
    InputError
        If a router, link or client asks for what the engines or the requests do not have.
    """
    if requests.concurrency and (fleet.disaggregated or fleet.store or fleet.router.policy != "round-robin"):
        raise InputError("requests.concurrency: clients that wait for answers are served by serve_agents")
    if fleet.disaggregated and requests.clients_may_leave:
        raise InputError(
            "clients: timeouts and cancellations are not followed from a prefill pool to a decode pool; leave them out"
        )
    stages = stages_of(fleet, requests)
    refused = ~admissible(fleet, requests, stages)
    links = many.new_links(sum(stage.n_links for stage in stages))
    sent = _Sent(
        when_s=np.where(refused, np.nan, requests.arrival_s),
        since_s=np.full(len(requests), np.nan),
        source=np.full(len(requests), -1, dtype=np.int64),
    )
    found: list[StageResult] = []
    itl: Ints | None = None
    for plan in stages:
        if plan.state_free:
            result, counts = _split(plan, sent, links, seed, workers, itl_window_s)
        else:
            result, counts = _together(plan, sent, links, seed, itl_window_s)
        found.append(result)
        if counts is not None:
            itl = counts if itl is None else itl + counts
        goes = goes_on(fleet, requests) & (result.column("status") == FINISHED)
        sent = _Sent(np.where(goes, result.column("finish_s"), np.nan), result.column("scheduled_s"), result.replica)
    refused_s = np.where(refused, requests.arrival_s, np.nan)
    return served(fleet, requests, found, refused_s, links.sums, itl)


@dataclass(frozen=True)
class _Sent:
    """[n] when requests are sent to a stage (NaN: they are not); since when their KV caches are computed, and where."""

    when_s: Floats
    since_s: Floats
    source: Ints

    @property
    def order(self) -> Ints:
        """Those that are sent, by time, then row."""
        return np.argsort(self.when_s, kind="stable")[: int((~np.isnan(self.when_s)).sum())]


def _split(
    plan: Plan,
    sent: _Sent,
    links: many.Links,
    seed: int,
    workers: int,
    itl_window_s: tuple[float, float] | None,
) -> tuple[StageResult, Ints | None]:
    """Serve a stage whose replicas nobody looks at, each by itself."""
    record, order = plan.record(seed), sent.order
    many.transfer_in_order(links, record, order, sent.when_s, sent.since_s, sent.source)
    closed, n = plan.requests.concurrency, plan.replicas
    there = np.argsort(record.arrive_s[order], kind="stable") if plan.link is not None else slice(None)
    arriving = order[there]
    by_replica = np.argsort(record.given[arriving], kind="stable")
    edges = np.searchsorted(record.given[arriving][by_replica], np.arange(n + 1))
    rows = [arriving[by_replica[edges[r] : edges[r + 1]]] for r in range(n)]
    kinds = [pool for pool in plan.pools for _ in range(pool.replicas)]
    # Out of the order of their arrival at the fleet they may come to a replica.
    requests = plan.requests if closed else replace(plan.requests, arrival_s=np.zeros(len(sent.when_s)))

    def one(r: int) -> tuple[EngineResult, Ints | None]:
        part = requests.take(rows[r], concurrency=len(range(r, closed, n)))
        if not closed:
            part = replace(part, arrival_s=record.arrive_s[rows[r]])
        engine = new_engine(kinds[r].cost, kinds[r].settings, part)
        measured = None if itl_window_s is None else engine.itl_between(*itl_window_s)
        engine.advance()
        return engine.result(), measured

    if workers == 1 or n == 1:
        done = [one(r) for r in range(n)]
    else:
        # The compiled engine holds no lock while it runs, so threads do; map keeps the order of replicas.
        with ThreadPoolExecutor(max_workers=min(workers, n)) as pool:
            done = list(pool.map(one, range(n)))
    results, counts = zip(*done, strict=True)
    if closed:  # when they were sent is up to the clients
        record = record._replace(sent_s=_arrivals(rows, results, len(sent.when_s)))
        record = record._replace(arrive_s=record.sent_s)
    measured = None if itl_window_s is None else np.asarray(np.sum(counts, axis=0))
    return StageResult(plan, record, rows, results), measured


def _arrivals(rows: Sequence[Ints], results: Sequence[EngineResult], n: int) -> Floats:
    arrival = np.full(n, np.nan)
    for mine, result in zip(rows, results, strict=True):
        arrival[mine] = result.arrival_s
    return arrival


def _together(
    plan: Plan, sent: _Sent, links: many.Links, seed: int, itl_window_s: tuple[float, float] | None
) -> tuple[StageResult, Ints | None]:
    """Serve a stage whose router looks at its replicas."""
    n = plan.replicas
    record, order = replace(plan, first=0).record(seed), sent.order
    kinds = [Kind(pool.cost, pool.settings, pool.replicas) for pool in plan.pools]
    last_s = float(sent.when_s[order[-1]]) if len(order) else 0.0
    times = order, sent.when_s, sent.since_s, sent.source
    place, counts = 0, []
    replicas = new_replicas(
        kinds, plan.requests, policies=(record.policy,), prefixes=plan.prefixes, last_arrival_s=last_s
    )
    replicas.links = links
    for edge_s in (*(itl_window_s or ()), np.inf):
        place = replicas.serve(record, *times, edge_s, place)
        replicas.advance(record, edge_s)
        counts.append(replicas.itl_counts())
    given = record.given[order]
    rows = [order[given == r] for r in range(n)]
    results = [replicas.result(r, mine) for r, mine in enumerate(rows)]
    measured = None if itl_window_s is None else counts[1] - counts[0]
    return StageResult(plan, record, rows, results), measured
