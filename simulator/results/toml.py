"""TOML for plain data: the standard library reads it but does not write it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(data: Mapping[str, Any]) -> str:
    """Write nested mappings, lists, strings, numbers and booleans as TOML, in the order given.

    A mapping's plain values come before its sub-tables, as TOML demands. ``None`` values are left out: TOML has none.

    >>> print(dumps({"name": "x", "run": {"seed": 1, "share": 0.5}}), end="")
    name = "x"
    <BLANKLINE>
    [run]
    seed = 1
    share = 0.5
    """
    lines: list[str] = []
    _table(data, (), lines)
    return "\n".join(lines) + "\n"


def _table(data: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    nested = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in data.items() if key not in nested and value is not None}
    if path and (flat or not nested):
        if lines:
            lines.append("")
        lines.append("[" + ".".join(_key(part) for part in path) + "]")
    lines.extend(f"{_key(key)} = {value_text(value)}" for key, value in flat.items())
    for key, value in nested.items():
        _table(value, (*path, key), lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # With non-ASCII left as it is, JSON's escapes are a subset of TOML's; only DEL must be escaped in TOML alone.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_text(value: Any) -> str:
    """Write one value; floats keep their shortest exact form.

    >>> value_text([1, 2.5e12, "a", True, float("inf")])
    '[1, 2500000000000.0, "a", true, inf]'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return repr(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_key(k)} = {value_text(v)}" for k, v in value.items() if v is not None) + " }"
            if value
            else "{}"
        )
    if isinstance(value, Sequence):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    raise TypeError(f"TOML cannot hold {type(value).__name__}: {value!r}")
