"""Memory of training state, and the idle time of pipelines."""

from typing import Literal

from simulator.errors import InputError

OPTIMIZER_BYTES = 12.0
"""Of mixed-precision Adam per parameter: 32-bit weights, momentum and variance."""


def zero_bytes_per_chip(
    parameters: float, chips: int, stage: Literal[0, 1, 2, 3], *, optimizer_bytes: float = OPTIMIZER_BYTES
) -> float:
    """Weights, gradients and optimizer state per chip under ZeRO; activations are not in it. [bytes]

    16-bit weights (2 B) and gradients (2 B) with K = 12 B of optimizer state per parameter. Stage 1 divides the optimizer
    over the chips, stage 2 gradients too, stage 3 weights too. S. Rajbhandari et al. 2020, arXiv:1910.02054, Fig. 1.

    >>> [zero_bytes_per_chip(7.5e9, 64, stage) / 1e9 for stage in (0, 1, 2, 3)]
    [120.0, 31.40625, 16.640625, 1.875]
    """
    if chips < 1:
        raise InputError(f"chips = {chips}: must be at least 1")
    whole = {0: (4 + optimizer_bytes, 0.0), 1: (4.0, optimizer_bytes), 2: (2.0, 2 + optimizer_bytes)}
    kept, divided = whole.get(stage, (0.0, 4 + optimizer_bytes))
    return parameters * (kept + divided / chips)


def pipeline_idle_share(stages: int, micro_batches: int, *, interleaved: int = 1) -> float:
    """Idle share of a step's total time: with v model chunks a stage, x/(1 + x) of x = (p − 1)/(v·m). [1]

    >>> round(pipeline_idle_share(8, 32), 5)
    0.17949
    """
    overhead = pipeline_overhead(stages, micro_batches, interleaved=interleaved)
    return overhead / (1 + overhead)


def pipeline_overhead(stages: int, micro_batches: int, *, interleaved: int = 1) -> float:
    """Idle time relative to the ideal time, (p − 1)/(v·m); often called bubble as well (arXiv:2104.04473, eq. 1). [1]

    >>> pipeline_overhead(8, 32), pipeline_overhead(8, 32, interleaved=4)
    (0.21875, 0.0546875)
    """
    if stages < 1 or micro_batches < 1 or interleaved < 1:
        raise InputError(f"stages = {stages}, micro_batches = {micro_batches}: must be at least 1")
    return (stages - 1) / (interleaved * micro_batches)
