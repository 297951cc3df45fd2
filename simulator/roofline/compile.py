"""Compile a deployment into the table the engines run on."""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.roofline.blocks import deals_sequences, decode_knots
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import (
    Number,
    Op,
    StepShape,
    context_attention_ops,
    decode_attention_ops,
    dense_ops,
    head_ops,
    prefill_attention_ops,
    step_op_groups,
)
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]

MANY_KEYS, ROUNDING = 2.0**20, 1e-12
"""Keys from which a time per key is found, so many that the rounding of the times per sequence does not show."""


def compile_step_cost(d: Deployment, *, equal_ranks: bool = False) -> StepCost:
    """Table of step times of ``d``, from 0 to ``max_num_batched_tokens`` tokens and ``max_rows`` rows.

    With ``equal_ranks``, attention ranks that share experts are taken to hold equal batches at every step, so that one of
    them stands for all; they are refused otherwise, because real ranks wait for the fullest.

    Equals :func:`step_time_s` of the same step: at constant efficiencies every term is linear in S, SW, B, A, K, P, AW
    and KW on each side of a bound, so one knot, and a plane for each state of the layers, hold it exactly. Prefill
    expands the latents of MLA for every key it reads but dense[n] counts the new tokens' already; so dense[n] goes
    without the expansion's n·z seconds, and K·z and B·z stand in the planes and in ``decode_seq_s``.

    Raises
    ------
    InputError
        For a stage or a rank: it has a table (:func:`compile_part`) but is no replica
        (:func:`simulator.roofline.sharded_cost.compile_sharded`).
    """
    if d.stage != (1, 1) or (d.expert_ranks > 1 and not equal_ranks):
        what = (
            f"stage {d.stage[0]} of {d.stage[1]}"
            if d.stage[1] > 1
            else f"one of {d.expert_ranks:g} ranks that share experts"
        )
        raise InputError(f"{what} is no replica by itself: compile the ShardedDeployment it belongs to")
    return compile_part(d)


def compile_part(d: Deployment) -> StepCost:
    """As :func:`compile_step_cost`, also of a stage or rank by itself: its own chips and tokens, its peers all alike."""
    if d.context_domains:
        raise InputError("context parallelism splits prompts and cannot decode; the engines do both")
    if d.kv_layout == "batch":
        raise InputError(
            "kv_layout = 'batch': a step waits for the chip with most sequences, which the engines' tables cannot say; "
            "price it with chipseconds roofline"
        )
    _keep_freed_memory()
    n = np.arange(1, d.max_num_batched_tokens + 1, dtype=np.float64)
    rows = np.arange(1, d.max_rows + 1, dtype=np.float64)
    dense, head = dense_ops(d, n), head_ops(d, rows)
    launch, key, seen = (decode_attention_ops(d, *x) for x in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    expansion_s = float(sum_over(op.roofline_s for op in context_attention_ops(d, 1.0)))
    knots, values, slopes = _decode_curve(d, float(sum_over(op.overhead_s for op in launch)))
    parts = dense_parts(d, dense)
    if expansion_s:
        parts["matmul"] = parts["matmul"] - n * expansion_s
    tables = {name: _table(n, part) for name, part in parts.items()}
    chips = d.chips
    return StepCost(
        dense_s=sum_over(tables.values()),
        head_s=_table(rows, sum_over(op.time_s for op in head) - hidden_s(d, head)),
        decode_knots=knots,
        decode_value_s=values,
        decode_slope_s=slopes,
        decode_seq_s=float(sum_over(op.roofline_s for op in launch)) + expansion_s,
        decode_walk_s=_decode_walk(d, rows),
        prefill_planes=_prefill_planes(d, expansion_s),
        chips=chips,
        dense_flops=_table(n, chips * sum_over(op.flops - op.copied_flops for op in dense)),
        dense_bytes=_table(n, chips * sum_over(op.weight_bytes + op.kv_write_bytes for op in dense)),
        head_flops=_table(rows, chips * sum_over(op.flops - op.copied_flops for op in head)),
        head_bytes=_table(rows, chips * sum_over(op.weight_bytes for op in head)),
        attention_flops_per_pair=chips * float(sum_over(op.flops - op.copied_flops for op in key)),
        kv_bytes_per_token=chips * float(sum_over(op.kv_read_bytes for op in key)),
        peak_flops_per_s=chips * d.peak_flops_per_s,
        hbm_bandwidth_bytes_per_s=chips * d.slice.chip.hbm_bandwidth_bytes_per_s,
        dense_parts=tables,
        expert_s=_expert_s(n, dense),
        window=d.window,
        window_chunked=d.window_chunked,
        window_slope_s=float(sum_over(op.roofline_s for op in seen)),
        window_flops_per_pair=chips * float(sum_over(op.flops - op.copied_flops for op in seen)),
        window_kv_bytes_per_token=chips * float(sum_over(op.kv_read_bytes for op in seen)),
        decode_seq_bytes=chips * float(sum_over(op.kv_read_bytes + op.kv_write_bytes for op in launch)),
    )


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep what one compile frees for the next: some megabytes in arrays of 64 KiB.

    glibc's malloc returns the top of its heap to the system whenever more than 128 KiB of it are free, and page faults to
    get them back took over half of a compile's time. Once a large block has been freed, which any large array is, it
    keeps up to twice that block (mallopt(3), dynamic M_MMAP_THRESHOLD). Elsewhere this does nothing.
    """
    np.empty(1 << 21)


def _decode_curve(d: Deployment, launch_s: float) -> tuple[Array, Array, Array]:
    """Knots, values and slopes of g(S): launches, and the keys' time, whose slope changes where a ramp ends.

    The slope never rises from one knot to the next, so the line of each piece starts at or above 0 (rule R11).
    """
    knots = np.array([0.0, *decode_knots(d)])
    points = np.append(knots, 2 * knots[-1] + 1)  # the last slope is that of any stretch beyond the last knot
    keys_s = sum_over(op.roofline_s for op in decode_attention_ops(d, 0.0, points)) + np.zeros_like(points)
    return knots, keys_s[:-1] + launch_s, np.diff(keys_s) / np.diff(points)


def _decode_walk(d: Deployment, rows: Array) -> Array:
    """Table of what a key costs on top while 1, 2 … sequences decode, of kernels that deal each to blocks of threads. [s]"""
    if not deals_sequences(d):
        return np.zeros(0)
    both_s, rows_s, keys_s = (
        sum_over(op.roofline_s for op in decode_attention_ops(d, *x))
        for x in ((rows, MANY_KEYS), (rows, 0.0), (0.0, MANY_KEYS))
    )
    more_s = both_s - rows_s - keys_s
    return _table(rows, np.where(more_s > ROUNDING * both_s, more_s, 0.0) / MANY_KEYS)


def _table(counts: Array, figure: Number) -> Array:
    """Table of a figure of 1, 2 … tokens or rows, after the 0 of none."""
    table = np.zeros(len(counts) + 1)
    table[1:] = figure
    return table


def step_time_s(d: Deployment, step: StepShape) -> float:
    """Time of one step, op by op. [s]"""
    dense, attention, head = step_op_groups(d, step)
    every = [*dense, *attention, *head]
    return float(sum_over(op.time_s for op in every) - hidden_s(d, dense) - hidden_s(d, head))


def hidden_s(d: Deployment, ops: Sequence[Op]) -> Array:
    """Time of collectives that hides behind the matrix products among ``ops``, either all dense or all of the head. [s]

    Of each collective ``overlap`` may, or what its algorithm hides if that is more, but no more than its share of the
    time the products take.
    """
    fractions = {hiding(d, op) for op in ops if op.kind == "collective"} - {0.0}
    if not fractions:
        return np.zeros(())
    products_s = sum_over(op.roofline_s for op in ops if op.kind == "matmul")
    if len(fractions) == 1 and d.overlap:
        collective_s = sum_over(op.roofline_s for op in ops if op.kind == "collective")
        return d.overlap * np.minimum(collective_s, products_s)
    able_s = sum_over(hiding(d, op) * op.roofline_s for op in ops if op.kind == "collective")
    return np.minimum(able_s, max(fractions) * products_s)


def hiding(d: Deployment, op: Op) -> float:
    """Fraction of a collective that may hide behind matrix products."""
    return max(d.overlap, op.hides)


def dense_parts(d: Deployment, dense: Sequence[Op]) -> dict[str, Array]:
    """Time of the dense ops by what it goes to; overheads of all kinds are one part. [s]"""
    collective_s = sum_over(op.roofline_s for op in dense if op.kind == "collective")
    parts: dict[str, Array] = {
        "matmul": sum_over(op.roofline_s for op in dense if op.kind == "matmul"),
        "elementwise": sum_over(op.roofline_s for op in dense if op.kind == "elementwise"),
        "collective": collective_s - hidden_s(d, dense),
        "overhead": sum_over(op.overhead_s for op in dense),
    }
    shape = parts["matmul"].shape
    return {name: np.broadcast_to(part, shape) for name, part in parts.items()}


def _expert_s(n: Array, dense: Sequence[Op]) -> Array:
    """Table of the routed experts' products; empty without any. [s]"""
    ops = [op for op in dense if op.name.startswith("experts")]
    return _table(n, sum_over(op.roofline_s for op in ops)) if ops else np.zeros(0)


def sum_over(figures: Iterable[Number]) -> Array:
    """Sum of numbers or equally long arrays; zero for none."""
    return np.asarray(sum(figures, np.zeros(())), dtype=np.float64)


def _prefill_planes(d: Deployment, expansion_s: float) -> Array:
    """Planes whose largest is the attention time of chunks: a sum over layers of max(compute, memory).

    As K/A grows, the layers that see all keys turn memory-bound one kind after the other, the one with the least compute
    per key first; so do the windowed ones as KW/AW grows, independently. The plane of each such state bounds the
    sum from below everywhere, and is the sum where the state holds.
    """

    def gather_s(ops: Sequence[Op]) -> float:
        return sum(float(op.roofline_s) for op in ops if op.kind == "collective")

    chunk, pair, key, seen_pair, seen_key = (prefill_attention_ops(d, *unit) for unit in np.eye(5).tolist())
    chunk_s = float(sum_over(op.time_s for op in chunk))
    full, windowed = _states(pair, key), _states(seen_pair, seen_key)
    key_s, seen_s = expansion_s + gather_s(key), gather_s(seen_key)
    return np.array([[a, k + key_s, chunk_s, aw, kw + seen_s] for a, k in full for aw, kw in windowed])


def _states(pair: Sequence[Op], key: Sequence[Op]) -> list[tuple[float, float]]:
    """Seconds per pair and per key of each state of ops given for a pair and for a key; those bound by memory come last.

    Ops whose times add up are in every state with both. Collectives are in none.
    """
    every = [
        (float(p.roofline_s), float(k.roofline_s), p.adds)
        for p, k in zip(pair, key, strict=True)
        if p.kind != "collective" and (p.roofline_s or k.roofline_s)
    ]
    both = [(p, k) for p, k, adds in every if adds]
    pair_s, key_s = sum(p for p, _ in both), sum(k for _, k in both)
    ops = [(p, k) for p, k, adds in every if not adds]
    ops.sort(key=lambda op: op[1] / op[0])
    return [(pair_s + sum(p for p, _ in ops[:j]), key_s + sum(k for _, k in ops[j:])) for j in range(len(ops), -1, -1)]
