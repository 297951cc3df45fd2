"""A stage of a request's path: where it may go, how it gets there, and what becomes of it. Used by both drivers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine import many
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import (
    FINISHED,
    NOT_ARRIVED,
    REJECTED,
    WAITING,
    EngineResult,
    EngineSettings,
    Requests,
)
from simulator.errors import InputError
from simulator.fleet.records import Fleet, Link, Pool, PoolResult, Router, Served, joined
from simulator.fleet.routing import assign, two_replicas

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_CODES = {
    "least-requests": many.LEAST_REQUESTS,
    "least-kv": many.LEAST_KV,
    "power-of-two": many.POWER_OF_TWO,
    "prefix-affinity": many.PREFIX,
}


@dataclass(frozen=True)
class Plan:
    """One stage: its pools, its router, its link, and requests as its replicas see them.

    Attributes
    ----------
    first
        its first replica, counted over all stages.
    bytes
        [n] that cross ``link`` for each request; without a link, zeros. [bytes]
    link0
        the first of its links among the fleet's.
    sources
        replicas of the stage before it.
    cause
        of the random numbers of its router.
    """

    pools: tuple[Pool, ...]
    router: Router
    link: Link | None
    requests: Requests
    bytes: Floats
    first: int
    link0: int
    sources: int
    cause: str

    @property
    def replicas(self) -> int:
        """Replicas of the stage."""
        return sum(pool.replicas for pool in self.pools)

    @property
    def state_free(self) -> bool:
        """Whether nobody looks at replicas: the router does not, or there is but one."""
        return self.router.state_free or self.replicas == 1

    @property
    def n_links(self) -> int:
        """Links of the stage."""
        if self.link is None:
            return 0
        return {
            "fleet": 1,
            "source": self.sources,
            "target": self.replicas,
            "both": self.sources + self.replicas,
        }[self.link.per]

    @property
    def held_twice(self) -> bool:
        """Whether a transfer holds two links."""
        return self.link is not None and self.link.per == "both"

    def record(self, seed: int, *, row0: int = 0) -> many.Stage:
        """The stage as compiled code takes it; requests' rows start at ``row0``."""
        n = len(self.requests)
        all_replicas = self.first + self.replicas
        inlet, outlet = np.full(all_replicas, -1, dtype=np.int64), np.full(self.sources, -1, dtype=np.int64)
        link = self.link
        if link is not None:
            if link.per in {"source", "both"}:
                outlet[:] = self.link0 + np.arange(self.sources)
            if link.per in {"target", "both"}:
                after = self.sources if link.per == "both" else 0
                inlet[self.first :] = self.link0 + after + np.arange(self.replicas)
            if link.per == "fleet":
                inlet[:] = self.link0
        given = np.full(n, -1, dtype=np.int64)
        if self.state_free:
            given = assign(self.router, self.requests, self.replicas, seed, cause=self.cause)
        draws = np.zeros((0, 2), dtype=np.int64)
        if self.router.policy == "power-of-two":
            draws = two_replicas(seed, self.cause, n, self.replicas)
        return many.Stage(
            first=self.first,
            last=all_replicas,
            row0=row0,
            policy=many.GIVEN if self.state_free else _CODES[self.router.policy],
            given=given,
            draws=draws,
            match=float(self.router.match_fraction),
            imbalance=int(self.router.imbalance),
            ratio=float(self.router.imbalance_ratio),
            linked=link is not None,
            bandwidth=1.0 if link is None else float(link.bandwidth_bytes_per_s),
            latency_s=0.0 if link is None else float(link.latency_s),
            layers=self.pools[0].layers if link is not None and link.layerwise else 0,
            inlet=inlet,
            outlet=outlet,
            bytes=np.ascontiguousarray(self.bytes, dtype=np.float64),
            sent_s=np.full(n, np.nan),
            arrive_s=np.full(n, np.nan),
            waited_s=np.zeros(n),
        )

    @property
    def prefixes(self) -> BlockHashes | None:
        """What a prefix-affinity router goes by: ids per KV block.

        Raises
        ------
        InputError
            If the requests do not say which prompts are alike.
        """
        if self.router.policy != "prefix-affinity" or self.state_free:
            return None
        requests = self.requests
        if requests.hashes is None:
            raise InputError(
                "router.policy = 'prefix-affinity': requests do not say which prompts start alike; use traffic.sessions, or a "
                "trace with hash_ids"
            )
        return requests.hashes.at_block_size(
            self.pools[0].settings.block_size, requests.prompt_tokens, requests.output_tokens
        )


def stages_of(fleet: Fleet, requests: Requests) -> list[Plan]:
    """The stages of a fleet's path, and what requests are in each of them (F1, F7)."""
    entry = fleet.entry
    n = len(requests)
    bytes_ = np.zeros(n)
    if fleet.store is not None:
        if any(pool.kv_block_bytes <= 0 for pool in entry):
            raise InputError("pools: kv_block_bytes must be positive where KV caches come from a store")
        bytes_ = entry[0].kv_bytes(requests.cached_tokens)
    here = requests
    if fleet.disaggregated:
        one = np.ones(n, dtype=np.int64)
        here = replace(requests, output_tokens=one, max_tokens=one)
    first = Plan(entry, fleet.router, fleet.store, here, bytes_, 0, 0, 0, "router")
    if not fleet.disaggregated:
        return [first]
    if fleet.first_token == "prefill":  # noqa: S105 - a token of text
        # The replica has the KV of the whole prompt, and the first token to compute.
        there = replace(
            requests,
            prompt_tokens=requests.prompt_tokens + 1,
            cached_tokens=requests.prompt_tokens,
            output_tokens=np.maximum(requests.output_tokens - 1, 1),
            max_tokens=np.maximum(requests.max_tokens - 1, 1),
        )
    else:
        there = replace(requests, cached_tokens=requests.prompt_tokens - 1)
    carried = entry[0].kv_bytes(requests.prompt_tokens)
    return [
        first,
        Plan(
            fleet.decoders,
            fleet.decode_router,
            fleet.link,
            there,
            carried,
            first.replicas,
            first.n_links,
            first.replicas,
            "decode_router",
        ),
    ]


def fits(settings: EngineSettings, requests: Requests) -> NDArray[np.bool_]:
    """[n] R4, B2 to B4: which requests a replica would not reject."""
    longest = requests.prompt_tokens + requests.max_tokens
    found = -(-(longest - 1 + settings.lookahead) // settings.block_size) <= settings.num_kv_blocks
    if settings.max_model_len:
        found &= longest <= settings.max_model_len
    batching = settings.scheduling.batching
    if batching != "chunked":
        known = requests.prompt_tokens if batching == "static" else longest - 1
        found &= known - requests.cached_tokens <= settings.max_num_batched_tokens
    return np.asarray(found)


def admissible(fleet: Fleet, requests: Requests, stages: Sequence[Plan]) -> NDArray[np.bool_]:
    """[n] F7: requests that some replica of each later stage they need would not reject; the others are rejected on arrival."""
    found = np.ones(len(requests), dtype=bool)
    for stage in stages[1:]:
        found &= np.any([fits(pool.settings, stage.requests) for pool in stage.pools], axis=0)
    return np.asarray(found | ~goes_on(fleet, requests))


def goes_on(fleet: Fleet, requests: Requests) -> NDArray[np.bool_]:
    """[n] which requests need a decode replica after their prefill."""
    if not fleet.disaggregated:
        return np.zeros(len(requests), dtype=bool)
    if fleet.first_token == "decode":  # noqa: S105 - a token of text
        return np.ones(len(requests), dtype=bool)
    return np.asarray(requests.output_tokens > 1)


@dataclass(frozen=True)
class StageResult:
    """What became of one stage: where requests were sent and when, and what its replicas did, in order.

    ``rows`` are those of each replica among the stage's requests.
    """

    plan: Plan
    record: many.Stage
    rows: Sequence[Ints]
    results: Sequence[EngineResult]

    def pools(self) -> list[PoolResult]:
        """The same, pool by pool."""
        found, start = [], 0
        for pool in self.plan.pools:
            stop = start + pool.replicas
            parts = tuple(self.rows[start:stop]), tuple(self.results[start:stop])
            found.append(PoolResult(pool, self.plan.requests, *parts))
            start = stop
        return found

    def column(self, name: str) -> NDArray[Any]:
        """[n] one per-request array of the engine results, whichever replica they were on."""
        return joined(len(self.plan.requests), name, self.rows, self.results)

    @property
    def moved(self) -> NDArray[np.bool_]:
        """[n] whose KV cache was sent."""
        return np.asarray(~np.isnan(self.record.sent_s) & (self.plan.bytes > 0))

    @property
    def replica(self) -> Ints:
        """[n] replica of each request, counted over all stages; −1: nobody."""
        sent = ~np.isnan(self.record.sent_s)
        return np.where(sent, self.record.given + self.plan.first, -1)


def served(
    fleet: Fleet, requests: Requests, found: Sequence[StageResult], refused_s: Floats, links: Floats, itl: Ints | None
) -> Served:
    """The whole path from its stages. ``refused_s``: [n] when each was rejected before the first one; NaN: it was not."""
    first, last = found[0], found[-1]
    n = len(requests)
    sent = ~np.isnan(first.record.sent_s)
    arrival = np.where(sent, first.record.sent_s, np.nan)
    status, finish = first.column("status").copy(), first.column("finish_s").copy()
    first_token, replica = first.column("first_token_s").copy(), first.replica
    prefilled, transfer = first.replica, np.zeros(n)
    bridge = None
    if fleet.disaggregated:
        ended = status == FINISHED
        onward = ended & goes_on(fleet, requests)
        there = last.column("status")
        # Who is on the link is not lost: it waits for the next replica.
        status[onward] = np.where(there[onward] == NOT_ARRIVED, WAITING, there[onward])
        finish[onward] = last.column("finish_s")[onward]
        replica = np.where(onward, last.replica, replica)
        transfer[onward] = (last.record.arrive_s - last.record.sent_s)[onward]
        if fleet.first_token == "decode":  # noqa: S105 - a token of text
            first_token[onward] = last.column("first_token_s")[onward]
        else:
            bridge = np.where(onward, last.column("first_token_s") - first_token, np.nan)
    refused = ~np.isnan(refused_s)
    arrival[refused] = refused_s[refused]
    status[refused] = REJECTED
    linked = {name: stage for name, stage in zip(("store", "link"), found, strict=False) if stage.plan.link is not None}
    return Served(
        fleet=fleet,
        requests=requests,
        pools=tuple(pool for stage in found for pool in stage.pools()),
        replica=replica,
        prefill_replica=prefilled,
        status=status,
        arrival_s=arrival,
        scheduled_s=first.column("scheduled_s"),
        first_token_s=first_token,
        finish_s=finish,
        store_s=np.where(sent, first.record.arrive_s - first.record.sent_s, 0.0),
        transfer_s=transfer,
        links={name: links[stage.plan.link0 : stage.plan.link0 + stage.plan.n_links] for name, stage in linked.items()},
        moved={name: stage.moved for name, stage in linked.items()},
        waited_s={name: stage.record.waited_s for name, stage in linked.items()},
        moved_bytes={
            name: float(stage.plan.bytes[stage.moved].sum()) * (2 if stage.plan.held_twice else 1)
            for name, stage in linked.items()
        },
        itl_counts=itl,
        bridge_s=bridge,
    )
