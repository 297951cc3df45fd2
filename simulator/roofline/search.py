"""Every legal way to lay a model on a slice, priced and ranked: ``--shard auto``.

On a torus each tensor-parallel group is tried in every layout of its weights (:mod:`simulator.roofline.layouts`), the axes of
each chosen for the step's tokens by the exchanges of a feed-forward layer; and where a decode would copy KV heads, with
attention spread over sequences too.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from simulator.catalog.architecture import Architecture, DenseFFN, MoEFFN, SoftmaxAttention
from simulator.catalog.slices import Slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.layouts import FeedForward, best_axes
from simulator.roofline.pipeline import ShardedDeployment, ShardedReport, Shardings, sharded_report
from simulator.roofline.sharding import Sharding, link_domains

Objective = Literal["latency", "throughput"]
USUAL_LAYOUT = {"layout": "1d", "kv_layout": "heads"}


@dataclass(frozen=True)
class Tried:
    """One sharding in one layout: its report, or why it has none."""

    sharding: Sharding
    report: ShardedReport | None = None
    reason: str = ""
    layout: str = "1d"
    kv_layout: str = "heads"

    @property
    def name(self) -> str:
        """In words: the sharding, and what is unusual about its layout.

        >>> Tried(Sharding(tp=64), layout="2d-x", kv_layout="batch").name
        'tp64 2d-x, attention over sequences'
        """
        words = str(self.sharding) + (f" {self.layout}" if self.layout != "1d" else "")
        return words + (", attention over sequences" if self.kv_layout == "batch" else "")


@dataclass(frozen=True)
class Search:
    """What was tried, best first, the ones that cannot be at the end."""

    objective: Objective
    tried: tuple[Tried, ...]

    @property
    def best(self) -> ShardedReport:
        """The winner.

        Raises
        ------
        InfeasibleError
            If there is none; the message has every reason.
        """
        report = self.tried[0].report
        if report is None:
            reasons = "; ".join(f"{t.name}: {t.reason}" for t in self.tried)
            raise InfeasibleError(f"no sharding does it: {reasons}")
        return report


def shardings(chips: int, *, experts: bool = False, prompts: bool = False) -> list[Sharding]:
    """Every split of the chips over tensor parallelism, pipeline stages and replicas.

    With ``experts``, each also with whole experts spread over the chips of a stage, its replicas being attention ranks.
    With ``prompts``, also over context parallelism without stages.

    >>> [str(s) for s in shardings(4)]
    ['tp4', 'tp2pp2', 'tp2dp2', 'pp4', 'pp2dp2', 'dp4']
    """
    found = [
        Sharding(tp=tp, pp=pp, dp=dp, ep=ep)
        for tp in _divisors(chips)
        for pp in _divisors(chips // tp)
        for dp in [chips // tp // pp]
        for ep in ([1, tp * dp] if experts and tp * dp > 1 else [1])
    ]
    if prompts:
        found += [
            Sharding(tp=tp, cp=cp, dp=chips // tp // cp)
            for tp in _divisors(chips)
            for cp in _divisors(chips // tp)
            if cp > 1
        ]
    return found


def search(
    architecture: Architecture,
    slice_: Slice,
    *,
    objective: Objective = "latency",
    prefill: int | None = None,
    decode: int | None = None,
    context: int | None = None,
    **settings: Any,
) -> Search:
    """Price a prefill, or a decode of ``decode`` sequences over the whole slice, under every sharding.

    A sharding counts if it is legal, its weights fit, and the cache of the asked sequences fits beside them. ``latency``
    ranks by the time of the prompt or per output token; ``throughput`` by tokens per second and chip, all replicas and
    stages kept busy. A fixed batch ranks both ways alike; ``throughput`` with neither ``prefill`` nor ``decode`` gives
    each sharding the largest decode batch at ``context`` that its memory and ``max_num_seqs`` per replica allow. Ties go to
    fewer stages, then fewer replicas. ``settings`` that say ``layout`` or ``kv_layout`` leave no choice of them.

    Raises
    ------
    InputError
        If the question itself is malformed.
    """
    if objective not in get_args(Objective):
        raise InputError(f"objective = {objective!r}: must be one of {', '.join(get_args(Objective))}")
    fill = prefill is None and decode is None
    if fill and (objective != "throughput" or context is None):
        raise InputError("give prefill (tokens) or decode (batch); only throughput at a context finds its own batch")
    tried, laid = [], Shardings(architecture, slice_, **settings)
    moe = any(isinstance(group.ffn, MoEFFN) for group in architecture.layers)
    for sharding in shardings(slice_.n_chips, experts=moe, prompts=prefill is not None):
        tokens = prefill or -(-(decode or settings.get("max_num_seqs", 256)) // (sharding.dp * sharding.pp))
        for how in layouts(architecture, slice_, sharding, tokens, settings, decodes=prefill is None):
            label = {name: how.get(name, settings.get(name, usual)) for name, usual in USUAL_LAYOUT.items()}
            try:
                d = laid.shard(sharding, **how)
            except InputError as error:
                tried.append(Tried(sharding, reason=str(error), **label))
                continue
            batch = largest_batch(d, context or 1) if fill else decode
            reason = _too_small(d, prefill, batch, context)
            found = None if reason else sharded_report(d, prefill=prefill, decode=batch, context=context)
            tried.append(Tried(sharding, found, reason, **label))
            if not d.memory.fits:  # layouts differ in where weights are, not in how much of them a chip holds
                break
    return Search(objective, tuple(sorted(tried, key=lambda t: _rank(t, objective))))


def layouts(
    architecture: Architecture,
    slice_: Slice,
    sharding: Sharding,
    tokens: int,
    settings: dict[str, Any],
    *,
    decodes: bool,
) -> list[dict[str, str]]:
    """Settings of every layout worth trying: on a torus one of each kind, with either place for the keys of a decode."""
    found: list[dict[str, str]] = [{}]
    if sharding.tp == 1 or sharding.cp > 1 or slice_.domains[0].kind != "torus":
        return found
    dense = [g.ffn for g in architecture.layers if isinstance(g.ffn, DenseFFN)]
    softmax = [g.mixer for g in architecture.layers if isinstance(g.mixer, SoftmaxAttention)]
    if not dense or min(len(dense), len(softmax)) < len(architecture.layers):
        return found
    if "layout" not in settings:
        try:
            inner = link_domains(slice_, sharding).tp
        except InputError:  # no such groups: the sharding is refused with this reason
            return found
        widest = max(dense, key=lambda ffn: ffn.d_ff)
        widths = FeedForward(architecture.d_model, widest.d_ff, matrices=3 if widest.gated else 2)
        for kind in ("2d", "gathered") if len(inner) == 1 else ():
            try:
                axes = best_axes(inner[0], kind, widths, tokens=tokens)
            except InputError:  # a line of chips has no second dimension
                continue
            found.append({"layout": f"{kind}-{axes}"})
    copies = any(a.n_kv_heads < sharding.tp for a in softmax)
    if "kv_layout" not in settings and decodes and copies:
        stationary = [how for how in found if not (settings | how).get("layout", "1d").startswith("gathered")]
        found += [how | {"kv_layout": "batch"} for how in stationary]
    return found


def largest_batch(d: ShardedDeployment, context: int) -> int:
    """Sequences of ``context`` tokens that fit on the slice, at least one per replica and at most ``max_num_seqs``."""
    per_sequence = int(d.memory.groups.blocks_in_step(context, d.memory.block_size))
    return d.sharding.dp * max(1, min(d.memory.kv_blocks // per_sequence, d.whole.max_num_seqs))


def _too_small(d: ShardedDeployment, prefill: int | None, decode: int | None, context: int | None) -> str:
    """Why the asked sequences do not fit in memory; empty if they do."""
    fit = d.memory
    if not fit.fits:
        taken = (fit.weights_bytes + fit.activations_bytes + fit.workspace_bytes) / 1e9
        return f"needs {taken:.1f} GB per chip before any KV cache, has {fit.usable_bytes / 1e9:.1f} GB"
    sequences = -(-decode // d.sharding.dp) if decode else 1
    blocks = sequences * int(fit.groups.blocks_in_step(context or prefill or 1, fit.block_size))
    if blocks > fit.kv_blocks * d.sharding.cp:
        needed = blocks // fit.groups.count * fit.block_size
        return f"the KV cache of a replica holds {d.replica_kv_tokens:,} tokens, {needed:,} are needed"
    return ""


def _rank(tried: Tried, objective: Objective) -> tuple[float, float, int, int]:
    r, s = tried.report, tried.sharding
    if r is None:
        return float("inf"), 0.0, s.pp, s.dp
    value = r.time_s if objective == "latency" else -r.tokens_per_s_per_chip
    other = -r.tokens_per_s_per_chip if objective == "latency" else r.time_s
    return value, other, s.pp, s.dp


def _divisors(n: int) -> list[int]:
    """Largest first."""
    return [k for k in range(n, 0, -1) if n % k == 0]
