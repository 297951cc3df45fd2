"""The fewest chips of one kind that carry a rate within targets: bounds prune, simulation decides.

Deployments are visited in the order of a lower bound on the chips of their fleet, from :mod:`simulator.planning.bounds`. One is
dropped only if, even alone, its requests could not keep the targets, or if that bound exceeds the best fleet found; so the
answer is that of simulating them all. Nothing here depends on how many threads work: a chip is searched by one of them.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from simulator.catalog.architecture import Architecture
from simulator.errors import ChipsecondsError, InfeasibleError, InputError, UnpriceableError
from simulator.planning.bounds import Floors, fitting, floors
from simulator.planning.loads import Loads
from simulator.planning.options import PlanOptions
from simulator.planning.rating import LATENCIES, LOWEST, Bench, Load, Rated, Sample, requests_needed
from simulator.planning.space import Place, limits, places, reachable
from simulator.results.plan import Percentiles, Provisioning, Targets
from simulator.roofline.memory import memory_fit
from simulator.run.resolve import Resolved, resolve, with_limits
from simulator.run.scenario import Scenario


@dataclass(frozen=True)
class Found:
    """A deployment that keeps targets, and how many replicas of it the peak takes.

    ``order`` is its place in the enumeration, which breaks ties.
    """

    place: Place
    resolved: Resolved
    load: Load
    rated: Rated
    latency: dict[str, Percentiles]
    needed: int
    replicas: int
    order: tuple[int, int]

    @property
    def chips(self) -> int:
        """Chips of the fleet, spares included."""
        return self.replicas * self.resolved.cost.chips

    @property
    def rank(self) -> tuple[int, float, tuple[int, int]]:
        """Fewest chips first; of equals, the one with most room per chip."""
        return self.chips, -self.needed * self.rated.rate_per_s, self.order


def needed_replicas(provisioning: Provisioning, rate_per_s: float) -> int:
    """Replicas that carry the peak, each at ``rate_per_s`` less the headroom."""
    usable = rate_per_s * (1 - provisioning.headroom_fraction)
    return max(1, math.ceil(provisioning.peak_qps / usable * (1 - 1e-12)))


def with_spares(provisioning: Provisioning, needed: int) -> int:
    """Replicas to provision so that ``needed`` are there in spite of failures."""
    surviving = math.ceil(needed / (1 - provisioning.failed_fraction) * (1 - 1e-12))
    return surviving + provisioning.spare_replicas


@dataclass(eq=False)
class Entry:
    """One deployment under consideration. ``order`` is its place in the enumeration."""

    place: Place
    resolved: Resolved
    floors: Floors
    bench: Bench
    order: tuple[int, int]

    @cached_property
    def floor_sample(self) -> Sample:
        """The least latencies of the measured requests, as if they had been simulated."""
        return floor_sample(self.floors, self.bench.load)


@dataclass(eq=False)
class Site:
    """One place with all its batch limits: bounds that hold for each of them, and the deployments when they are asked for.

    ``base`` has the largest limits and the cost tables; its memory has not been looked at.
    """

    place: Place
    base: Resolved
    floors: Floors
    load: Load
    limits: list[tuple[int, int]]
    order: int

    @cached_property
    def floor_sample(self) -> Sample:
        """As :attr:`Entry.floor_sample`, for every deployment here."""
        return floor_sample(self.floors, self.load)


def floor_sample(floors: Floors, load: Load) -> Sample:
    """Least latencies of the measured requests of a load."""
    rows = load.measured
    least = Sample({name: np.where(floors.accepted, getattr(floors, name), np.inf)[rows] for name in LATENCIES})
    return load.seen(least)


@dataclass(frozen=True)
class Answer:
    """Fleets that keep targets, the fewest chips first: the first is the best there is, others may be missing.

    ``pruned_by_latency`` and ``pruned_by_cost`` count deployments that were not simulated.
    """

    found: tuple[Found, ...]
    pruned_by_latency: int
    pruned_by_cost: int


@dataclass
class ChipSearch:
    """All deployments of a model on one chip, and what simulations of them said."""

    architecture: Architecture
    chip: str
    template: Scenario
    options: PlanOptions
    loads: Loads
    provisioning: Provisioning
    considered: int = 0
    illegal: int = 0
    unfit: int = 0
    unpriceable: str = ""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why places cannot be."""
    sites: list[Site] = field(default_factory=list)
    _entries: dict[int, list[Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compile every place once, and bound it."""
        self._limits = limits(self.template, self.options)
        self._mean_tokens = self.loads.mean_tokens
        try:
            found = list(places(self.architecture, self.chip, self.template, self.options))
        except UnpriceableError as error:  # a link or a memory that is not published
            self.unpriceable = str(error)
            return
        for order, place in enumerate(found):
            site = self._site(place, order)
            self.considered += len(self._limits if site is None else site.limits)
            if site is not None:
                self.sites.append(site)

    def _scenario(self, place: Place, limit: tuple[int, int]) -> Scenario:
        return place.scenario(self.template, max_num_seqs=limit[0], max_num_batched_tokens=limit[1])

    def _site(self, place: Place, order: int) -> Site | None:
        seqs, budgets = zip(*self._limits, strict=True)
        scenario = self._scenario(place, (max(seqs), max(budgets)))
        memory = scenario.engine.num_gpu_blocks_override
        if memory is None:  # looked at below, where the limits are known
            scenario = scenario.model_copy(
                update={"engine": scenario.engine.model_copy(update={"num_gpu_blocks_override": 2})}
            )
        try:
            base = resolve(scenario, architecture=self.architecture)
        except UnpriceableError as error:
            self.illegal += len(self._limits)
            self.unpriceable = self.unpriceable or refusal(error)
            return None
        except InputError as error:
            self.illegal += len(self._limits)
            self.reasons[refusal(error)] += 1
            return None
        least = (min(seqs), min(budgets))
        most_blocks = self._blocks(base, least) if memory is None else memory - 1
        settings = replace(base.settings, num_kv_blocks=max(most_blocks, 1))
        load = self.loads.first(self.options.requests)
        fits = fitting(settings, load.requests)
        if most_blocks < 1 or not fits.any():
            self.unfit += len(self._limits)
            what = "the weights leave no KV cache" if most_blocks < 1 else "no request fits into the KV cache"
            self.reasons[f"{what} on {place.slice} in {place.precision}"] += 1
            return None
        bounds = floors(base.engine_cost, settings, load.requests)
        fewest_blocks = self._blocks(base, (max(seqs), max(budgets))) if memory is None else most_blocks
        if not (fits == fitting(replace(settings, num_kv_blocks=max(fewest_blocks, 1)), load.requests)).all():
            bounds = replace(bounds, requests_per_s=math.inf)  # a replica that rejects the long ones may be faster
        held = settings.kv_groups.tokens_held(most_blocks, settings.block_size) / self._mean_tokens
        return Site(place, base, bounds, load, reachable(self._limits, held), order)

    def _blocks(self, base: Resolved, limit: tuple[int, int]) -> int:
        """KV blocks of a replica with some batch limits; 0 or less: it does not fit."""
        if base.speculation is not None:  # the draft model takes memory too: seen when the deployment is resolved
            return 1 << 30
        deployment, sharded = base.lay(
            efficiency=base.deployment.efficiency, max_num_seqs=limit[0], max_num_batched_tokens=limit[1]
        )
        return (memory_fit(deployment) if sharded is None else sharded.memory).kv_blocks

    def entries(self, site: Site) -> list[Entry]:
        """Deployments of a place, made when first asked for."""
        if site.order not in self._entries:
            self._entries[site.order] = list(self._expand(site))
        return self._entries[site.order]

    def _expand(self, site: Site) -> Iterator[Entry]:
        for j, limit in enumerate(site.limits):
            scenario = self._scenario(site.place, limit)
            try:
                if site.base.speculation is None:
                    resolved = with_limits(site.base, scenario)
                else:
                    resolved = resolve(scenario, architecture=self.architecture)
            except InfeasibleError:
                self.unfit += 1
                self.reasons[f"no KV cache is left on {site.place.slice} in {site.place.precision}"] += 1
                continue
            load = self.loads.first(requests_needed(resolved, self.loads.shortest_tokens, self.options.requests))
            bounds = floors(resolved.engine_cost, resolved.settings, load.requests)
            if not bounds.accepted.any():
                self.unfit += 1
                self.reasons[f"no request fits into the KV cache on {site.place.slice} in {site.place.precision}"] += 1
                continue
            yield Entry(site.place, resolved, bounds, Bench(resolved, load), (site.order, j))

    def search(self, targets: Targets, at_most_chips: int | None = None) -> Answer:
        """Best first: a place or deployment is opened in the order of the least chips that a fleet there could take.

        Fleets of more than ``at_most_chips`` are not looked for.
        """
        by_latency = by_cost = 0
        heap: list[tuple[int, tuple[int, int], Site | Entry]] = []
        for site in self.sites:
            if site.floor_sample.holds(targets):
                heapq.heappush(heap, (self._least_chips(site), (site.order, -1), site))
            else:
                by_latency += len(site.limits)
        best = at_most_chips
        found: list[Found] = []
        while heap:
            least_chips, _, node = heapq.heappop(heap)
            if best is not None and least_chips > best:
                by_cost += self._deployments(node)
                continue
            if isinstance(node, Site):
                for entry in self.entries(node):
                    if entry.floor_sample.holds(targets):
                        heapq.heappush(heap, (max(least_chips, self._least_chips(entry)), entry.order, entry))
                    else:
                        by_latency += 1
                continue
            rated = node.bench.rate(targets, at_least_per_s=self._rate_for(node, best))
            if rated is None or not rated.rate_per_s:
                continue
            fleet = self._found(node, rated)
            found.append(fleet)
            best = fleet.chips if best is None else min(best, fleet.chips)
        found.sort(key=lambda fleet: fleet.rank)
        return Answer(tuple(found), by_latency, by_cost)

    def exhaustive(self, targets: Targets) -> list[Found]:
        """The same without bounds: every deployment is simulated. What :meth:`search` is tested against."""
        everything = [entry for site in self.sites for entry in self.entries(site)]
        rated = [(entry, entry.bench.rate(targets)) for entry in everything]
        found = [self._found(entry, r) for entry, r in rated if r is not None and r.rate_per_s]
        return sorted(found, key=lambda fleet: fleet.rank)

    def _deployments(self, node: Site | Entry) -> int:
        if isinstance(node, Entry):
            return 1
        opened = self._entries.get(node.order)
        return len(node.limits) if opened is None else len(opened)

    def _found(self, entry: Entry, rated: Rated) -> Found:
        needed = needed_replicas(self.provisioning, rated.rate_per_s)
        return Found(
            place=entry.place,
            resolved=entry.resolved,
            load=entry.bench.load,
            rated=rated,
            latency=rated.sample.percentiles(),
            needed=needed,
            replicas=with_spares(self.provisioning, needed),
            order=entry.order,
        )

    def _least_chips(self, node: Site | Entry) -> int:
        """Chips of a fleet whose replicas run at the bound of their rate."""
        chips = (node.base if isinstance(node, Site) else node.resolved).cost.chips
        if not math.isfinite(node.floors.requests_per_s):
            return chips
        return with_spares(self.provisioning, needed_replicas(self.provisioning, node.floors.requests_per_s)) * chips

    def _rate_for(self, entry: Entry, best: int | None) -> float:
        """Rate of a replica below which a fleet of them takes more than ``best`` chips; 0 without one. [1/s]"""
        if best is None:
            return 0.0
        replicas = best // entry.resolved.cost.chips
        needed = replicas
        while needed and with_spares(self.provisioning, needed) > replicas:
            needed -= 1
        if not needed:
            return math.inf
        usable = 1 - self.provisioning.headroom_fraction
        return self.provisioning.peak_qps / (needed * usable) * (1 - 1e-9)

    @property
    def opened(self) -> list[Entry]:
        """Deployments that have been made so far, in order."""
        return [entry for order in sorted(self._entries) for entry in self._entries[order]]

    def least_scale(self, targets: Targets, metrics: Sequence[str]) -> float:
        """Smallest factor on the limits of ``metrics`` with which some deployment here keeps the targets when idle."""
        heap: list[tuple[float, tuple[int, int], Site | Entry]] = [
            (site.floor_sample.least_scale(targets, metrics), (site.order, -1), site) for site in self.sites
        ]
        heapq.heapify(heap)
        found = math.inf
        while heap:
            bound, _, node = heapq.heappop(heap)
            if bound >= found:
                break
            if isinstance(node, Site):
                for entry in self.entries(node):
                    heapq.heappush(heap, (entry.floor_sample.least_scale(targets, metrics), entry.order, entry))
            elif node.bench.saturated_per_s:
                found = min(found, node.bench.sample(LOWEST).least_scale(targets, metrics))
        return found

    def floor_scale(self, targets: Targets, metrics: Sequence[str]) -> float:
        """A bound of :meth:`least_scale` without a simulation."""
        return min((site.floor_sample.least_scale(targets, metrics) for site in self.sites), default=math.inf)

    def why_not(self) -> str:
        """The commonest reason why places cannot be, in words."""
        if self.unpriceable:
            return self.unpriceable
        if self.reasons:
            return self.reasons.most_common(1)[0][0]
        return "no legal slice within the chips of a replica allowed"


def refusal(error: ChipsecondsError) -> str:
    """First line of an error."""
    return str(error).splitlines()[0]
