"""The cost of a micro-batch in each stage of a pipeline, and between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]

MAX_STAGES = 16
"""More stages than any published deployment has; the compiled engine numbers steps within this bound."""


@dataclass(frozen=True)
class PipelineCost:
    """Step costs of the stages of one replica, in the order of the network.

    Attributes
    ----------
    stages
        one table each, all over as many tokens and rows; stages before the last have a head of zeros.
    send_s
        [stages − 1, max tokens + 1] time from one stage to the next for n tokens. [s]
    """

    stages: tuple[StepCost, ...]
    send_s: Array

    def __post_init__(self) -> None:
        """Refuse tables that do not fit together."""
        first, n = self.stages[0], len(self.stages)
        if not 1 <= n <= MAX_STAGES:
            raise InputError(f"PipelineCost: {n} stages; 1 … {MAX_STAGES} are possible")
        for cost in self.stages:
            if (cost.max_tokens, cost.max_rows) != (first.max_tokens, first.max_rows):
                raise InputError("PipelineCost: every stage's tables must cover as many tokens and rows")
            if cost.parts > 1:
                raise InputError(f"PipelineCost: a stage of {cost.ranks} ranks; stages are replicas of one rank")
        windows = {(cost.window, cost.window_chunked) for cost in self.stages if cost.window}
        if len(windows) > 1:
            raise InputError(f"PipelineCost: stages with different windows, {sorted(windows)}")
        if self.send_s.shape != (n - 1, first.max_tokens + 1) or not (self.send_s >= 0).all():
            raise InputError(
                f"PipelineCost.send_s must be a [{n - 1}, {first.max_tokens + 1}] table without negative entries"
            )

    @cached_property
    def total(self) -> StepCost:
        """Sum over the stages: times in seconds of stages, FLOPs and bytes of the whole replica.

        Its pieces and planes are the sums of the stages' active ones, so shares of a sum are sums of shares.
        """
        stages = self.stages
        knots = np.unique(np.concatenate([cost.decode_knots for cost in stages]))
        pieces = [np.searchsorted(cost.decode_knots, knots, side="right") - 1 for cost in stages]
        windowed = next((cost for cost in stages if cost.window), stages[0])

        def total(name: str) -> Array:
            return np.asarray(sum(getattr(cost, name) for cost in stages), dtype=np.float64)

        def sum_of(name: str) -> float:
            return float(total(name))

        names = dict.fromkeys(name for cost in stages for name in cost.dense_parts)
        nothing = np.zeros(len(stages[0].dense_s))
        experts = [cost.expert_s for cost in stages if len(cost.expert_s)]
        return StepCost(
            dense_s=total("dense_s"),
            head_s=total("head_s"),
            decode_knots=knots,
            decode_value_s=np.array([sum(cost.decode_attention_s(S) for cost in stages) for S in knots]),
            decode_slope_s=np.sum([c.decode_slope_s[j] for c, j in zip(stages, pieces, strict=True)], axis=0),
            decode_seq_s=sum_of("decode_seq_s"),
            decode_walk_s=total("decode_walk_s"),
            prefill_planes=_sums_of_planes([cost.prefill_planes for cost in stages]),
            chips=sum(cost.chips for cost in stages),
            dense_flops=total("dense_flops"),
            dense_bytes=total("dense_bytes"),
            head_flops=total("head_flops"),
            head_bytes=total("head_bytes"),
            attention_flops_per_pair=sum_of("attention_flops_per_pair"),
            kv_bytes_per_token=sum_of("kv_bytes_per_token"),
            peak_flops_per_s=sum_of("peak_flops_per_s"),
            hbm_bandwidth_bytes_per_s=sum_of("hbm_bandwidth_bytes_per_s"),
            dense_parts={name: np.sum([c.dense_parts.get(name, nothing) for c in stages], axis=0) for name in names},
            window=windowed.window,
            window_chunked=windowed.window_chunked,
            window_slope_s=sum_of("window_slope_s"),
            window_flops_per_pair=sum_of("window_flops_per_pair"),
            window_kv_bytes_per_token=sum_of("window_kv_bytes_per_token"),
            decode_seq_bytes=sum_of("decode_seq_bytes"),
            stages=len(stages),
            expert_s=np.sum(experts, axis=0) if experts else np.zeros(0),
        )


def _sums_of_planes(tables: Sequence[Array]) -> Array:
    """Planes whose largest is the sum of the largest of each table: one for each choice of a plane per different table.

    >>> _sums_of_planes([np.array([[1.0], [2.0]]), np.array([[1.0], [2.0]]), np.array([[5.0]])]).tolist()
    [[7.0], [9.0]]
    """
    counts: dict[bytes, tuple[Array, int]] = {}
    for table in tables:
        key = np.ascontiguousarray(table).tobytes()
        counts[key] = (table, counts.get(key, (table, 0))[1] + 1)
    choices = product(*(count * table for table, count in counts.values()))
    return np.array([np.sum(choice, axis=0) for choice in choices])
