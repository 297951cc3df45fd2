"""How well a fit predicts rows it has not seen: three ways of leaving rows out, and what repeats leave unexplained.

``random``
    rows at random, in :data:`FOLDS` parts: the same servers, other loads.
``release``
    every run of one engine version.
``group``
    every run of one (model, chip, engine, formats).

Each refit starts from the fit to all rows and uses its slopes; its values come from the kept rows alone.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.measurements import Measurement
from simulator.calibration.serving import SPREADS, Fit, Simulators, fit_serving
from simulator.calibration.validate import ErrorSummary, error_summary
from simulator.randomness import uniform

FOLDS = 5
SPLITS = ("random", "release", "group")


@dataclass(frozen=True)
class Split:
    """Errors on rows left out, all parts of one split together.

    Attributes
    ----------
    name
        of :data:`SPLITS`.
    left_out
        [rows, metrics] log(predicted / measured) of each row by the fit that has not seen it.
    parts
        [rows] name of the part that was left out with the row.
    """

    name: str
    left_out: NDArray[np.float64]
    parts: tuple[str, ...]

    def errors(self, metric: str, part: str | None = None) -> ErrorSummary | None:
        """Errors of one metric, of all rows or of one part; None without any."""
        column = self.left_out[:, list(SPREADS).index(metric)]
        chosen = np.isfinite(column) & np.array([part in {None, p} for p in self.parts])
        return error_summary(metric, list(np.expm1(column[chosen]))) if chosen.any() else None


def split_parts(name: str, rows: Sequence[Measurement]) -> tuple[str, ...]:
    """[rows] which part of a split a row belongs to.

    Runs of one configuration stay in one random part: a repeat is not a row that has not been seen.
    """
    match name:
        case "random":
            setups = [setup(m) for m in rows]
            draws = dict(zip(dict.fromkeys(setups), uniform(0, "calibration/folds", 0, len(set(setups))), strict=True))
            return tuple(f"part {1 + int(FOLDS * draws[s])}" for s in setups)
        case "release":
            return tuple(" ".join(m.release) for m in rows)
        case _:
            return tuple(" · ".join(m.group) for m in rows)


def setup(m: Measurement) -> Hashable:
    """A run's configuration: what repeats have in common."""
    return replace(m, id="", table="", measured={}, replay=None)


def leave_out(
    name: str,
    rows: Sequence[Measurement],
    full: Fit,
    *,
    simulators: Simulators,
    say: Callable[[str], None] = lambda _: None,
) -> Split:
    """Refit without each part in turn and predict it."""
    parts = split_parts(name, rows)
    found = np.full((len(rows), len(SPREADS)), np.nan)
    names = list(dict.fromkeys(parts))
    for part in names:
        inside = np.array([p == part for p in parts])
        if inside.all():
            say(f"{name}: {part} is everything there is")
            continue
        fit = fit_serving(
            rows,
            simulators=simulators,
            parameters=full.parameters,
            base=full.base,
            start=full.values,
            keep=~inside,
            jacobian=full.slopes,
        )
        found[inside] = fit.after[inside]
        say(f"{name}: without {part}, {inside.sum()} rows")
    return Split(name, found, parts)


def noise_floor(rows: Sequence[Measurement]) -> Mapping[str, ErrorSummary]:
    """Differences between repeats of one configuration and engine version, by metric: what no model can explain.

    Rows that agree to all digits given are one run listed twice, and not counted.
    """
    repeats: dict[Hashable, list[Measurement]] = {}
    for m in rows:
        repeats.setdefault(setup(m), []).append(m)
    found: dict[str, list[float]] = {}
    for same in repeats.values():
        for i, one in enumerate(same):
            for other in same[i + 1 :]:
                ratios = {k: one.measured[k] / v - 1 for k, v in other.measured.items() if k in one.measured}
                if any(abs(r) > LISTED_TWICE for r in ratios.values()):
                    for metric, ratio in ratios.items():
                        found.setdefault(metric, []).append(ratio)
    return {metric: error_summary(metric, errors) for metric, errors in found.items()}


LISTED_TWICE = 1e-3
"""Tables round to a tenth of a percent at worst."""
