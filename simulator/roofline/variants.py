"""A deployment on other hardware than it has: faster, slower, or as a textbook prices it. What matters, and how much."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from simulator.catalog.chips import IDEAL, ChipSpec
from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError, nearest
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape

#: What can be changed, and what a factor on it does.
KNOBS = {
    "hbm": "HBM bandwidth",
    "compute": "FLOP/s of every format",
    "link": "link bandwidth",
    "latency": "latency of hops and collectives",
    "overhead": "launch, step and row overheads",
}
_TIMES = frozenset({"latency", "overhead"})
_NUDGE = 1e-4
"""Relative change from which elasticities are taken."""


@dataclass(frozen=True)
class WhatIf:
    """A step with some of its hardware changed.

    Attributes
    ----------
    factors
        knob -> factor; rates and times are multiplied by it.
    time_s
        of the step then. [s]
    speedup
        time now ÷ time then.
    elasticity
        d ln time / d ln factor at the present value: −0.6 says that 1 % more of this rate saves 0.6 % of the time. With
        several knobs, NaN. At a kink, where an op is about to change what bounds it, the mean of both sides.
    """

    factors: Mapping[str, float]
    time_s: float
    speedup: float
    elasticity: float


def scaled(d: Deployment, factors: Mapping[str, float]) -> Deployment:
    """``d`` with rates (hbm, compute, link) and fixed times (latency, overhead) multiplied. Capacities stay.

    Raises
    ------
    InputError
        If a knob is unknown, a rate's factor not above 0, or a time's below 0.
    """
    for knob, factor in factors.items():
        if knob not in KNOBS:
            raise InputError(f"what-if: {knob!r}{nearest(knob, KNOBS)}")
        if not (0 <= factor < math.inf) or (factor == 0 and knob not in _TIMES):
            least = "not below 0" if knob in _TIMES else "above 0"
            raise InputError(f"what-if {knob} = {factor}: a factor must be finite and {least}")
    f = dict.fromkeys(KNOBS, 1.0) | dict(factors)
    e = d.eff
    return replace(
        d,
        slice=_scaled_slice(d.slice, hbm=f["hbm"], compute=f["compute"], link=f["link"], latency=f["latency"]),
        efficiency=replace(
            e,
            op_overhead_s=e.op_overhead_s * f["overhead"],
            step_overhead_s=e.step_overhead_s * f["overhead"],
            row_overhead_s=e.row_overhead_s * f["overhead"],
            collective_latency_s=e.collective_latency_s * f["latency"],
            curves=None
            if e.curves is None
            else e.curves.with_fixed_times(kernels=f["overhead"], collectives=f["latency"]),
        ),
    )


def what_if(d: Deployment, step: StepShape, factors: Mapping[str, float]) -> list[WhatIf]:
    """Each change alone, then all together if there are several."""
    now = step_time_s(d, step)
    rows = []
    for knob, factor in factors.items():
        then = step_time_s(scaled(d, {knob: factor}), step)
        rows.append(WhatIf({knob: factor}, then, now / then, elasticity(d, step, knob)))
    if len(rows) > 1:
        then = step_time_s(scaled(d, factors), step)
        rows.append(WhatIf(dict(factors), then, now / then, math.nan))
    return rows


def elasticity(d: Deployment, step: StepShape, knob: str) -> float:
    """Relative change of the step's time per relative change of ``knob``, from a small change both ways.

    Time is homogeneous: with all rates doubled and all fixed times halved it halves. So the elasticities of times less
    those of rates add up to 1, and each is the share of the step that its knob accounts for.
    """
    up, down = (step_time_s(scaled(d, {knob: math.exp(sign * _NUDGE)}), step) for sign in (1, -1))
    return math.log(up / down) / (2 * _NUDGE)


def textbook(d: Deployment) -> Deployment:
    """``d`` as textbook rooflines price it.

    The datasheet's rates; only weights and KV reads cross HBM; the cache lies evenly over the chips; links cost nothing.
    What memory holds changes only by the copies of the cache.
    """
    free = LinkDomain("switched", (d.slice.n_chips,), (False,), math.inf, 0.0, "free links")
    return replace(
        d,
        slice=replace(d.slice, domains=(free,)),
        efficiency=IDEAL,
        activation_traffic=False,
        kv_layout="even",
        layout="1d",
    )


def _scaled_slice(s: Slice, *, hbm: float, compute: float, link: float, latency: float) -> Slice:
    domains = tuple(
        replace(level, bandwidth_bytes_per_s=level.bandwidth_bytes_per_s * link, latency_s=level.latency_s * latency)
        for level in s.domains
    )
    return replace(s, chip=_scaled_chip(s.chip, hbm=hbm, compute=compute), domains=domains)


def _scaled_chip(chip: ChipSpec, *, hbm: float, compute: float) -> ChipSpec:
    rates = {
        dtype: q if q.value is None else q.model_copy(update={"value": q.value * compute})
        for dtype, q in chip.compute.items()
    }
    bandwidth = chip.memory.hbm_bandwidth
    if bandwidth.value is not None:
        bandwidth = bandwidth.model_copy(update={"value": bandwidth.value * hbm})
    memory = chip.memory.model_copy(update={"hbm_bandwidth": bandwidth})
    return chip.model_copy(update={"compute": rates, "memory": memory})
