"""Random mixtures: any subset of what a replica can do, on the dyadic grid.

A feature is a name of :data:`simulator.engine.refusals.NAMES` and one function here that switches it on in a case being drawn. Whoever
adds a feature adds both, and every combination with the others is drawn from then on. Combinations that the engines refuse are not drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.kv_memory import HostSwap, Tier
from simulator.engine.records import EngineSettings, Requests, Speculation
from simulator.engine.refusals import LASTING, NAMES, PENDING, Refusal, why_not
from simulator.engine.scheduling import BATCHINGS, POLICIES, HostOverheads, Retries
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.speculation import SpeculationCost
from simulator.roofline.step_cost import StepCost
from tests.engine.strategies import (
    SLOPE_GRID_S,
    TIME_GRIDS_S,
    Case,
    Pick,
    dyadic_case,
    dyadic_cost,
    in_groups,
    one_of,
    with_ties,
)

GRID_S = 2.0**-6
BOTH = (*LASTING, *PENDING)
"""What the compiled engine refuses; the reference refuses ``LASTING`` alone."""


NEEDS = {"prefix tree": "prefix cache", "tiers": "prefix cache", "writing through": "tiers", "warm store": "tiers"}
"""Features that are nothing without another."""


@dataclass
class Draft:
    """A case in the making."""

    pick: Pick
    features: frozenset[str]
    settings: EngineSettings
    requests: Requests
    grid_s: float
    queries: tuple[int, ...] = (1,)
    """Tokens per pass of the levels of speculation."""

    def set(self, **changes):
        self.settings = replace(self.settings, **changes)

    def schedule(self, **changes):
        self.set(scheduling=replace(self.settings.scheduling, **changes))

    def ask(self, **columns):
        self.requests = replace(self.requests, **columns)

    def column(self, one):
        """One value of ``one`` per request."""
        return np.array([one() for _ in range(len(self.requests))])

    @property
    def enough_blocks(self) -> int:
        """Blocks that the longest request needs."""
        longest = int((self.requests.prompt_tokens + self.requests.max_tokens).max()) - 1 + self.queries[-1] - 1
        return -(-longest // self.settings.block_size)


def with_needs(features: frozenset[str]) -> frozenset[str]:
    """The features, and those without which they are nothing."""
    needed = {NEEDS[name] for name in features if name in NEEDS}
    return features if needed <= features else with_needs(features | needed)


def draw_features(pick: Pick, must: Sequence[str], refusals: Sequence[Refusal]) -> frozenset[str]:
    """A random subset that nobody refuses, with ``must`` in it."""
    chosen = with_needs(frozenset(must))
    names = [name for name in NAMES if name not in chosen]
    few = one_of(pick, (1, 2) if must else (1, 2, 3, 3))
    while names:
        name = names.pop(pick(0, len(names) - 1))
        more = with_needs(chosen | {name})
        if len(more) > len(chosen) + 1 and pick(0, 2):  # or most would have what others need
            continue
        if name == "bounded windows" and pick(0, 2):  # it rules out others, and what needs them
            continue
        if pick(0, 5) < few and not more >= {"batching", "chunk limits"} and why_not(more, refusals) is None:
            chosen = more
    return chosen


def mixture_case(pick: Pick, must: Sequence[str] = (), refusals: Sequence[Refusal] = BOTH) -> Case:
    """A dyadic case with a random set of features."""
    features = draw_features(pick, must, refusals)
    _, settings, requests = dyadic_case(pick, plain_windows=False)
    for _ in range(2):
        if len(requests) < 9 and pick(0, 2):  # few requests seldom meet
            _, settings, requests = dyadic_case(pick, plain_windows=False)
    draft = Draft(pick, features, settings, requests, one_of(pick, TIME_GRIDS_S))
    for name, switch_on in BEFORE_COSTS.items():
        if name in features:
            switch_on(draft)
    if pick(0, 2) == 0 or (features & {"swap", "tiers"} and pick(0, 5)):
        draft.set(num_kv_blocks=draft.enough_blocks + pick(0, max(1, draft.enough_blocks // 3)), max_model_len=0)
    cost = with_costs(draft)
    for name, switch_on in AFTER_COSTS.items():
        if name in features:
            switch_on(draft, cost)
    case = Case(cost, draft.settings, draft.requests)
    return case if case.requests.concurrency or pick(0, 3) else with_ties(pick, case)


def random_mixture(seed: int, must: Sequence[str] = (), refusals: Sequence[Refusal] = BOTH) -> Case:
    """The mixture of a seed."""
    rng = np.random.default_rng([seed, *map(list(NAMES).index, must)])
    return mixture_case(lambda low, high: int(rng.integers(low, high, endpoint=True)), must, refusals)


def tight_mixture(seed: int, must: Sequence[str] = (), refusals: Sequence[Refusal] = BOTH) -> Case:
    """The mixture of a seed with a KV cache that barely holds the longest request, and chunks of few tokens where there are chunks."""
    cost, settings, requests = random_mixture(seed, must, refusals)
    rng = np.random.default_rng([seed, 1])
    scheduling, budget = settings.scheduling, settings.max_num_batched_tokens
    if scheduling.batching == "chunked":
        if rng.integers(2):
            scheduling = replace(scheduling, long_prefill_token_threshold=int(rng.integers(1, 4)))
        if settings.speculation is None:  # whose levels were drawn for its budget
            budget = min(budget, settings.max_num_seqs + int(rng.integers(0, 3)))
    settings = replace(
        settings,
        scheduling=scheduling,
        max_num_batched_tokens=budget,
        scheduler_reserve_full_isl=settings.scheduler_reserve_full_isl and not rng.integers(3),
        max_model_len=0,
    )
    longest = int((requests.prompt_tokens + requests.max_tokens).max()) - 1
    enough = int(settings.most_blocks(longest)) + int(rng.integers(0, 3))
    return Case(cost, replace(settings, num_kv_blocks=enough), requests)


@st.composite
def mixtures(draw: st.DrawFn, must: Sequence[str] = (), refusals: Sequence[Refusal] = BOTH) -> Case:
    """Mixtures drawn by hypothesis, so that a failure shrinks."""
    return mixture_case(lambda low, high: draw(st.integers(low, high)), must, refusals)


def seeded_mixtures(must: Sequence[str] = (), refusals: Sequence[Refusal] = BOTH) -> st.SearchStrategy[Case]:
    """Mixtures of drawn seeds: they do not shrink, but are larger than hypothesis likes to draw and so meet more."""
    return st.integers(0, 10**9).map(lambda seed: random_mixture(seed, must, refusals))


# The queue and the batch


def with_policy(draft: Draft) -> None:
    pick = draft.pick
    policy = one_of(pick, (*POLICIES[1:], "priority", "priority"))
    draft.schedule(
        policy=policy,
        preempt_lower=policy == "priority" and draft.settings.scheduling.batching != "static" and pick(0, 3) > 0,
        prompt_weight=pick(0, 2),
        output_weight=pick(0, 3),
    )
    draft.ask(
        priority=draft.column(lambda: pick(0, 2)),
        predicted_tokens=draft.column(lambda: float(pick(1, 20))),
        deadline_s=GRID_S * draft.column(lambda: float(pick(0, 200))),
        tenant=draft.column(lambda: pick(0, 3)),
    )


def with_batching(draft: Draft) -> None:
    draft.schedule(batching=one_of(draft.pick, BATCHINGS[1:]))
    longest = int((draft.requests.prompt_tokens + draft.requests.max_tokens).max())  # whole prompts, most of them
    draft.set(max_num_batched_tokens=max(draft.settings.max_num_batched_tokens, longest - draft.pick(0, 3)))


def with_chunk_limits(draft: Draft) -> None:
    pick = draft.pick
    threshold = pick(1, 8) if pick(0, 2) else 0
    limit = pick(1, 3) if not threshold or pick(0, 2) == 0 else 0
    draft.schedule(long_prefill_token_threshold=threshold, max_num_partial_prefills=limit)


def with_watermark(draft: Draft) -> None:
    draft.schedule(watermark=one_of(draft.pick, (0.125, 0.25, 0.5)))


# Memory


def families(pick: Pick, prompt, output, unit: int, *, covers_output: bool) -> BlockHashes:
    """Rows of ids in which requests copy each other's beginnings: each leaves another's path somewhere."""
    rows, fresh = [], 0
    for p, o in zip(prompt, output, strict=True):
        length = (p + o - 1 if covers_output else p) // unit + pick(0, 1)
        other = one_of(pick, rows) if rows and pick(0, 4) else []
        row = other[: pick(0, len(other)) if pick(0, 1) else len(other)][:length]
        while len(row) < length:
            row = [*row, fresh]
            fresh += 1
        if pick(0, 5) == 0:
            row = row[: pick(0, len(row))]
        rows.append(row)
    ids = np.array([block for row in rows for block in row], dtype=np.int64)
    if pick(0, 1):
        ids = ids * 1_000_003
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return BlockHashes(ids, offsets, unit, covers_output)


def with_cache(draft: Draft) -> None:
    pick, settings, requests = draft.pick, draft.settings, draft.requests
    blocks = one_of(pick, (1, 2, 2, 3, 3) if "tiers" in draft.features else (1, 2, 3, 4, pick(1, 16)))
    if blocks != settings.block_size:
        tokens = settings.num_kv_blocks * settings.block_size
        draft.set(block_size=blocks, num_kv_blocks=max(1, -(-tokens // blocks)))
    prompt = requests.prompt_tokens
    if pick(0, 1):  # whole blocks, where a full hit computes one again
        prompt = np.maximum(prompt // blocks, 1) * blocks
    unit = one_of(pick, (blocks, 4 * blocks, 2 * blocks, *(u for u in (1, 2, 3) if blocks % u == 0)))
    draft.ask(
        prompt_tokens=prompt,
        cached_tokens=np.minimum(requests.cached_tokens, prompt - 1) * min(1, pick(0, 3)),
        hashes=families(pick, prompt, requests.output_tokens, unit, covers_output=bool(pick(0, 1))),
    )
    draft.set(prefix_cache="blocks", cache_outputs=bool(pick(0, 3)))


def with_tree(draft: Draft) -> None:
    draft.set(prefix_cache="radix")


def with_swap(draft: Draft) -> None:
    pick, enough = draft.pick, draft.enough_blocks
    blocks = one_of(pick, (0, pick(1, enough), 2 * enough, 100 * enough))
    draft.set(swap=HostSwap(blocks, draft.grid_s * pick(0, 6), overlapped=bool(pick(0, 1))))


def with_tiers(draft: Draft) -> None:
    pick, enough = draft.pick, draft.enough_blocks
    tiers = tuple(
        Tier(
            one_of(
                pick,
                (pick(1, 6), 50 * enough, 50 * enough) if i else (pick(1, 3), pick(1, 6), pick(1, 10), 50 * enough),
            ),
            block_s=draft.grid_s * one_of(pick, (pick(0, 1), pick(1, 6), pick(1, 60), pick(20, 90))),
            latency_s=draft.grid_s * pick(0, 6),
            name=f"tier {i}",
        )
        for i in range(one_of(pick, (1, 2, 2, 2, 2, 3)))
    )
    policy = one_of(pick, ("always", "always", "always", "always", "cheaper", "cheaper", "never"))
    draft.set(tiers=tiers, load_policy=policy)


def with_writing_through(draft: Draft) -> None:
    tiers = draft.settings.tiers
    chosen = draft.pick(0, len(tiers) - 1)
    draft.set(
        tiers=tuple(replace(tier, write_through=i == chosen or not draft.pick(0, 2)) for i, tier in enumerate(tiers))
    )


def with_warm_store(draft: Draft) -> None:
    pick, prompt = draft.pick, draft.requests.prompt_tokens.tolist()
    draft.ask(stored_tokens=np.array([pick(0, tokens) * pick(0, 1) for tokens in prompt]))


# Costs


def with_speculation(draft: Draft) -> None:
    """Levels, and room for them; what they cost is drawn once the cost table is there."""
    pick = draft.pick
    levels = pick(2, 4)
    draft.queries = (1, *sorted({pick(2, 7) for _ in range(levels - 1)}))
    if pick(0, 2) == 0:  # room for whole batches of the highest level
        seqs = draft.settings.max_num_seqs
        draft.set(
            max_num_batched_tokens=max(draft.settings.max_num_batched_tokens, seqs * draft.queries[-1] + pick(1, 20))
        )
    if pick(0, 1):
        lookahead = -(-(draft.queries[-1] - 1) // draft.settings.block_size)
        draft.set(num_kv_blocks=draft.settings.num_kv_blocks + lookahead)


def with_prices_of_speculation(draft: Draft, cost: StepCost | PipelineCost) -> None:
    cost = cost.total if isinstance(cost, PipelineCost) else cost
    pick, queries, seqs = draft.pick, draft.queries, draft.settings.max_num_seqs
    classes = pick(1, 3)
    survival = np.zeros((classes, len(queries), queries[-1] - 1))
    for kind in range(classes):
        for level, q in enumerate(queries[1:], start=1):
            survival[kind, level, : q - 1] = sorted((pick(0, 16) / 16 for _ in range(q - 1)), reverse=True)
    table = np.array([pick(0, len(queries) - 1) for _ in range(seqs + 1)])
    if pick(0, 3) == 0:
        table[:] = pick(1, len(queries) - 1)
    draft.set(speculation=Speculation(speculation_cost(draft, cost), survival, table))
    if pick(0, 3):
        draft.ask(acceptance_class=draft.column(lambda: pick(0, classes - 1)))


def speculation_cost(draft: Draft, cost: StepCost) -> SpeculationCost:
    pick, grid_s, levels = draft.pick, draft.grid_s, len(draft.queries)
    seqs, budget = draft.settings.max_num_seqs, draft.settings.max_num_batched_tokens

    def slopes(most):
        return SLOPE_GRID_S * np.array([0] + [pick(0, most) for _ in range(levels - 1)], dtype=float)

    per_draft = [[pick(0, 3) * (level > 0) * (b > 0) for b in range(seqs + 1)] for level in range(levels)]
    extra = slopes(3)[:, None]
    curve = np.array([slopes(2) for _ in cost.decode_knots]).T
    rise = np.cumsum(curve[:, :-1] * np.diff(cost.decode_knots), axis=1)
    return SpeculationCost(
        queries=np.array(draft.queries),
        knots=cost.decode_knots,
        value_s=cost.decode_value_s + extra * cost.decode_knots,
        slope_s=cost.decode_slope_s + extra,
        window_slope_s=cost.window_slope_s + (slopes(2) if cost.window else np.zeros(levels)),
        seq_s=cost.decode_seq_s + grid_s * np.arange(levels) * pick(0, 1),
        draft_s=grid_s * np.array(per_draft),
        draft_value_s=np.concatenate([np.zeros((levels, 1)), rise], axis=1),
        draft_slope_s=curve,
        chunk_s=grid_s * pick(0, 1) * np.arange(budget + 1.0),
        chunk_planes=SLOPE_GRID_S * np.array([[pick(0, 2), pick(0, 2), pick(0, 2), 0, 0] for _ in range(pick(1, 2))]),
    )


def with_costs(draft: Draft) -> StepCost | PipelineCost:
    """The cost table for what the settings let a step be, of one rank and stage or of several."""
    pick, settings, features = draft.pick, draft.settings, draft.features
    budget = settings.max_num_batched_tokens
    rows = (
        max(budget, settings.max_num_seqs * draft.queries[-1]) if "speculation" in features else settings.max_num_seqs
    )
    cost = dyadic_cost(pick, budget, rows, draft.grid_s, windowed="bounded windows" in features)
    if features & {"ranks", "uneven experts", "stages"}:
        cost = replace(cost, expert_s=cost.dense_s * one_of(pick, (0.25, 0.5, 1.0)))
    if "ranks" in features:
        draft.set(rank_routing=one_of(pick, ("round-robin", "least-loaded")))
        cost = replace(cost, ranks=pick(2, 4))
    return with_stages(draft, cost) if "stages" in features else cost


def with_stages(draft: Draft, cost: StepCost) -> PipelineCost:
    """Two to four stages, equal or unequal."""
    pick, n, grid_s = draft.pick, one_of(draft.pick, (2, 2, 3, 4)), draft.grid_s
    equal = pick(0, 2) == 0
    costs = [cost, *(cost if equal else other_stage(pick, cost, grid_s) for _ in range(n - 1))]
    no_head = np.zeros(len(cost.head_s))
    costs = [*(replace(each, head_s=no_head) for each in costs[:-1]), costs[-1]]
    base, per_token = pick(0, 3), pick(0, 1)
    send_s = np.array([[grid_s * (base + per_token * t) for t in range(cost.max_tokens + 1)]] * (n - 1))
    return PipelineCost(tuple(costs), send_s)


def other_stage(pick: Pick, first: StepCost, grid_s: float) -> StepCost:
    """A stage of other times, with the first one's window or none."""
    cost = dyadic_cost(pick, first.max_tokens, first.max_rows, grid_s)
    cost = replace(cost, expert_s=cost.dense_s * one_of(pick, (0.25, 0.5, 1.0)))
    if first.window and cost.window:
        return replace(cost, window=first.window, window_chunked=first.window_chunked)
    planes = cost.prefill_planes * [1, 1, 1, 0, 0]
    return replace(cost, window=0, window_chunked=False, window_slope_s=0.0, prefill_planes=planes)


def with_small_chunks(draft: Draft) -> None:
    """Prompts of many chunks, so that one may follow itself through the stages."""
    pick = draft.pick
    if draft.settings.scheduling.batching == "chunked" and pick(0, 1):
        budget = min(draft.settings.max_num_batched_tokens, draft.settings.max_num_seqs + pick(0, 8))
        draft.set(max_num_batched_tokens=budget, scheduler_reserve_full_isl=False)


def with_bounded_windows(draft: Draft, cost: StepCost | PipelineCost) -> None:
    draft.settings = in_groups(draft.pick, cost.total if isinstance(cost, PipelineCost) else cost, draft.settings)


def with_skew(draft: Draft, cost: StepCost | PipelineCost) -> None:
    del cost
    pick = draft.pick
    draft.set(expert_skew=ExpertSkew(1 + pick(1, 4) / 4, sigma=0.75, seed=pick(0, 99)))


# Hosts and clients


def typical_step_s(cost: StepCost | PipelineCost) -> float:
    table = cost.total if isinstance(cost, PipelineCost) else cost
    return float(table.dense_s[len(table.dense_s) // 2])


def with_host(draft: Draft, cost: StepCost | PipelineCost) -> None:
    pick = draft.pick
    asynchronous = pick(0, 2) > 0
    typical_s = GRID_S * round(typical_step_s(cost) / GRID_S)
    host = HostOverheads(
        step_s=typical_s + GRID_S * pick(0, 40) if asynchronous else GRID_S * pick(0, 40) * pick(0, 1),
        sequence_s=GRID_S * pick(0, 3),
        token_s=GRID_S * pick(0, 1),
        asynchronous=asynchronous,
        request_s=GRID_S * pick(0, 20) * pick(0, 1),
        output_s=GRID_S * pick(0, 9) * pick(0, 1),
    )
    draft.set(host=host if host != HostOverheads(asynchronous=asynchronous) else replace(host, step_s=GRID_S))


def with_clients(draft: Draft, cost: StepCost | PipelineCost) -> None:
    pick = draft.pick
    scale_s = one_of(pick, (0.25, 1.0, 4.0, 16.0)) * 8 * typical_step_s(cost)
    unit_s = max(GRID_S, 2.0 ** round(np.log2(scale_s) - 5))
    earliest_s = draft.settings.host.request_s + unit_s
    columns = {}
    for name in ("ttft_timeout_s", "timeout_s", "cancel_s"):
        if pick(0, 1):
            columns[name] = draft.column(lambda: earliest_s + unit_s * pick(0, 96) if pick(0, 2) else np.inf)
    if not columns:
        columns["timeout_s"] = draft.column(lambda: earliest_s + unit_s * pick(0, 96))
    draft.ask(**columns)
    retries = Retries(max_attempts=pick(1, 3), backoff_s=unit_s * pick(0, 12), backoff_factor=float(pick(1, 2)))
    draft.set(retries=retries)


BEFORE_COSTS = {
    "prefix cache": with_cache,
    "prefix tree": with_tree,
    "batching": with_batching,
    "stages": with_small_chunks,
    "chunk limits": with_chunk_limits,
    "policy": with_policy,
    "watermark": with_watermark,
    "speculation": with_speculation,
    "swap": with_swap,
    "tiers": with_tiers,
    "writing through": with_writing_through,
    "warm store": with_warm_store,
}
"""What decides how long a step may be, and what memory there is."""
AFTER_COSTS = {
    "bounded windows": with_bounded_windows,
    "speculation": with_prices_of_speculation,
    "uneven experts": with_skew,
    "host": with_host,
    "clients that leave": with_clients,
}
"""What is measured in steps."""
