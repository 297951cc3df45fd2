"""The web agent's chips, correction by correction, and one replica simulated.

The chain starts at the published figure and ends at the engine; each link is a call of the room that knows it.
"""

from dataclasses import dataclass, replace

import numpy as np

from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests
from simulator.randomness import draw
from simulator.reproduction.napkin import (
    AGENT_OVERHEAD_S,
    CACHED,
    CONTEXT,
    GOAL_S,
    NEW,
    OUTPUT,
    QPS,
    accounted_chip_seconds,
    as_written,
    decode_step_s,
    deployment,
    linear_flops,
    peak_flops_per_s,
    prefill_s,
)
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.memory import memory_fit
from simulator.roofline.ops import StepShape

PREFILL_SLICE, DECODE_SLICE = "tpu-v5e:8x8", "tpu-v5e:2x4"
CANDIDATES = ("tpu-v5e:2x4", "tpu-v5e:4x4", "tpu-v5e:4x8", "tpu-v5e:8x8")
SIMULATED_REQUESTS = 4000


@dataclass(frozen=True)
class Link:
    """One link of the chain: a correction and the chip-seconds per query after it."""

    what: str
    chip_seconds: float
    latency_s: float
    """Time of one query on an empty system, the agent's own 0.25 s included."""

    @property
    def chips(self) -> float:
        """Chips at 10,000 queries per second."""
        return self.chip_seconds * QPS


def corrections() -> list[Link]:
    """From the slide to a deployment that could run, without queueing."""
    written = as_written()
    peak = peak_flops_per_s()

    def slide(prefill_1_s: float, chips: int) -> float:
        return accounted_chip_seconds(prefill_1_s, chips)

    layers_and_head = linear_flops(NEW, rows=NEW) / peak
    head_once = linear_flops(NEW) / peak
    with_attention = prefill_s()
    step = decode_step_s()
    chain = [
        Link("as published (prefill on 4x4, decode at its budget on 2x4)", written["chip_seconds"], GOAL_S),
        Link("parameters counted right", slide(layers_and_head, 16), GOAL_S),
        Link("output head on the last prompt token only", slide(head_once, 16), GOAL_S),
        Link(
            "attention over the 122,880 cached tokens (prefill on 8x8 to make the goal)",
            slide(with_attention, 64),
            GOAL_S,
        ),
        Link(
            "decode charged for the time it takes, not for its budget",
            with_attention + OUTPUT * step * 8,
            AGENT_OVERHEAD_S + with_attention / 64 + OUTPUT * step,
        ),
    ]
    scaled = deployment(PREFILL_SLICE, real=True).precision
    for what, real in (
        ("interconnect: 8x8 and 2x4 have no wraparound", False),
        ("int4 scales counted, output head in bf16", False),
        ("efficiency and overheads of the chip family", True),
    ):
        pool = [deployment(PREFILL_SLICE, real=real), deployment(DECODE_SLICE, real=real)]
        if "scales" in what:
            pool = [replace(d, precision=scaled) for d in pool]
        prefill = step_time_s(pool[0], StepShape.prefill(NEW, CACHED))
        decode = OUTPUT * step_time_s(pool[1], StepShape.decode(1, CONTEXT))
        chain.append(Link(what, 64 * prefill + 8 * decode, AGENT_OVERHEAD_S + prefill + decode))
    batch = decode_batch()
    d = deployment(DECODE_SLICE, real=True)
    decode = OUTPUT * step_time_s(d, StepShape.decode(batch, CONTEXT))
    chain.append(
        Link(
            f"decode in batches of {batch}, all that fit the 2x4",
            64 * prefill + 8 * decode / batch,
            AGENT_OVERHEAD_S + prefill + decode,
        )
    )
    return chain


def decode_batch() -> int:
    """Agents whose caches fit the decode slice at once."""
    d = deployment(DECODE_SLICE, real=True, max_num_seqs=16, max_num_batched_tokens=16)
    return memory_fit(d).kv_tokens // (CONTEXT + OUTPUT)


@dataclass(frozen=True)
class Simulated:
    """One replica that prefills and decodes, simulated and scaled to 10,000 queries per second."""

    slice: str
    chips_per_replica: int
    sequences: int
    capacity_per_s: float
    load: float
    rate_per_s: float
    chips: float
    """Chips for 10,000 queries per second: replicas at ``load``, each with Poisson arrivals of its own."""
    alone_s: float
    p50_s: float
    p99_s: float
    """End to end, the agent's 0.25 s included: one query alone, and percentiles at ``load``."""
    share_met: float
    busy_chip_seconds: float

    @property
    def missed_by(self) -> float:
        """How many times the goal the median takes."""
        return self.p50_s / GOAL_S


def simulate_agents(
    spec: str, load: float = 0.7, *, seed: int = 0, requests: int = SIMULATED_REQUESTS
) -> Simulated | None:
    """Simulate one replica on ``spec`` at ``load`` of its own capacity; None if no agent's cache fits."""
    d = deployment(spec, real=True, max_num_seqs=64)
    fit = memory_fit(d)
    sequences = fit.kv_tokens // (CONTEXT + OUTPUT)
    if sequences < 1:
        return None
    cost = compile_step_cost(d)
    settings = EngineSettings(d.max_num_seqs, d.max_num_batched_tokens, d.block_size, fit.kv_blocks)
    gaps = draw(seed, "arrival", 0, requests, lambda rng, n: rng.standard_exponential(n))
    ones = np.ones(requests, dtype=np.int64)
    offline = Requests(0 * gaps, CONTEXT * ones, OUTPUT * ones, CACHED * ones, OUTPUT * ones)
    capacity = requests / simulate(cost, settings, offline).end_s
    alone = simulate(cost, settings, _first(offline))
    rate = load * capacity
    result = simulate(cost, settings, replace(offline, arrival_s=np.cumsum(gaps) / rate))
    warm = slice(requests // 10, None)
    latency = AGENT_OVERHEAD_S + (result.finish_s - result.arrival_s)[warm]
    return Simulated(
        slice=spec,
        chips_per_replica=d.chips,
        sequences=int(sequences),
        capacity_per_s=capacity,
        load=load,
        rate_per_s=rate,
        chips=d.chips * QPS / rate,
        alone_s=AGENT_OVERHEAD_S + float(alone.finish_s[0]),
        p50_s=float(np.quantile(latency, 0.5)),
        p99_s=float(np.quantile(latency, 0.99)),
        share_met=float(np.mean(latency <= GOAL_S)),
        busy_chip_seconds=d.chips * float(result.busy_s[warm].mean()),
    )


def _first(requests: Requests) -> Requests:
    """The first request alone."""
    return Requests(
        requests.arrival_s[:1],
        requests.prompt_tokens[:1],
        requests.output_tokens[:1],
        requests.cached_tokens[:1],
        requests.max_tokens[:1],
    )
