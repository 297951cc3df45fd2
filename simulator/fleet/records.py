"""What a fleet is, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED, NOT_ARRIVED, EngineResult, EngineSettings, Requests
from simulator.errors import InputError, nearest
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Routers that know nothing of the replicas: each replica's requests are a stream of their own.
STATE_FREE = ("round-robin", "random", "hash")
#: Routers that look at replicas.
LOAD_BASED = ("least-requests", "least-kv", "power-of-two", "prefix-affinity")
POLICIES = STATE_FREE + LOAD_BASED

Role = Literal["unified", "prefill", "decode"]


@dataclass(frozen=True)
class Pool:
    """Equal replicas with one role.

    Attributes
    ----------
    cost, settings
        of one replica, as the engine takes them.
    chips
        of one replica.
    kv_block_bytes
        bytes of one KV block on all chips of a replica, copies included; needed where KV caches cross links. [bytes]
    layers
        of the model: the parts in which a link may carry a KV cache while the next one is computed.
    """

    name: str
    role: Role
    cost: StepCost | PipelineCost
    settings: EngineSettings
    replicas: int
    chips: int = 1
    kv_block_bytes: float = 0.0
    layers: int = 1

    def __post_init__(self) -> None:
        """Check the number of replicas."""
        if self.replicas < 1:
            raise InputError(f"pool {self.name}: replicas = {self.replicas}: must be at least 1")

    def kv_bytes(self, tokens: Ints) -> Floats:
        """KV cache of that many tokens, in whole blocks. [bytes]"""
        return np.asarray(self.settings.kv_groups.blocks(tokens, self.settings.block_size) * self.kv_block_bytes)


@dataclass(frozen=True)
class Router:
    """Who chooses a replica (F2 to F5 of ``docs/fleets.md``).

    Attributes
    ----------
    policy
        one of :data:`POLICIES`.
    prefix_tokens
        of ``hash``, where requests have no tenants: those with the same prompt up to here, and to the end of the block that
        follows, go together. [tokens]
    match_fraction
        of ``prefix-affinity``: share of a prompt's blocks that must be known for the request to follow them …
    imbalance, imbalance_ratio
        … unless the largest number of requests exceeds the smallest by more than ``imbalance`` and by more than this factor.
    """

    policy: str = "round-robin"
    prefix_tokens: int = 0
    match_fraction: float = 0.5
    imbalance: int = 32
    imbalance_ratio: float = 1.5

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.policy not in POLICIES:
            raise InputError(f"router.policy = {self.policy!r}{nearest(self.policy, POLICIES)}")
        if not 0 <= self.match_fraction <= 1:
            raise InputError(f"router.match_fraction = {self.match_fraction}: must be 0 … 1")

    @property
    def state_free(self) -> bool:
        """Whether it knows nothing of the replicas."""
        return self.policy in STATE_FREE


@dataclass(frozen=True)
class Link:
    """What carries KV caches, first come, first served (F6).

    Attributes
    ----------
    bandwidth_bytes_per_s
        of each link.
    latency_s
        after a transfer's last byte; it does not occupy the link. [s]
    per
        ``fleet``: one link for everything; ``source``, ``target``: one for each replica that sends, or receives; ``both``: one
        for each of either, and a transfer holds its two ends' links.
    layerwise
        whether a layer is sent while the next ones are computed.
    """

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0
    per: Literal["fleet", "source", "target", "both"] = "fleet"
    layerwise: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.bandwidth_bytes_per_s < np.inf:
            raise InputError(f"link.bandwidth_bytes_per_s = {self.bandwidth_bytes_per_s}: must be positive and finite")
        if not 0 <= self.latency_s < np.inf:
            raise InputError(f"link.latency_s = {self.latency_s}: must be 0 or more, and finite")


@dataclass(frozen=True)
class Fleet:
    """Pools behind a router.

    Attributes
    ----------
    pools
        all ``unified``, or ``prefill`` ones and then ``decode`` ones.
    router
        chooses where a request enters …
    decode_router
        … and where it is decoded.
    link
        from prefill to decode pools.
    store
        from a store that holds the KV cache of every request's cached tokens; None: they are in HBM already.
    first_token
        who gives the first token: the ``prefill`` replica; or the ``decode`` replica, which computes the last prompt token again.
    """

    pools: tuple[Pool, ...]
    router: Router = field(default_factory=Router)
    decode_router: Router = field(default_factory=lambda: Router("least-kv"))
    link: Link | None = None
    store: Link | None = None
    first_token: Literal["prefill", "decode"] = "prefill"  # noqa: S105 - a token of text

    def __post_init__(self) -> None:
        """Check that the pools make a path.

        Raises
        ------
        InputError
            If roles do not fit together, or KV caches could not go from one pool to another.
        """
        roles = {pool.role for pool in self.pools}
        if not roles or ("unified" in roles and len(roles) > 1) or roles in ({"prefill"}, {"decode"}):
            listed = ", ".join(f"{pool.name} ({pool.role})" for pool in self.pools) or "none"
            raise InputError(
                f"pools: {listed}: either all are unified, or there are prefill and decode pools, at least one of each"
            )
        order = [pool.role for pool in self.pools]
        if order != sorted(order, reverse=True):
            raise InputError("pools: state the prefill pools first, then the decode pools")
        if self.disaggregated != (self.link is not None):
            raise InputError("link: needed between prefill and decode pools, and only there")
        if self.store is not None and self.store.per in {"source", "both"}:
            raise InputError(
                f"store.per = {self.store.per!r}: a store has one link, 'fleet', or one to each replica, 'target'"
            )
        if self.store is not None and self.store.layerwise:
            raise InputError("store.layerwise: a store holds whole caches; nothing is computed while they are sent")
        if self.disaggregated and any(pool.kv_block_bytes <= 0 for pool in self.pools):
            raise InputError("pools: kv_block_bytes must be positive where KV caches cross a link")

    @property
    def disaggregated(self) -> bool:
        """Whether prompts are computed and answers decoded in pools of their own."""
        return self.pools[0].role != "unified"

    @property
    def entry(self) -> tuple[Pool, ...]:
        """Pools that requests enter."""
        return tuple(pool for pool in self.pools if pool.role != "decode")

    @property
    def decoders(self) -> tuple[Pool, ...]:
        """Decode pools; none if all are unified."""
        return tuple(pool for pool in self.pools if pool.role == "decode")

    @property
    def chips(self) -> int:
        """Chips of all pools."""
        return sum(pool.replicas * pool.chips for pool in self.pools)


@dataclass(frozen=True)
class Agents:
    """Who sends the next request when an answer has come (F8).

    Attributes
    ----------
    count
        agents at work at a time.
    turns
        [tasks] requests of each task, in stream order: a task's are consecutive rows.
    think_s
        [n] time from the answer before (or the start, for an agent's first) to each request. [s]
    deadline_s
        from a task's first request on; a request that would be sent later is not, nor the rest of its task. inf: none. [s]
    """

    count: int
    turns: Ints
    think_s: Floats
    deadline_s: float = np.inf

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1:
            raise InputError(f"agents.count = {self.count}: must be at least 1")
        if len(self.turns) and int(self.turns.min()) < 1:
            raise InputError("agents.turns: a task has at least one request")
        if int(self.turns.sum()) != len(self.think_s):
            raise InputError(f"agents: tasks have {int(self.turns.sum())} turns, requests are {len(self.think_s)}")


#: What a request that no replica was sent has in the columns of an engine's result, if not 0.
_OF_NOBODY: dict[str, float] = {
    "status": NOT_ARRIVED,
    **dict.fromkeys(("arrival_s", "scheduled_s", "first_token_s", "finish_s", "load_start_s", "load_end_s"), np.nan),
}


def joined(n: int, name: str, rows: Sequence[Ints | slice], results: Sequence[EngineResult]) -> NDArray[Any]:
    """[n] a per-request array of several replicas' results; ``rows`` says whose are whose."""
    parts = [getattr(result, name) for result in results]
    whole = np.full(n, _OF_NOBODY.get(name, 0), dtype=parts[0].dtype)
    for mine, part in zip(rows, parts, strict=True):
        whole[mine] = part
    return whole


@dataclass(frozen=True)
class PoolResult:
    """What one pool did.

    Attributes
    ----------
    requests
        [n] as this pool saw them; those it never got are in state ``not_arrived``.
    rows
        of each replica, which of them it was sent.
    """

    pool: Pool
    requests: Requests
    rows: tuple[Ints, ...]
    replicas: tuple[EngineResult, ...]

    def column(self, name: str) -> NDArray[Any]:
        """[n] one per-request array of the engine results."""
        return joined(len(self.requests), name, self.rows, self.replicas)


@dataclass(frozen=True)
class Served:
    """What a fleet did with a stream of requests; all times are of the whole path. [n] each, NaN where it did not happen.

    Attributes
    ----------
    pools
        in the order of ``fleet.pools``.
    replica, prefill_replica
        who gave the last token, and who computed the prompt; counted over all pools, −1: nobody.
    status, arrival_s, scheduled_s, first_token_s, finish_s
        as in an engine's result.
    store_s, transfer_s
        from a request's arrival until its cached tokens' KV was there, and from the end of its prefill until its KV was at
        the decode replica: waiting, sending, latency. [s]
    links
        by ``store`` and ``link``, where there are any: [links, 4] bytes, seconds sending, seconds that transfers waited, transfers.
    moved, waited_s, moved_bytes
        likewise: [n] which requests had a KV cache sent; [n] how long it waited; Σ of their bytes, once for each link they held.
    itl_counts
        inter-token latencies of the measured stretch of time, if one was asked for.
    bridge_s
        [n] from a first token given by a prefill replica to the second token. [s]
    """

    fleet: Fleet
    requests: Requests
    pools: tuple[PoolResult, ...]
    replica: Ints
    prefill_replica: Ints
    status: NDArray[np.int8]
    arrival_s: Floats
    scheduled_s: Floats
    first_token_s: Floats
    finish_s: Floats
    store_s: Floats
    transfer_s: Floats
    links: dict[str, Floats]
    moved: dict[str, NDArray[np.bool_]]
    waited_s: dict[str, Floats]
    moved_bytes: dict[str, float]
    itl_counts: Ints | None = None
    bridge_s: Floats | None = None

    @property
    def end_s(self) -> float:
        """When the last replica was done. [s]"""
        return max(result.end_s for pool in self.pools for result in pool.replicas)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """[n] whether each request finished."""
        return np.asarray(self.status == FINISHED)

    @property
    def arrived(self) -> NDArray[np.bool_]:
        """[n] whether each request was sent at all."""
        return np.asarray(self.status != NOT_ARRIVED)
