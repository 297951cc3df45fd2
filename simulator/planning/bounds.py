"""Sound roofline bounds: what no schedule of a deployment can beat, from its cost tables and the requests alone.

A step of n tokens takes at least α + β·n for every pair (α, β) whose line lies under the table ``dense_s``. So requests of t
tokens in all, served in at least k steps, take at least α·k + β·t, whatever steps they share with whom; the best of some lines
bounds a prompt's prefill (t its tokens) and a whole stream (t all tokens). Attention is a maximum of planes (prefill) and a
curve over a line (decode), so the sums of its arguments bound its sum. A running request holds a seat and its KV blocks for at
least so long, and there are only so many of either (Little's law). Recomputation, waiting, host work, larger batches and smaller
chunks only add to this.

The bounds hold for first-come and every other policy with chunked batching, one token per sequence and step, and cached tokens
as the requests state them. Where they do not hold (speculative decoding, a prefix cache, other batching modes), there are none.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import EngineSettings, Requests
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost, window_pairs

Array = NDArray[np.float64]

#: Slopes of the lines tried, as shares of the steepest that starts at or above 0.
_SLOPES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
#: Bounds are lowered by this much, so that rounding never lets one exceed what it bounds.
_SLACK = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class Floors:
    """What a replica cannot beat.

    Attributes
    ----------
    accepted
        [n] requests that are not rejected on arrival (rule R4).
    ttft_s, tpot_s, e2e_s
        [n] least latencies; NaN for the TPOT of a one-token output. [s]
    requests_per_s
        most requests per second of these lengths; infinite where nothing is known. [1/s]
    """

    accepted: NDArray[np.bool_]
    ttft_s: Array
    tpot_s: Array
    e2e_s: Array
    requests_per_s: float


def floors(cost: StepCost | PipelineCost, settings: EngineSettings, requests: Requests) -> Floors:
    """Bounds of one replica for a stream of requests."""
    accepted = fitting(settings, requests)
    n = len(requests)
    plain = (
        settings.speculation is None and settings.prefix_cache == "off" and settings.scheduling.batching == "chunked"
    )
    if not plain:
        nothing = np.zeros(n)
        return Floors(accepted, nothing, np.where(requests.output_tokens > 1, 0.0, np.nan), nothing, np.inf)
    stages = cost.stages if isinstance(cost, PipelineCost) else (cost,)
    gaps = requests.output_tokens - 1
    # A token passes through all stages; the chunks of a prompt may be in several at a time.
    kinds = Counter(id(stage) for stage in stages)  # equal inner stages are one object
    unlike = {id(stage): stage for stage in stages}
    prefill = np.max([_prefill_s(stage, settings, requests) for stage in unlike.values()], axis=0)
    token_s = np.sum([kinds[k] * _token_s(stage, settings, requests) for k, stage in unlike.items()], axis=0)
    if isinstance(cost, PipelineCost):
        token_s = token_s + float(cost.send_s[:, 1:].min(axis=1).sum())
    busiest_s = max(_stream_s(stage, settings, requests, accepted) for stage in unlike.values())
    served = int(accepted.sum())
    crowd_s = _crowd_s(cost, settings, requests, accepted, prefill, token_s)
    return Floors(
        accepted=accepted,
        ttft_s=prefill * _SLACK,
        tpot_s=np.where(gaps > 0, token_s, np.nan) * _SLACK,
        e2e_s=(prefill + gaps * token_s) * _SLACK,
        requests_per_s=served / (max(busiest_s, crowd_s) * _SLACK) if served else 0.0,
    )


def _crowd_s(
    cost: StepCost | PipelineCost,
    settings: EngineSettings,
    requests: Requests,
    accepted: NDArray[np.bool_],
    prefill_s: Array,
    token_s: Array,
) -> float:
    """Least time in which all accepted requests find a seat and KV blocks, which each holds as long as it runs. [s]

    It bounds a pipeline better than its busiest stage does: a sequence holds its seat on the way through all of them.
    """
    total = cost.total if isinstance(cost, PipelineCost) else cost
    prompt, gaps = requests.prompt_tokens[accepted], requests.output_tokens[accepted] - 1
    decode_s = gaps * token_s[accepted]
    seats = float((prefill_s[accepted] + decode_s).sum()) / settings.max_num_seqs
    # The more a sequence holds, the longer its steps take: the sum of the products is at least the product of the means. Not so
    # where contexts start over.
    grows = not (total.window_chunked and total.window_slope_s)
    held = float((decode_s * (prompt + (gaps + 1) / 2)).sum()) / (settings.num_kv_blocks * settings.block_size)
    return max(seats, held if grows else 0.0) / total.ranks


def fitting(settings: EngineSettings, requests: Requests) -> NDArray[np.bool_]:
    """Which requests the engine does not reject on arrival (rule R4)."""
    longest = requests.prompt_tokens + requests.max_tokens
    fits = -(-(longest - 1) // settings.block_size) <= settings.num_kv_blocks
    return np.asarray(fits & (longest <= settings.max_model_len) if settings.max_model_len else fits)


def _lines(table: Array, largest: int) -> Array:
    """[k, 2] lines (α, β), α at least 0, under the entries 1 … ``largest`` of a table."""
    y, x = table[1 : largest + 1], np.arange(1, min(largest, len(table) - 1) + 1)
    slopes = float((y / x).min()) * _SLOPES
    return np.stack([np.maximum((y - slopes[:, None] * x).min(axis=1), 0.0), slopes], axis=1)


def _chunks(settings: EngineSettings, requests: Requests) -> NDArray[np.int64]:
    """[n] steps that a prompt takes at least."""
    return -(-(requests.prompt_tokens - requests.cached_tokens) // settings.max_num_batched_tokens)


def _prompt_figures(cost: StepCost, settings: EngineSettings, requests: Requests) -> Array:
    """[n, 5] least sums of A, K, P, AW, KW over the chunks of each prompt."""
    prompt, cached, budget = requests.prompt_tokens, requests.cached_tokens, settings.max_num_batched_tokens
    new, chunks = prompt - cached, _chunks(settings, requests)
    pairs = new * cached + new * (new + 1) // 2
    # The j-th chunk from the end reads at least what is before the last j budgets.
    read = chunks * prompt - budget * (chunks * (chunks - 1) // 2)
    seen = np.zeros(len(requests))
    if cost.window:
        after, before = (window_pairs(t, cost.window, chunked=cost.window_chunked) for t in (prompt, cached))
        seen = np.asarray(after - before, dtype=np.float64)
    return np.stack([pairs, read, chunks, seen, np.zeros(len(requests))], axis=1).astype(np.float64)


def _prefill_s(cost: StepCost, settings: EngineSettings, requests: Requests) -> Array:
    """[n] least time of each prompt's chunks in one stage. [s]"""
    new, chunks = requests.prompt_tokens - requests.cached_tokens, _chunks(settings, requests)
    alpha, beta = _lines(cost.dense_s, settings.max_num_batched_tokens).T
    dense = (alpha[:, None] * chunks + beta[:, None] * new).max(axis=0)
    attention = (_prompt_figures(cost, settings, requests) @ cost.prefill_planes.T).max(axis=1)
    return np.asarray(dense + attention + float(cost.head_s[1 : settings.max_num_seqs + 1].min()))


def _token_s(cost: StepCost, settings: EngineSettings, requests: Requests) -> Array:
    """[n] least mean time of the decode steps that a request is in. [s]"""
    prompt, gaps = requests.prompt_tokens, requests.output_tokens - 1
    fixed = float(cost.dense_s[1 : settings.max_num_batched_tokens + 1].min()) + cost.decode_seq_s
    fixed += float(cost.head_s[1 : settings.max_num_seqs + 1].min())
    slope, start = _key_line(cost)
    found = fixed + start + slope * (prompt + (gaps + 1) / 2)
    if cost.window_slope_s:
        found += cost.window_slope_s * _seen(cost, prompt, gaps) / np.maximum(gaps, 1)
    return np.asarray(found)


def _seen(cost: StepCost, prompt: NDArray[np.int64], decodes: NDArray[np.int64]) -> Array:
    """[n] keys that each request's decode steps see through the window."""
    after, before = (window_pairs(t, cost.window, chunked=cost.window_chunked) for t in (prompt + decodes, prompt))
    return np.asarray(after - before, dtype=np.float64)


def _key_line(cost: StepCost) -> tuple[float, float]:
    """Slope and start of a line under the decode curve g(S)."""
    slope = float(cost.decode_slope_s.min())
    return slope, max(0.0, float((cost.decode_value_s - slope * cost.decode_knots).min()))


def _stream_s(cost: StepCost, settings: EngineSettings, requests: Requests, accepted: NDArray[np.bool_]) -> float:
    """Least time of one stage, or of ranks in lock-step, for all accepted requests together. [s]"""
    prompt, output = requests.prompt_tokens[accepted], requests.output_tokens[accepted]
    new, decodes = prompt - requests.cached_tokens[accepted], output - 1
    keys = float((decodes * prompt + decodes * (decodes + 1) // 2).sum())
    n_decodes, tokens = float(decodes.sum()), float(new.sum() + decodes.sum())
    rows = n_decodes + len(prompt)
    held = settings.num_kv_blocks * settings.block_size
    decode_steps = max(n_decodes / settings.max_num_seqs, keys / held)
    steps = max(tokens / settings.max_num_batched_tokens, decode_steps)
    alpha, beta = _lines(cost.dense_s, settings.max_num_batched_tokens).T
    total = float((alpha * steps + beta * tokens).max())
    alpha, beta = _lines(cost.head_s, settings.max_num_seqs).T
    total += float((alpha * rows / settings.max_num_seqs + beta * rows).max())
    slope, start = _key_line(cost)
    total += start * decode_steps + slope * keys + cost.decode_seq_s * n_decodes
    if cost.window_slope_s:
        total += cost.window_slope_s * float(_seen(cost, prompt, decodes).sum())
    figures = _prompt_figures(cost, settings, requests)[accepted].sum(axis=0)
    total += float((cost.prefill_planes @ figures).max())
    # Ranks step together, and a step takes at least the mean of what its ranks need.
    return total / cost.ranks
