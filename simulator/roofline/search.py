"""Every legal way to lay a model on a slice, priced and ranked: ``--shard auto``."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from simulator.catalog.architecture import Architecture, MoEFFN
from simulator.catalog.slices import Slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.pipeline import ShardedDeployment, ShardedReport, shard, sharded_report
from simulator.roofline.sharding import Sharding

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Tried:
    """One sharding: its report, or why it has none."""

    sharding: Sharding
    report: ShardedReport | None = None
    reason: str = ""


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
            reasons = "; ".join(f"{t.sharding}: {t.reason}" for t in self.tried)
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
    fewer stages, then fewer replicas.

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
    tried = []
    moe = any(isinstance(group.ffn, MoEFFN) for group in architecture.layers)
    for sharding in shardings(slice_.n_chips, experts=moe, prompts=prefill is not None):
        try:
            d = shard(architecture, slice_, sharding, **settings)
        except InputError as error:
            tried.append(Tried(sharding, reason=str(error)))
            continue
        batch = largest_batch(d, context or 1) if fill else decode
        reason = _too_small(d, prefill, batch, context)
        if reason:
            tried.append(Tried(sharding, reason=reason))
        else:
            tried.append(Tried(sharding, sharded_report(d, prefill=prefill, decode=batch, context=context)))
    return Search(objective, tuple(sorted(tried, key=lambda t: _rank(t, objective))))


def largest_batch(d: ShardedDeployment, context: int) -> int:
    """Sequences of ``context`` tokens that fit on the slice, at least one per replica and at most ``max_num_seqs``."""
    per_sequence = -(-context // d.memory.block_size)
    return d.sharding.dp * max(1, min(d.memory.kv_blocks // per_sequence, d.stages[0].max_num_seqs))


def _too_small(d: ShardedDeployment, prefill: int | None, decode: int | None, context: int | None) -> str:
    """Why the asked sequences do not fit in memory; empty if they do."""
    fit = d.memory
    if not fit.fits:
        taken = (fit.weights_bytes + fit.activations_bytes + fit.workspace_bytes) / 1e9
        return f"needs {taken:.1f} GB per chip before any KV cache, has {fit.usable_bytes / 1e9:.1f} GB"
    sequences = -(-decode // d.sharding.dp) if decode else 1
    blocks = sequences * -(-(context or prefill or 1) // fit.block_size)
    if blocks > fit.kv_blocks * d.sharding.cp:
        needed = blocks * fit.block_size
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
