"""The deployments a plan chooses from: slices, shardings, layouts, precisions and batch limits of one chip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from simulator.catalog.architecture import Architecture, MoEFFN
from simulator.catalog.chips import DomainScaleUp, load_chip
from simulator.catalog.slices import Slice, legal_slices, resolve_slice
from simulator.errors import InputError
from simulator.planning.options import PlanOptions
from simulator.roofline.precision import parse_precision
from simulator.roofline.search import layouts, shardings
from simulator.roofline.sharding import Sharding
from simulator.run.scenario import Scenario


@dataclass(frozen=True)
class Place:
    """Where and how the model lies: everything about a deployment but its batch limits."""

    slice: str
    sharding: Sharding
    precision: str
    layout: str = "1d"

    def scenario(self, template: Scenario, *, max_num_seqs: int, max_num_batched_tokens: int) -> Scenario:
        """A scenario of one replica here; what a plan does not vary is the template's."""
        s = self.sharding
        sharding = template.sharding.model_copy(
            update={"tp": s.tp, "pp": s.pp, "dp": s.dp, "ep": s.ep, "layout": self.layout}
        )
        engine = template.engine.model_copy(
            update={"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        )
        # A chip without a price under the term asked for can still be counted.
        prices = template.prices.model_copy(update={"usd_per_chip_hour": None, "term": None, "provider": None})
        changes = {
            "slice": self.slice,
            "precision": self.precision,
            "sharding": sharding,
            "engine": engine,
            "prices": prices,
            "replicas": 1,
        }
        return template.model_copy(update=changes)


def slices_of(chip: str, options: PlanOptions) -> list[Slice]:
    """Slices of a chip, smallest first: those of one scale-up domain, and powers of two of full domains.

    Raises
    ------
    InputError
        If a slice asked for does not exist.
    """
    if options.slices:
        asked = [resolve_slice(spec) for spec in options.slices]
        return [s for s in asked if s.spec.rpartition(":")[0] == chip]
    specs = legal_slices(chip)
    found = [s for s in map(resolve_slice, specs) if s.n_chips <= options.max_chips]
    spec = load_chip(chip)
    if spec.scale_out is not None and isinstance(spec.scale_up, DomainScaleUp) and found:
        most = max(spec.scale_up.sizes)
        nodes = 2
        while nodes * most <= options.max_chips:
            found.append(resolve_slice(f"{chip}:{nodes}x{most}"))
            nodes *= 2
    return found


def places(architecture: Architecture, chip: str, template: Scenario, options: PlanOptions) -> Iterator[Place]:
    """Every place on slices of a chip that the engines can run; whether it is legal and fits shows when it is resolved.

    On a torus, two-dimensional and gathered layouts are among them, without pipeline stages.
    """
    experts = any(isinstance(group.ffn, MoEFFN) for group in architecture.layers)
    precisions = options.precisions or (template.precision,)
    for a_slice in slices_of(chip, options):
        for sharding in shardings(a_slice.n_chips, experts=experts):
            if not _wanted(sharding, options):
                continue
            own = template.sharding.layout
            settings = {} if own == "1d" and sharding.pp == 1 else {"layout": own}
            tokens = template.engine.max_num_batched_tokens
            try:
                laid = layouts(architecture, a_slice, sharding, tokens, settings, decodes=False)
            except InputError:
                laid = [{}]
            for how in laid:
                layout = how.get("layout", own)
                yield from (Place(a_slice.spec, sharding, precision, layout) for precision in precisions)


def _wanted(s: Sharding, options: PlanOptions) -> bool:
    """Whether a sharding is of a kind asked for, and no mere copies: those are replicas on smaller slices."""
    if s.dp > 1 and s.ep == 1:
        return False
    if s.ep > 1:
        return "ep" in options.shardings and s.pp == 1
    if s.pp > 1:
        return "pp" in options.shardings and s.pp <= options.max_stages
    return "tp" in options.shardings


def limits(template: Scenario, options: PlanOptions) -> list[tuple[int, int]]:
    """Pairs of ``max_num_seqs`` and ``max_num_batched_tokens`` to try, the largest first.

    Raises
    ------
    InputError
        If no budget covers a batch.
    """
    engine = template.engine
    seqs = sorted({*options.batch_limits, engine.max_num_seqs}, reverse=True)
    budgets = sorted({*options.token_budgets, engine.max_num_batched_tokens}, reverse=True)
    found = [(b, t) for b in seqs for t in budgets if b <= t]
    if not found:
        raise InputError(f"plan: no token budget of {budgets} covers a batch limit of {seqs}")
    return found


def reachable(pairs: list[tuple[int, int]], sequences: float) -> list[tuple[int, int]]:
    """Of some limits those that a KV cache of ``sequences`` mean requests comes near: the first batch beyond twice that is the last.

    >>> reachable([(64, 512), (32, 512), (16, 512), (8, 512)], 3.5)
    [(8, 512)]
    """
    enough = [b for b, _ in pairs if b >= 2 * sequences]
    most = min(enough, default=math.inf)
    return [(b, t) for b, t in pairs if b <= most]


def check_precisions(options: PlanOptions) -> None:
    """Refuse unknown precisions before anything is searched.

    Raises
    ------
    InputError
        With the nearest names.
    """
    for text in options.precisions:
        parse_precision(text)
