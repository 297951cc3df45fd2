"""Compile a sharded deployment into what the engines run on: one table, one of lock-step ranks, or one per stage."""

from dataclasses import replace

import numpy as np

from simulator.errors import InputError
from simulator.roofline.compile import compile_part
from simulator.roofline.pipeline import ShardedDeployment, sends_s
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost


def compile_sharded(d: ShardedDeployment) -> StepCost | PipelineCost:
    """Step costs of one replica of ``d``.

    With ``ep``, the ``dp`` attention ranks are one replica, whose ranks step together, each with a table's n tokens. Without, ``dp``
    counts replicas, and this is the cost of one. With ``pp``, the cost has a table per stage.

    Raises
    ------
    InputError
        For context parallelism, which cannot decode; for ranks inside a pipeline, which the engines do not run; for a
        cache spread over sequences.

    Examples
    --------
    >>> from simulator.catalog.models import load_model
    >>> from simulator.catalog.slices import resolve_slice
    >>> from simulator.roofline.pipeline import shard
    >>> from simulator.roofline.sharding import parse_sharding
    >>> two = shard(load_model("llama-3-70b"), resolve_slice("h100-sxm:2x8"), parse_sharding("tp8pp2"), max_num_batched_tokens=512)
    >>> cost = compile_sharded(two)
    >>> len(cost.stages), cost.total.chips
    (2, 16)
    """
    s = d.sharding
    ranks = s.dp if s.ep > 1 else 1
    if s.pp == 1:
        cost = compile_part(d.stages[0])
        if ranks == 1:
            return cost
        return replace(
            cost,
            ranks=ranks,
            chips=ranks * cost.chips,
            peak_flops_per_s=ranks * cost.peak_flops_per_s,
            hbm_bandwidth_bytes_per_s=ranks * cost.hbm_bandwidth_bytes_per_s,
        )
    if ranks > 1:
        raise InputError(
            f"sharding {s}: {ranks} attention ranks that share experts inside {s.pp} pipeline stages; the engines run one or "
            "the other: dp and ep without pp, or pp with tp alone"
        )
    found = {id(stage): compile_part(stage) for stage in d.stages}
    # A send takes a latency and a time per token.
    one, two = (np.array(sends_s(d, n))[:, None] for n in (1.0, 2.0))
    n = np.arange(found[id(d.stages[0])].max_tokens + 1)
    return PipelineCost(
        tuple(found[id(stage)] for stage in d.stages), np.where(n > 0, one + (n - 1) * (two - one), 0.0)
    )
