"""The schema as Markdown, for ``docs/results.md``: written from the definitions, so the two cannot disagree."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args, get_origin

from simulator.results.summary import Section, Summary
from simulator.results.tables import REQUEST_COLUMNS, TIMELINE_COLUMNS, Column


def reference_markdown() -> str:
    """Tables of every column and every summary field."""
    parts = [
        "## `requests.parquet`\n",
        _columns(REQUEST_COLUMNS),
        "\n## `timeline.parquet`\n",
        _columns(TIMELINE_COLUMNS),
        "\n## `summary.json`\n",
        *(text for record in _sections(Summary, []) for text in (f"\n### {record.__name__}\n", _fields(record))),
    ]
    return "\n".join(parts)


def _columns(columns: tuple[Column, ...]) -> str:
    rows = [f"| `{c.name}` | {c.dtype} | {c.meaning} |" for c in columns]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def _fields(record: type[Section]) -> str:
    lines = []
    if record.__doc__:
        lines += [" ".join(record.__doc__.split()), ""]
    lines += ["| field | type | meaning |", "|---|---|---|"]
    for name, field in record.model_fields.items():
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{name}` | {_type(field.annotation)} | {meaning} |")
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if isinstance(annotation, UnionType):
        return " or ".join(_type(a) for a in arguments)
    if get_origin(annotation) in {list, dict}:
        kind = "list of" if get_origin(annotation) is list else "table of"
        return f"{kind} {_type(arguments[-1])}"
    if arguments:
        return ", ".join(f"`{a}`" for a in arguments)
    return "null" if annotation is type(None) else str(annotation.__name__)


def _sections(record: type[Section], seen: list[type[Section]]) -> Iterator[type[Section]]:
    """The record and every record inside it, each once, in the order of first use."""
    if record in seen:
        return
    seen.append(record)
    yield record
    for field in record.model_fields.values():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                yield from _sections(candidate, seen)
