"""One scheduler of the reference engine: who waits, who runs, and the KV memory that they share.

A plain replica and a pipeline have one, attention ranks have one each. Written from the rules in docs/ to be read; the comments
name the rule a line carries out. Which features a replica has shows in which parts are there: the pool of blocks, host memory,
tiers and a speculator. The order in which they act on a step is that of docs/engine-mixtures.md (M3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor, isnan

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import RUNNING, WAITING, EngineSettings, Requests
from simulator.engine.reference_cache import BlockPool, CountedPool, RadixPool
from simulator.engine.reference_pricing import chunk_work
from simulator.engine.reference_queue import Queue
from simulator.engine.reference_speculation import Speculator
from simulator.engine.reference_state import Clock, Plan, Request
from simulator.engine.reference_swap import HostPool
from simulator.engine.reference_tiers import TierStack
from simulator.roofline.step_cost import StepCost


def new_pool(settings: EngineSettings, hashes: BlockHashes | None) -> BlockPool | CountedPool:
    """The blocks of one scheduler: told apart only where a prefix cache must."""
    if hashes is None:
        return CountedPool(settings.num_kv_blocks, settings.kv_groups)
    pool = RadixPool if settings.prefix_cache == "radix" else BlockPool
    return pool(settings.num_kv_blocks, hashes, settings.kv_groups, settings.block_size)


@dataclass(eq=False)
class Scheduler:
    """Chooses the tokens of a step (R5 to R8, B1 to B4), and keeps what its requests own."""

    rank: int
    cost: StepCost
    settings: EngineSettings
    clock: Clock
    pool: BlockPool | CountedPool
    speculator: Speculator | None
    on_load: Callable[[Request], None]
    """Called when a request goes to load (F5)."""
    queue: Queue = field(init=False)
    running: list[Request] = field(default_factory=list)
    loading: list[Request] = field(default_factory=list)
    host: HostPool | None = None
    """Host memory for preempted requests, where there is some."""
    tiers: TierStack | None = None
    is_open: bool = True
    """Whether a static batch is being formed (B4)."""

    def __post_init__(self) -> None:
        """Make the parts that the settings ask for."""
        self.queue = Queue(self.settings.scheduling)
        if self.settings.swap is not None:
            self.host = HostPool(self.settings.swap)
        if isinstance(self.pool, BlockPool) and self.settings.tiers:
            self.tiers = self.pool.tiers = TierStack(self.settings.tiers)

    def warm(self, requests: Requests) -> None:
        """Fill the store as it is at the start (F10)."""
        if self.tiers is None or requests.stored_tokens is None:
            return
        for row, tokens in enumerate(requests.stored_tokens.tolist()):
            self.tiers.warm(self.pool.ids_of(row)[: tokens // self.settings.block_size])

    @property
    def n_waiting(self) -> int:
        """Requests that wait, those that load included (F8)."""
        return len(self.queue) + len(self.loading)

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody owns."""
        return self.settings.num_kv_blocks - self.pool.free

    def pages(self, tokens: int) -> int:
        """Blocks of one group that ``tokens`` tokens take."""
        return -(-tokens // self.settings.block_size)

    def blocks_for(self, tokens: int, passed: int) -> int:
        """Return the blocks that ``tokens`` tokens take, when a window has left ``passed`` of each of its groups behind (W1, W3)."""
        return self.settings.kv_groups.in_all(self.pages(tokens), passed)

    def passed(self, computed: int) -> int:
        """Blocks of a windowed group that the window has left once ``computed`` tokens are there (W2)."""
        return self.settings.kv_groups.passed(computed, self.settings.block_size)

    def most_blocks(self, tokens: int, passed: int) -> int:
        """Blocks that a request owns at most until it has ``tokens`` tokens, from where its window has left ``passed`` (W4)."""
        groups = self.settings.kv_groups
        ahead = max(self.settings.max_num_batched_tokens, 1 + self.settings.lookahead)  # W6
        at_once = self.pages(groups.window - 1 + ahead) + 1
        return groups.full * self.pages(tokens) + groups.windowed * min(self.pages(tokens) - passed, at_once)

    def leave_behind(self, done: Sequence[tuple[Request, int]]) -> None:
        """Give back what the windows of requests of a step have left, each with so many tokens computed (W2, W10)."""
        passed = [(request.row, self.passed(computed)) for request, computed in done]
        self.pool.leave([(row, places) for row, places in passed if places > self.pool.passed[row]])

    def speculates(self, request: Request) -> bool:
        """Whether a request's tokens of a step are a pass of speculative decoding."""
        return self.speculator is not None and not request.in_prefill

    # Choosing a step

    def choose(self) -> Plan:
        """Choose the tokens of the step that starts now (M3)."""
        plan, batching = Plan(self.settings.max_num_batched_tokens), self.settings.scheduling.batching
        if batching in {"chunked", "orca"}:
            self.go_on(plan)
            if not plan.preempted and not plan.stuck:
                self.admit(plan)
        else:
            self.is_open = self.is_open or not self.running
            if self.is_open or batching != "static":
                self.admit(plan)
            if not plan.batch:
                self.is_open = False
                self.go_on(plan)
        if self.settings.scheduling.preempt_lower:  # M7
            self.publish(plan, list(plan.batch))
        for request, tokens in plan.batch.items():
            if self.speculates(request) or request.computed + tokens == request.known:
                self.queue.count_output(request)
        return plan

    def go_on(self, plan: Plan) -> None:
        """Give tokens to those who run, decoding requests first (R5, B1, M22)."""
        if self.speculator is not None:
            plan.level = self.speculator.level(sum(not request.in_prefill for request in self.running))
        ready = [request for request in self.running if request.may_go_on]
        for request in sorted(ready, key=lambda request: request.in_prefill):
            if not plan.budget:
                break
            if request.status != RUNNING:  # preempted for one before it
                continue
            wanted, held = self.wants(request, plan)
            if self.make_room(request, held, plan):
                self.pool.take(request.row, self.pages(held))
                plan.batch[request] = wanted
                plan.budget -= wanted
            elif request.status == RUNNING and not request.flights:  # the foremost waits
                break
        if not self.settings.scheduling.preempt_lower:  # M7
            self.publish(plan, list(plan.batch))

    def wants(self, request: Request, plan: Plan) -> tuple[int, int]:
        """Tokens a running request wants of the step, and the tokens its blocks must then hold (R5, P2)."""
        if self.speculator is not None and self.speculates(request):
            return self.speculator.queries(plan.level), self.speculator.slots(request)
        wanted = min(request.known - request.computed, plan.budget, self.longest_chunk)
        return wanted, request.computed + wanted

    def make_room(self, request: Request, held: int, plan: Plan) -> bool:
        """Preempt until a running request has the blocks of ``held`` tokens; return whether it has (Q2, S3, M22)."""
        while self.pool.free < self.missing(request, held):
            victim = self.queue.victim(self.preemptible) if not request.flights else request
            if victim is request and (request.flights or self.is_foremost(request)):
                plan.stuck = True
                return False
            self.preempt(victim, plan)
            if victim is request:
                return False
        return True

    def is_foremost(self, request: Request) -> bool:
        """Whether others run, all of whom would be preempted before a request if none was in flight (S3)."""
        return len(self.running) > 1 and self.queue.foremost(self.running) is request

    def missing(self, request: Request, held: int) -> int:
        """Blocks that a running request lacks for ``held`` tokens."""
        return self.blocks_for(held, self.pool.passed[request.row]) - self.pool.owned(request.row)

    @property
    def preemptible(self) -> list[Request]:
        """Running requests that no step in progress holds."""
        return [request for request in self.running if not request.flights]

    def preempt(self, request: Request, plan: Plan) -> None:
        """Take a running request's blocks and let it wait again (R6, Q2, M4)."""
        self.running.remove(request)
        plan.budget += plan.batch.pop(request, 0)
        plan.preempted.append(request)
        blocks = self.blocks_for(request.computed, self.passed(request.computed))
        if self.host is not None and self.host.copy_out(request.row, blocks):
            request.saved = request.computed
        self.release(request)
        request.computed = 0
        request.status = WAITING
        request.preemptions += 1
        self.queue.join_again(request)

    def admit(self, plan: Plan) -> None:
        """Take requests from the queue (R7, M3)."""
        block_size = self.settings.block_size
        while plan.budget and self.queue:
            request = self.queue.first()
            if request in plan.preempted:  # Q3
                return
            hits = self.pool.lookup(request.row, (request.known - 1) // block_size)  # C5
            if len(self.running) < self.settings.max_num_seqs and self.goes_loading(request, hits):
                continue
            start = max(hits * block_size, request.cached_tokens, request.loaded)
            computed = max(start, request.saved)  # M5
            found = self.pool.found(request.row, hits, self.passed(computed))  # W9
            rest = request.known - computed
            chunk = min(rest, plan.budget, self.longest_chunk)
            if chunk < rest and not self.may_cut(plan):
                return
            held = sum(block is not None and block.owners > 0 for table in found for block in table)
            if not self.fits(request, computed, computed + chunk, held):
                victim = self.queue.lower_victim(request, self.preemptible)
                if victim is None:
                    return
                self.preempt(victim, plan)
                continue
            self.queue.take(request, start, is_new=isnan(request.scheduled_s))
            self.take_in(request, hits, start, computed)
            self.pool.share(request.row, found, self.passed(computed))
            self.pool.take(request.row, self.pages(computed + chunk))
            plan.batch[request] = chunk
            plan.budget -= chunk
            plan.admitted.append(request)
            if not self.settings.scheduling.preempt_lower:  # M7
                self.publish(plan, [request])

    def take_in(self, request: Request, hits: int, start: int, computed: int) -> None:
        """Let an admitted request run (C8, C9, E2)."""
        self.running.append(request)
        request.status = RUNNING
        request.must_emit = True
        request.start, request.computed = start, computed
        request.reused_tokens += max(0, start - request.seen)
        self.pool.count_admission(request.known, max(hits * self.settings.block_size, request.loaded))
        request.asks, request.loaded = False, 0
        if self.host is not None and request.saved:
            groups, missing = self.settings.kv_groups, range(hits, self.pages(request.saved))  # W9
            in_window = range(max(hits, self.passed(computed)), missing.stop)
            self.host.copy_in(request.row, groups.full * len(missing) + groups.windowed * len(in_window))
        request.saved = 0
        if isnan(request.scheduled_s):
            request.scheduled_s = self.clock.now

    @property
    def longest_chunk(self) -> int:
        """Tokens of one prompt in a step at most (B5)."""
        return self.settings.scheduling.long_prefill_token_threshold or self.settings.max_num_batched_tokens

    def may_cut(self, plan: Plan) -> bool:
        """Whether the first of the queue may leave a part of its prompt for later (B2, B6)."""
        scheduling = self.settings.scheduling
        unfinished = sum(one.in_prefill and one.computed + plan.batch.get(one, 0) < one.known for one in self.running)
        limit = scheduling.max_num_partial_prefills
        return scheduling.batching == "chunked" and not 0 < limit <= unfinished

    def fits(self, request: Request, computed: int, tokens: int, held: int) -> bool:
        """Whether there is a seat, and blocks for the first ``tokens`` tokens, for the first of the queue (R7, B4, B7, W4).

        It starts with ``computed`` tokens.

        ``held`` blocks of them are in use already (C6).
        """
        settings = self.settings
        if len(self.running) == settings.max_num_seqs:
            return False
        if settings.scheduling.batching == "static":
            longest = [one.prompt_tokens + one.max_tokens - 1 + settings.lookahead for one in (*self.running, request)]
            return sum(self.most_blocks(tokens, 0) for tokens in longest) <= settings.num_kv_blocks
        margin = floor(settings.scheduling.watermark * settings.num_kv_blocks) if self.running else 0
        passed = self.passed(computed)
        whole = settings.scheduler_reserve_full_isl
        wanted = self.most_blocks(request.known, passed) if whole else self.blocks_for(tokens, passed)
        return wanted - held + margin <= self.pool.free

    # Memory

    def publish(self, plan: Plan, scheduled: Sequence[Request]) -> None:
        """Let the blocks that requests fill in this step be found from now on (C3, P6, M7)."""
        for request in scheduled:
            if not self.speculates(request):
                full = (request.computed + plan.batch[request]) // self.settings.block_size
                self.pool.publish(request.row, full)

    def chunk_is_there(self, request: Request, start: int, stop: int) -> None:
        """Keep what a chunk has computed: in the tree (D2), and in the tiers that want it (F9)."""
        block_size = self.settings.block_size
        self.pool.publish_at_end(request.row, stop // block_size)
        if self.tiers is not None:
            until = min(stop, request.prompt_tokens) // block_size
            self.tiers.put(self.pool.ids_of(request.row)[start // block_size : until])

    def finish(self, request: Request) -> None:
        """Let a request go that has all its tokens (D2, C7)."""
        self.running.remove(request)
        self.pool.publish_at_end(request.row, request.computed // self.settings.block_size)
        self.release(request)

    def let_go(self, request: Request) -> None:
        """Let a request go whose client has left (L3, M12, M13)."""
        if request.status == RUNNING:
            self.running.remove(request)
        elif request.loading:
            self.loading.remove(request)
            request.loading, request.load_end_s = False, self.clock.now
        else:
            self.queue.leave(request)
        if self.host is not None:
            self.host.forget(request.row)
        self.pool.release(request.row)
        request.computed = request.saved = 0

    def release(self, request: Request) -> None:
        """Take all blocks from a request that finishes or is preempted."""
        if self.speculator is not None:  # P6
            self.pool.publish(request.row, request.computed // self.settings.block_size)
        self.pool.release(request.row)

    def goes_loading(self, request: Request, hits: int) -> bool:
        """Ask the tiers for what follows the hits of the first in the queue; return whether it leaves to load it (F3 to F5)."""
        if self.tiers is None or not request.asks:
            return False
        now_s, block_size = self.clock.now, self.settings.block_size
        first = max(hits, request.cached_tokens // block_size)
        run = self.tiers.run(self.pool.ids_of(request.row)[first : (request.known - 1) // block_size])
        if not run:
            return False
        request.asks = False
        ready_s, policy = self.tiers.ready_s(run, now_s), self.settings.load_policy
        computing_s = self.computing_s(first * block_size, len(run) * block_size)
        if policy == "never" or (policy == "cheaper" and ready_s - now_s >= computing_s):  # F4
            self.tiers.counts["loads_declined"] += 1
            return False
        self.tiers.load(run, now_s)
        request.loaded = (first + len(run)) * block_size
        request.load_start_s, request.load_end_s = now_s, ready_s
        self.queue.leave(request)
        self.loading.append(request)
        request.loading = True
        self.on_load(request)
        return True

    def computing_s(self, past: int, tokens: int) -> float:
        """Time of computing tokens in full steps instead of loading them (F4, M14). [s]"""
        budget = self.settings.max_num_batched_tokens
        attention_s = self.cost.prefill_attention_s(*chunk_work(self.cost, past, tokens))
        return tokens * float(self.cost.dense_s[budget]) / budget + attention_s

    def has_loaded(self, request: Request) -> None:
        """Let a request wait again whose load is there (F5)."""
        self.loading.remove(request)
        request.loading, request.returned_s = False, self.clock.now
        self.queue.come_back(request)
