"""Intervals of figures over draws, and those of one step: how far off it may be for what its chip's calibration leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.chips import IDEAL
from simulator.catalog.draws import SOURCES, Draws, Source, drawn_efficiencies, interval_of
from simulator.errors import InputError
from simulator.results.summary import ParameterInterval
from simulator.roofline.analysis import StepReport
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment

Array = NDArray[np.float64]

DRAWS = 64
MIN_PER_SOURCE = 12
"""Draws of one source alone, at least: stratified, so enough to tell which sources matter."""
_FAR = 1e290


def check_level(level: float) -> None:
    """Refuse levels that are no share of draws.

    Raises
    ------
    InputError
        For a level outside (0, 100).
    """
    if not 0 < level < 100:
        raise InputError(f"interval = {level:g}: must lie between 0 and 100 percent, both excluded")


def draws_per_source(n: int) -> int:
    """Draws of one source alone beside ``n`` of all together."""
    return max(MIN_PER_SOURCE, n // 8)


def drawn_interval(value: float, values: Sequence[float], level: float) -> ParameterInterval:
    """Central interval of a figure that holds a share ``level`` of its draws.

    Parameters
    ----------
    value
        the figure itself.
    values
        of the draws: infinite where it grows without bound, NaN where it is not defined.

    >>> drawn_interval(2.0, [1.0, 2.0, 3.0, float("inf")], 0.8).high is None
    True
    """
    column = np.array(values)
    known = column[~np.isnan(column)]
    if len(known) < len(column) / 2:
        reason = f"defined in {len(known)} of {len(column)} draws only"
        return ParameterInterval(value=value, low=None, median=None, high=None, reason=reason)
    finite = np.minimum(known, _FAR)
    low, high = interval_of(finite, level)
    unbounded = float((known >= _FAR).mean())
    # Between a finite draw and one without bound lies no number.
    ends = [None if x > _FAR / 1e9 else float(x) for x in (low, np.median(finite), high)]
    return ParameterInterval(
        value=value,
        low=ends[0],
        median=ends[1],
        high=ends[2],
        reason=f"{unbounded:.0%} of the draws have no steady state" if unbounded else "",
    )


def variance_shares(alone: Mapping[Source, Sequence[float]]) -> dict[str, float]:
    """Each source's share of the summed variances of a figure's logarithm, from draws of that source alone; empty if nothing moves."""
    variances = {source: _log_variance(values) for source, values in alone.items()}
    total = sum(variances.values())
    return {source: variance / total for source, variance in variances.items()} if total > 0 else {}


def _log_variance(values: Sequence[float]) -> float:
    column = np.array(values)
    usable = column[np.isfinite(column) & (column > 0)]
    return float(np.log(usable).var()) if len(usable) > 1 else 0.0


@dataclass(frozen=True)
class StepIntervals:
    """Intervals of one step.

    Attributes
    ----------
    level
        share of draws inside each.
    draws, draws_per_source
        of all sources together, and of each alone for the shares.
    sources
        that move anything.
    figures
        name of the figure in the JSON answer -> interval.
    notes
        what is not in them.
    """

    level: float
    draws: int
    draws_per_source: int
    sources: list[str]
    figures: dict[str, ParameterInterval]
    notes: list[str]


def step_intervals(report: StepReport, *, level: float, n: int = DRAWS, seed: int = 0) -> StepIntervals:
    """Intervals of a step's time and of what follows from it.

    Parameters
    ----------
    level
        percent of draws inside.

    Raises
    ------
    InputError
        For a level outside (0, 100), or a deployment at the bare datasheet.
    """
    check_level(level)
    d = report.deployment
    if d.eff == IDEAL:
        raise InputError(
            "an interval at efficiency ideal: the datasheet is taken as it stands, so there is nothing to draw"
        )
    every = Draws(n, seed)
    times = _step_times(report, every)
    fewer = draws_per_source(n)
    sources: list[Source] = [s for s in SOURCES if np.ptp(_step_times(report, every.only(s, fewer))) > 0]
    shares = variance_shares({s: list(_step_times(report, every.only(s, fewer))) for s in sources})

    def interval(value: float, factor: Array) -> ParameterInterval:
        return drawn_interval(value, list(value * factor), level / 100).model_copy(update={"shares": shares})

    slower, faster = times / report.time_s, report.time_s / times
    return StepIntervals(
        level=level / 100,
        draws=n,
        draws_per_source=fewer,
        sources=list(sources),
        figures={
            "step_time_s": interval(report.time_s, slower),
            "chip_seconds": interval(report.time_s * d.chips, slower),
            "tokens_per_s": interval(report.tokens_per_s, faster),
            "tokens_per_s_per_chip": interval(report.tokens_per_s_per_chip, faster),
            "mfu": interval(report.mfu, faster),
            "mbu": interval(report.mbu, faster),
        },
        notes=[*kernel_notes(d), "what a serving engine adds to its kernels is not in this step, nor in its interval"],
    )


def _step_times(report: StepReport, draws: Draws) -> Array:
    d = report.deployment
    drawn = drawn_efficiencies(d.slice.chip, d.eff, draws)
    return np.array([step_time_s(replace(d, efficiency=one), report.step) for one in drawn])


def kernel_notes(d: Deployment) -> list[str]:
    """Where the spread of a deployment's kernels comes from, when it is not their own measurement."""
    chip, curves = d.slice.chip, d.eff.curves
    if curves is None:
        return [f"no kernel of {chip.name} was measured: its efficiencies are drawn from the ranges of its file"]
    if curves.chip != chip.name:
        return [f"kernels of {chip.name} are those of {curves.chip}: what changes from chip to chip is drawn too"]
    return []
