"""FasterTransformer's published times on A100: MT-NLG 530B and GPT-3 175B, whole requests of a static batch.

A request is one prefill of the whole batch and a decode step for each further token, priced with the catalogue's efficiencies.
"""

from functools import partial

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.errors import UnpriceableError
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision

CHIP = "a100-80-sxm"


def rows_ours() -> Ours:
    """Our side of ``data/fastertransformer.csv``."""
    return {
        row["id"]: partial(_mfu if row["unit"] == "%" else request_ms, row)
        for row in read_published("fastertransformer")
    }


def request_ms(row: Published) -> float:
    """Prefill and all decode steps of a static batch. [ms]"""
    if row["pp"]:
        raise UnpriceableError(f"pipeline parallelism over {row['pp']} stages is not priced here yet")
    nodes, rest = divmod(int(row["chips"]), 8)
    d = Deployment(
        architecture=load_model(row["model"]),
        slice=resolve_slice(f"{CHIP}:{nodes}x8" if nodes > 1 and not rest else f"{CHIP}:{row['chips']}"),
        precision=parse_precision("fp16"),
    )
    batch, prompt, output = (int(row[name]) for name in ("batch", "prompt", "output"))
    every_prompt = StepShape(n=batch * prompt, P=batch, A=batch * prompt * (prompt + 1) / 2, K=batch * prompt, R=batch)
    decodes = (StepShape.decode(batch, prompt + i) for i in range(1, output))
    return (step_time_s(d, every_prompt) + sum(step_time_s(d, step) for step in decodes)) * 1e3


def _mfu(row: Published) -> float:
    """2·N·(input + output) over peak FLOPs of the published time. [%]"""
    tokens = int(row["batch"]) * (int(row["prompt"]) + int(row["output"]))
    peak = int(row["chips"]) * resolve_slice(f"{CHIP}:1").chip.peak_flops_per_s("fp16")
    return 2 * count(load_model(row["model"])).total * tokens / (peak * float(row["time_ms"]) / 1e3) * 100
