"""What queries consumed: FLOPs, bytes and chip-seconds, from counts of steps and the cost tables."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED, EngineSettings, SpeculationResult
from simulator.results.summary import Utilisation
from simulator.roofline.speculation import SpeculationCost
from simulator.roofline.step_cost import StepCost, window_keys, window_pairs
from simulator.run.outcome import Outcome

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a whole run, all replicas.

    ``flops`` counts everything; ``recomputed_flops`` and ``speculative_flops`` (drafting, and verifying rejected drafts) are parts
    of it that the model did not need.
    """

    flops: float
    recomputed_flops: float
    hbm_bytes: float
    speculative_flops: float = 0.0


def total_work(
    outcome: Outcome,
    cost: StepCost,
    useful: tuple[int, int] | None = None,
    speculation: SpeculationCost | None = None,
) -> Work:
    """Work of a run, exactly: every step's table entry times how often it occurred.

    Bytes: what each step's dense layers and head move (the writing of new KV included), and the keys read. Recomputed
    pairs are all pairs less those that the finished requests need: token i of a request attends to i keys.

    ``useful`` is what :func:`useful_pairs` gives, where the outcome has no requests to ask.
    """
    by_tokens, by_rows = outcome.steps_by_tokens, outcome.steps_by_rows
    tokens, rows = len(by_tokens), len(by_rows)
    pairs = outcome.total("decode_keys") + outcome.total("prefill_pairs")
    window = outcome.total("window_decode_keys") + outcome.total("window_prefill_pairs")
    keys_read = outcome.total("decode_keys") + outcome.total("prefill_keys")
    window_read = outcome.total("window_decode_keys") + outcome.total("window_prefill_keys")
    flops = (
        float(by_tokens @ cost.dense_flops[:tokens])
        + float(by_rows @ cost.head_flops[:rows])
        + cost.attention_flops_per_pair * pairs
        + cost.window_flops_per_pair * window
    )
    hbm_bytes = (
        float(by_tokens @ cost.dense_bytes[:tokens])
        + float(by_rows @ cost.head_bytes[:rows])
        + cost.kv_bytes_per_token * keys_read
        + cost.window_kv_bytes_per_token * window_read
        + cost.decode_seq_bytes * (outcome.total("decode_tokens") + outcome.total("chunks"))
    )
    recomputed = 0.0
    again = computed_in_vain(outcome)
    if again:
        full, windowed = useful or useful_pairs(outcome, cost)
        recomputed = (
            cost.dense_flops[1] * again
            + cost.attention_flops_per_pair * (pairs - full)
            + cost.window_flops_per_pair * (window - windowed)
        )
    work = Work(flops=flops, recomputed_flops=float(recomputed), hbm_bytes=hbm_bytes)
    found = outcome.speculation
    return work if found is None or speculation is None else _with_drafts(work, found, outcome, cost, speculation)


def _with_drafts(
    work: Work, found: SpeculationResult, outcome: Outcome, cost: StepCost, speculation: SpeculationCost
) -> Work:
    """Add what speculation does: drafts, and the further queries of each pass, which share one reading of the cache.

    Of verification's attention, the part that is waste goes by tokens: rejected ÷ verified.
    """
    passes, queries = found.sequence_passes, speculation.queries
    batches = found.passes.shape[1]
    within = passes * queries * (queries - 1) / 2  # pairs among the drafts of a pass, and their own keys
    pairs = cost.attention_flops_per_pair * ((queries - 1) @ found.keys + within.sum())
    pairs += cost.window_flops_per_pair * ((queries - 1) @ found.window_keys)
    read = cost.kv_bytes_per_token * float((queries - 1) @ passes)
    chunks = len(found.chunk_steps)
    draft_flops = (
        float((found.passes * speculation.draft_flops[:, :batches]).sum())
        + float(speculation.draft_flops_per_key @ found.keys)
        + float(found.chunk_steps @ speculation.chunk_flops[:chunks])
        + speculation.chunk_flops_per_pair * outcome.total("prefill_pairs")
    )
    draft_bytes = (
        float((found.passes * speculation.draft_bytes[:, :batches]).sum())
        + float(speculation.draft_bytes_per_key @ found.keys)
        + float(found.chunk_steps @ speculation.chunk_bytes[:chunks])
        + speculation.chunk_bytes_per_key * outcome.total("prefill_keys")
    )
    verified = float(queries @ passes)
    attention = cost.attention_flops_per_pair * float(queries @ found.keys + within.sum())
    attention += cost.window_flops_per_pair * float(queries @ found.window_keys)
    rejected = found.rejected_tokens * (cost.dense_flops[1] + cost.head_flops[1])
    rejected += attention * found.rejected_tokens / verified if verified else 0.0
    return Work(
        flops=work.flops + float(pairs) + draft_flops,
        recomputed_flops=work.recomputed_flops,
        hbm_bytes=work.hbm_bytes + read + draft_bytes,
        speculative_flops=float(draft_flops + rejected),
    )


def computed_in_vain(outcome: Outcome) -> int:
    """Tokens computed a second time, or for attempts that timed out or were cancelled."""
    return int(outcome.total("recomputed_tokens") + outcome.total("abandoned_tokens"))


def useful_pairs(outcome: Outcome, cost: StepCost) -> tuple[int, int]:
    """(Query, key) pairs the finished requests need when every token is computed once; the same through the window.

    Reused tokens are taken to be the first of each request. That fails only where a prefix cache had more for a request's second
    admission than it had computed before its preemption; its pairs are then a little too many.
    """
    done = outcome.column("status") == FINISHED
    requests = outcome.requests
    reused = outcome.column("reused_tokens")[done]
    return pairs_of(requests.prompt_tokens[done], reused, requests.output_tokens[done], cost)


def pairs_of(
    prompt_tokens: NDArray[np.int64], cached_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64], cost: StepCost
) -> tuple[int, int]:
    """(Query, key) pairs of these requests when every token is computed once; the same through the window."""
    cached = cached_tokens
    computed = prompt_tokens + output_tokens - 1

    def windowed(context: NDArray[np.int64]) -> int:
        return int(np.sum(window_pairs(context, cost.window, chunked=cost.window_chunked)))

    full = int((computed * (computed + 1) // 2 - cached * (cached + 1) // 2).sum())
    return full, windowed(computed) - windowed(cached)


def utilisation(outcome: Outcome, cost: StepCost, work: Work) -> Utilisation:
    """MFU and MBU over the whole run, and over its busy time."""
    replica_s = outcome.n_replicas * outcome.end_s
    model_flops = work.flops - work.recomputed_flops - work.speculative_flops
    return Utilisation(
        mfu=model_flops / (cost.peak_flops_per_s * replica_s),
        mbu=work.hbm_bytes / (cost.hbm_bandwidth_bytes_per_s * replica_s),
        mfu_busy=model_flops / (cost.peak_flops_per_s * outcome.busy_s),
        mbu_busy=work.hbm_bytes / (cost.hbm_bandwidth_bytes_per_s * outcome.busy_s),
        busy_fraction=outcome.busy_s / replica_s,
        model_flops=model_flops,
        recomputed_flops=work.recomputed_flops,
        speculative_flops=work.speculative_flops,
        hbm_bytes=work.hbm_bytes,
    )


def saved_chip_seconds(outcome: Outcome, cost: StepCost, budget: int) -> float:
    """What computing the prefix cache's hits would have taken in full steps. [chip-s]

    At capacity a replica gets that back (rule C9). Below it saves less: prompt tokens ride along with decodes in steps that take place
    anyway. Windowed layers are left out.
    """
    tokens, pairs = outcome.total("cache_hit_tokens"), outcome.total("cache_hit_pairs")
    dense_s = tokens * float(cost.dense_s[budget]) / budget
    planes = cost.prefill_planes
    attention_s = float((planes[:, 0] * pairs + planes[:, 1] * tokens).max())
    return cost.chips / cost.parts * (dense_s + attention_s)


def ideal_chip_seconds(
    prompt_tokens: NDArray[np.int64],
    cached_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    *,
    cost: StepCost,
    settings: EngineSettings,
    mean_batch: float,
) -> Array:
    """[n] chip-seconds of each query alone at efficiency 1: its prefill, plus output × step(B̄)/B̄. [chip-s]

    Parameters
    ----------
    cost
        tables of the same deployment with every efficiency at 1 and no overheads.
    mean_batch
        B̄, mean decoding sequences per step (of a rank, or a micro-batch) of the pool, at least 1. The step is taken at B̄ of the
        query's own mean context, prompt + output/2; between whole B̄ the tables are interpolated.
    """
    prefill = ideal_prefill_chip_seconds(prompt_tokens, cached_tokens, cost=cost, settings=settings)
    return prefill + ideal_decode_chip_seconds(prompt_tokens, output_tokens, cost=cost, mean_batch=mean_batch)


def ideal_prefill_chip_seconds(
    prompt_tokens: NDArray[np.int64], cached_tokens: NDArray[np.int64], *, cost: StepCost, settings: EngineSettings
) -> Array:
    """[n] the part of :func:`ideal_chip_seconds` that is prefill. [chip-s]"""
    alone_s = _prefill_alone_s(prompt_tokens, cached_tokens, cost, settings.max_num_batched_tokens)
    return np.asarray(cost.chips / cost.parts * alone_s)


def ideal_decode_chip_seconds(
    prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64], *, cost: StepCost, mean_batch: float
) -> Array:
    """[n] the part of :func:`ideal_chip_seconds` that is not: output × step(B̄)/B̄. [chip-s]"""
    batch = max(mean_batch, 1.0)
    context = prompt_tokens + output_tokens / 2
    keys = batch * context
    knot = np.searchsorted(cost.decode_knots, keys, side="right") - 1
    attention = cost.decode_value_s[knot] + cost.decode_slope_s[knot] * (keys - cost.decode_knots[knot])
    seen = window_keys(np.rint(context).astype(np.int64), cost.window, chunked=cost.window_chunked)
    attention += cost.window_slope_s * batch * seen
    attention += np.interp(batch, np.arange(len(cost.decode_walk_s)), cost.decode_walk_s) * keys
    shared = np.interp(batch, np.arange(len(cost.dense_s)), cost.dense_s) + np.interp(
        batch, np.arange(len(cost.head_s)), cost.head_s
    )
    step = shared + attention + cost.decode_seq_s * batch
    return np.asarray(cost.chips / cost.parts * (output_tokens * step / batch))


def _prefill_alone_s(
    prompt_tokens: NDArray[np.int64], cached_tokens: NDArray[np.int64], cost: StepCost, budget: int
) -> Array:
    """[n] time of each prompt's own chunks, each alone in its step, the last one with its logit row. [s]"""
    total = np.zeros(len(prompt_tokens))
    done = cached_tokens.copy()
    rows = np.arange(len(prompt_tokens))
    while len(rows):
        past = done[rows]
        chunk = np.minimum(prompt_tokens[rows] - past, budget)
        attention = _chunk_figures(past, chunk, cost) @ cost.prefill_planes.T
        last = past + chunk == prompt_tokens[rows]
        total[rows] += cost.dense_s[chunk] + attention.max(axis=1) + np.where(last, cost.head_s[1], 0.0)
        done[rows] = past + chunk
        rows = rows[~last]
    return total


def _chunk_figures(past: NDArray[np.int64], chunk: NDArray[np.int64], cost: StepCost) -> Array:
    """[m, 5] A, K, P, AW, KW of chunks of ``chunk`` tokens on ``past`` earlier ones, each alone in its step."""
    pairs = chunk * past + chunk * (chunk + 1) // 2
    windowed, read = 0 * chunk, 0 * chunk
    if cost.window:
        before, after = (window_pairs(t, cost.window, chunked=cost.window_chunked) for t in (past, past + chunk))
        windowed = np.asarray(after - before)
        read = past % cost.window + chunk if cost.window_chunked else np.minimum(past + chunk, chunk + cost.window - 1)
    return np.stack([pairs, past + chunk, np.ones_like(chunk), windowed, read], axis=1).astype(np.float64)
