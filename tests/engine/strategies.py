"""Random cases for the engine tests: one builder, drawn from by a seeded generator or by hypothesis.

Dyadic cases keep every time on a grid of 2**-k s, so that float sums are exact in any order, ties are frequent, and
two engines can be asked for equality. Real-looking cases have smooth costs and Poisson arrivals.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from simulator.engine.records import EngineSettings, Requests
from simulator.engine.reference import Replica
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

Pick = Callable[[int, int], int]
"""Draw an integer between two bounds, both included."""

SLOPE_GRID_S = 2.0**-14
TIME_GRIDS_S = (2.0**-10, 2.0**-6, 2.0**-3, 2.0**-2)


class Case(NamedTuple):
    cost: StepCost | PipelineCost
    settings: EngineSettings
    requests: Requests


def one_of(pick: Pick, options: Sequence):
    return options[pick(0, len(options) - 1)]


def step_cost(
    dense_s, head_s, *, knots=(0,), value_s=0.0, slopes_s=(0.0,), decode_seq_s=0.0, planes=((0, 0, 0),), **window
):
    """A StepCost whose times are given and whose FLOPs and bytes are of no interest; g starts at ``value_s``."""
    values = value_s + np.concatenate([[0.0], np.cumsum(np.diff(knots) * np.array(slopes_s[:-1]))])
    return StepCost(
        dense_s=np.array(dense_s, dtype=float),
        head_s=np.array(head_s, dtype=float),
        decode_knots=np.array(knots, dtype=float),
        decode_value_s=values,
        decode_slope_s=np.array(slopes_s, dtype=float),
        decode_seq_s=float(decode_seq_s),
        prefill_planes=np.array(planes, dtype=float),
        chips=1,
        dense_flops=np.zeros(len(dense_s)),
        dense_bytes=np.zeros(len(dense_s)),
        head_flops=np.zeros(len(head_s)),
        head_bytes=np.zeros(len(head_s)),
        attention_flops_per_pair=1.0,
        kv_bytes_per_token=1.0,
        peak_flops_per_s=1.0,
        hbm_bandwidth_bytes_per_s=1.0,
        **window,
    )


def requests_of(arrival_s, prompt, output, cached=None, max_tokens=None, concurrency=0):
    """Requests from plain lists: nothing cached, ``max_tokens`` the true length, unless given."""
    whole = {"dtype": np.int64}
    return Requests(
        arrival_s=np.array(arrival_s, dtype=float),
        prompt_tokens=np.array(prompt, **whole),
        output_tokens=np.array(output, **whole),
        cached_tokens=np.zeros(len(prompt), **whole) if cached is None else np.array(cached, **whole),
        max_tokens=np.array(output if max_tokens is None else max_tokens, **whole),
        concurrency=concurrency,
    )


def dyadic_cost(pick: Pick, max_tokens: int, max_rows: int, grid_s: float, *, windowed: bool = False) -> StepCost:
    base, per_token, jitter = pick(1, 6), pick(0, 2), pick(0, 3)
    dense = [0.0] + [
        grid_s * (base + per_token * n + (pick(0, jitter) if jitter else 0)) for n in range(1, max_tokens + 1)
    ]
    head_base, head_per_row = pick(0, 2), pick(0, 2)
    head = [0.0] + [grid_s * (head_base + head_per_row * rows) for rows in range(1, max_rows + 1)]
    slope_s = one_of(pick, (0.0, 0.0, SLOPE_GRID_S, max(SLOPE_GRID_S, grid_s / 16)))
    knots, slopes = [0], [slope_s * pick(0, 5)]
    for _ in range(pick(0, 5)):
        knots.append(knots[-1] + pick(1, 40))
        slopes.append(slope_s * pick(0, 5))
    planes = [[slope_s * pick(0, 3), slope_s * pick(0, 7), grid_s * pick(0, 2)] for _ in range(pick(1, 3))]
    window, window_slope_s = {}, max(SLOPE_GRID_S, slope_s)
    if windowed or pick(0, 1):
        window = {
            "window": one_of(pick, (pick(1, 8), pick(1, 20), pick(1, 60))),
            "window_chunked": bool(pick(0, 1)),
            "window_slope_s": window_slope_s * pick(0, 5),
        }
        planes = [[*plane, window_slope_s * pick(0, 3), window_slope_s * pick(0, 7)] for plane in planes]
    # A few sequences leave most of the chip idle: their keys cost more, by their number.
    walk_s = [slope_s * (len(knots) * rows % 4) for rows in range(max_rows + 1)]
    return step_cost(
        dense,
        head,
        knots=knots,
        value_s=grid_s * pick(0, 2),
        slopes_s=slopes,
        decode_seq_s=grid_s * pick(0, 1),
        planes=planes,
        decode_walk_s=np.array(walk_s, dtype=float),
        **window,
    )


def in_groups(pick: Pick, cost: StepCost, settings: EngineSettings) -> EngineSettings:
    """The settings with layers in groups, of which those with the cost's window give blocks back; scarce blocks stay scarce."""
    full, windowed = pick(0, 2), pick(1, 4)
    blocks = settings.num_kv_blocks * one_of(pick, (full + windowed, full + windowed, full + 1, max(full, 1)))
    groups = KvGroups(full, windowed, cost.window, cost.window_chunked)
    return replace(settings, kv_groups=groups, num_kv_blocks=max(1, blocks + pick(-3, 3)))


def dyadic_arrivals(pick: Pick, count: int, grid_s: float, concurrency: int) -> list[float]:
    if concurrency:
        return [grid_s * pick(0, 6) * pick(0, 1) for _ in range(count)]
    pattern = one_of(pick, ("at once", "bursts", "steady", "steady", "sparse"))
    if pattern == "at once":
        return [0.0] * count
    now, arrivals = grid_s * pick(0, 3), []
    for _ in range(count):
        gap = {"bursts": pick(0, 40) * (pick(0, 4) == 0), "steady": pick(0, 12), "sparse": pick(0, 120)}[pattern]
        now += grid_s * gap
        arrivals.append(now)
    return arrivals


def dyadic_case(pick: Pick, *, plain_windows: bool = True) -> Case:
    """A plain replica and its requests; ``plain_windows``: also one whose windows are bounded."""
    grid_s = one_of(pick, TIME_GRIDS_S)
    max_num_seqs = pick(1, 7)
    max_num_batched_tokens = max_num_seqs + one_of(pick, (0, pick(0, 6), pick(0, 60)))
    block_size = one_of(pick, (pick(1, 3), pick(1, 16)))

    count = pick(1, 16)
    longest_prompt, longest_output = one_of(pick, (4, 20, 60)), one_of(pick, (3, 15, 40))
    prompt = [pick(1, longest_prompt) for _ in range(count)]
    output = [pick(1, longest_output) for _ in range(count)]
    some_cached, some_slack = pick(0, 2) == 0, pick(0, 2) == 0
    cached = [pick(0, tokens - 1) if some_cached and pick(0, 1) else 0 for tokens in prompt]
    max_tokens = [tokens + (pick(0, 10) if some_slack else 0) for tokens in output]
    concurrency = pick(1, 6) if pick(0, 3) == 0 else 0

    longest = max(p + m for p, m in zip(prompt, max_tokens, strict=True))
    enough = -(-(longest - 1) // block_size)
    num_kv_blocks = max(
        1, one_of(pick, (enough + pick(0, 3), enough + pick(0, enough + 1), enough * 8, enough - pick(0, 3)))
    )
    settings = EngineSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        max_model_len=longest - pick(0, 8) if longest > 9 and pick(0, 4) == 0 else 0,
        scheduler_reserve_full_isl=bool(pick(0, 1)),
    )
    cost = dyadic_cost(pick, max_num_batched_tokens, max_num_seqs, grid_s)
    if plain_windows and cost.window and pick(0, 1):
        settings = in_groups(pick, cost, settings)
    arrivals = dyadic_arrivals(pick, count, grid_s, concurrency)
    case = Case(cost, settings, requests_of(arrivals, prompt, output, cached, max_tokens, concurrency))
    return case if concurrency or pick(0, 4) else with_ties(pick, case)


def with_ties(pick: Pick, case: Case) -> Case:
    """Let the later requests arrive at ends of steps that the earlier ones would have had on their own."""
    cost, settings, requests = case
    few = (len(requests) + 1) // 2
    early = requests.take(slice(few))
    _, steps, _ = observe(Case(cost, settings, early))
    ends = [step.end_s for step in steps if step.end_s >= early.arrival_s[-1]] or [early.arrival_s[-1]]
    late = sorted(one_of(pick, ends) for _ in range(len(requests) - few))
    return Case(cost, settings, replace(requests, arrival_s=np.concatenate([early.arrival_s, late])))


def random_case(seed: int) -> Case:
    """The dyadic case of a seed."""
    rng = np.random.default_rng(seed)
    return dyadic_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def dyadic_cases(draw: st.DrawFn) -> Case:
    """Dyadic cases drawn by hypothesis, so that a failure shrinks."""
    return dyadic_case(lambda low, high: draw(st.integers(low, high)))


def real_case(seed: int) -> Case:
    """A case with smooth costs, Poisson arrivals or a closed loop, and a KV cache under pressure.

    Seeds of 3k have no window, 3k + 1 a sliding and 3k + 2 a chunked one.
    """
    rng = np.random.default_rng(seed)
    max_num_seqs = int(rng.integers(2, 17))
    max_num_batched_tokens = int(rng.integers(64, 400))
    block_size = int(rng.choice([8, 16, 32]))
    count = 30
    prompt = np.clip(np.rint(rng.lognormal(4.5, 0.8, count)), 1, 600).astype(int)
    output = np.clip(np.rint(rng.lognormal(3.3, 0.7, count)), 1, 120).astype(int)
    cached = np.where(rng.random(count) < 0.3, (prompt * rng.random(count) * 0.9).astype(int), 0)
    max_tokens = output + rng.integers(0, 20, count)
    longest = int((prompt + max_tokens).max())
    tokens = np.arange(max_num_batched_tokens + 1)
    dense_s = np.where(tokens > 0, 1e-4 + np.maximum(4.1e-3, 3.3e-5 * tokens) * rng.uniform(0.5, 2), 0.0)
    knots = np.concatenate([[0.0], np.cumsum(rng.integers(50, 1500, 4))])
    cost = step_cost(
        dense_s,
        7.7e-5 * np.arange(max_num_seqs + 1) ** 0.5,
        knots=knots,
        value_s=3e-5,
        slopes_s=rng.uniform(1e-8, 3e-6, len(knots)),
        decode_seq_s=1.3e-6,
        planes=rng.uniform(0, 1, (3, 3)) * [4e-8, 9e-7, 2e-5],
    )
    settings = EngineSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_kv_blocks=int(-(-longest // block_size) * rng.uniform(1, 4)),
        scheduler_reserve_full_isl=bool(rng.integers(2)),
    )
    concurrency = int(rng.integers(1, 12)) if seed % 4 == 0 else 0
    gap_s = rng.exponential(0.05, count)
    arrivals = gap_s if concurrency else np.cumsum(gap_s)
    if seed % 3:
        cost = replace(
            cost,
            window=int(rng.integers(2, 150)),
            window_chunked=seed % 3 == 2,
            window_slope_s=rng.uniform(1e-8, 3e-6),
            prefill_planes=np.hstack([cost.prefill_planes[:, :3], rng.uniform(0, 1, (3, 2)) * [4e-8, 9e-7]]),
        )
    return Case(cost, settings, requests_of(arrivals, prompt, output, cached, max_tokens, concurrency))


def observe(case: Case, timeline_interval_s: float | None = None):
    """Run the reference; return its result, its steps, and every inter-token latency."""
    steps = []
    replica = Replica(*case, steps.append)
    replica.advance()
    return replica.result(timeline_interval_s), steps, replica.itl_s
