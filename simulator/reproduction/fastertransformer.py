"""FasterTransformer's published times on A100: MT-NLG 530B and GPT-3 175B, whole requests of a static batch.

A request is one prefill of the whole batch and a decode step for each further token, priced with the catalogue's efficiencies.
"""

from functools import partial

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.roofline.compile import step_time_s
from simulator.roofline.ops import StepShape
from simulator.roofline.pipeline import ShardedDeployment, flow_s, shard, sharded_report
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharding import Sharding

CHIP = "a100-80-sxm"


def rows_ours() -> Ours:
    """Our side of ``data/fastertransformer.csv``."""
    return {
        row["id"]: partial(_mfu if row["unit"] == "%" else request_ms, row)
        for row in read_published("fastertransformer")
    }


def request_ms(row: Published) -> float:
    """Prefill and all decode steps of a static batch. [ms]"""
    nodes, chips = int(row["chips"]) // 8, int(row["chips"])
    stages = int(row["pp"] or 1)
    d = shard(
        load_model(row["model"]),
        resolve_slice(f"{CHIP}:{nodes}x8" if nodes > 1 else f"{CHIP}:{chips}"),
        Sharding(tp=chips // stages, pp=stages),
        precision=parse_precision("fp16"),
    )
    batch, prompt, output = (int(row[name]) for name in ("batch", "prompt", "output"))
    decodes_s = (sharded_report(d, decode=batch, context=prompt + i).time_s for i in range(1, output))
    return (_prefill_s(d, batch, prompt) + sum(decodes_s)) * 1e3


def _prefill_s(d: ShardedDeployment, batch: int, prompt: int) -> float:
    """All prompts of a batch, in as many micro-batches as there are stages. [s]"""
    pp = d.sharding.pp
    sizes = [batch // pp + (i < batch % pp) for i in range(pp)]
    times = [[step_time_s(stage, _prompts(size, prompt)) for stage in d.stages] for size in sizes if size]
    send_s = sharded_report(d, prefill=len(times) * max(sizes) * prompt, micro_batches=len(times)).send_s
    return flow_s(times, [send_s] * (pp - 1))


def _prompts(batch: int, prompt: int) -> StepShape:
    """Whole prompts in one step."""
    tokens = batch * prompt
    return StepShape(n=tokens, P=batch, A=tokens * (prompt + 1) / 2, K=tokens, R=batch)


def _mfu(row: Published) -> float:
    """2·N·(input + output) over peak FLOPs of the published time. [%]"""
    tokens = int(row["batch"]) * (int(row["prompt"]) + int(row["output"]))
    peak = int(row["chips"]) * resolve_slice(f"{CHIP}:1").chip.peak_flops_per_s("fp16")
    return 2 * count(load_model(row["model"])).total * tokens / (peak * float(row["time_ms"]) / 1e3) * 100
