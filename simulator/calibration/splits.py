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
from simulator.calibration.serving import SPREADS, Fit, Simulators, fit_serving, with_rates
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
    clear = np.array([not m.unclear for m in rows])
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
            keep=~inside & clear,
            jacobian=full.slopes,
        )
        found[inside] = fit.after[inside]
        say(f"{name}: without {part}, {inside.sum()} rows")
    return Split(name, with_rates(rows, found), parts)


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


@dataclass(frozen=True)
class Ranking:
    """How good the choices are that predictions make.

    Attributes
    ----------
    choices
        (model, chip, lengths, limit on TPOT) with several measured configurations, one of which meets the limit.
    median_loss, p90_loss
        measured rate per chip that the predicted best forgoes against the measured best that meets the limit.
    missed
        share of choices whose pick misses the limit by more than 5 %; its loss counts as 1.
    """

    choices: int
    median_loss: float
    p90_loss: float
    missed: float


TPOT_LIMITS_S = (0.008, 0.012, 0.02, 0.04)
SLACK = 1.05


def ranking(rows: Sequence[Measurement], log_ratios: NDArray[np.float64]) -> Ranking | None:
    """Choose a layout and a number of clients by prediction, for each limit on TPOT; None without choices.

    ``log_ratios`` are those of a split: a row is predicted by a fit that has not seen it.
    """
    tpot, ttft = (list(SPREADS).index(name) for name in ("tpot_s", "ttft_s"))
    cases: dict[Hashable, list[tuple[float, float, float, float]]] = {}
    for m, ratios in zip(rows, log_ratios, strict=True):
        if m.load == "closed" and np.isfinite(ratios[[tpot, ttft]]).all():
            real = [m.measured["ttft_s"], m.measured["tpot_s"]]
            ours = [real[0] * np.exp(ratios[ttft]), real[1] * np.exp(ratios[tpot])]
            rates = [m.clients * m.output_tokens / (t + (m.output_tokens - 1) * x) / m.chips for t, x in (real, ours)]
            key = (m.model, m.chip, m.engine, m.prompt_tokens, m.output_tokens)
            cases.setdefault(key, []).append((real[1], ours[1], rates[0], rates[1]))
    losses = []
    for options in cases.values():
        for limit_s in TPOT_LIMITS_S:
            best = max((rate for real, _, rate, _ in options if real <= limit_s), default=None)
            if best is None or len(options) < 3:
                continue
            allowed = [o for o in options if o[1] <= limit_s]
            pick = max(allowed, key=lambda o: o[3]) if allowed else min(options, key=lambda o: o[1])
            losses.append(max(0.0, 1 - pick[2] / best) if pick[0] <= SLACK * limit_s else 1.0)
    if not losses:
        return None
    found = np.array(losses)
    return Ranking(len(found), float(np.median(found)), float(np.quantile(found, 0.9)), float((found == 1.0).mean()))


LISTED_TWICE = 1e-3
"""Tables round to a tenth of a percent at worst."""
