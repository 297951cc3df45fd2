"""What is asked of a plan, checked, and how fleets are ranked for it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simulator.catalog.architecture import Architecture
from simulator.catalog.chips import load_chip
from simulator.catalog.models import load_model
from simulator.errors import InputError
from simulator.planning.choices import Choice, parts_of
from simulator.planning.fleet import planned_fleet, pool, price_of
from simulator.planning.loads import Loads
from simulator.planning.options import PlanOptions
from simulator.planning.search import ChipSearch, with_spares
from simulator.planning.space import check_precisions
from simulator.results.plan import PlannedFleet, Provisioning, Target, Targets
from simulator.run.options import SloOptions
from simulator.run.scenario import Scenario
from simulator.traffic import TrafficSpec


def targets_of(slo: SloOptions) -> Targets:
    """What a scenario's ``[slo]`` asks: ``percentile`` percent of the requests keep all its limits."""
    limits = tuple(Target(metric=name, limit_s=limit) for name, limit in slo.limits.items())
    return Targets(limits=limits, joint_fraction=slo.percentile / 100 if limits else None)


@dataclass(frozen=True)
class Question:
    """A validated question; what depends on it alone is a method."""

    architecture: Architecture
    targets: Targets
    provisioning: Provisioning
    chips: tuple[str, ...]
    options: PlanOptions
    template: Scenario
    loads: Loads
    explain: bool = True
    """Whether to simulate how far a chip is from targets that it cannot keep, or only to bound it."""

    @classmethod
    def ask(
        cls,
        model: Architecture | str,
        traffic: TrafficSpec,
        targets: Targets,
        qps: float,
        chips: Sequence[str],
        *,
        options: PlanOptions | None,
        template: Scenario | None,
    ) -> "Question":
        """Check what is asked.

        Raises
        ------
        InputError
            As :func:`~simulator.planning.planner.plan`.
        """
        options = options or PlanOptions()
        if not 0 < qps < math.inf:
            raise InputError(f"qps = {qps}: must be positive and finite")
        if not chips:
            raise InputError("chips: name at least one")
        for chip in chips:
            load_chip(chip)
        check_precisions(options)
        for spec in options.slices:
            if spec.rpartition(":")[0] not in chips:
                raise InputError(f"slice {spec}: its chip is not among those asked for, {', '.join(chips)}")
        architecture = load_model(model) if isinstance(model, str) else model
        name = model if isinstance(model, str) else architecture.name
        if template is None:
            template = Scenario(schema_version=1, name="plan", model=name, slice=f"{chips[0]}:1", traffic=traffic)
        template = template.model_copy(update={"model": name, "traffic": traffic, "replicas": 1})
        if template.clients.may_leave:
            raise InputError(
                f"{template.name}: a plan is made for clients who wait; leave the timeouts of [clients] out"
            )
        return cls(
            architecture=architecture,
            targets=targets,
            provisioning=Provisioning(
                qps=qps,
                peak_to_mean=options.peak_to_mean,
                headroom_fraction=options.headroom,
                spare_replicas=options.spare_replicas,
                failed_fraction=options.failed_fraction,
            ),
            chips=tuple(dict.fromkeys(chips)),
            options=options,
            template=template,
            loads=Loads(template, options.seed, options.requests),
        )

    def searcher(self, chip: str) -> ChipSearch:
        """The search of one chip."""
        return ChipSearch(self.architecture, chip, self.template, self.options, self.loads, self.provisioning)

    def fleet(self, choice: Choice, *, needed: Sequence[int] | None = None) -> PlannedFleet:
        """A choice as a fleet, with other numbers of needed replicas than it has itself if given."""
        parts = parts_of(choice)
        counts = needed or [found.needed for _, found, _ in parts]
        pools = [
            pool(found, role, needed=n, replicas=with_spares(self.provisioning, n), share=share)
            for (role, found, share), n in zip(parts, counts, strict=True)
        ]
        prices = [
            price_of(f.resolved.slice.chip, f.place.slice.rpartition(":")[0], self.template, self.options)
            for _, f, _ in parts
        ]
        return planned_fleet(pools, self.provisioning, prices)

    def order(self, fleet: PlannedFleet | None) -> tuple[bool, bool, float, int]:
        """Ranks fleets: those with a price first where cost decides, chips among the others."""
        if fleet is None:
            return True, True, 0.0, 0
        cost = fleet.usd_per_hour if self.options.rank_by == "cost" else None
        return False, cost is None and self.options.rank_by == "cost", cost or 0.0, fleet.chips

    def ranked(self, fleets: Iterable[Choice]) -> list[Choice]:
        """Fleets that may win, best first: by cost, only those with a price."""
        found = [(self.order(self.fleet(f)), f) for f in fleets]
        kept = [item for item in found if not item[0][1]]
        kept.sort(key=lambda item: (item[0], item[1].rank[1:]))
        return [f for _, f in kept]
