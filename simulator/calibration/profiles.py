"""Fitted engine profiles as files: the profile they start from with the fitted values, their errors and where they come from."""

from collections.abc import Mapping
from datetime import date
from typing import Any

from simulator.calibration.serving import Fit
from simulator.catalog.engines import EngineSpec, FitErrors
from simulator.catalog.records import Quantity
from simulator.results.toml import dumps

#: Units of a profile file, by what a field ends in, and the factor to SI.
_UNITS = {"_s": ("us", 1e-6), "_bytes": ("GB", 1e9), "_slowdown": ("1", 1.0), "_skew": ("1", 1.0)}


def fitted_quantities(
    fit: Fit, engine: str, *, source: str, locator: str, day: date
) -> dict[str, dict[str, dict[str, Any]]]:
    """[table][key] -> quantity of a profile file, of the parameters that ``engine`` has in a fit.

    ``low`` and ``high`` are the value less and plus a standard error, inside the parameter's bounds.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for p, value, error in zip(fit.parameters, fit.values, fit.errors, strict=True):
        if p.engine not in {None, engine}:
            continue
        suffix = next(s for s in _UNITS if p.field.endswith(s))
        unit, factor = _UNITS[suffix]
        table, key = place(p.field)
        note = f"standard error {_rounded(error / factor):g}" + ("" if p.engine else ", one value for every engine")
        found.setdefault(table, {})[key] = {
            "value": _rounded(value / factor),
            "unit": unit,
            "low": _rounded(max(p.low, value - error) / factor),
            "high": _rounded(min(p.high, value + error) / factor),
            "kind": "derived",
            "source": source,
            "locator": locator,
            "retrieved": day,
            "note": note,
        }
    return found


def place(field: str) -> tuple[str, str]:
    """Table and key of a profile's field in its file.

    >>> place("step_s"), place("kernel_s"), place("experts_slowdown"), place("workspace_bytes"), place("routing_skew")
    (('host', 'step'), ('launch', 'kernel'), ('slowdown', 'experts'), ('memory', 'workspace'), ('routing', 'skew'))
    """
    name = field.removesuffix("_s").removesuffix("_slowdown").removesuffix("_bytes")
    if field.endswith("_slowdown"):
        return "slowdown", name
    if field.endswith("_bytes"):
        return "memory", name
    if name.startswith("routing_"):
        return "routing", name.removeprefix("routing_")
    return ("launch" if name in {"kernel", "eager"} else "host"), name


def profile_text(
    spec: EngineSpec,
    quantities: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    command: str,
    errors: FitErrors | None = None,
) -> str:
    """A profile file: ``spec`` with some quantities replaced, and how well they are known; the same text for the same values.

    A quantity that comes out as it was keeps its date, so that a fit made again gives the same file.
    """
    lines = [f"# Written by: {command}", ""]
    plain = {name: getattr(spec, name) for name in ("schema_version", "name", "title", "versions", "kernels", "note")}
    lines += dumps({k: v for k, v in plain.items() if v != ""}).rstrip().split("\n")
    for table in ("host", "launch", "routing", "slowdown", "memory", "scheduler"):
        lines += ["", f"[{table}]"]
        for key, value in getattr(spec, table):
            fitted = quantities.get(table, {}).get(key)
            if fitted is not None and isinstance(value, Quantity):
                fitted = dict(fitted)
                if Quantity(**{**fitted, "retrieved": value.retrieved}) == value:
                    fitted["retrieved"] = value.retrieved
                lines.append(f"{key} = {_inline(fitted)}")
            elif hasattr(value, "unit"):
                lines.append(f"{key} = {_inline(value.model_dump(exclude_defaults=True))}")
            elif value != "":
                lines += dumps({key: value}).rstrip().split("\n")
    text = "\n".join(lines) + "\n"
    return (
        text if errors is None else text + "\n" + dumps({"errors": errors.model_dump(mode="json", exclude_none=True)})
    )


def _inline(quantity: Mapping[str, Any]) -> str:
    parts = []
    for key, value in quantity.items():
        text = value.isoformat() if isinstance(value, date) else dumps({"x": value}).removeprefix("x = ").strip()
        parts.append(f"{key} = {text}")
    return "{ " + ", ".join(parts) + " }"


def _rounded(value: float) -> float:
    """Four significant digits: more than any standard error leaves."""
    return float(f"{value:.4g}")
