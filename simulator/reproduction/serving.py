"""Measured serving throughput: a roofline no measurement may pass, and what the engine makes of the same requests.

Each row of ``data/{mlperf,trtllm,jetstream}.csv`` states model, chips, precision and lengths. The *bound* is the steady state at
full rates: as many sequences as memory holds, weights read once a step, compute and HBM perfectly overlapped, links free. The
*estimate* queues all requests at once on the engine, with the catalogue's efficiencies and one set of engine settings for every
row. Where a source does not say how the chips were shared, the best tensor-parallel degree counts, in both.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests
from simulator.errors import InputError, UnpriceableError
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.reproduction.textbook import step_without_links_s, textbook
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit, weights_bytes
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.pipeline import ShardedDeployment, shard
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharded_cost import compile_sharded
from simulator.roofline.sharding import Sharding

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 2048, 8192
DEGREES = (1, 2, 4, 8)
LOAD_CURVE_TURNS = 6
"""Requests per client of the load curve; the first third is left out of the means."""


def mlperf_ours() -> Ours:
    """Our side of ``data/mlperf.csv``."""
    return _measured("mlperf")


def trtllm_ours() -> Ours:
    """Our side of ``data/trtllm.csv``: maximum throughput, and one load curve."""
    return _measured("trtllm")


def jetstream_ours() -> Ours:
    """Our side of ``data/jetstream.csv``, and its full-cache scale."""
    d = textbook("llama-3-8b", "tpu-v5e:2x4")
    step_s = partial(step_without_links_s, d, StepShape.decode(128, 2048))
    scale: dict[str, Callable[[], float]] = {
        "full-cache-step": lambda: step_s() * 1e3,
        "full-cache-rate": lambda: 128 / step_s(),
    }
    return scale | _measured("jetstream")


def _measured(table: str) -> dict[str, Callable[[], float]]:
    ours: dict[str, Callable[[], float]] = {}
    for row in read_published(table):
        if not row["model"]:
            continue
        if row["metric"] == "throughput":
            ours[row["id"]] = partial(bound_tokens_per_s if row["kind"] == "bound" else estimate_tokens_per_s, row)
        else:
            ours[row["id"]] = partial(_curve_point, row)
    return ours


def bound_tokens_per_s(row: Published) -> float:
    """Most output tokens per second of all chips. [tokens/s]"""

    def rate(tp: int) -> float:
        d = replace(_deployment(row, tp, scales=False), efficiency=IDEAL, activation_traffic=False, kv_layout="even")
        held = (d.slice.chip.hbm_capacity_bytes - weights_bytes(d)) / d.kv_bytes_per_token
        prompt, output = int(row["prompt"]), int(row["output"])
        batch = min(held / (prompt + (output + 1) / 2), float(row["batch"] or "inf"))
        if batch < 1:
            return 0.0
        step = _steady(batch, prompt, output)
        ops = [op for op in step_ops(d, step) if op.kind != "collective"]
        step_s = max(sum(float(op.compute_s) for op in ops), sum(float(op.memory_s) for op in ops))
        return (batch + step.P) / step_s * int(row["chips"]) / tp

    return max(rate(tp) for tp in _degrees(row))


def estimate_tokens_per_s(row: Published) -> float:
    """Output tokens per second of all chips, every request queued at time 0. [tokens/s]"""
    if row["pp"]:
        return pipelined_tokens_per_s(row)
    rates = []
    for tp in _degrees(row):
        d = _deployment(row, tp)
        fit = memory_fit(d)
        prompt, output = int(row["prompt"]), int(row["output"])
        if fit.kv_tokens < prompt + output:
            continue
        replicas = int(row["chips"]) // tp
        rates.append(replicas * _offline_rate(d, fit.kv_blocks, -(-int(row["requests"]) // replicas), prompt, output))
    if not rates:
        raise UnpriceableError(
            f"{row['model']} does not fit on {row['chips']} x {row['chip']} with the engine's defaults"
        )
    return max(rates)


def pipelined_tokens_per_s(row: Published) -> float:
    """Output tokens per second of all chips in pipelines, every request queued at time 0. [tokens/s]"""
    tp, pp = int(row["tp"] or 1), int(row["pp"])
    settings = _settings(row, tp * pp)
    d = shard(settings.pop("architecture"), settings.pop("slice"), Sharding(tp=tp, pp=pp), **settings)
    replicas = int(row["chips"]) // d.sharding.chips
    requests = -(-int(row["requests"]) // replicas)
    return replicas * _offline_rate(d, d.memory.kv_blocks, requests, int(row["prompt"]), int(row["output"]))


def _steady(batch: float, prompt: int, output: int) -> StepShape:
    """A step of ``batch`` sequences halfway through their outputs, in which as many prompts start as sequences end."""
    new = batch / max(output - 1, 1)
    return StepShape(
        n=batch + new * prompt,
        B=batch,
        S=batch * (prompt + (output + 1) / 2),
        P=new,
        A=new * prompt * (prompt + 1) / 2,
        K=new * prompt,
        R=batch + new,
    )


def _offline_rate(d: Deployment | ShardedDeployment, kv_blocks: int, requests: int, prompt: int, output: int) -> float:
    one = d.stages[0] if isinstance(d, ShardedDeployment) else d
    cost = compile_sharded(d) if isinstance(d, ShardedDeployment) else compile_step_cost(d)
    settings = EngineSettings(one.max_num_seqs, one.max_num_batched_tokens, one.block_size, kv_blocks)
    result = simulate(cost, settings, _same(requests, prompt, output))
    return requests * output / result.end_s


def _curve_point(row: Published) -> float:
    means = _curve(
        row["model"],
        row["chip"],
        int(row["chips"]),
        row["precision"],
        int(row["prompt"]),
        int(row["output"]),
        int(row["batch"]),
    )
    return means[row["metric"]]


@cache
def _curve(
    model: str, chip: str, chips: int, precision: str, prompt: int, output: int, clients: int
) -> Mapping[str, float]:
    """Means of a closed loop of ``clients``: TTFT and ITL [ms], output tokens per second."""
    row = {
        "model": model,
        "chip": chip,
        "chips": str(chips),
        "precision": precision,
        "tp": str(chips),
        "pp": "",
        "batch": "",
    }
    d = _deployment(row, chips)
    settings = EngineSettings(d.max_num_seqs, d.max_num_batched_tokens, d.block_size, memory_fit(d).kv_blocks)
    n = LOAD_CURVE_TURNS * max(clients, 4)
    result = simulate(compile_step_cost(d), settings, _same(n, prompt, output, concurrency=clients))
    kept = slice(n // 3, n - n // 6)
    first = (result.first_token_s - result.arrival_s)[kept]
    between = ((result.finish_s - result.first_token_s) / (output - 1))[kept]
    latency = (result.finish_s - result.arrival_s)[kept]
    return {
        "ttft": float(first.mean()) * 1e3,
        "itl": float(between.mean()) * 1e3,
        "rate": clients * output / float(latency.mean()),
    }


def _same(n: int, prompt: int, output: int, *, concurrency: int = 0) -> Requests:
    ones = np.ones(n, dtype=np.int64)
    return Requests(np.zeros(n), prompt * ones, output * ones, 0 * ones, output * ones, concurrency)


def _degrees(row: Published) -> list[int]:
    """Tensor-parallel degrees to consider: the stated one, or all that divide the chips.

    A bound's links are free and its cache is spread evenly, so pipeline stages count there as tensor parallelism.

    Raises
    ------
    UnpriceableError
        If the model is not priced at any degree.
    """
    if row["tp"]:
        return [int(row["tp"]) * int(row["pp"] or 1)]
    found = []
    for tp in DEGREES:
        if int(row["chips"]) % tp:
            continue
        try:
            _deployment(row, tp)
        except UnpriceableError:
            raise
        except InputError:  # no such slice, or heads that the degree does not divide
            continue
        found.append(tp)
    return found


def _deployment(row: Published, tp: int, *, scales: bool = True) -> Deployment:
    """Describe one replica: the row's model and precision on ``tp`` chips.

    Without ``scales``, as generous as the format allows: no scales, embedding and head quantised too.
    """
    return Deployment(**_settings(row, tp, scales=scales))


def _settings(row: Published, chips: int, *, scales: bool = True) -> dict[str, Any]:
    word = row["precision"] if scales or row["precision"] == "bf16" else f"{row['precision']}g0"
    torus = {8: "2x4", 4: "2x2", 1: "1"}
    shape = torus.get(chips, str(chips)) if row["chip"].startswith("tpu") else str(chips)
    return {
        "architecture": load_model(row["model"]),
        "slice": resolve_slice(f"{row['chip']}:{shape}"),
        "precision": parse_precision(word, quantize_head=not scales),
        "max_num_seqs": min(MAX_NUM_SEQS, int(row["batch"] or MAX_NUM_SEQS)),
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
    }
