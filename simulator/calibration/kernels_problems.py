"""A curve to fit: rows of one op in one format, the model that prices them, and which parameters are free.

Formats' bytes and the chip format whose peak they run at are here too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.regression import Parameter
from simulator.catalog.chips import ChipSpec
from simulator.catalog.kernel_curves import KernelOp, Schedule

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Values = Mapping[str, float]

FORMATS: dict[str, tuple[str, float, float]] = {
    "float32": ("fp32", 4.0, 4.0),
    "bfloat16": ("bf16", 2.0, 2.0),
    "fp8": ("fp8", 1.0, 1.0),
    "fp8_block": ("fp8", 1.0, 1.0),
    "nvfp4": ("fp4", 0.5625, 0.5625),
    "sq": ("int8", 1.0, 1.0),
    "int8_wo": ("bf16", 1.0, 2.0),
    "int4_wo": ("bf16", 0.5156, 2.0),
    "w4a16_mxfp4": ("bf16", 0.53125, 2.0),
    "w4a8_mxfp4_mxfp8": ("fp8", 0.53125, 1.0),
}
"""Format of a table -> the chip's format it multiplies in, bytes per weight and per input, scales included."""

KV_BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}
SHARPNESS = (1.0, 2.0, 4.0)
"""p-norms tried between compute and memory."""


ROWS_PER_PARAMETER = 10
"""Rows for each parameter that another way of working takes at least to be told from the plain one."""


@dataclass(frozen=True)
class Problem:
    """One curve to fit.

    Attributes
    ----------
    op, dtype, kv_dtype, framework, chips, head_dim
        what it is the curve of.
    measured
        times of its rows. [s]
    model
        predicted times of some rows for given parameters; all of the curve's. [s]
    free, held
        parameters to fit, and those that stay.
    choices
        values tried in turn for one held parameter; empty: none.
    others, worth, rows_per_parameter
        other ways of working that a kernel may have, each tried where there are so many rows for each of its parameters; the best is taken if its
        loss is below ``worth`` times this one's.
    schedule
        of decode attention: the curve's.
    shape
        number of the shape each row belongs to; cross-validation leaves whole shapes out.
    held_out_by
        what makes a shape, in words.
    regimes
        name and rows (as a mask) of each regime that errors are reported for.
    left_out, why
        rows of the table that are not fitted, and the reason.
    """

    op: KernelOp
    dtype: str
    kv_dtype: str
    framework: str
    measured: Array
    model: Callable[[Values, Rows], Array]
    free: tuple[Parameter, ...]
    held: Values
    shape: NDArray[np.int64]
    held_out_by: str
    regimes: tuple[tuple[str, NDArray[np.bool_]], ...]
    choices: tuple[str, tuple[float, ...]] = ("", ())
    others: tuple["Problem", ...] = ()
    worth: float = 1.0
    rows_per_parameter: int = ROWS_PER_PARAMETER
    schedule: Schedule = ""
    chips: int = 1
    head_dim: int = 0
    left_out: int = 0
    why: str = ""


def has_peak(chip: ChipSpec, dtype: str) -> bool:
    """Whether a chip multiplies in what a table's format is multiplied in."""
    return dtype in FORMATS and chip.has_dtype(FORMATS[dtype][0])


def numbered(*columns: Array) -> NDArray[np.int64]:
    """Number the different combinations of some columns."""
    _, index = np.unique(np.stack(columns), axis=1, return_inverse=True)
    return np.asarray(index.reshape(-1), dtype=np.int64)


def steps(by: Array, unit: str, *edges: float) -> tuple[tuple[str, NDArray[np.bool_]], ...]:
    """Regimes between ascending edges of one quantity."""
    bounds = [-np.inf, *edges, np.inf]
    found = []
    for low, high in pairwise(bounds):
        keep = (by > low) & (by <= high)
        name = f"{unit} > {low:g}" if high == np.inf else f"{unit} <= {high:g}"
        if keep.any():
            found.append((name, keep))
    return tuple(found)


def wide_bytes(dtype: str) -> float:
    """Bytes per output of products, and per query and output of attention."""
    return 4.0 if dtype == "float32" else 2.0


def problem_at(problem: Problem, choice: float | None) -> Problem:
    """A problem with one of its choices made."""
    name, _ = problem.choices
    return problem if choice is None else replace(problem, held={**problem.held, name: choice}, choices=("", ()))
