"""The compiled engine: the one that a deployment needs, whole runs, and the first compile of each of its loops."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from simulator.engine import jit
from simulator.engine.grouped import RankEngine, StageEngine
from simulator.engine.kv_memory import HostSwap
from simulator.engine.records import (
    EngineResult,
    EngineSettings,
    Requests,
    needs_queue,
)
from simulator.engine.scheduling import Scheduling
from simulator.engine.single import Engine
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost


def simulate(
    cost: StepCost | PipelineCost,
    settings: EngineSettings,
    requests: Requests,
    *,
    timeline_interval_s: float | None = None,
) -> EngineResult:
    """Run ``requests`` through one replica to the end.

    Exact: the schedule, the counts and the times are those of a step-by-step run of the same rules.
    """
    engine = new_engine(cost, settings, requests, timeline_interval_s=timeline_interval_s)
    engine.advance()
    return engine.result()


def new_engine(
    cost: StepCost | PipelineCost,
    settings: EngineSettings,
    requests: Requests,
    *,
    timeline_interval_s: float | None = None,
) -> Engine:
    """The engine that a deployment needs: a plain one, or one of several ranks or stages."""
    if isinstance(cost, PipelineCost) and len(cost.stages) == 1:
        cost = cost.stages[0]
    if isinstance(cost, StepCost) and cost.ranks == 1 and not settings.expert_skew.on:
        return Engine(cost, settings, requests, timeline_interval_s=timeline_interval_s)
    if isinstance(cost, PipelineCost):
        return StageEngine(cost, settings, requests, timeline_interval_s=timeline_interval_s)
    return RankEngine(cost, settings, requests, timeline_interval_s=timeline_interval_s)


def form_of(cost: StepCost | PipelineCost, settings: EngineSettings, *, clients_leave: bool) -> str:
    """Name of the loop, as it is compiled, that a run takes.

    ``plain``; ``policies``, with a queue; ``features``, with all that remembers too; and ``ranks`` and ``stages``, with ``-features`` or without.
    """
    remembers = settings.prefix_cache != "off" or settings.speculation is not None or settings.swap is not None
    if isinstance(cost, PipelineCost) and len(cost.stages) > 1:
        return "stages-features" if remembers else "stages"
    table = cost.stages[0] if isinstance(cost, PipelineCost) else cost
    if table.ranks > 1 or settings.expert_skew.on:
        return "ranks-features" if remembers else "ranks"
    if remembers:
        return "features"
    return "policies" if needs_queue(settings, clients_leave=clients_leave) else "plain"


def warm_up(form: str = "plain") -> None:
    """Compile one of the engine's loops into the disk cache (once per version) so that later calls start at once."""
    one = np.ones(1, dtype=np.int64)
    table = np.array([0.0, 1.0])
    cost: StepCost | PipelineCost = StepCost(
        dense_s=table,
        head_s=table,
        decode_knots=np.zeros(1),
        decode_value_s=np.zeros(1),
        decode_slope_s=np.zeros(1),
        decode_seq_s=0.0,
        prefill_planes=np.zeros((1, 3)),
        chips=1,
        dense_flops=table,
        dense_bytes=table,
        head_flops=table,
        head_bytes=table,
        attention_flops_per_pair=0.0,
        kv_bytes_per_token=0.0,
        peak_flops_per_s=1.0,
        hbm_bandwidth_bytes_per_s=1.0,
        ranks=2 if form.startswith("ranks") else 1,
    )
    if isinstance(cost, StepCost) and form.startswith("stages"):
        cost = PipelineCost((cost, cost), np.zeros((1, 2)))
    settings = EngineSettings(
        max_num_seqs=1,
        max_num_batched_tokens=1,
        num_kv_blocks=1,
        scheduling=Scheduling(policy="priority" if form == "policies" else "fcfs"),
        swap=HostSwap(0) if form.endswith("features") else None,
    )
    with _no_collection():
        simulate(cost, settings, Requests(np.zeros(1), one, one, one * 0, one, priority=one))
    jit.mark_warm(form)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage in cycles: what a compiler holds lives to its end, and to look through it again and again takes a tenth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
