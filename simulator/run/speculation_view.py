"""What speculative decoding is worth at each batch: by the cost model, and by the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import EngineSettings, Requests, Speculation
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.pipeline import ShardedDeployment
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.sharded_cost import compile_sharded
from simulator.roofline.speculation import best_levels, speedup
from simulator.roofline.step_cost import StepCost
from simulator.run.speculation import ResolvedSpeculation, SpeculationOptions, resolve_speculation

Array = NDArray[np.float64]

OUTPUT_TOKENS = 256
"""Of each simulated request; long enough that its last pass's surplus does not show."""
ROUNDS = 2
"""Requests per client of a simulated closed loop."""


@dataclass(frozen=True)
class SpeculationView:
    """Speed-ups (tokens per second with ÷ without) over the batch, every sequence at one context.

    Attributes
    ----------
    batches
        [n] decoding sequences, of each attention rank.
    gains
        [levels, n] of each fixed level; 1 at level 0.
    best
        [n] level that gives most.
    largest
        sequences of the context that the KV cache holds beside the drafter.
    tokens_per_pass
        [levels] mean over the requests.
    simulated
        (clients, speed-up) pairs of the engine: the highest level fixed, and as many drafts as pay.
    """

    deployment: Deployment
    options: SpeculationOptions
    context: int
    batches: NDArray[np.int64]
    gains: Array
    best: NDArray[np.int64]
    largest: int
    tokens_per_pass: Array
    simulated: tuple[tuple[int, float, float], ...] = ()

    @property
    def labels(self) -> list[str]:
        """Names of the levels."""
        if self.options.tree:
            return ["no drafts", f"tree of {sum(self.options.tree)}"]
        return ["no drafts"] + [f"{i} draft{'s' if i > 1 else ''}" for i in range(1, len(self.gains))]


def speculation_view(
    target: Deployment | ShardedDeployment,
    options: SpeculationOptions,
    *,
    context: int,
    simulate_at: Sequence[int] = (),
) -> SpeculationView:
    """Compute the view for batches of 1 to the deployment's ``max_num_seqs``, of attention ranks those of each rank.

    Parameters
    ----------
    target
        a sharded one must be of ``options.decode_tokens``.
    simulate_at
        numbers of clients at which the engine runs as well: a closed loop of requests whose prompts are cached.

    Raises
    ------
    InputError, UnpriceableError, InfeasibleError
        As :func:`simulator.run.speculation.resolve_speculation`; the last also if not one sequence fits, the first for pipeline stages.
    """
    d, cost = _laid(target, options)
    found = resolve_speculation(options, d, cost)
    largest = found.fit.kv_blocks // -(-(context + found.plan.cost.lookahead) // d.block_size)
    if largest < 1:
        raise InfeasibleError(
            f"speculation: not one sequence of {context} tokens fits beside the drafter on {d.slice.spec}"
        )
    weights = found.class_weights
    tokens = 1 + (weights[:, None] * found.plan.survival.sum(axis=2)).sum(axis=0)
    batches = np.arange(1, d.max_num_seqs + 1)
    most = min(cost.max_rows, cost.max_tokens)
    prices = found.plan.cost
    gains = np.array(
        [
            [
                speedup(cost, prices, level, float(tokens[level]), int(batch), context)
                if batch * prices.queries[level] <= most
                else np.nan
                for batch in batches
            ]
            for level in range(len(tokens))
        ]
    )
    table = best_levels(cost, prices, tokens, max_num_seqs=d.max_num_seqs, context=context)
    simulated = tuple(_simulated(d, cost, found, table, context, clients) for clients in simulate_at)
    return SpeculationView(d, options, context, batches, gains, table[1:], largest, tokens, simulated)


def _laid(target: Deployment | ShardedDeployment, options: SpeculationOptions) -> tuple[Deployment, StepCost]:
    """The target, or one rank of it, and the table of all of it."""
    if isinstance(target, Deployment):
        d = replace(target, decode_tokens=options.decode_tokens)
        return d, compile_step_cost(d)
    cost = compile_sharded(target)
    if isinstance(cost, PipelineCost):
        raise InputError(
            f"speculation with sharding {target.sharding}: the next drafts need the last stage's verdict on the present ones; leave pp out"
        )
    return target.whole, cost


def _simulated(
    d: Deployment, cost: StepCost, found: ResolvedSpeculation, table: NDArray[np.int64], context: int, clients: int
) -> tuple[int, float, float]:
    """Speed-ups of a closed loop: its time without speculation over its time with it."""
    from simulator.engine.compiled import simulate  # noqa: PLC0415 - numba takes a while to import

    clients_of_all = clients * cost.ranks
    n = ROUNDS * clients_of_all
    prompt = np.full(n, max(context - OUTPUT_TOKENS // 2, 1))
    output = np.full(n, OUTPUT_TOKENS)
    requests = Requests(np.zeros(n), prompt, output, prompt - 1, output, clients_of_all)
    fixed = replace(found.plan, level_by_batch=np.full(d.max_num_seqs + 1, len(found.plan.cost.queries) - 1))

    def end_s(plan: Speculation | None) -> float:
        settings = EngineSettings(
            d.max_num_seqs, d.max_num_batched_tokens, d.block_size, found.fit.kv_blocks, speculation=plan
        )
        return simulate(cost, settings, requests).end_s

    plain = end_s(None)
    return clients, plain / end_s(fixed), plain / end_s(replace(fixed, level_by_batch=table))
