"""Draws of what calibration leaves uncertain: kernel curves, efficiency constants, engine profiles, and what remains.

Four sources, each with causes of its own in :mod:`simulator.randomness`, so that draw k of one is the same whatever else is drawn:

``kernels``
    parameters of the fitted curves, normal in their logarithms with the fit's standard errors and correlation; on top of them what
    left-out shapes show: one factor for the small and one for the large calls of every curve. A chip that is priced by the
    curves of another also gets the spread of each parameter from one measured chip to the next.
``profile``
    the engine's fitted parameters, normal with their covariance, cut off at 0.
``assumed``
    efficiency constants that a file states with low … high: triangular between them, with peak and median at the value, in the
    logarithm where low is above 0, because such ranges span factors.
``residual``
    what rows of left-out groups show beyond the others: a factor on every step and one on the first token.

Nothing drawn pushes a time under its roofline bound: fractions stop at 1, times at 0.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.chips import ChipSpec, Efficiency, load_chip
from simulator.catalog.engines import EngineProfile, EngineSpec, FitErrors, LeftOut, field_of
from simulator.catalog.kernel_curves import (
    CURVES,
    KERNELS_FROM,
    CollectiveCurve,
    Curve,
    DecodeCurve,
    GemmCurve,
    GroupedCurve,
    KernelCurves,
    KernelFit,
    Key,
    PrefillCurve,
    VectorCurve,
    calibration_names,
    preferred_fits,
    read_calibration,
)
from simulator.errors import InputError
from simulator.randomness import stratified
from simulator.units import to_si

Array = NDArray[np.float64]
Source = Literal["kernels", "profile", "assumed", "residual"]
SOURCES: tuple[Source, ...] = get_args(Source)

MAX_RELATIVE_ERROR = 1.0
"""Standard error of a logarithm beyond which a parameter is not identified: a factor of e is as far as a draw strays per sigma."""
TAIL = 4
"""Degrees of freedom of Student's t for kernel residuals: their 90th percentiles are some three medians, a normal's 2.4, t₄'s 2.9."""

#: Order of a fit's free parameters in its correlation, where it is not that of the curve's fields.
_ORDER: dict[type, tuple[str, ...]] = {
    DecodeCurve: (
        "hbm",
        "peak",
        "launch_s",
        "ramp_s",
        "ramp_bytes",
        "head_s",
        "kv_head_s",
        "resident",
        "resident_speed",
        "item_s",
        "walk_s",
        "pair",
        "split_s",
    )
}

#: Parameters by the calls whose time they set, small or large; the others shape what lies between.
_SIDES: dict[type, dict[str, Literal["small", "large"]]] = {
    GemmCurve: {
        "launch_s": "small",
        "hbm": "small",
        "quantise": "small",
        "row_s": "small",
        "peak": "large",
        "split_s": "large",
        "spill": "large",
    },
    VectorCurve: {"launch_s": "small", "hbm": "large"},
    GroupedCurve: {"launch_s": "small", "expert_s": "small", "hbm": "small", "traffic": "small", "peak": "large"},
    PrefillCurve: {"launch_s": "small", "traffic": "small", "serial": "large", "peak": "large"},
    DecodeCurve: {
        "launch_s": "small",
        "ramp_s": "small",
        "kv_head_s": "small",
        "head_s": "small",
        "split_s": "small",
        "hbm": "large",
        "peak": "large",
        "item_s": "large",
        "walk_s": "large",
    },
    CollectiveCurve: {"latency_s": "small", "direct": "small", "setup_s": "large", "link": "large"},
}

#: What carries over least from one chip to the next of each side: the parameter that sets the time of its plainest calls.
_LEADING: dict[type, tuple[str, str]] = {
    GemmCurve: ("hbm", "peak"),
    VectorCurve: ("launch_s", "hbm"),
    GroupedCurve: ("hbm", "peak"),
    PrefillCurve: ("launch_s", "peak"),
    DecodeCurve: ("launch_s", "hbm"),
    CollectiveCurve: ("latency_s", "link"),
}


@dataclass(frozen=True)
class Draws:
    """``n`` draws of a seed, of some sources; the others stay where they are.

    Raises
    ------
    InputError
        For fewer than one draw or an unknown source.
    """

    n: int
    seed: int = 0
    sources: frozenset[Source] = frozenset(SOURCES)

    def __post_init__(self) -> None:
        """Check."""
        if self.n < 1:
            raise InputError(f"draws = {self.n}: must be at least 1")
        if unknown := self.sources - set(SOURCES):
            raise InputError(f"sources of uncertainty {sorted(unknown)}: known are {', '.join(SOURCES)}")

    def uniform(self, cause: str) -> Array:
        """[n] values in (0, 1)."""
        return stratified(self.seed, f"interval/{cause}", self.n)

    def normal(self, cause: str) -> Array:
        """[n] standard normal values."""
        return normal_scores(self.uniform(cause))

    def only(self, source: Source, n: int) -> "Draws":
        """``n`` draws of one source alone."""
        return Draws(n, self.seed, frozenset({source}))


_NORMAL = NormalDist()


def normal_scores(u: Array) -> Array:
    """Standard normal quantiles."""
    return np.array([_NORMAL.inv_cdf(float(x)) for x in u])


def interval_of(values: Array, level: float, axis: int = -1) -> Array:
    """[2, …] ends of the central interval that holds ``level`` (a share) of draws, along ``axis``.

    Quantiles by Hazen's rule, which takes each draw for the middle of its stratum.

    >>> interval_of(np.arange(10.0), 0.8).round(6).tolist()
    [0.5, 8.5]
    """
    return np.asarray(np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=axis, method="hazen"))


def student_quantile(u: Array, tail: int) -> Array:
    """Quantiles of Student's t with 2 or 4 degrees of freedom, in closed form [1]_; 0 stands for the normal.

    .. [1] W. T. Shaw, J. Comp. Finance 9(4), 2006, "Sampling Student's T distribution": recalled; tested against scipy.

    >>> [round(float(student_quantile(np.array([0.9]), tail)[0]), 3) for tail in (2, 4, 0)]
    [1.886, 1.533, 1.282]
    """
    alpha = 4 * u * (1 - u)
    match tail:
        case 2:
            return np.asarray((2 * u - 1) * np.sqrt(2 / alpha))
        case 4:
            root = np.sqrt(alpha)
            return np.asarray(np.sign(u - 0.5) * 2 * np.sqrt(np.maximum(0.0, np.cos(np.arccos(root) / 3) / root - 1)))
        case 0:
            return normal_scores(u)
        case _:
            raise InputError(f"tail = {tail}: Student's t with 2 or 4 degrees of freedom, or 0 for a normal")


def triangular(u: Array, low: float, value: float, high: float) -> Array:
    """Quantiles of a triangle with its peak at ``value`` and half of the probability on either side, so that it is the median too.

    In the logarithm where ``low`` is above 0.

    >>> triangular(np.array([0.0, 0.5, 1.0]), 0.0, 1.0, 3.0).tolist()
    [0.0, 1.0, 3.0]
    """
    if low == high:
        return np.full_like(u, value)
    if low > 0:
        return np.asarray(np.exp(_triangular(u, np.log(low), np.log(value), np.log(high))))
    return _triangular(u, low, value, high)


def _triangular(u: Array, low: float, value: float, high: float) -> Array:
    out = 1 - np.sqrt(1 - np.abs(2 * u - 1))  # 0 at the peak, 1 at either end
    return np.asarray(value + out * np.where(u < 0.5, low - value, high - value))


# Efficiencies ---------------------------------------------------------------------------------------------------------


def drawn_efficiencies(
    chip: ChipSpec, efficiency: Efficiency, draws: Draws, *, held: Collection[str] = (), kernels: str = ""
) -> list[Efficiency]:
    """``n`` efficiencies of a chip.

    Parameters
    ----------
    efficiency
        those in force; what differs from the chip's own was chosen by hand and stays, as do the constants in ``held``.
    kernels
        framework whose own kernels the engine runs; those of others stay as they are.

    Raises
    ------
    InputError
        If the chip's calibration cannot be read.
    """
    if not draws.sources & {"kernels", "assumed"}:
        return [efficiency] * draws.n
    constants = _drawn_constants(chip, efficiency, draws, held) if "assumed" in draws.sources else {}
    curves: Sequence[KernelCurves | None] = [efficiency.curves] * draws.n
    if efficiency.curves is not None and "kernels" in draws.sources:
        curves = _drawn_curves(chip, efficiency.curves, draws, kernels)
    return [
        replace(efficiency, curves=curve, **{name: float(values[k]) for name, values in constants.items()})
        for k, curve in enumerate(curves)
    ]


def _drawn_constants(chip: ChipSpec, efficiency: Efficiency, draws: Draws, held: Collection[str]) -> dict[str, Array]:
    found = {}
    own = chip.efficiency.constants
    for name, value in efficiency.constants.items():
        quantity = getattr(chip.efficiency_table, name.removesuffix("_s"))
        if name in held or value != own[name] or quantity.low is None or quantity.high is None:
            continue
        low, high = (to_si(side, quantity.unit) for side in (quantity.low, quantity.high))
        if not low <= value <= high:
            raise InputError(f"{chip.name}: efficiency.{name} = {value:g} is outside its own range {low:g} … {high:g}")
        found[name] = triangular(draws.uniform(f"assumed/{chip.family}/{name}"), low, value, high)
    return found


def _drawn_curves(chip: ChipSpec, curves: KernelCurves, draws: Draws, kernels: str) -> list[KernelCurves]:
    spreads = {} if curves.chip == chip.name else chip_spreads(_links(chip))
    plain = {
        key: _drawn_curve(curve, _preferred(chip.calibration)[key], _cause(curves.chip, key), draws, spreads)
        for key, curve in curves.curves.items()
    }
    # The same causes: where two frameworks' kernels of one kind were measured, they are off alike.
    own = {}
    for key, curve in curves.own.get(kernels, {}).items():
        fit, stand_in = _fit_of(chip.calibration, kernels, key)
        own[key] = _drawn_curve(
            curve, fit, _cause(curves.chip, key), draws, chip_spreads(_links(chip)) if stand_in else spreads
        )
    return [
        replace(
            curves,
            curves={key: column[k] for key, column in plain.items()},
            own={**curves.own, kernels: {key: column[k] for key, column in own.items()}} if own else curves.own,
        )
        for k in range(draws.n)
    ]


def _cause(chip: str, key: Key) -> str:
    return "/".join(map(str, (chip, *key)))


@cache
def _preferred(calibration: str) -> dict[Key, KernelFit]:
    return {fit.key: fit for fit in preferred_fits(read_calibration(calibration))}


@cache
def _by_framework(calibration: str) -> dict[tuple[str, Key], KernelFit]:
    return {(fit.framework, fit.key): fit for fit in read_calibration(calibration).fits}


def _fit_of(calibration: str, framework: str, key: Key) -> tuple[KernelFit, bool]:
    """The fit of a framework's curve, and whether it is of another chip that stands in.

    Its own fit; that of the chip whose kernels of it stand in; that of the framework whose kernels it runs.
    """
    fit = _by_framework(calibration).get((framework, key))
    if fit is not None:
        return fit, False
    donor = KERNELS_FROM.get(read_calibration(calibration).chip, {}).get(framework, "")
    stand_in = _by_framework(donor).get((framework, key)) if donor else None
    return (_preferred(calibration)[key], False) if stand_in is None else (stand_in, True)


def _drawn_curve(
    curve: Curve, fit: KernelFit, name: str, draws: Draws, spreads: Mapping[tuple[str, str], float]
) -> list[Curve]:
    """[n] curves: parameter errors, errors on left-out shapes, and what changes from chip to chip."""
    logs = _parameter_errors(fit, f"kernels/{name}", draws)
    sides = _SIDES[type(curve)]
    slower = {
        side: scale * student_quantile(draws.uniform(f"kernels/{name}/{side}"), TAIL)
        for side, scale in residual_scales(fit).items()
    }
    for field, side in sides.items():
        if spread := spreads.get((fit.op, field), 0.0):
            logs[field] = logs.get(field, 0.0) + spread * draws.normal(f"kernels/{name}/chip/{field}")
        logs[field] = logs.get(field, 0.0) + (-1 if field in curve.fractions else 1) * slower[side]
    values = {field: _inside(curve, field, getattr(curve, field) * np.exp(log)) for field, log in logs.items()}
    kind: type[Any] = type(curve)
    own = {item.name: getattr(curve, item.name) for item in fields(curve)}
    return [kind(**own | {field: float(column[k]) for field, column in values.items()}) for k in range(draws.n)]


def _inside(curve: Curve, field: str, values: Array) -> Array:
    if field in curve.fractions:
        return np.minimum(values, 1.0)
    least = field in curve.multiples or (field == "direct" and bool(values.any()))
    return np.maximum(values, 1.0) if least else values


def free_parameters(fit: KernelFit, curve: type) -> tuple[str, ...]:
    """Parameters with an error, in the order of the fit's correlation."""
    order = _ORDER.get(curve) or tuple(item.name for item in fields(curve))
    return tuple(name for name in order if fit.standard_errors.get(name, 0.0) > 0)


def _parameter_errors(fit: KernelFit, cause: str, draws: Draws) -> dict[str, Array]:
    """[n] errors of each free parameter's logarithm."""
    names = free_parameters(fit, _curve_type(fit))
    if not names:
        return {}
    independent = np.stack([draws.normal(f"{cause}/{name}") for name in names])
    correlation = np.array(fit.correlation) if len(fit.correlation) == len(names) else np.eye(len(names))
    sigma = np.minimum([fit.standard_errors[name] for name in names], MAX_RELATIVE_ERROR)
    return dict(zip(names, sigma[:, None] * (root_of(correlation) @ independent), strict=True))


def root_of(correlation: Array) -> Array:
    """Matrix L with L·Lᵀ the nearest positive semidefinite matrix: rounded correlations may be slightly indefinite.

    >>> root_of(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    values, vectors = np.linalg.eigh(correlation)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def residual_scales(fit: KernelFit) -> dict[str, float]:
    """Scale of t₄ of log(time) for the fit's small and large calls: from the median errors on left-out shapes by regime."""
    regimes = fit.residuals[1:] or fit.residuals[:1]
    half = max(1, len(regimes) // 2)
    parts = {"small": regimes[:half], "large": regimes[half:] or regimes}
    median = float(student_quantile(np.array([0.75]), TAIL)[0])
    return {
        side: float(np.average([r.median_abs for r in part], weights=[r.rows for r in part])) / median
        for side, part in parts.items()
    }


@cache
def chip_spreads(links: str) -> dict[tuple[str, str], float]:
    """(op, parameter) -> spread of its logarithm from one measured chip of the catalogue to the next.

    Of the leading parameters, over the chips with the same kind of links where there are two or more (with NVLink goes HBM, with PCIe
    GDDR); the median over the formats and group sizes measured on several, because single fits run into limits.
    """
    measured = {name: load_chip(name) for name in calibration_names()}
    alike = [name for name, chip in measured.items() if _links(chip) == links]
    values: dict[tuple[Any, ...], list[float]] = {}
    for name in alike if len(alike) > 1 else measured:
        for key, fit in _preferred(name).items():
            for field in _LEADING[_curve_type(fit)]:
                values.setdefault((field, *key), []).append(float(np.log(fit.parameters[field])))
    spreads: dict[tuple[str, str], list[float]] = {}
    for (field, op, *_), logs in values.items():
        if len(logs) > 1:
            spreads.setdefault((op, field), []).append(float(np.std(logs, ddof=1)))
    return {key: float(np.median(found)) for key, found in spreads.items()}


def _links(chip: ChipSpec) -> str:
    return "none" if chip.scale_up is None else chip.scale_up.topology


def _curve_type(fit: KernelFit) -> type:
    return CURVES[fit.op]


# Engines --------------------------------------------------------------------------------------------------------------


def drawn_profiles(spec: EngineSpec, profile: EngineProfile, draws: Draws) -> list[EngineProfile]:
    """``n`` profiles of an engine.

    Parameters
    ----------
    profile
        the one in force; values that differ from the file's were chosen by hand and stay.
    """
    logs: dict[str, Array] = {}
    if spec.errors is not None and "profile" in draws.sources:
        logs = _fitted_values(spec, spec.errors, draws)
    elif spec.errors is None and "assumed" in draws.sources:
        logs = _stated_values(spec, draws)
    own = spec.profile
    moved = {name: values for name, values in logs.items() if getattr(profile, name) == getattr(own, name)}
    return [profile.with_values(**{name: float(v[k]) for name, v in moved.items()}) for k in range(draws.n)]


def _fitted_values(spec: EngineSpec, errors: FitErrors, draws: Draws) -> dict[str, Array]:
    n = len(errors.parameters)
    correlation = np.eye(n)
    for i, row in enumerate(errors.correlation):
        correlation[i, : i + 1] = correlation[: i + 1, i] = row
    # Values shared by all engines have causes of their own: two engines compared by the same draws share them.
    causes = [
        f"profile/{path}" if path.startswith(("slowdown.", "launch.", "routing.")) else f"profile/{spec.name}/{path}"
        for path in errors.parameters
    ]
    independent = np.stack([draws.normal(cause) for cause in causes])
    moves = np.array(errors.standard_errors)[:, None] * (root_of(correlation) @ independent)
    values = {field_of(path): move for path, move in zip(errors.parameters, moves, strict=True)}
    return {name: np.maximum(0.0, getattr(spec.profile, name) + move) for name, move in values.items()}


def _stated_values(spec: EngineSpec, draws: Draws) -> dict[str, Array]:
    found = {}
    for path, quantity in spec.quantities().items():
        if quantity.low is not None and quantity.high is not None and quantity.value is not None:
            low, value, high = (to_si(v, quantity.unit) for v in (quantity.low, quantity.value, quantity.high))
            found[field_of(path)] = triangular(draws.uniform(f"assumed/{spec.name}/{path}"), low, value, high)
    return found


@dataclass(frozen=True)
class ResidualFactors:
    """[n] factors on the time of every step, and on the time to the first token besides."""

    step: Array
    first_token: Array


def residual_of(spec: EngineSpec, chip: str, *, experts: bool) -> LeftOut | None:
    """What describes a deployment's residual: its kind of model on the chips of the fit, or chips the fit has not seen.

    None where the profile's file does not say.
    """
    errors = spec.errors
    if errors is None:
        return None
    if chip not in errors.chips and errors.other_chips is not None:
        return errors.other_chips
    return errors.left_out.get("experts" if experts else "dense")


def residual_factors(left_out: LeftOut | None, draws: Draws, *, group: str, run: str) -> ResidualFactors:
    """``n`` factors of one run.

    Parameters
    ----------
    group
        model, chip, engine and formats: runs of one group have part of the factor in common.
    run
        what tells the run from others of its group.
    """
    if left_out is None or "residual" not in draws.sources:
        return ResidualFactors(np.ones(draws.n), np.ones(draws.n))

    def factor(what: str, scale: float, tail: int) -> Array:
        common, own = (draws.normal(f"residual/{what}/{name}") for name in (group, f"{group}/{run}"))
        share = left_out.within_group
        mixed = np.sqrt(share) * common + np.sqrt(1 - share) * own
        # One value per stratum again, in the order of the mixture.
        u = (np.argsort(np.argsort(mixed, kind="stable"), kind="stable") + 0.5) / draws.n
        return np.asarray(np.exp(scale * student_quantile(u, tail)))

    return ResidualFactors(
        factor("step", left_out.step_scale, left_out.step_tail),
        factor("first token", left_out.first_token_scale, left_out.first_token_tail),
    )
