"""Compile a deployment into the table the engines run on."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import (
    Number,
    Op,
    StepShape,
    decode_attention_ops,
    dense_ops,
    head_ops,
    prefill_attention_ops,
    step_op_groups,
)
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]


def compile_step_cost(d: Deployment) -> StepCost:
    """Table of step times of ``d``, from 0 to ``max_num_batched_tokens`` tokens and ``max_num_seqs`` rows.

    Equals :func:`step_time_s` of the same step: at constant efficiencies every term is linear in S, A, K and P on
    each side of a bound, so one knot, and one plane more than there are layer groups, hold it exactly.
    """
    if d.stage != (1, 1):
        raise InputError(
            f"stage {d.stage[0]} of {d.stage[1]}: the engines run whole replicas; a pipeline emits a token per sequence only "
            "once per round of its stages, which no table of steps can say; price it with chipseconds roofline"
        )
    dense = dense_ops(d, np.arange(d.max_num_batched_tokens + 1, dtype=np.float64))
    head = head_ops(d, np.arange(d.max_num_seqs + 1, dtype=np.float64))
    launches, one_key = decode_attention_ops(d, 1.0, 0.0), decode_attention_ops(d, 0.0, 1.0)
    parts = dense_parts(d, dense)
    chips = d.chips
    return StepCost(
        dense_s=sum_over(parts.values()),
        head_s=sum_over(op.time_s for op in head) - hidden_s(d, head),
        decode_knots=np.zeros(1),
        decode_value_s=np.array([sum_over(op.overhead_s for op in launches)]),
        decode_slope_s=np.array([sum_over(op.roofline_s for op in one_key)]),
        decode_seq_s=0.0,
        prefill_planes=_prefill_planes(d),
        chips=chips,
        dense_flops=chips * sum_over(op.flops - op.copied_flops for op in dense),
        dense_bytes=chips * sum_over(op.weight_bytes + op.kv_write_bytes for op in dense),
        head_flops=chips * sum_over(op.flops - op.copied_flops for op in head),
        head_bytes=chips * sum_over(op.weight_bytes for op in head),
        attention_flops_per_pair=chips * float(sum_over(op.flops for op in one_key)),
        kv_bytes_per_token=chips * d.kv_bytes_per_token,
        peak_flops_per_s=chips * d.peak_flops_per_s,
        hbm_bandwidth_bytes_per_s=chips * d.slice.chip.hbm_bandwidth_bytes_per_s,
        dense_parts=parts,
    )


def step_time_s(d: Deployment, step: StepShape) -> float:
    """Time of one step, op by op. [s]"""
    dense, attention, head = step_op_groups(d, step)
    every = [*dense, *attention, *head]
    return float(sum_over(op.time_s for op in every) - hidden_s(d, dense) - hidden_s(d, head))


def hidden_s(d: Deployment, ops: Sequence[Op]) -> Array:
    """Time of collectives that hides behind the matrix products among ``ops``, either all dense or all of the head. [s]"""
    collective_s = sum_over(op.roofline_s for op in ops if op.kind == "collective")
    return d.overlap * np.minimum(collective_s, sum_over(op.roofline_s for op in ops if op.kind == "matmul"))


def dense_parts(d: Deployment, dense: Sequence[Op]) -> dict[str, Array]:
    """Time of the dense ops by what it goes to; overheads of all kinds are one part. [s]"""
    collective_s = sum_over(op.roofline_s for op in dense if op.kind == "collective")
    parts = {
        "matmul": sum_over(op.roofline_s for op in dense if op.kind == "matmul"),
        "elementwise": sum_over(op.roofline_s for op in dense if op.kind == "elementwise"),
        "collective": collective_s - hidden_s(d, dense),
        "overhead": sum_over(op.overhead_s for op in dense),
    }
    shape = parts["matmul"].shape
    return {name: np.broadcast_to(part, shape) for name, part in parts.items()}


def sum_over(figures: Iterable[Number]) -> Array:
    """Sum of numbers or equally long arrays; zero for none."""
    return np.asarray(sum(figures, np.zeros(())), dtype=np.float64)


def _prefill_planes(d: Deployment) -> Array:
    """Planes whose largest is the attention time of chunks: a sum over layer groups of max(compute, memory).

    As K/A grows, groups turn memory-bound one by one, the one with the least compute per key first. The plane of each
    such state bounds the sum from below everywhere, and is the sum where the state holds.
    """
    pairs = [float(op.roofline_s) for op in prefill_attention_ops(d, 0.0, 1.0, 0.0)]
    keys = [float(op.roofline_s) for op in prefill_attention_ops(d, 0.0, 0.0, 1.0)]
    chunk_s = float(sum_over(op.overhead_s for op in prefill_attention_ops(d, 1.0, 0.0, 0.0)))
    order = sorted(range(len(pairs)), key=lambda g: keys[g] / pairs[g])
    return np.array(
        [
            [sum(pairs[g] for g in order[:j]), sum(keys[g] for g in order[j:]), chunk_s]
            for j in range(len(order), -1, -1)
        ]
    )
