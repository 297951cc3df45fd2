"""Prefill and decode pools: each searched by itself under its part of the targets, then joined and simulated as a fleet.

A prompt pool sees every request with one token of output, and its first token is the user's TTFT. A decode pool sees the requests
with more tokens, their prompts cached (rule F7): what a user waits there, and while the KV cache crosses the link, makes the TPOT; with the
median prefill before it, the E2E. The fewest chips of either role make the fewest of both. What this leaves out, queues on links and the
unevenness of what a prefill pool sends, the run of the whole fleet shows.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from simulator.planning.loads import Loads
from simulator.planning.rating import Load
from simulator.planning.search import Found
from simulator.planning.space import Place
from simulator.results.plan import Provisioning, Role, Targets
from simulator.roofline.kv_groups import KvGroups
from simulator.run.fleet_options import LinkOptions, PoolOptions
from simulator.run.fleets import kv_block_bytes
from simulator.run.scenario import Scenario

#: Replicas of a whole fleet simulated at most; larger ones by a smaller fleet that is loaded no less.
MOST_SIMULATED = 12


@dataclass(frozen=True)
class Handover:
    """What a request has behind it when it reaches a decode pool, and how long its KV cache takes to get there.

    Attributes
    ----------
    prefill_s
        median time to first token of the prefill pool. [s]
    latency_s, seconds_per_block
        of the link. [s]
    block_size, kv_groups
        tokens per KV block, and how many blocks they take.
    """

    prefill_s: float
    latency_s: float
    seconds_per_block: float
    block_size: int
    kv_groups: KvGroups = field(default_factory=KvGroups)

    @classmethod
    def of(cls, prefill: Found) -> "Handover":
        """From a prefill pool over its chips' network.

        Raises
        ------
        UnpriceableError
            If the network is not published.
        """
        link = LinkOptions().link(prefill.resolved.slice)
        median = prefill.latency["ttft_s"].p50
        return cls(
            prefill_s=math.inf if median is None else median,
            latency_s=link.latency_s,
            seconds_per_block=kv_block_bytes(prefill.resolved) / link.bandwidth_bytes_per_s,
            block_size=prefill.resolved.settings.block_size,
            kv_groups=prefill.resolved.settings.kv_groups,
        )


#: Nothing before, and no way to go.
NO_WAY = Handover(0.0, 0.0, 0.0, 1)


class RoleLoads(Loads):
    """A traffic as the pools of one role see it. Rates are those of the requests that come there."""

    def __init__(
        self, template: Scenario, seed: int, at_least: int, role: Role, handover: Handover | None = None
    ) -> None:
        self.role = role
        self.handover = handover
        super().__init__(template, seed, at_least)

    def _build(self, n: int) -> Load:
        whole = super()._build(n)
        self._native_per_s = whole.rate_per_s
        requests = whole.requests
        if self.role == "prefill":
            one = np.ones_like(requests.output_tokens)
            return replace(whole, requests=replace(requests, output_tokens=one, max_tokens=one))
        rows = np.flatnonzero(requests.output_tokens > 1)
        some = requests.take(rows)
        later = replace(
            some,
            prompt_tokens=some.prompt_tokens + 1,
            cached_tokens=some.prompt_tokens,
            output_tokens=some.output_tokens - 1,
            max_tokens=some.max_tokens - 1,
        )
        h = self.handover or NO_WAY
        transfer = h.latency_s + h.kv_groups.blocks(some.prompt_tokens, h.block_size) * h.seconds_per_block
        return replace(
            whole,
            requests=later,
            rate_per_s=whole.rate_per_s * len(rows) / len(requests),
            before_s=np.asarray(h.prefill_s + transfer),
            transfer_s=np.asarray(transfer),
        )

    @property
    def share(self) -> float:
        """Requests that come to the role ÷ all."""
        return self._longest.rate_per_s / self._native_per_s


def of_role(targets: Targets, role: Role) -> Targets:
    """The part of some targets that a role decides; a joint share is asked of each limit by itself."""
    mine = ("ttft_s",) if role == "prefill" else ("tpot_s", "e2e_s")
    joint = targets.joint_fraction
    limits = tuple(
        t if t.percentile is not None else t.model_copy(update={"percentile": 100 * (joint or 1)})
        for t in targets.limits
        if t.metric in mine
    )
    return Targets(limits=limits)


def of_share(provisioning: Provisioning, share: float) -> Provisioning:
    """The same for a part of the queries."""
    return provisioning.model_copy(update={"qps": provisioning.qps * share})


@dataclass(frozen=True)
class Split:
    """A prefill and a decode pool that together keep the targets, as far as each can tell by itself."""

    prefill: Found
    decode: Found
    share: float
    """Part of the queries that are decoded at all."""

    @property
    def parts(self) -> tuple[tuple[Role, Found, float], tuple[Role, Found, float]]:
        """Both with their roles, and the share of the queries that come there."""
        return ("prefill", self.prefill, 1.0), ("decode", self.decode, self.share)

    @property
    def place(self) -> tuple[Place, Place]:
        """Where both lie."""
        return self.prefill.place, self.decode.place

    @property
    def chips(self) -> int:
        """Chips of both, spares included."""
        return self.prefill.chips + self.decode.chips

    @property
    def rank(self) -> tuple[int, float, tuple[int, int]]:
        """Fewest chips first, after unified fleets of as many."""
        return self.chips, 0.0, self.decode.order


def small_fleet(needed: tuple[int, int]) -> tuple[int, int]:
    """Replicas of a fleet to simulate in place of one of ``needed``: as near to its ratio as :data:`MOST_SIMULATED` allow.

    >>> small_fleet((3, 5)), small_fleet((300, 500)), small_fleet((1, 90))
    ((3, 5), (3, 5), (1, 11))
    """
    if sum(needed) <= MOST_SIMULATED:
        return needed
    pairs = [(p, d) for p in range(1, MOST_SIMULATED) for d in range(1, MOST_SIMULATED - p + 1)]
    wanted = math.log(needed[0] / needed[1])
    return min(pairs, key=lambda pair: (round(abs(math.log(pair[0] / pair[1]) - wanted), 9), sum(pair)))


def fleet_scenario(template: Scenario, split: Split, replicas: tuple[int, int]) -> Scenario:
    """A scenario of both pools, its traffic still the template's."""
    pools = []
    for (role, found, _), n in zip(split.parts, replicas, strict=True):
        s, engine, place = found.resolved.sharding, found.resolved.settings, found.place
        pools.append(
            PoolOptions(
                name=role,
                role=role,
                replicas=n,
                slice=place.slice,
                precision=place.precision,
                sharding={"tp": s.tp, "pp": s.pp, "dp": s.dp, "ep": s.ep, "layout": place.layout},
                engine={
                    "max_num_seqs": engine.max_num_seqs,
                    "max_num_batched_tokens": engine.max_num_batched_tokens,
                },
            )
        )
    router = template.router.model_copy(update={"policy": "round-robin", "decode": "round-robin"})
    changes = {
        "pool": tuple(pools),
        "link": LinkOptions(),
        "replicas": 1,
        "router": router,
        "slice": split.decode.place.slice,
        "precision": split.decode.place.precision,
    }
    return template.model_copy(update=changes)
