"""A model over a whole slice: pipeline stages, replicas of them, and how long batches take through the stages.

Each stage is part of a :class:`~simulator.roofline.deployment.Deployment` of all the layers on its tensor-parallel chips, so
a stage is priced by the same ops as a whole replica; between stages every chip sends its share of the residual stream.

*Decode.* The sequences of a replica are split into as many micro-batches as there are stages, as engines do that keep
one batch in flight per stage. A round, in which every sequence gets one token, takes the longer of one micro-batch's way
through all the stages and all micro-batches' time in the slowest stage.

*Prefill.* The prompt is cut into chunks that follow each other through the stages; a chunk enters a stage when it has
left the one before and its predecessor has left this one. With m chunks of equal time in pp equal stages that is
(m + pp − 1) chunk times, so (pp − 1)/(m + pp − 1) of each stage's time is a bubble [1]_.

*Context parallelism.* The chips of a group split a prompt, each with about as many query-key pairs, and gather each
layer's keys and values before its attention [2]_; a ring that hides this behind the attention is not credited.

.. [1] Y. Huang et al., "GPipe", NeurIPS 2019 (recalled).
.. [2] H. Liu et al., "Ring Attention", 2023 (recalled); the gather is its simplest form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypedDict

from simulator.catalog.architecture import Architecture, LayerGroup
from simulator.catalog.models import attention_windows
from simulator.catalog.slices import Slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.analysis import StepReport, report
from simulator.roofline.collectives import all_gather_s, send_s
from simulator.roofline.deployment import Deployment, Part, part_of
from simulator.roofline.memory import Memory, MemoryFit
from simulator.roofline.ops import StepShape
from simulator.roofline.sharding import Links, Sharding, check_sharding, link_domains, links_of_one, subdomains
from simulator.roofline.stage_times import StepTimes


class Windows(TypedDict):
    """The window of a model's windowed layers, 0 without any, and whether it is chunked."""

    window: int
    chunked: bool


@dataclass(frozen=True)
class ShardedDeployment:
    """A model on all chips of a slice.

    Attributes
    ----------
    slice, sharding
        the whole slice, and how the model lies on it.
    whole
        the model on the chips of one stage, as if it had all the layers: what a stage is a part of.
    parts
        what the pipeline stages of one replica have of it; equal ones are one object.
    links
        what each degree of parallelism communicates over.
    part_memory, part_times
        what parts hold, and what steps take in them.
    """

    slice: Slice
    sharding: Sharding
    whole: Deployment
    parts: tuple[Part, ...]
    links: Links
    part_memory: Memory
    part_times: StepTimes

    @property
    def architecture(self) -> Architecture:
        """The whole model."""
        return self.whole.architecture

    @cached_property
    def stages(self) -> tuple[Deployment, ...]:
        """A deployment per stage, to look into. Equal inner stages are one object, numbered as the first of them."""
        pp = self.sharding.pp
        if pp == 1:
            return (self.whole,)
        split = self.whole.axis_split  # its axes hold for all stages
        layout = "1d" if split is None else str(split.layout)
        found: dict[Part, Deployment] = {}
        for i, (layers, part) in enumerate(zip(split_layers(self.architecture, pp), self.parts, strict=True), start=1):
            if part not in found:
                architecture = self.architecture.model_copy(update={"layers": layers})
                found[part] = replace(self.whole, architecture=architecture, layout=layout, stage=(i, pp))
        return tuple(found[part] for part in self.parts)

    @cached_property
    def memory(self) -> MemoryFit:
        """Of a chip of the stage that holds the fewest blocks of KV cache: it sets the replica's capacity."""
        fits = (self.part_memory.fit(part) for part in dict.fromkeys(self.parts))
        return min(fits, key=lambda fit: (fit.kv_blocks, fit.kv_bytes))

    @property
    def replica_kv_tokens(self) -> int:
        """Tokens of KV cache a replica holds; chips that split a prompt hold a part each."""
        return self.sharding.cp * self.memory.kv_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache the slice holds, all replicas together."""
        return self.sharding.dp * self.replica_kv_tokens


def shard(architecture: Architecture, slice_: Slice, sharding: Sharding, **settings: Any) -> ShardedDeployment:
    """Lay a model on a slice; ``settings`` are those of every stage's :class:`Deployment`.

    Raises
    ------
    InputError
        If the sharding breaks a rule of the model or the slice.

    Examples
    --------
    >>> from simulator.catalog.models import load_model
    >>> from simulator.catalog.slices import resolve_slice
    >>> from simulator.roofline.sharding import parse_sharding
    >>> two = shard(load_model("llama-3-70b"), resolve_slice("h100-sxm:2x8"), parse_sharding("tp8pp2"))
    >>> [(d.architecture.n_layers, d.chips) for d in two.stages]
    [(40, 8), (40, 8)]
    """
    return Shardings(architecture, slice_, **settings).shard(sharding)


class Shardings:
    """The shardings of one model on one slice. What several of them have in common is worked out once."""

    def __init__(self, architecture: Architecture, slice_: Slice, **settings: Any) -> None:
        self._architecture = architecture
        self._slice = slice_
        self._settings = {"efficiency": slice_.chip.efficiency} | settings
        self._laid: dict[tuple[object, ...], dict[int, tuple[Deployment, Memory, StepTimes]]] = {}

    def shard(self, sharding: Sharding, **layout: str) -> ShardedDeployment:
        """As :func:`shard`, with further settings."""
        check_sharding(self._architecture, self._slice, sharding)
        links = link_domains(self._slice, sharding)
        parts = split_parts(self._architecture, sharding.pp)
        whole, memory, times = self._lay(sharding, links, layout)
        return ShardedDeployment(self._slice, sharding, whole, parts, links, memory, times)

    def _lay(self, s: Sharding, links: Links, layout: dict[str, str]) -> tuple[Deployment, Memory, StepTimes]:
        """All layers on the chips of one stage."""
        alike = self._laid.setdefault((s.tp, s.cp, *layout.items()), {})  # but for the places of experts
        ranks = s.tp * s.dp if s.ep > 1 else 1
        if ranks in alike:
            return alike[ranks]
        slice_, settings = self._slice, self._settings | layout
        inner = links.tp or links_of_one(slice_)
        spec = slice_.spec if s.tp == slice_.n_chips else f"{slice_.spec} (tp{s.tp} of it)"
        if s.cp > 1:  # a chip has its part of the tokens of a step
            limit = settings.get("max_num_batched_tokens", Deployment.max_num_batched_tokens)
            settings["max_num_batched_tokens"] = -(-limit // s.cp)
        whole = Deployment(
            architecture=self._architecture,
            slice=Slice(spec, slice_.chip, s.tp, tuple(inner)),
            tp=s.tp,
            expert_domains=subdomains(slice_, [ranks, s.cp * s.pp])[0] if s.ep > 1 else (),
            context_domains=links.cp,
            **settings,
        )
        _, memory, times = next(iter(alike.values()), (None, None, None))
        alike[ranks] = whole, Memory(whole, like=memory), StepTimes(whole, like=times)
        return alike[ranks]


def split_layers(architecture: Architecture, pp: int) -> tuple[tuple[LayerGroup, ...], ...]:
    """Layers of each of ``pp`` stages: as even as they go, one more in the stages before the last, which has the head.

    Groups that differ in their mixers are interleaved in the network, so every stage gets an equal share of each and
    the counts must allow it; groups that differ in their feed-forward alone follow one another.

    >>> from simulator.catalog.models import load_model
    >>> [sum(g.count for g in groups) for groups in split_layers(load_model("llama-3-8b"), 5)]
    [6, 6, 7, 7, 6]
    """
    groups, n = architecture.layers, architecture.n_layers
    if not 1 <= pp <= n:
        raise InputError(f"pp = {pp}: {architecture.name} has {n} layers; a stage needs at least one")
    if any(g.mixer != groups[0].mixer for g in groups):
        for g in groups:
            if g.count % pp:
                raise InputError(
                    f"pp = {pp}: {architecture.name} interleaves unlike layers, {g.count} of them of one kind, which "
                    f"{pp} does not divide into equal stages"
                )
        return (tuple(g.model_copy(update={"count": g.count // pp}) for g in groups),) * pp
    sizes = [n // pp] * pp
    for i in range(n % pp):
        sizes[pp - 2 - i if pp > 1 else 0] += 1
    stages: list[tuple[LayerGroup, ...]] = []
    seen: dict[tuple[tuple[int, int], ...], tuple[LayerGroup, ...]] = {}
    at, left = 0, groups[0].count  # group, and layers of it not yet in a stage
    for size in sizes:
        cut, missing = [], size
        while missing:
            if not left:
                at, left = at + 1, groups[at + 1].count
            used = min(left, missing)
            cut.append((at, used))
            left, missing = left - used, missing - used
        stages.append(seen.setdefault(tuple(cut), tuple(groups[g].model_copy(update={"count": k}) for g, k in cut)))
    return tuple(stages)


@lru_cache(maxsize=1024)
def split_parts(architecture: Architecture, pp: int) -> tuple[Part, ...]:
    """What each stage of :func:`split_layers` has; equal ones are one object."""
    stages = enumerate(split_layers(architecture, pp), start=1)
    return tuple(part_of(architecture, layers, first=i == 1, last=i == pp) for i, layers in stages)


@dataclass(frozen=True)
class ShardedReport:
    """A prefill or decode of a sharded deployment.

    Attributes
    ----------
    deployment
        what was priced.
    step
        one micro-batch: the largest, or a prompt's last chunk.
    stages_s
        time of each stage for it. [s]
    replica_tokens
        tokens that one replica processes in ``time_s``.
    micro_batches
        batches that follow each other through the stages.
    send_s
        from one stage to the next, the slowest boundary; 0 without stages. [s]
    time_s
        decode: a round, one token for every sequence — the time per output token; prefill: the whole prompt. [s]
    period_s
        time after which a replica can do the same again, its stages kept full. [s]
    bubble
        fraction of the stages' time that is idle during ``time_s``.
    """

    deployment: ShardedDeployment
    step: StepShape
    stages_s: tuple[float, ...]
    replica_tokens: float
    micro_batches: int
    send_s: float
    time_s: float
    period_s: float
    bubble: float

    @cached_property
    def stages(self) -> tuple[StepReport, ...]:
        """The report of each stage on :attr:`step`."""
        stages = self.deployment.stages
        found = {key: report(stage, self.step) for key, stage in {id(stage): stage for stage in stages}.items()}
        return tuple(found[id(stage)] for stage in stages)

    @property
    def tokens_per_s(self) -> float:
        """Of the slice, all replicas busy: new tokens of decodes, prompt tokens of prefills."""
        return self.deployment.sharding.dp * self.replica_tokens / self.period_s

    @property
    def tokens_per_s_per_chip(self) -> float:
        """As :attr:`tokens_per_s`, per chip of the slice."""
        return self.tokens_per_s / self.deployment.slice.n_chips


def sharded_report(
    d: ShardedDeployment,
    *,
    prefill: int | None = None,
    decode: int | None = None,
    context: int | None = None,
    micro_batches: int | None = None,
) -> ShardedReport:
    """Price a prefill of one prompt on one replica, or a decode of ``decode`` sequences spread over the slice.

    Parameters
    ----------
    prefill, context
        as in :func:`~simulator.roofline.analysis.step_report`; every replica can do as much at the same time.
    decode
        sequences of the whole slice; the fullest replica and micro-batch are priced.
    micro_batches
        default: one per stage (but no empty one). A prompt is cut into more if ``max_num_batched_tokens`` demands it.

    Raises
    ------
    InputError
        Unless exactly one of ``prefill`` and ``decode`` is given, with a context that can hold it.
    """
    if (prefill is None) == (decode is None):
        raise InputError("give exactly one of prefill (tokens) and decode (batch)")
    if micro_batches is not None and micro_batches < 1:
        raise InputError(f"micro_batches = {micro_batches}: must be at least 1")
    pp = d.sharding.pp
    if prefill is not None:
        total = prefill if context is None else context
        if not 1 <= prefill <= total:
            raise InputError(f"prefill = {prefill} of context = {total}: need 1 ≤ prefill ≤ context")
        steps = -(-prefill // (d.whole.max_num_batched_tokens * d.sharding.cp))
        shapes = _chunks(d, prefill, total - prefill, min(max(micro_batches or pp, steps), prefill))
        if d.sharding.cp > 1:
            if prefill < d.sharding.cp:
                raise InputError(f"prefill = {prefill}: cp = {d.sharding.cp} splits no fewer tokens than that")
            shapes = [_part(shape, d.sharding.cp) for shape in shapes]
        tokens = float(prefill)
    else:
        if d.sharding.cp > 1:
            raise InputError(
                f"sharding {d.sharding}: cp splits the tokens of a prompt; a decode step has one per sequence"
            )
        if context is None:
            raise InputError("decode needs a context: the length of each sequence, its new token included")
        if decode is None or decode < 1:
            raise InputError(f"decode = {decode}: need at least 1 sequence")
        sequences = -(-decode // d.sharding.dp)
        m = min(micro_batches or pp, sequences)
        shapes = [StepShape.decode(-(-sequences // m), context, **windows(d))] * m
        tokens = decode / d.sharding.dp
    times = {shape: _stages_s(d, shape) for shape in dict.fromkeys(shapes)}
    table = [times[shape] for shape in shapes]
    sends = sends_s(d, max(shape.n for shape in shapes))
    slowest_s = max(sum(column) for column in zip(*table, strict=True))
    # Rounds of decodes follow each other: a micro-batch's next token waits for its last one, and for the slowest stage.
    time_s = flow_s(table, sends) if prefill is not None else max(sum(table[0]) + sum(sends), slowest_s)
    busy_s = sum(map(sum, table))
    return ShardedReport(
        deployment=d,
        step=shapes[-1],
        stages_s=tuple(table[-1]),
        replica_tokens=tokens,
        micro_batches=len(shapes),
        send_s=max(sends, default=0.0),
        time_s=time_s,
        period_s=slowest_s if prefill is not None else time_s,
        bubble=max(0.0, 1 - busy_s / (pp * time_s)),
    )


def _stages_s(d: ShardedDeployment, shape: StepShape) -> list[float]:
    """Time of one micro-batch in each stage. [s]"""
    found = {part: d.part_times.step_time_s(part, shape) for part in dict.fromkeys(d.parts)}
    return [found[part] for part in d.parts]


def flow_s(times_s: Sequence[Sequence[float]], sends_s: Sequence[float]) -> float:
    """Time for batches to pass through stages in order; ``times_s[i][j]`` is batch i in stage j. [s]

    ``sends_s[j]`` is the way from stage j to the next, which holds neither of them up.

    Examples
    --------
    Eight equal batches in four equal stages take 8 + 4 − 1 batch times, so 3/11 of the time is a bubble:

    >>> flow_s([[1.0] * 4] * 8, [0.0] * 3)
    11.0
    """
    free = [0.0] * len(times_s[0])
    for row in times_s:
        ready = 0.0
        for j, time in enumerate(row):
            free[j] = max(free[j], ready) + time
            ready = free[j] + (sends_s[j] if j < len(sends_s) else 0.0)
    return free[-1]


def require_sharded_fit(d: ShardedDeployment) -> MemoryFit:
    """Memory of the tightest stage.

    Raises
    ------
    InfeasibleError
        If no block of KV cache is left there.
    """
    fit = d.memory
    if fit.fits:
        return fit
    needed = (fit.weights_bytes + fit.activations_bytes + fit.workspace_bytes) / 1e9
    raise InfeasibleError(
        f"{d.architecture.name} as {d.sharding} does not fit on {d.slice.spec}: a chip of its tightest stage needs "
        f"{needed:.2f} GB before any KV cache and has {fit.usable_bytes / 1e9:.2f} GB; --shard auto tries the others"
    )


def windows(d: ShardedDeployment) -> Windows:
    """Windows of the whole model's layers, as a step must say them; a stage may have none of those layers."""
    found = attention_windows(d.architecture)
    return {"window": next((w for w, _ in found), 0), "chunked": any(chunked for _, chunked in found)}


def _chunks(d: ShardedDeployment, tokens: int, past: int, m: int) -> list[StepShape]:
    """A prompt in ``m`` chunks, the first ones a token longer where they are uneven; the last emits a token."""
    shapes = []
    for i in range(m):
        size = tokens // m + (i < tokens % m)
        shapes.append(StepShape.prefill(size, past, completes=i == m - 1, **windows(d)))
        past += size
    return shapes


def _part(shape: StepShape, cp: int) -> StepShape:
    """What the busiest of ``cp`` chips does of a chunk: the parts are cut so that each has as many pairs, over all keys."""
    return replace(shape, n=-(-int(shape.n) // cp), A=shape.A / cp, AW=shape.AW / cp)


def sends_s(d: ShardedDeployment, n: float) -> list[float]:
    """Time to hand ``n`` tokens on at each boundary between stages. [s]

    Every tensor-parallel chip sends its share to its peer; where chips keep whole rows they gather them afterwards.
    """
    first = d.whole
    size = n * first.architecture.d_model * first.precision.wide_bytes
    link, latency = first.eff.link, first.eff.collective_latency_s
    gather = 0.0 if first.splits_tokens else float(all_gather_s(size, d.links.tp, link=link, latency_s=latency))
    levels = [
        (x.size, float(send_s(size / d.sharding.tp, x, link=link, latency_s=latency)) + gather) for x in d.links.pp
    ]
    sends = []
    for boundary in range(1, d.sharding.pp):
        inside = 1
        for groups, time_s in levels:  # the boundary lies on the outermost level whose groups it joins
            level_s = time_s
            inside *= groups
            if boundary % inside:
                break
        sends.append(level_s)
    return sends
