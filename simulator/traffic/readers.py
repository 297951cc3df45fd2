"""Request traces: which column of which format means what, and errors that name file and line.

A format is a row of :data:`FORMATS`. How files are opened and read is :mod:`simulator.traffic.sources`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, nearest
from simulator.traffic.hash_ids import HASH_BLOCK_TOKENS, read_block_ids
from simulator.traffic.sources import Source, open_source
from simulator.traffic.stream import BlockIds, first_fault, order_check, row_checks

FormatName = Literal["azure", "mooncake", "vidur", "plain"]
Quantity = Literal["arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens"]

UNIX_TIME_FROM_S = 1e8
"""Times whose first is above this (three years) are taken for Unix times and count from the first row, as dates do."""

UNIX_TIME_TO_S = 1e11
"""A first time above this (the year 5138) is a Unix time in milliseconds under the name of seconds."""


@dataclass(frozen=True)
class Format:
    """How one kind of trace names its columns. Names are compared without case, with spaces as ``_``.

    Attributes
    ----------
    names
        quantity -> header names that mean it.
    required
        quantities without which it is not this format. Never ``arrival_s`` for lengths without times.
    per_second
        how many units of the time column make a second. A name that ends in ``_ms`` means milliseconds by itself.
    left_out
        header name -> what is lost by not reading it, told as a note.
    """

    names: dict[Quantity, tuple[str, ...]]
    required: tuple[Quantity, ...]
    per_second: float = 1.0
    left_out: dict[str, str] = field(default_factory=dict)
    hash_ids: tuple[str, ...] = ()
    """Header names of a list of block ids per row."""


#: Formats with names of their own come first; ``plain`` takes whatever they leave.
FORMATS: dict[FormatName, Format] = {
    "azure": Format(
        {
            "arrival_s": ("timestamp",),
            "prompt_tokens": ("contexttokens",),
            "output_tokens": ("generatedtokens",),
        },
        ("arrival_s", "prompt_tokens", "output_tokens"),
    ),
    "mooncake": Format(
        {
            "arrival_s": ("timestamp",),
            "prompt_tokens": ("input_length",),
            "output_tokens": ("output_length",),
        },
        ("arrival_s", "prompt_tokens", "output_tokens"),
        per_second=1000.0,
        hash_ids=("hash_ids",),
    ),
    "vidur": Format(
        {
            "arrival_s": ("arrived_at",),
            "prompt_tokens": ("num_prefill_tokens",),
            "output_tokens": ("num_decode_tokens",),
        },
        ("prompt_tokens", "output_tokens"),
    ),
    "plain": Format(
        {
            "arrival_s": (
                "arrival_s",
                "arrival_time_s",
                "arrival",
                "arrival_time",
                "timestamp_s",
                "timestamp",
                "arrival_ms",
                "timestamp_ms",
            ),
            "prompt_tokens": ("prompt_tokens", "input_tokens", "prompt_len", "input_len", "request_tokens", "prompt"),
            "output_tokens": (
                "output_tokens",
                "completion_tokens",
                "generated_tokens",
                "output_len",
                "response_tokens",
                "output",
            ),
            "cached_tokens": ("cached_tokens",),
            "max_tokens": ("max_tokens",),
        },
        ("prompt_tokens", "output_tokens"),
        hash_ids=("hash_ids",),
        left_out={
            "prefix_hit_tokens_upper_bound": "prefix_hit_tokens_upper_bound is not read: it is what an infinite cache "
            "would hit, not what was cached"
        },
    ),
}


@dataclass(frozen=True)
class Trace:
    """Requests as a file has them, checked.

    Attributes
    ----------
    arrival_s
        [n] times since the start, not decreasing; None if the file has none. [s]
    prompt_tokens, output_tokens
        [n] at least 1 each.
    cached_tokens, max_tokens
        [n], or None if the file has no such column.
    format
        name of the format, stated or found.
    columns
        quantity -> header name of the column it was read from.
    n_dropped
        rows left out because ``drop_invalid`` was set.
    notes
        what a reader of the results should know.
    blocks
        which prompts share a prefix, or None if the file does not say.
    """

    file: str
    format: FormatName
    columns: dict[Quantity, str]
    arrival_s: NDArray[np.float64] | None
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64] | None = None
    max_tokens: NDArray[np.int64] | None = None
    n_dropped: int = 0
    notes: tuple[str, ...] = ()
    blocks: BlockIds | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.prompt_tokens)


def read_trace(
    file: Path,
    *,
    format_name: FormatName | None = None,
    drop_invalid: bool = False,
    hash_block_tokens: int = HASH_BLOCK_TOKENS,
) -> Trace:
    """Read a trace: CSV, JSON lines (both also gzipped) or Parquet.

    Parameters
    ----------
    file
        ends in ``.csv``, ``.jsonl``, ``.ndjson``, ``.json`` (one object per line), each also with ``.gz``, or ``.parquet``.
    format_name
        one of :data:`FORMATS`; None: the first whose required columns are all there.
    drop_invalid
        leave out rows with a missing, negative, fractional or zero number and count them, where otherwise the first
        of them is an error. Times out of order are an error in either case.
    hash_block_tokens
        tokens per entry of ``hash_ids``, if there is such a column.

    Raises
    ------
    InputError
        With the file and the line (Parquet: the row) of the first fault.
    """
    if not file.is_file():
        raise InputError(f"trace file {str(file)!r} does not exist")
    source = open_source(file)
    header = source.header()
    name, columns = _match(file, header, format_name)
    values, dates = _fetch(source, header, columns, FORMATS[name].per_second)
    n_read = len(values["prompt_tokens"])
    if n_read == 0:
        raise InputError(f"{file}: has columns, but no rows")
    plain = [_plain_name(column) for column in header]
    notes = [text for column, text in FORMATS[name].left_out.items() if column in plain]
    rows = np.arange(n_read)
    if drop_invalid:
        rows = np.flatnonzero(~np.any([bad for _, bad, _ in _checks(values)], axis=0))
        values = {quantity: column[rows] for quantity, column in values.items()}
        if len(rows) == 0:
            raise InputError(f"{file}: drop_invalid leaves none of its {n_read} rows")
        if len(rows) < n_read:
            notes.append(f"{n_read - len(rows)} of {n_read} rows were invalid and dropped")
    checks = _checks(values)
    if "arrival_s" in values:
        checks.append(order_check(values["arrival_s"]))
    fault = first_fault(checks)
    if fault is not None:
        row, quantity, rule = fault
        raise _cell_error(source, int(rows[row]), columns[cast("Quantity", quantity)], quantity, rule, dates=dates)
    if "arrival_s" in values and values["arrival_s"][0] >= UNIX_TIME_TO_S:
        rule = "is no time in seconds; if it is in milliseconds, call the column timestamp_ms"
        raise _cell_error(source, int(rows[0]), columns["arrival_s"], "arrival_s", rule, dates=dates)
    if "arrival_s" in values and (dates or values["arrival_s"][0] >= UNIX_TIME_FROM_S):
        values["arrival_s"] = values["arrival_s"] - values["arrival_s"][0]
        notes.append("times count from the first row")

    found = next((plain.index(n) for n in FORMATS[name].hash_ids if n in plain), None)
    blocks = None
    if found is not None:
        prompt = values["prompt_tokens"].astype(np.int64)
        blocks = read_block_ids(source, found, rows, prompt, hash_block_tokens)

    def whole(quantity: Quantity) -> NDArray[np.int64] | None:
        return values[quantity].astype(np.int64) if quantity in values else None

    return Trace(
        file=str(file),
        format=name,
        columns={quantity: header[index] for quantity, index in columns.items()},
        arrival_s=values.get("arrival_s"),
        prompt_tokens=values["prompt_tokens"].astype(np.int64),
        output_tokens=values["output_tokens"].astype(np.int64),
        cached_tokens=whole("cached_tokens"),
        max_tokens=whole("max_tokens"),
        n_dropped=n_read - len(rows),
        notes=tuple(notes),
        blocks=blocks,
    )


def _plain_name(name: str) -> str:
    """Header name as names are compared: lower case, spaces as underscores."""
    return re.sub(r"\s+", "_", name.strip().lower())


def _match(file: Path, header: list[str], format_name: FormatName | None) -> tuple[FormatName, dict[Quantity, int]]:
    """Find the format, and for each quantity the index of its column; of several names the first listed wins."""
    plain = [_plain_name(name) for name in header]
    twice = next((name for name in plain if plain.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{file}:1: two columns are called {twice!r}")
    if format_name is not None and format_name not in FORMATS:
        raise InputError(f"unknown trace format {format_name!r}{nearest(format_name, FORMATS)}")
    for name, form in FORMATS.items() if format_name is None else [(format_name, FORMATS[format_name])]:
        columns = {
            quantity: plain.index(next(n for n in names if n in plain))
            for quantity, names in form.names.items()
            if any(n in plain for n in names)
        }
        if all(quantity in columns for quantity in form.required):
            return name, columns
    missing = next(quantity for quantity in form.required if quantity not in columns)
    wanted = ", ".join(form.names[missing])
    raise InputError(f"{file}:1: no column for {missing} ({name} format: {wanted}); found: {', '.join(header)}")


def _checks(values: dict[Quantity, NDArray[np.float64]]) -> list[tuple[str, NDArray[np.bool_], str]]:
    return row_checks(
        arrival_s=values.get("arrival_s"),
        prompt_tokens=values["prompt_tokens"],
        output_tokens=values["output_tokens"],
        cached_tokens=values.get("cached_tokens"),
        max_tokens=values.get("max_tokens"),
    )


#: A UTC date and time in words DuckDB 1.1 and 2.0 read alike; other offsets they do not.
_DATE = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|\+00(:?00)?)?)?"


def _fetch(
    source: Source, header: list[str], columns: dict[Quantity, int], per_second: float
) -> tuple[dict[Quantity, NDArray[np.float64]], bool]:
    """Columns as floats, NaN where a cell is missing or no number, and whether times were dates. Times in seconds."""
    selected = [f"try_cast(c{index} AS DOUBLE) AS {quantity}" for quantity, index in columns.items()]
    time = columns.get("arrival_s")
    if time is not None:
        text = f"trim(c{time})"
        selected.append(
            f"CASE WHEN arrival_s IS NULL AND regexp_full_match({text}, '{_DATE}') "
            f"THEN epoch_ns(try_cast(regexp_replace({text}, '(Z|\\+00(:?00)?)$', '') AS TIMESTAMP_NS)) END AS date_ns"
        )
    fetched = source.query(", ".join(selected), [columns[q] for q in columns])
    values: dict[Quantity, NDArray[np.float64]] = {
        quantity: np.ma.filled(np.ma.asarray(fetched[quantity], dtype=np.float64), np.nan) for quantity in columns
    }
    if time is None or not len(values["arrival_s"]):
        return values, False
    date_ns = np.ma.asarray(fetched["date_ns"])
    given = ~np.ma.getmaskarray(date_ns)
    if given.sum() <= np.isfinite(values["arrival_s"]).sum():
        unit = 1000.0 if _plain_name(header[time]).endswith("_ms") else per_second
        values["arrival_s"] = values["arrival_s"] / unit
        return values, False
    # Counted from the earliest while still whole nanoseconds: a date in float seconds is only good to 0.2 µs.
    whole_ns = np.asarray(np.ma.getdata(date_ns), dtype=np.int64)
    values["arrival_s"] = np.where(given, (whole_ns - whole_ns[given].min()) / 1e9, np.nan)
    return values, True


def _cell_error(source: Source, row: int, index: int, quantity: str, rule: str, *, dates: bool) -> InputError:
    """The error for one cell: where it is, what it says, what it should say."""
    where, text = source.cell(row, index)
    column = source.header()[index]
    if text is None or not text.strip():
        return InputError(f"{where}: {column}: missing value")
    if quantity == "arrival_s" and (dates or not _is_number(text)) and "earlier" not in rule:
        rule = "must be a UTC date and time such as 2023-11-16 18:15:46.68" if dates else "must be a number of seconds"
    return InputError(f"{where}: {column} = {text!r}: {rule}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
