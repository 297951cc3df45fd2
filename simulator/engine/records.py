"""What goes into an engine and what comes out: the only code the two engines share."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.expert_skew import EVEN, ExpertSkew
from simulator.engine.kv_memory import LOAD_POLICIES, HostSwap, Tier
from simulator.engine.scheduling import HostOverheads, Retries, Scheduling
from simulator.errors import InputError, nearest
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.speculation import SpeculationCost
from simulator.roofline.step_cost import StepCost

FINISHED, REJECTED, RUNNING, WAITING, NOT_ARRIVED, TIMED_OUT, CANCELLED = 0, 1, 2, 3, 4, 5, 6
STATUS_NAMES = ("finished", "rejected", "running", "waiting", "not_arrived", "timed_out", "cancelled")

#: Kinds of prefix cache.
PREFIX_CACHES = ("off", "blocks", "radix")

#: How arrivals are spread over the attention ranks of a replica.
RANK_ROUTINGS = ("round-robin", "least-loaded")

#: ITL histogram: bins of equal width in the mantissa, 128 per factor of two, so a bin's centre is within 0.4 % of
#: every value in it. Bin 0 also takes everything below ITL_MIN_S.
ITL_BINS_PER_OCTAVE = 128
ITL_MIN_EXPONENT = -27
"""2**-27 s is 7 ns, far below any step."""
ITL_MAX_EXPONENT = 20
"""2**20 s is 12 days."""
ITL_BINS = (ITL_MAX_EXPONENT - ITL_MIN_EXPONENT) * ITL_BINS_PER_OCTAVE


PROGRESS_BITS = 16
"""Tokens per pass of speculative decoding are counted in units of 2**-16."""


@dataclass(frozen=True, eq=False, repr=False)
class Speculation:
    """Speculative decoding of one replica; ``docs/engine-speculation.md`` has the rules.

    Attributes
    ----------
    cost
        what a pass of each level costs.
    survival
        [classes, levels, depth] probability that at least 1 … depth drafts of a pass are accepted, for each class of requests;
        zeros where a level drafts no further.
    level_by_batch
        [max_num_seqs + 1] level wanted with that many decoding sequences.
    """

    cost: SpeculationCost
    survival: NDArray[np.float64]
    level_by_batch: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check shapes and ranges."""
        s, levels = self.survival, len(self.cost.queries)
        if s.ndim != 3 or s.shape[0] < 1 or s.shape[1] != levels:
            raise InputError(f"speculation.survival has shape {s.shape}: must be (classes, {levels} levels, depth)")
        if not ((s >= 0) & (s <= 1)).all() or (np.diff(s, axis=2) > 0).any():
            raise InputError("speculation.survival: must be 0 … 1 and not rise with depth")
        deepest = (s > 0).sum(axis=2).max(axis=0)
        if (deepest >= self.cost.queries).any():
            raise InputError(
                f"speculation.survival: more drafts accepted ({deepest.tolist()}) than verified "
                f"({(self.cost.queries - 1).tolist()})"
            )
        wanted = self.level_by_batch
        if wanted.ndim != 1 or not ((wanted >= 0) & (wanted < levels)).all():
            raise InputError(f"speculation.level_by_batch: must be a table of levels 0 … {levels - 1}, got {wanted}")

    def __repr__(self) -> str:
        """Say what it is, not its tables."""
        return f"Speculation(up to {self.cost.lookahead} drafts)"

    @cached_property
    def rates(self) -> NDArray[np.int64]:
        """[classes, levels] mean tokens per pass in units of 2**-16, rounded."""
        tokens = 1 + self.survival.sum(axis=2)
        return np.asarray(np.rint(tokens * (1 << PROGRESS_BITS)), dtype=np.int64)

    def levels(self, max_num_seqs: int, budget: int) -> NDArray[np.int64]:
        """[max_num_seqs + 1] levels in force: the wanted one, or the largest below it that leaves a token of the budget."""
        batch = np.arange(max_num_seqs + 1)
        found = self.level_by_batch[: max_num_seqs + 1].copy()
        while (over := (found > 0) & (batch * self.cost.queries[found] >= budget)).any():
            found[over] -= 1
        return found

    def most_rows(self, max_num_seqs: int, budget: int) -> int:
        """Logit rows of the largest step."""
        batch = np.arange(max_num_seqs + 1)
        rows = int((batch * self.cost.queries[self.levels(max_num_seqs, budget)] + max_num_seqs - batch).max())
        return min(rows, max(budget, max_num_seqs))


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one replica, under vLLM's names.

    Attributes
    ----------
    max_num_seqs
        running requests at most.
    max_num_batched_tokens
        tokens in one step at most; not less than ``max_num_seqs``.
    block_size
        tokens per KV block.
    num_kv_blocks
        KV blocks a replica may hand out (vLLM's ``num_gpu_blocks`` less its null block).
    kv_groups
        how many of these blocks the tokens of a sequence take: one for all layers, or one for each group of layers, of which those with a window
        give blocks back.
    max_model_len
        prompt + ``max_tokens`` of a request at most; 0: bounded by the KV cache alone.
    scheduler_reserve_full_isl
        admit a waiting request only if blocks for all its tokens known so far are free, not merely for the first chunk.
    speculation
        speculative decoding; None: one token per sequence and step.
    prefix_cache
        one of :data:`PREFIX_CACHES`: ``off``; ``blocks``, vLLM's cache of hashed blocks; ``radix``, SGLang's tree of prefixes
        (``docs/engine-prefix-cache.md``).
    cache_outputs
        whether blocks with output tokens can be reused, where the requests' hashes cover them.
    rank_routing
        one of :data:`RANK_ROUTINGS`; read where the cost table has several ranks (``docs/engine-ranks.md``). All
        the settings above are those of one rank.
    expert_skew
        how the time of the routed experts varies from step to step.
    scheduling
        policy of the queue, and how a step is put together.
    host
        time that the CPU adds.
    retries
        what clients do after a timeout.
    swap
        host memory that preempted requests are copied to (``docs/engine-kv-memory.md``); None: they are computed again.
    tiers
        memory below HBM that keeps what the prefix cache evicts, the nearest first.
    load_policy
        one of :data:`~simulator.engine.kv_memory.LOAD_POLICIES`: whether what the tiers hold is loaded or computed again.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_kv_blocks: int = 1 << 20
    max_model_len: int = 0
    scheduler_reserve_full_isl: bool = True
    speculation: Speculation | None = None
    prefix_cache: str = "off"
    cache_outputs: bool = True
    rank_routing: str = "round-robin"
    expert_skew: ExpertSkew = EVEN
    scheduling: Scheduling = field(default_factory=Scheduling)
    host: HostOverheads = field(default_factory=HostOverheads)
    retries: Retries = field(default_factory=Retries)
    swap: HostSwap | None = None
    tiers: tuple[Tier, ...] = ()
    load_policy: str = "cheaper"
    kv_groups: KvGroups = field(default_factory=KvGroups)

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"engine.{name} = {getattr(self, name)}: must be at least 1")
        if self.max_model_len < 0:
            raise InputError(f"engine.max_model_len = {self.max_model_len}: must be 0 (no limit) or positive")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                f"engine.max_num_batched_tokens = {self.max_num_batched_tokens} is less than "
                f"engine.max_num_seqs = {self.max_num_seqs}: a full decode batch would not fit in a step"
            )
        if self.speculation is not None:
            covered = min(len(self.speculation.level_by_batch), self.speculation.cost.draft_s.shape[1]) - 1
            if covered < self.max_num_seqs or len(self.speculation.cost.chunk_s) <= self.max_num_batched_tokens:
                raise InputError(
                    f"engine.speculation: tables end at {covered} sequences and "
                    f"{len(self.speculation.cost.chunk_s) - 1} tokens, max_num_seqs = {self.max_num_seqs}, "
                    f"max_num_batched_tokens = {self.max_num_batched_tokens}"
                )
        if self.prefix_cache not in PREFIX_CACHES:
            raise InputError(f"engine.prefix_cache = {self.prefix_cache!r}{nearest(self.prefix_cache, PREFIX_CACHES)}")
        if self.rank_routing not in RANK_ROUTINGS:
            raise InputError(f"engine.rank_routing = {self.rank_routing!r}{nearest(self.rank_routing, RANK_ROUTINGS)}")
        if self.load_policy not in LOAD_POLICIES:
            raise InputError(f"engine.load_policy = {self.load_policy!r}{nearest(self.load_policy, LOAD_POLICIES)}")
        if self.tiers and self.prefix_cache == "off":
            raise InputError("engine.cache_tiers: without engine.prefix_cache there is nothing to keep in them")

    @property
    def max_rows(self) -> int:
        """Logit rows of the largest step."""
        if self.speculation is None:
            return self.max_num_seqs
        return self.speculation.most_rows(self.max_num_seqs, self.max_num_batched_tokens)

    def most_blocks(self, tokens: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """KV blocks that a request owns at most until ``tokens`` tokens of it are computed (R4, W4). [tokens' shape]"""
        return self.kv_groups.most_blocks(np.asarray(tokens) + self.lookahead, self.block_size, self.longest_advance)

    @property
    def longest_tokens(self) -> float:
        """Tokens of the longest sequence that the KV cache holds; inf where a window bounds them."""
        return self.kv_groups.longest(self.num_kv_blocks, self.block_size, self.longest_advance)

    @property
    def longest_advance(self) -> int:
        """Tokens beyond its computed ones that a request has blocks for at most: a whole step's, or a pass's and those it looks ahead."""
        return max(self.max_num_batched_tokens, 1 + self.lookahead)

    @property
    def lookahead(self) -> int:
        """KV slots a decoding sequence owns beyond that of its last token."""
        return 0 if self.speculation is None else self.speculation.cost.lookahead


@dataclass(frozen=True)
class Requests:
    """A stream of requests, one row each, in arrival order.

    Attributes
    ----------
    arrival_s
        [n] not decreasing; ties are served in row order. With ``concurrency`` > 0 only used as think time: row i
        arrives ``arrival_s[i]`` after the finish that makes room for it (the first ``concurrency`` rows: after time 0).
    prompt_tokens, output_tokens
        [n] at least 1 each.
    cached_tokens
        [n] leading prompt tokens whose KV is already there: 0 … prompt_tokens − 1. They take blocks but no compute.
    max_tokens
        [n] the output length the scheduler may know; at least ``output_tokens``.
    concurrency
        0: open loop. Otherwise a closed loop of that many clients.
    acceptance_class
        [n] row of ``Speculation.survival`` that says how well a request's tokens can be drafted; None: row 0 for all.
    hashes
        which blocks of which requests are alike; None: none are. Read by a prefix cache alone.
    priority
        [n] class, the smallest first; needed by the policy ``priority``.
    predicted_tokens
        [n] predicted output length; needed by ``sjf``. With the true lengths the policy is an oracle.
    deadline_s
        [n] time from arrival to deadline; needed by ``edf``.
    tenant
        [n] who sent it, 0, 1, …; needed by ``fair``.
    ttft_timeout_s, timeout_s
        [n] time from arrival after which the client gives up if it has no first token, or is not finished; inf: never.
    cancel_s
        [n] time from arrival after which the client cancels, whatever it has got; inf: never.
    stored_tokens
        [n] leading prompt tokens whose blocks the last of ``EngineSettings.tiers`` holds at the start (rule F10); None: none.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    concurrency: int = 0
    acceptance_class: NDArray[np.int64] | None = None
    hashes: BlockHashes | None = None
    priority: NDArray[np.int64] | None = None
    predicted_tokens: NDArray[np.float64] | None = None
    deadline_s: NDArray[np.float64] | None = None
    tenant: NDArray[np.int64] | None = None
    ttft_timeout_s: NDArray[np.float64] | None = None
    timeout_s: NDArray[np.float64] | None = None
    cancel_s: NDArray[np.float64] | None = None
    stored_tokens: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Check shapes, ranges and order; the message names the first bad row."""
        n = len(self.arrival_s)
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise InputError(f"requests.{name} has {len(column)} rows, arrival_s has {n}")
        checks = [
            ("arrival_s", ~np.isfinite(self.arrival_s) | (self.arrival_s < 0), "must be finite and not negative"),
            ("prompt_tokens", self.prompt_tokens < 1, "must be at least 1"),
            ("output_tokens", self.output_tokens < 1, "must be at least 1"),
            (
                "cached_tokens",
                (self.cached_tokens < 0) | (self.cached_tokens >= self.prompt_tokens),
                "must be 0 … prompt_tokens − 1 (the last prompt token is always computed)",
            ),
            ("max_tokens", self.max_tokens < self.output_tokens, "must be at least output_tokens"),
        ]
        if self.acceptance_class is not None:
            checks.append(("acceptance_class", self.acceptance_class < 0, "must not be negative"))
        for name in ("priority", "predicted_tokens", "deadline_s"):
            column = getattr(self, name)
            if column is not None:
                checks.append((name, ~np.isfinite(column) | (np.abs(column) > 2.0**53), "must be finite"))
        if self.tenant is not None:
            checks.append(("tenant", self.tenant < 0, "must be 0 or more"))
        if self.stored_tokens is not None:
            beyond = (self.stored_tokens < 0) | (self.stored_tokens > self.prompt_tokens)
            checks.append(("stored_tokens", beyond, "must be 0 … prompt_tokens"))
        for name in LEAVING:
            column = getattr(self, name)
            if column is not None:
                checks.append((name, ~(column > 0), "must be positive (inf: never)"))
        if not self.concurrency:
            step_back = np.zeros(n, dtype=bool)
            step_back[1:] = np.diff(self.arrival_s) < 0
            checks.append(("arrival_s", step_back, "must not decrease"))
        for name, bad, rule in checks:
            if bad.any():
                row = int(np.argmax(bad))
                raise InputError(f"requests.{name}[{row}] = {getattr(self, name)[row]}: {rule}")
        if self.concurrency < 0:
            raise InputError(f"requests.concurrency = {self.concurrency}: must be 0 (open loop) or positive")
        if self.hashes is not None and len(self.hashes) != n:
            raise InputError(f"requests.hashes has {len(self.hashes)} rows, arrival_s has {n}")

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)

    def take(self, rows: slice | NDArray[np.int64], *, concurrency: int | None = None) -> "Requests":
        """Some of the rows, with all their columns; ``concurrency`` instead of the stream's own if given."""
        columns = {name: column[rows] for name in COLUMNS if (column := getattr(self, name)) is not None}
        return Requests(
            **columns,
            concurrency=self.concurrency if concurrency is None else concurrency,
            hashes=None if self.hashes is None else self.hashes.rows(rows),
        )

    @property
    def clients_may_leave(self) -> bool:
        """Whether any client gives up or cancels at some time."""
        columns = [getattr(self, name) for name in LEAVING]
        return any(column is not None and bool(np.isfinite(column).any()) for column in columns)


LEAVING = ("ttft_timeout_s", "timeout_s", "cancel_s")
#: Columns of :class:`Requests`, one row per request; those that default to None need not be there.
COLUMNS = tuple(name for name in Requests.__dataclass_fields__ if name not in {"concurrency", "hashes"})


def needs_queue(settings: EngineSettings, *, clients_leave: bool) -> bool:
    """Whether a run goes beyond first come, first served: a policy or batching mode, a host, or clients that leave."""
    scheduling, host = settings.scheduling, settings.host
    plain = (
        scheduling.policy == "fcfs"
        and scheduling.batching == "chunked"
        and not scheduling.long_prefill_token_threshold
        and not scheduling.watermark
        and host == HostOverheads(asynchronous=host.asynchronous)
    )
    return not plain or clients_leave


def check_columns(settings: EngineSettings, requests: Requests) -> None:
    """Check that the requests have what the settings need.

    Raises
    ------
    InputError
        if the policy's column is missing, or a client would give up before the scheduler sees its request.
    """
    needed = {"priority": "priority", "sjf": "predicted_tokens", "edf": "deadline_s", "fair": "tenant"}
    policy = settings.scheduling.policy
    if policy in needed and getattr(requests, needed[policy]) is None:
        raise InputError(f"engine.policy = {policy!r} needs requests.{needed[policy]}")
    for name in LEAVING:
        column = getattr(requests, name)
        if column is not None and (column <= settings.host.request_s).any():
            row = int(np.argmax(column <= settings.host.request_s))
            raise InputError(
                f"requests.{name}[{row}] = {column[row]}: must be longer than engine.host.request_s = "
                f"{settings.host.request_s}, or the scheduler would never see the request"
            )


@dataclass(frozen=True, eq=False)
class SpeculationResult:
    """What speculative decoding did.

    Attributes
    ----------
    passes
        [levels, max_num_seqs + 1] steps by level and number of decoding sequences (none is entry 0).
    keys, window_keys
        [levels] Σ S and Σ SW of those steps.
    chunk_steps
        [max_num_batched_tokens + 1] steps by the number of their chunk tokens.
    drafted_tokens
        drafts verified.
    extra_tokens
        of them, those accepted and emitted: tokens emitted beyond one per pass. They share their pass's time: each adds an inter-token latency of 0 to those
        of ``EngineResult.itl_counts``, which has one latency per pass.
    wasted_s
        [n] the part of ``busy_s`` spent on drafts that were rejected.
    draft_s
        time of drafting, its passes over prompts included.
    """

    passes: NDArray[np.int64]
    keys: NDArray[np.float64]
    window_keys: NDArray[np.float64]
    chunk_steps: NDArray[np.int64]
    drafted_tokens: int
    extra_tokens: int
    wasted_s: NDArray[np.float64]
    draft_s: float

    @property
    def rejected_tokens(self) -> int:
        """Drafts verified in vain."""
        return self.drafted_tokens - self.extra_tokens

    @property
    def sequence_passes(self) -> NDArray[np.int64]:
        """[levels] passes of single sequences."""
        return np.asarray(self.passes @ np.arange(self.passes.shape[1]))


def drafted_tokens(cost: SpeculationCost, passes: NDArray[np.int64]) -> int:
    """Drafts verified in passes, from their counts."""
    return int((cost.queries - 1) @ (passes @ np.arange(passes.shape[1])))


def fixed_drafting_s(cost: SpeculationCost, passes: NDArray[np.int64]) -> float:
    """Time of drafting in decode passes that does not depend on contexts, from their counts. [s]"""
    return float((passes * cost.draft_s[:, : passes.shape[1]]).sum())


@dataclass(frozen=True)
class EngineResult:
    """What one replica did. Times in simulated seconds; NaN where it did not happen.

    Attributes
    ----------
    status
        [n] FINISHED, REJECTED, RUNNING, WAITING, NOT_ARRIVED, TIMED_OUT or CANCELLED at the end.
    arrival_s, scheduled_s, first_token_s, finish_s
        [n] (first) arrival; start of the first step it was part of; when its first token reached the client; its last.
        The latter three of the latest attempt.
    preemptions
        [n] times it was preempted.
    busy_s
        [n] its share of the steps it rode in. Σ busy_s + idle_s = end_s.
    busy_prefill_s, busy_cached_s
        [n] the parts of ``busy_s`` spent in prefill chunks (recomputation after preemption included), and, within
        that, on reading cached tokens.
    recompute_s
        [n] the part of ``busy_s`` spent computing tokens a second time after a preemption.
    reused_tokens
        [n] tokens it never computed itself: ``cached_tokens`` of the request, or with a prefix cache what was found there (0
        until it is admitted).
    attempts
        [n] attempts that reached the scheduler.
    wasted_s
        [n] the part of ``busy_s`` spent on attempts that timed out or were cancelled.
    swap_s
        [n] the part of ``busy_s`` by which copies of its blocks to and from host memory lengthened steps.
    load_start_s, load_end_s
        [n] from when to when it waited for KV blocks to be loaded from the tiers below HBM.
    idle_s
        time without a step.
    end_s
        clock at the end.
    steps_by_tokens, steps_by_rows
        number of steps with n dense tokens, with R logit rows.
    itl_counts
        [ITL_BINS] histogram of inter-token latencies, one count per token after a request's first.
    itl_max_s
        largest inter-token latency. 0 if none.
    totals
        sums over steps: ``steps``, ``dense_tokens``, ``decode_tokens`` (ΣB), ``decode_keys`` (ΣS), ``prefill_pairs`` (ΣA),
        ``prefill_keys`` (ΣK), ``window_decode_keys`` (ΣSW), ``window_prefill_pairs`` (ΣAW), ``window_prefill_keys`` (ΣKW), ``chunks`` (ΣP), ``rows`` (ΣR), ``preemptions``, ``recomputed_tokens``, ``segments``;
        and of clients: ``timeouts``, ``cancellations``, ``retries``, ``abandoned_tokens`` (computed, for attempts that were
        left; recomputation apart) and ``abandoned_outputs`` (emitted for them);
        and times: ``decode_attention_s``, ``prefill_attention_s``, ``host_s`` (host work that delayed a step), and with ranks or uneven
        experts ``padding_s`` and ``imbalance_s``;
        and time integrals: ``running_s`` (Σ running requests × time), ``waiting_s``, ``kv_blocks_s``;
        and peaks: ``max_running``, ``max_waiting``, ``max_kv_blocks``;
        with a prefix cache: ``cache_queried_tokens``, ``cache_hit_tokens``, ``cache_hit_pairs``, ``evicted_blocks``;
        with swapping: ``swap_out_blocks``, ``swap_in_blocks``, ``swap_fallbacks`` (preempted requests that found host memory full),
        ``max_host_blocks`` and ``swap_s`` (time by which copies lengthened steps);
        with tiers: ``loads``, ``loads_declined`` (computed again instead), and of each tier ``tier0_stored_blocks`` (moved into it),
        ``tier0_loaded_blocks``.
    timeline
        columns of equal length: ``start_s``, and means over each interval of ``running``, ``waiting``, ``kv_blocks``,
        ``busy_fraction``, and ``preemptions_per_s``. Intervals are ``timeline_interval_s`` long; the last may be partly past the end.
    speculation
        of a replica that speculates. Then ``decode_keys`` and ``window_decode_keys`` are no whole numbers,
        ``decode_attention_s`` is the attention of verification, and ``draft_s`` is another entry of ``totals``.
    """

    status: NDArray[np.int8]
    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    preemptions: NDArray[np.int32]
    busy_s: NDArray[np.float64]
    busy_prefill_s: NDArray[np.float64]
    busy_cached_s: NDArray[np.float64]
    recompute_s: NDArray[np.float64]
    reused_tokens: NDArray[np.int64]
    attempts: NDArray[np.int32]
    wasted_s: NDArray[np.float64]
    swap_s: NDArray[np.float64]
    load_start_s: NDArray[np.float64]
    load_end_s: NDArray[np.float64]
    idle_s: float
    end_s: float
    steps_by_tokens: NDArray[np.int64]
    steps_by_rows: NDArray[np.int64]
    itl_counts: NDArray[np.int64]
    itl_max_s: float
    totals: dict[str, float] = field(default_factory=dict)
    timeline: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    timeline_interval_s: float = 0.0
    speculation: SpeculationResult | None = None

    @property
    def load_s(self) -> NDArray[np.float64]:
        """Time waited for KV blocks to be loaded, part of the time in the queue. [n] [s]"""
        return np.nan_to_num(self.load_end_s - self.load_start_s)


#: Columns and totals that an engine of several parts, ranks or stages, counts in seconds of one part.
PART_COLUMNS = ("busy_s", "busy_prefill_s", "busy_cached_s", "recompute_s", "wasted_s", "swap_s")
PART_TOTALS = (
    "decode_attention_s",
    "prefill_attention_s",
    "padding_s",
    "imbalance_s",
    "host_s",
    "swap_s",
    "draft_s",
)


def of_the_whole(result: EngineResult, parts: int) -> EngineResult:
    """Turn seconds of ``parts`` parts of a replica into seconds of the whole: Σ busy_s + idle_s = end_s again."""
    columns = {name: getattr(result, name) / parts for name in PART_COLUMNS}
    totals = {name: result.totals[name] / parts for name in PART_TOTALS if name in result.totals}
    drafts = result.speculation
    if drafts is not None:
        drafts = replace(drafts, wasted_s=drafts.wasted_s / parts, draft_s=drafts.draft_s / parts)
    return replace(result, **columns, totals=result.totals | totals, speculation=drafts)


def itl_bin(value_s: float) -> int:
    """Bin of one inter-token latency (reference form; the compiled engine reads the float's bits)."""
    mantissa, exponent = np.frexp(value_s)
    index = (int(exponent) - 1 - ITL_MIN_EXPONENT) * ITL_BINS_PER_OCTAVE + int(
        (float(mantissa) * 2 - 1) * ITL_BINS_PER_OCTAVE
    )
    return min(max(index, 0), ITL_BINS - 1)


def itl_centres_s() -> NDArray[np.float64]:
    """[ITL_BINS] centre of each bin of an ITL histogram; 0 for bin 0, where the tokens of one pass are. [s]"""
    octave, part = np.divmod(np.arange(ITL_BINS), ITL_BINS_PER_OCTAVE)
    centres = np.ldexp(1 + (part + 0.5) / ITL_BINS_PER_OCTAVE, octave + ITL_MIN_EXPONENT)
    centres[0] = 0.0
    return np.asarray(centres)


def itl_mean_s(counts: NDArray[np.int64]) -> float:
    """Mean of an ITL histogram, within 0.4 % of the exact one. [s]"""
    return float(counts @ itl_centres_s() / counts.sum())


def itl_quantiles_s(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles of an ITL histogram (inverse of the empirical distribution), each within 0.4 % of the exact one. [s]

    NaN if the histogram is empty.
    """
    total = int(counts.sum())
    if total == 0:
        return np.full(len(probabilities), np.nan)
    ranks = np.maximum(np.ceil(probabilities * total), 1)
    return np.asarray(itl_centres_s()[np.searchsorted(np.cumsum(counts), ranks)])


def check_windows(cost: StepCost, settings: EngineSettings) -> None:
    """Refuse groups of layers whose window is not that of the cost table.

    Raises
    ------
    InputError
        As said.
    """
    groups = settings.kv_groups
    if groups.windowed and (groups.window, groups.chunked) != (cost.window, cost.window_chunked):
        raise InputError(
            f"engine.kv_groups: a window of {groups.window} tokens (chunked: {groups.chunked}), the cost table has one of {cost.window} "
            f"(chunked: {cost.window_chunked})"
        )


def cache_hashes(settings: EngineSettings, requests: Requests) -> BlockHashes | None:
    """Ids of the KV blocks that a replica with these settings can find again; None without a prefix cache.

    Raises
    ------
    InputError
        As :func:`findable_hashes`; or of units that do not fit the block size.
    """
    hashes = findable_hashes(settings, requests)
    if hashes is None:
        return None
    return hashes.at_block_size(settings.block_size, requests.prompt_tokens, requests.output_tokens)


def findable_hashes(settings: EngineSettings, requests: Requests) -> BlockHashes | None:
    """Ids, in units of their own, by which a replica with these settings finds KV blocks; None without a prefix cache.

    Raises
    ------
    InputError
        If the requests have no hashes to go by.
    """
    if settings.prefix_cache == "off":
        return None
    if requests.hashes is None:
        raise InputError(
            f"engine.prefix_cache = {settings.prefix_cache!r}: the requests have no block hashes; "
            "use a trace with hash_ids or state traffic.sessions"
        )
    return requests.hashes if settings.cache_outputs else replace(requests.hashes, covers_output=False)
