"""``--set path=value``: changes to what a TOML file says, before it is validated."""

import tomllib
from collections.abc import Mapping
from typing import Any

from simulator.errors import InputError, nearest


def parse_override(text: str, *, example: str) -> tuple[list[str], Any]:
    """Read ``path=value``: a path of fields, and a value in TOML's syntax, in which a word that is no TOML value is a string.

    >>> parse_override("engine.max_num_seqs=64", example="a.b=1")
    (['engine', 'max_num_seqs'], 64)

    Raises
    ------
    InputError
        If there is no ``=`` or a field of the path has no name.
    """
    name, equals, written = text.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise InputError(f"--set {text!r}: write path=value, e.g. {example}")
    return path, parse_value(written.strip())


def parse_value(written: str) -> Any:
    """A TOML value, or the text itself."""
    if "\n" not in written:
        try:
            return tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            pass
    return written


def assign(data: dict[str, Any], path: list[str], value: Any, *, short: Mapping[str, str] | None = None) -> None:
    """Put ``value`` into ``data`` at ``path``, making tables on the way; a table of a list goes by its name or place.

    ``short`` names tables that a file may write as one word, and the field that the word is short for.

    Raises
    ------
    InputError
        If the path goes through a value, or a list has no such table.
    """
    for depth, part in enumerate(path[:-1]):
        at = ".".join(path[: depth + 1])
        inner = (
            _item(data[part], path[depth + 1], at) if isinstance(data.get(part), list) else data.setdefault(part, {})
        )
        if isinstance(inner, str) and short and at in short:
            inner = data[part] = {short[at]: inner}
        if not isinstance(inner, dict):
            raise InputError(f"--set {'.'.join(path)}: {at} = {inner!r} is a value, not a table")
        if isinstance(data.get(part), list):
            assign(inner, path[depth + 2 :], value, short=short)
            return
        data = inner
    data[path[-1]] = value


def _item(tables: list[Any], which: str, where: str) -> Any:
    """One of the tables of a list, by its name or its place."""
    named = {str(table.get("name")): table for table in tables if isinstance(table, dict)}
    if which in named:
        return named[which]
    if which.isdecimal() and int(which) < len(tables):
        return tables[int(which)]
    raise InputError(f"--set {where}.{which}: there is no {where} {which!r}{nearest(which, named)}")
