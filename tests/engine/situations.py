"""Special situations that a run of the reference engine meets, by name, so that tests can demand that they are frequent."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from simulator.engine.records import CANCELLED, FINISHED, TIMED_OUT
from simulator.engine.reference_state import StepRecord
from simulator.engine.refusals import features_of
from simulator.roofline.pipeline_cost import PipelineCost
from tests.engine.strategies import Case

#: Situations that each feature must meet often, in mixtures that have it; those of "" in all mixtures.
SITUATIONS = {
    "": (
        "preemption",
        "full token budget",
        "arrival at a step's end",
        "knot crossed during a run",
        "window saturated during decode",
        "chunk window wrapped",
        "max_num_seqs full",
        "admission blocked by memory",
        "several chunks in a step",
        "mixed step",
        "rejection",
        "idle",
        "closed loop",
        "level change within a batch",
        "hit in use",
        "eviction",
        "load",
        "swapped out",
        "timeouts",
        "retries",
        "ranks of unequal tokens",
        "all stages taken",
    ),
    "policy": ("overtaking", "preemption by class", "victim that is not the last to run", "several tenants"),
    "batching": ("decodes that sit a step out", "waiting for a static batch"),
    "chunk limits": ("several unfinished prompts",),
    "watermark": ("admission blocked by memory",),
    "host": ("host slower than device", "device overtakes the host", "host work in sequence"),
    "clients that leave": (
        "timeouts",
        "cancellations",
        "retries",
        "left while decoding",
        "left without having run",
        "finished in a later attempt",
        "closed loop with clients that leave",
    ),
    "bounded windows": (
        "a prompt's window leaves blocks",
        "a decode's window leaves blocks",
        "room that a window has left",
        "preemption",
    ),
    "prefix cache": (
        "full hit",
        "hit after preemption",
        "no hit after preemption",
        "hit in use",
        "hit from the queue",
        "stated cache longer than the hits",
        "two blocks under one id",
        "output block published",
        "block kept by another",
        "eviction",
    ),
    "prefix tree": (
        "hit in use",
        "eviction",
        "own block replaced by one in the tree",
        "blank blocks beside cached ones",
    ),
    "swap": (
        "swapped out",
        "swapped out in prefill",
        "host full",
        "swapped in",
        "several copies in a step",
        "copies hidden",
        "copies waited for",
    ),
    "tiers": (
        "load",
        "load from two tiers",
        "link shared",
        "others run meanwhile",
        "still there",
        "moved to the second tier",
        "dropped",
        "starts after the load",
        "loaded, but no room",
        "nothing to do but load",
        "computed again instead",
    ),
    "writing through": ("put", "load of what was put"),
    "warm store": ("load of what was there at the start",),
    "speculation": (
        "level change within a batch",
        "level lowered by the budget",
        "no drafts at this batch",
        "several tokens in a pass",
        "several blocks in a pass",
        "surplus in a last pass",
        "rates that differ within a batch",
        "sliding window",
        "chunked window",
        "preempted with a fraction",
        "knot crossed by a batch",
    ),
    "uneven experts": ("uneven experts",),
    "ranks": ("an idle rank", "ranks of unequal tokens", "another rank becomes the slowest", "least-loaded"),
    "stages": (
        "a prompt follows itself",
        "a prompt in flight waits for blocks",
        "all stages taken",
        "two micro-batches at one instant",
        "a try that only preempts",
    ),
}

#: Situations that two features meet often together.
TOGETHER = {
    ("bounded windows", "prefix cache"): (
        "a window leaves published blocks",
        "a window leaves published and other blocks at once",
        "a window leaves what others own",
        "a hit cut by what windows have lost",
        "a hit without the blocks before its window",
        "windowed groups that have lost different blocks",
        "hit after preemption",
        "eviction",
    ),
}

#: Situations of two features at once that must occur at all in the seeded mixtures.
MEETINGS = (
    "left while loading",
    "left while swapped out",
    "left in the middle of speculation",
    "left while in flight",
    "swapped out with a hit",
    "swapped in under a policy",
    "loaded under a policy",
    "preempted by class with a hit",
    "swap with a watermark",
    "hits on several ranks",
    "hits in a pipeline",
    "whole prompt shortened by a hit",
    "drafts with host work",
)


def total_cost(case: Case):
    return case.cost.total if isinstance(case.cost, PipelineCost) else case.cost


def of_steps(case: Case, steps: Sequence[StepRecord]) -> set[str]:
    """Situations of a plain replica, or of one rank."""
    cost, settings = total_cost(case), case.settings
    met = set()
    decode_only = [step for step in steps if step.B and not step.P]

    def slope(step):
        return cost.decode_slope_s[np.searchsorted(cost.decode_knots, step.S, side="right") - 1]

    if any(_preempted_itself(before, step) for before, step in pairwise(steps)):
        met.add("self-preemption")
    if any(len(step.preempted) > 1 for step in steps):
        met.add("several preemptions in a step")
    if any(step.n == settings.max_num_batched_tokens for step in steps):
        met.add("full token budget")
    if any(step.running and not set(step.running) <= set(step.scheduled) for step in steps):
        met.add("running request without budget")
    if any(a.running == b.running and slope(a) != slope(b) for a, b in pairwise(decode_only)):
        met.add("knot crossed during a run")
    contexts = _contexts_that_grow(decode_only)
    if cost.window and not cost.window_chunked and cost.window in contexts:
        met.add("window saturated during decode")
    if cost.window > 1 and cost.window_chunked and any(context % cost.window == 0 for context in contexts):
        met.add("chunk window wrapped")
    if any(len(step.running) == settings.max_num_seqs and step.waiting for step in steps):
        met.add("max_num_seqs full")
    if any(_blocked_by_memory(case, step) for step in steps):
        met.add("admission blocked by memory")
    if any(step.P > 1 for step in steps):
        met.add("several chunks in a step")
    if any(step.P and step.B for step in steps):
        met.add("mixed step")
    return met


def _contexts_that_grow(decode_only: Sequence[StepRecord]) -> set[int]:
    """Contexts of decoding requests that grow in the next step of the same batch."""
    same_batch = [step for step, after in pairwise(decode_only) if step.running == after.running]
    return {step.computed[row] + 1 for step in same_batch for row in step.scheduled}


def _preempted_itself(before: StepRecord, step: StepRecord) -> bool:
    """Whether the last victim of a step was the request that wanted blocks: then all of its own are free."""
    return bool(step.preempted) and step.free_blocks >= before.blocks.get(step.preempted[-1], 1 << 60)


def _blocked_by_memory(case: Case, step: StepRecord) -> bool:
    settings = case.settings
    return bool(
        step.waiting
        and not step.preempted
        and len(step.running) < settings.max_num_seqs
        and step.n < settings.max_num_batched_tokens
    )


def of_result(case: Case, result, steps: Sequence[StepRecord]) -> set[str]:
    """Situations that show in what is counted."""
    requests, totals = case.requests, result.totals
    met = {name for name in ("timeouts", "cancellations", "retries") if totals[name]}
    ends = {step.end_s for step in steps}
    if totals["preemptions"]:
        met.add("preemption")
    if not requests.concurrency and any(arrival_s in ends for arrival_s in requests.arrival_s):
        met.add("arrival at a step's end")
    if requests.concurrency:
        met.add("closed loop")
        if (np.diff(np.sort(result.finish_s[result.status == FINISHED])) == 0).any():
            met.add("two clients freed at once")
    if (result.status == 1).any():
        met.add("rejection")
    if result.idle_s > 0:
        met.add("idle")
    if totals["abandoned_outputs"]:
        met.add("left while decoding")
    gone = np.isin(result.status, (TIMED_OUT, CANCELLED))
    if (gone & np.isnan(result.scheduled_s)).any():
        met.add("left without having run")
    if ((result.attempts > 1) & (result.status == FINISHED)).any():
        met.add("finished in a later attempt")
    if requests.concurrency and gone.any():
        met.add("closed loop with clients that leave")
    if case.settings.expert_skew.on:
        met.add("uneven experts")
    if totals.get("evicted_blocks"):
        met.add("eviction")
    if totals.get("loads_declined"):
        met.add("computed again instead")
    return met


def of_scheduling(case: Case, steps: Sequence[StepRecord]) -> set[str]:
    """Situations of policies, batching modes and hosts."""
    settings, requests = case.settings, case.requests
    scheduling, host = settings.scheduling, settings.host
    met = set()
    admitted = [row for step in steps for row in step.admitted]
    if not requests.concurrency and any(a > b for a, b in pairwise(admitted)):
        met.add("overtaking")
    if scheduling.preempt_lower and any(step.preempted and step.admitted for step in steps):
        met.add("preemption by class")
    if any(_not_last(before, step) for before, step in pairwise(steps)):
        met.add("victim that is not the last to run")
    unfinished = [
        sum(step.computed[row] + step.scheduled.get(row, 0) < requests.prompt_tokens[row] for row in step.running)
        for step in steps
    ]
    if any(n > 1 for n in unfinished):
        met.add("several unfinished prompts")
    stalled = [step for step in steps if step.P and not step.B and len(step.scheduled) < len(step.running)]
    if scheduling.batching in {"prefill_first", "static"} and stalled:
        met.add("decodes that sit a step out")
    if scheduling.batching == "static" and any(step.waiting and step.B for step in steps):
        met.add("waiting for a static batch")
    if host.asynchronous and any(step.host_s > 0 for step in steps):
        met.add("host slower than device")
    if host.asynchronous and any(a.host_s > 0 and b.host_s == 0 for a, b in pairwise(steps)):
        met.add("device overtakes the host")
    if not host.asynchronous and any(step.host_s > 0 for step in steps):
        met.add("host work in sequence")
    if scheduling.policy == "fair" and len(set(requests.tenant.tolist())) > 1:
        met.add("several tenants")
    return met


def _not_last(before, step) -> bool:
    """Whether somebody preempted was not at the end of the running list."""
    survivors = [row for row in before.running if row in set(step.running) - set(step.preempted)]
    last = before.running.index(survivors[-1]) if survivors else -1
    return any(row in before.running and before.running.index(row) < last for row in step.preempted)


def of_speculation(case: Case, result, steps: Sequence[StepRecord]) -> set[str]:
    """Situations of speculation."""
    cost, limits, requests = total_cost(case), case.settings, case.requests
    plan, found = limits.speculation, result.speculation
    if plan is None:
        return set()
    met = set()
    levels = plan.levels(limits.max_num_seqs, limits.max_num_batched_tokens)
    batches = {step.B for step in steps if step.B}
    # The level is chosen before anybody is preempted.
    calm = sorted((step for step in steps if step.B and not step.preempted), key=lambda step: step.rank)
    same_rank = [(a, b) for a, b in pairwise(calm) if a.rank == b.rank]
    if any(a.level != b.level and set(a.running) & set(b.running) for a, b in same_rank):
        met.add("level change within a batch")
    if any(levels[b] < plan.level_by_batch[b] for b in batches):
        met.add("level lowered by the budget")
    if any(plan.level_by_batch[b] == 0 for b in batches) and found.passes[1:].any():
        met.add("no drafts at this batch")
    gains = [
        (b.computed[row] - a.computed[row], b.blocks[row] - a.blocks[row], a.computed[row])
        for a, b in pairwise(steps)
        for row in a.scheduled
        if row in b.running and row not in b.preempted and a.computed[row] >= requests.prompt_tokens[row]
    ]
    if any(tokens > 1 for tokens, _, _ in gains):
        met.add("several tokens in a pass")
        if cost.window:
            met.add("chunked window" if cost.window_chunked else "sliding window")
    if any(blocks > 1 for _, blocks, _ in gains):
        met.add("several blocks in a pass")
    rates = plan.rates[:, 1:] if requests.acceptance_class is not None else plan.rates[:1, 1:]
    if found.passes[1:].any() and len(np.unique(rates)) > 1 and found.passes[1:, 2:].any():
        met.add("rates that differ within a batch")
    done = result.status == FINISHED
    gained = (requests.output_tokens[done] - 1 - result.preemptions[done]).sum()
    if found.passes[1:].any() and gained > 0 and (rates % (1 << 16)).any():
        met.add("surplus in a last pass")
        if result.totals["preemptions"]:
            met.add("preempted with a fraction")
    if any(np.searchsorted(cost.decode_knots, a.S) != np.searchsorted(cost.decode_knots, b.S) for a, b in same_rank):
        met.add("knot crossed by a batch")
    return met


def of_ranks(case: Case, steps: Sequence[StepRecord]) -> set[str]:
    """Situations of ranks in lock-step."""
    ranks = total_cost(case).ranks
    if ranks == 1:
        return set()
    met = set()
    together = defaultdict(list)
    for step in steps:
        together[step.start_s].append(step)
    if any(len(own) < ranks for own in together.values()):
        met.add("an idle rank")
    if any(len({step.n for step in own}) > 1 for own in together.values()):
        met.add("ranks of unequal tokens")
    slowest = {(max(own, key=lambda step: step.S).running, len(own)) for own in together.values()}
    if len(slowest) > 2:
        met.add("another rank becomes the slowest")
    if case.settings.rank_routing == "least-loaded":
        met.add("least-loaded")
    return met


def of_stages(case: Case, result, steps: Sequence[StepRecord]) -> set[str]:
    """Situations of micro-batches in flight."""
    if not isinstance(case.cost, PipelineCost):
        return set()
    settings, n = case.settings, len(case.cost.stages)
    met = set()
    if result.totals["preemptions"] > sum(len(step.preempted) for step in steps):
        met.add("a try that only preempts")
    for before, step in pairwise(steps):
        partial = [row for row, tokens in before.scheduled.items() if before.computed[row] == 0 and tokens > 1]
        if step.start_s < before.end_s and any(step.computed.get(row) for row in partial if row in step.scheduled):
            met.add("a prompt follows itself")
        if before.start_s == step.start_s:
            met.add("two micro-batches at one instant")
    for k, step in enumerate(steps):
        flying = [other for other in steps[:k] if other.end_s > step.start_s]
        if len(flying) + 1 == n:
            met.add("all stages taken")
        last = step.running[-1] if step.running else -1
        begun = step.computed.get(last, 0)
        in_chunks = {
            row for other in flying for row in other.scheduled if other.computed[row] + other.scheduled[row] < begun + 1
        }
        unfinished = last in in_chunks and begun < case.requests.prompt_tokens[last]
        if unfinished and last not in step.scheduled and step.n < settings.max_num_batched_tokens:
            met.add("a prompt in flight waits for blocks")
    return met


def of_meetings(case: Case, result, met: set[str]) -> set[str]:
    """Situations of several features at once that show in the others' names."""
    found = set()
    features = features_of(*case)
    if sum(name.startswith("hit on rank") for name in met) > 1:
        found.add("hits on several ranks")
    if "stages" in features and met & {"hit in use", "hit from the queue"}:
        found.add("hits in a pipeline")
    if "preemption by class" in met and "hit after preemption" in met:
        found.add("preempted by class with a hit")
    if {"speculation", "host"} <= features and result.totals["host_s"] and "several tokens in a pass" in met:
        found.add("drafts with host work")
    return found
