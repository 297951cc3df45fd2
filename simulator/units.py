"""The one place where units other than SI base units are converted.

Inside the package every float is in SI base units (bytes, seconds, FLOP/s, bytes/s, watts, joules, USD).
Files, the command line and plots may use the units below; GB is 1e9 bytes and GiB is 2**30 bytes, always.
"""

from simulator.errors import InputError, nearest

_SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_IEC = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

#: unit -> (dimension, factor to the SI base unit of that dimension)
UNITS: dict[str, tuple[str, float]] = {
    **{f"{p}B": ("bytes", f) for p, f in (_SI | _IEC).items()},
    **{f"{p}B/s": ("bytes/s", f) for p, f in (_SI | _IEC).items()},
    **{f"{p}b/s": ("bytes/s", f / 8) for p, f in _SI.items()},
    **{f"{p}FLOP": ("flops", f) for p, f in _SI.items()},
    **{f"{p}FLOP/s": ("flops/s", f) for p, f in _SI.items()},
    **{f"{p}OP/s": ("flops/s", f) for p, f in _SI.items()},
    "s": ("s", 1.0),
    "ms": ("s", 1e-3),
    "us": ("s", 1e-6),
    "ns": ("s", 1e-9),
    "min": ("s", 60.0),
    "h": ("s", 3600.0),
    "W": ("W", 1.0),
    "kW": ("W", 1e3),
    "J": ("J", 1.0),
    "kWh": ("J", 3.6e6),
    "USD/h": ("USD/s", 1 / 3600),
    "USD/kWh": ("USD/J", 1 / 3.6e6),
    "USD": ("USD", 1.0),
    "1": ("1", 1.0),
    "fraction": ("1", 1.0),
    "percent": ("1", 0.01),
    "count": ("1", 1.0),
}


def to_si(value: float, unit: str, *, dimension: str | None = None) -> float:
    """Convert ``value`` in ``unit`` to the SI base unit of its dimension.

    Raises
    ------
    InputError
        If the unit is unknown, or is not of the expected ``dimension``.

    >>> to_si(16, "GiB", dimension="bytes")
    17179869184.0
    >>> to_si(400, "Gb/s")
    50000000000.0
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}{nearest(unit, UNITS)}")
    found, factor = UNITS[unit]
    if dimension is not None and found != dimension:
        allowed = ", ".join(u for u, (d, _) in UNITS.items() if d == dimension)
        raise InputError(f"unit {unit!r} measures {found}, expected {dimension}: one of {allowed}")
    return value * factor


def format_si(value: float, unit: str, digits: int = 3) -> str:
    """Write ``value`` with an SI prefix for a person to read.

    >>> format_si(1.97e14, "FLOP/s")
    '197 TFLOP/s'
    >>> format_si(6.942654985e-3, "s")
    '6.94 ms'
    """
    if value == 0:
        return f"0 {unit}"
    prefixes = ["f", "p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E"]
    index = prefixes.index("")
    scaled = value
    while abs(scaled) >= 999.5 and index < len(prefixes) - 1:
        scaled /= 1000
        index += 1
    while abs(scaled) < 0.9995 and index > 0:
        scaled *= 1000
        index -= 1
    before = len(str(int(abs(scaled))))
    text = f"{scaled:.{max(0, digits - before)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {prefixes[index]}{unit}"
