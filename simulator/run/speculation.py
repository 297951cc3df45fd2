"""``[engine.speculation]`` of a scenario: who drafts, how much is accepted, and the tables the engines need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from simulator.catalog.architecture import Architecture, MoEFFN
from simulator.catalog.models import load_model
from simulator.catalog.records import Record
from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.engine.records import Requests, Speculation
from simulator.errors import InfeasibleError, InputError
from simulator.randomness import draw
from simulator.results.summary import Assumption
from simulator.roofline.acceptance import (
    BETA_CLASSES,
    beta_parameters,
    survival_of_curve,
    survival_of_lengths,
    survival_of_rate,
)
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit, require_fit
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharding import one_chip
from simulator.roofline.speculation import (
    Drafter,
    SpeculationCost,
    Tree,
    best_levels,
    chain_levels,
    compile_speculation,
    layer_drafter,
    memory_with_drafter,
    model_drafter,
)
from simulator.roofline.step_cost import StepCost

LOOKUP_S = 2e-5
"""Host time to look up one sequence's n-gram. Assumed."""

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SpeculationOptions(Record):
    """``[engine.speculation]``; the first names are vLLM's."""

    method: Literal["draft_model", "eagle", "mtp", "medusa", "ngram"]
    num_speculative_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    """Drafts per pass; the depth of the tree, if there is one."""
    model: str | None = None
    """Draft model, for ``draft_model``."""
    precision: str | None = None
    """Of the draft model; None: the target's."""
    slice: str | None = None
    """Slice of the draft model, of attention ranks one for each; None: the target's own."""
    draft_tensor_parallel_size: PositiveInt | None = None
    """Chips of the target's slice, or of an attention rank, that the draft model is spread over: 1, or all of them (None)."""
    tree: tuple[PositiveInt, ...] = ()
    """Draft nodes at each depth; empty: a chain."""
    acceptance_rate: Share | None = None
    """Probability that a draft is accepted if all before it were."""
    acceptance_spread: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """Standard deviation of the rate between requests, which is then Beta-distributed."""
    acceptance_curve: tuple[Share, ...] = ()
    """That probability at each draft position."""
    acceptance_lengths: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Counts of passes with 0, 1, 2 … accepted drafts."""
    adaptive: bool = False
    """Draft as many tokens as pay at the batch at hand, by the roofline at ``typical_context``."""
    typical_context: PositiveInt = 2048
    drafts_by_batch: tuple[tuple[PositiveInt, Annotated[int, Field(ge=0)]], ...] = ()
    """(batch, drafts) pairs: from that batch on, draft so many."""
    host_step_s: Seconds = 0.0
    """Host time per drafting step. [s]"""
    host_sequence_s: Seconds | None = None
    """Host time per sequence and drafting step; None: 20 µs for ``ngram``, else 0. [s]"""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        return {name: _as_tuple(value) for name, value in data.items()} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fits_together(self) -> "SpeculationOptions":
        given = [self.acceptance_rate is not None, bool(self.acceptance_curve), bool(self.acceptance_lengths)]
        if sum(given) != 1:
            raise ValueError("give exactly one of acceptance_rate, acceptance_curve and acceptance_lengths")
        if self.acceptance_spread is not None and self.acceptance_rate is None:
            raise ValueError("acceptance_spread goes with acceptance_rate")
        if (self.num_speculative_tokens is None) == (not self.tree):
            raise ValueError("give exactly one of num_speculative_tokens and tree")
        if (self.method == "draft_model") != (self.model is not None):
            raise ValueError('model goes with method = "draft_model", and only with it')
        if self.model is None and (self.precision or self.slice or self.draft_tensor_parallel_size):
            raise ValueError("precision, slice and draft_tensor_parallel_size are those of a draft model")
        if self.slice and self.draft_tensor_parallel_size:
            raise ValueError(
                "draft_tensor_parallel_size goes with the target's slice; a slice of its own is used whole"
            )
        if self.tree and self.method in {"draft_model", "ngram"}:
            raise ValueError(f"method = {self.method!r} drafts chains, not trees")
        if self.adaptive and self.drafts_by_batch:
            raise ValueError("give one of adaptive and drafts_by_batch")
        batches = [batch for batch, _ in self.drafts_by_batch]
        if sorted(set(batches)) != batches:
            raise ValueError(f"drafts_by_batch: batches {batches} must ascend")
        return self

    @property
    def depth(self) -> int:
        """Draft tokens on one path."""
        return len(self.tree) or self.num_speculative_tokens or 0

    @property
    def levels(self) -> list[Tree]:
        """Trees of the levels: 0 … γ drafts of a chain; a tree whole or not at all."""
        return [(), self.tree] if self.tree else chain_levels(self.depth)

    @property
    def decode_tokens(self) -> int:
        """Tokens of a sequence in its largest pass."""
        return 1 + sum(self.levels[-1])


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class ResolvedSpeculation:
    """What a scenario's speculation comes to.

    Attributes
    ----------
    fit
        memory of target and drafter together.
    plan
        for the engines.
    other_chips, other_peak_flops_per_s, other_bandwidth_bytes_per_s
        of the drafter's own slice, or of one for each attention rank, whose time is the replica's too; 0 without one.
    """

    options: SpeculationOptions
    fit: MemoryFit
    plan: Speculation
    other_chips: int = 0
    other_peak_flops_per_s: float = 0.0
    other_bandwidth_bytes_per_s: float = 0.0

    @property
    def class_weights(self) -> NDArray[np.float64]:
        """Share of the requests in each class of acceptance."""
        return _class_weights(self.options, len(self.plan.survival))

    def with_other_slice(self, cost: StepCost) -> StepCost:
        """The target's table, with the chips of the drafter's own slice counted among the replica's."""
        return replace(
            cost,
            chips=cost.chips + self.other_chips,
            peak_flops_per_s=cost.peak_flops_per_s + self.other_peak_flops_per_s,
            hbm_bandwidth_bytes_per_s=cost.hbm_bandwidth_bytes_per_s + self.other_bandwidth_bytes_per_s,
        )


def drafter_of(options: SpeculationOptions, target: Deployment) -> Drafter:
    """The drafter that a scenario names.

    Raises
    ------
    InputError
        If the model has no prediction modules to draft with, or names and sizes contradict each other.
    UnpriceableError
        If the draft model cannot be priced.
    """
    sequence_s = options.host_sequence_s
    if sequence_s is None:
        sequence_s = LOOKUP_S if options.method == "ngram" else 0.0
    host: dict[str, Any] = {"step_s": options.host_step_s, "sequence_s": sequence_s}
    name, modules = target.architecture.name, target.architecture.mtp_layers
    if options.method == "mtp":
        if not modules:
            raise InputError(f'engine.speculation.method = "mtp": {name} has no multi-token-prediction modules')
        return layer_drafter(target, modules=modules, **host)
    if options.method == "eagle":
        return layer_drafter(target, **host)
    if options.method == "medusa":
        return Drafter("heads", **host)
    if options.method == "ngram":
        return Drafter("lookup", **host)
    architecture = load_model(options.model or "")
    place = resolve_slice(options.slice) if options.slice else target.slice
    alone = options.draft_tensor_parallel_size == 1
    if options.draft_tensor_parallel_size not in {None, 1, target.chips}:
        of_rank = " of an attention rank" if target.expert_ranks > 1 else ""
        raise InputError(
            f"engine.speculation.draft_tensor_parallel_size = {options.draft_tensor_parallel_size}: a draft model lies on one chip, or on "
            f"all {target.chips}{of_rank}"
        )
    draft = replace(
        target,
        architecture=architecture,
        slice=one_chip(place) if alone else place,
        tp=None,
        precision=parse_precision(options.precision) if options.precision else target.precision,
        decode_tokens=1,
        expert_domains=() if options.slice or alone else _experts_alike(target, architecture),
    )
    if options.slice:
        require_fit(draft)
    return model_drafter(draft, same_slice=options.slice is None, **host)


def _experts_alike(target: Deployment, draft: Architecture) -> tuple[LinkDomain, ...]:
    """The chips over which a draft model's experts are spread: the target's, if they can be."""
    counts = [group.ffn.n_experts for group in draft.layers if isinstance(group.ffn, MoEFFN)]
    return target.expert_domains if counts and not any(n % target.expert_chips for n in counts) else ()


def resolve_speculation(
    options: SpeculationOptions, target: Deployment, cost: StepCost, *, check_memory: bool = True
) -> ResolvedSpeculation:
    """Compile a scenario's speculation; ``target`` and ``cost`` must be of ``options.decode_tokens``. Of attention ranks ``target`` is one, and ``cost`` of all.

    Raises
    ------
    InputError, UnpriceableError
        As :func:`drafter_of`, or if acceptance and draft length contradict each other.
    InfeasibleError
        If the drafter does not fit beside the target, unless memory is not checked.
    """
    drafter = drafter_of(options, target)
    fit = memory_with_drafter(target, drafter, options.depth)
    if check_memory and not fit.fits:
        more = fit.weights_bytes - memory_fit(target).weights_bytes
        raise InfeasibleError(
            f"{target.architecture.name} fits on {target.slice.spec}, but not with its drafter ({options.method}), which takes "
            f"{more / 1e9:.2f} GB of weights more on each chip; use a larger slice, or give the drafter a slice of its own"
        )
    prices = compile_speculation(target, cost, drafter, options.levels)
    survival = survival_table(options)
    other = None if drafter.same_slice else drafter.deployment
    chips = cost.ranks * other.chips if other else 0
    return ResolvedSpeculation(
        options=options,
        fit=fit,
        plan=Speculation(prices, survival, _level_table(options, target, cost, prices, survival)),
        other_chips=chips,
        other_peak_flops_per_s=chips * other.peak_flops_per_s if other else 0.0,
        other_bandwidth_bytes_per_s=chips * other.hbm_bytes_per_s if other else 0.0,
    )


def survival_table(options: SpeculationOptions) -> NDArray[np.float64]:
    """[classes, levels, depth] survival of each class of requests: one, or one per 1/1024 of the rate with a spread."""
    depth = options.depth
    if options.acceptance_curve:
        classes = [survival_of_curve(options.acceptance_curve, depth)]
    elif options.acceptance_lengths:
        classes = [survival_of_lengths(options.acceptance_lengths, depth)]
    elif options.acceptance_spread is None:
        classes = [survival_of_rate(options.acceptance_rate or 0.0, depth)]
    else:
        beta_parameters(options.acceptance_rate or 0.0, options.acceptance_spread)  # refuses impossible spreads
        classes = [survival_of_rate(i / (BETA_CLASSES - 1), depth) for i in range(BETA_CLASSES)]
    lengths = np.array([len(tree) for tree in options.levels])
    reached = np.arange(depth) < lengths[:, None]
    return np.asarray(np.array(classes)[:, None, :] * reached)


def with_acceptance(requests: Requests, options: SpeculationOptions | None, seed: int) -> Requests:
    """The requests with the class of each, drawn by (seed, request) where rates differ between them."""
    if options is None or options.acceptance_spread is None:
        return requests
    a, b = beta_parameters(options.acceptance_rate or 0.0, options.acceptance_spread)
    rates = draw(seed, "speculation/acceptance", 0, len(requests), lambda rng, n: rng.beta(a, b, n))
    return replace(requests, acceptance_class=np.rint(rates * (BETA_CLASSES - 1)).astype(np.int64))


def _level_table(
    options: SpeculationOptions,
    target: Deployment,
    cost: StepCost,
    prices: SpeculationCost,
    survival: NDArray[np.float64],
) -> NDArray[np.int64]:
    seqs, top = target.max_num_seqs, len(options.levels) - 1
    if options.adaptive:
        weights = _class_weights(options, len(survival))
        tokens = 1 + (weights[:, None] * survival.sum(axis=2)).sum(axis=0)
        return best_levels(cost, prices, tokens, max_num_seqs=seqs, context=options.typical_context)
    table = np.full(seqs + 1, top, dtype=np.int64)
    for batch, drafts in options.drafts_by_batch:
        allowed = {0: 0, options.depth: top} if options.tree else {i: i for i in range(top + 1)}
        if drafts not in allowed:
            raise InputError(
                f"engine.speculation.drafts_by_batch: {drafts} drafts from batch {batch}: "
                f"allowed are {', '.join(map(str, allowed))}"
            )
        table[batch:] = allowed[drafts]
    return table


def _class_weights(options: SpeculationOptions, classes: int) -> NDArray[np.float64]:
    """Share of the requests in each class: the Beta density at its rate."""
    if options.acceptance_spread is None:
        return np.ones(classes) / classes
    a, b = beta_parameters(options.acceptance_rate or 0.0, options.acceptance_spread)
    rate = (np.arange(classes) + 0.5) / classes
    log_density = (a - 1) * np.log(rate) + (b - 1) * np.log1p(-rate)
    density = np.exp(log_density - log_density.max())
    return np.asarray(density / density.sum())


def assumptions_of(options: SpeculationOptions) -> Sequence[Assumption]:
    """What a scenario assumes about its drafts."""
    if options.acceptance_curve:
        value = f"curve {list(options.acceptance_curve)}"
    elif options.acceptance_lengths:
        value = f"histogram of accepted drafts {list(options.acceptance_lengths)}"
    else:
        spread = f", ± {options.acceptance_spread:g} between requests" if options.acceptance_spread else ""
        value = f"rate {options.acceptance_rate:g}{spread}"
    found = [Assumption(what="engine.speculation acceptance", value=value, kind="assumed", source="scenario")]
    if options.method == "ngram" and options.host_sequence_s is None:
        found.append(
            Assumption(
                what="engine.speculation.host_sequence_s",
                value=f"{LOOKUP_S:g} s per sequence",
                kind="assumed",
                source="scenario default",
            )
        )
    return found
