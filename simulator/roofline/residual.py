"""A factor on every step of a deployment: what a cost model that was checked against servers is still off by."""

from dataclasses import replace

import numpy as np

from simulator.errors import InputError
from simulator.roofline.step_cost import StepCost


def slowed_step(cost: StepCost, factor: float, bound: StepCost) -> StepCost:
    """``cost`` with every step ``factor`` times as long, below 1 too; no term falls under that of ``bound``.

    Parameters
    ----------
    bound
        the same deployment at datasheet rates, over as many tokens and rows.

    Raises
    ------
    InputError
        For a factor that is none.
    """
    if not 0 < factor < float("inf"):
        raise InputError(f"factor = {factor}: must be finite and above 0")
    if factor == 1:
        return cost
    dense = np.maximum(factor * cost.dense_s, bound.dense_s)
    part = np.divide(dense, cost.dense_s, out=np.ones_like(dense), where=cost.dense_s > 0)
    slope = np.maximum(factor * cost.decode_slope_s, bound.decode_slope_s[-1])
    value = factor * cost.decode_value_s[0] + np.concatenate(
        [[0.0], np.cumsum(slope[:-1] * np.diff(cost.decode_knots))]
    )
    planes = factor * cost.prefill_planes
    if factor < 1:  # the largest of both sets of planes is never below either
        planes = np.concatenate([planes, bound.prefill_planes])
    return replace(
        cost,
        dense_s=dense,
        expert_s=np.minimum(part * cost.expert_s, dense) if len(cost.expert_s) else cost.expert_s,
        head_s=np.maximum(factor * cost.head_s, bound.head_s),
        decode_value_s=value,
        decode_slope_s=slope,
        decode_walk_s=factor * cost.decode_walk_s,
        decode_seq_s=max(factor * cost.decode_seq_s, bound.decode_seq_s),
        window_slope_s=max(factor * cost.window_slope_s, bound.window_slope_s),
        prefill_planes=planes,
        dense_parts={name: part * table for name, table in cost.dense_parts.items()},
    )
