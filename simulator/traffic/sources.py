"""Tables in files: the header, the columns as text through DuckDB, and any single cell with its line number.

DuckDB reads every column as text and casts by an explicit expression, because its own type detection turns 3.7 tokens
into 4. Line numbers are worked out only when something is wrong, by reading the file again in plain Python: a row number is no
line number once a file has blank lines or line breaks inside quotes.
"""

import csv
import glob
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError


class Source(Protocol):
    """A table in a file. In expressions given to :meth:`query`, column i of the header is ``c{i}``, a VARCHAR."""

    file: Path

    def header(self) -> list[str]:
        """Names of the columns."""

    def query(self, expressions: str, indices: list[int]) -> dict[str, NDArray[Any]]:
        """Evaluate SQL ``expressions`` over the columns ``indices``, in row order."""

    def cell(self, row: int, index: int) -> tuple[str, str | None]:
        """Where row ``row`` (from 0) is, as ``file:line``, and what its column ``index`` says; None: nothing."""


def open_source(file: Path) -> Source:
    """Return the source for a file, by its suffix."""
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return _Csv(file)
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return _JsonLines(file)
    if file.name.lower().endswith(".parquet"):
        return _Parquet(file)
    raise InputError(
        f"{file}: not a kind of file traces are read from: .csv, .jsonl, .ndjson, .json, each also .gz, or .parquet"
    )


def _run(sql: str, parameters: list[Any]) -> dict[str, NDArray[Any]]:
    import duckdb  # noqa: PLC0415 - late: 0.1 s of import that --help must not pay

    with duckdb.connect(":memory:") as connection:
        result: dict[str, NDArray[Any]] = connection.execute(sql, parameters).fetchnumpy()
    return result


def _refusal(file: Path, error: Exception) -> InputError:
    first_line = str(error).partition("\n")[0]
    return InputError(f"{file}: cannot be read: {first_line}")


class _Text(ABC):
    """What CSV and JSON lines share: opening, decoding, and turning damage into an error with a line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _open(self) -> IO[str]:
        # newline="" leaves line breaks inside quotes to the csv module.
        if self.file.name.lower().endswith(".gz"):
            return gzip.open(self.file, "rt", encoding="utf-8-sig", newline="")
        return self.file.open(encoding="utf-8-sig", newline="")

    @abstractmethod
    def _records(self, lines: IO[str]) -> Iterator[tuple[int, Any]]:
        """Yield (line number, record); raise InputError where a record is broken."""

    def records(self) -> Iterator[tuple[int, Any]]:
        """Yield every record with the number of its first line."""
        line = 0  # the last good one, told when the next read fails
        try:
            with self._open() as lines:
                for line, record in self._records(lines):
                    yield line, record
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file}: not UTF-8 text after line {line}: {error.reason}") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{self.file}: not a whole gzip file, broken after line {line}: {error}") from None


class _Csv(_Text):
    """Comma-separated values with a header on the first line; quotes as in RFC 4180."""

    def _records(self, lines: IO[str]) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(lines, strict=True)
        n_columns = 0
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{self.file}:{line}: not valid CSV: {error}") from None
            if not record and n_columns:
                continue
            if not n_columns:
                if not any(name.strip() for name in record):
                    raise InputError(f"{self.file}:1: empty, but the first line must name the columns")
                n_columns = len(record)
            elif len(record) != n_columns:
                raise InputError(f"{self.file}:{line}: {len(record)} values, but the header names {n_columns} columns")
            yield line, record

    def header(self) -> list[str]:
        """Names of the columns."""
        _, names = next(self.records(), (0, None))
        if names is None:
            raise InputError(f"{self.file}:1: the file is empty")
        return list(names)

    def query(self, expressions: str, indices: list[int]) -> dict[str, NDArray[Any]]:
        """Evaluate SQL ``expressions`` over the columns, in row order."""
        import duckdb  # noqa: PLC0415 - late, as in _run

        columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(self.header())))
        options = """auto_detect=false, header=true, delim=',', quote='"', escape='"', nullstr=''"""
        try:
            return _run(
                f"SELECT {expressions} FROM read_csv(?, columns={{{columns}}}, {options})",  # noqa: S608 - column numbers
                [glob.escape(str(self.file))],
            )
        except duckdb.Error:
            # Broken, or only unusual (DuckDB 2.0 stumbles over mixed line ends): Python's reader tells which, and
            # raises for what is broken.
            records = [record for _, record in self.records()][1:]
        unnest = ", ".join(f"unnest(?::VARCHAR[]) AS c{i}" for i in indices)
        return _run(
            f"SELECT {expressions} FROM (SELECT {unnest})",  # noqa: S608 - column numbers
            [[record[i] or None for record in records] for i in indices],
        )

    def cell(self, row: int, index: int) -> tuple[str, str | None]:
        """Where a row is, and what one of its columns says."""
        for number, (line, record) in enumerate(self.records()):
            if number == row + 1:
                return f"{self.file}:{line}", record[index] or None
        raise IndexError(row)


class _JsonLines(_Text):
    """One JSON object per line; the keys of the first are the columns."""

    def _records(self, lines: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{self.file}:{line}: not one JSON object per line: {error.msg}") from None
            if not isinstance(record, dict):
                raise InputError(f"{self.file}:{line}: a JSON {type(record).__name__}, not an object")
            yield line, record

    def header(self) -> list[str]:
        """Names of the columns."""
        _, first = next(self.records(), (0, None))
        if first is None:
            raise InputError(f"{self.file}:1: the file is empty")
        return list(first)

    def query(self, expressions: str, indices: list[int]) -> dict[str, NDArray[Any]]:
        """Evaluate SQL ``expressions`` over the columns, in row order."""
        import duckdb  # noqa: PLC0415 - late, as in _run

        names = self.header()
        columns = ", ".join(f"{_literal(names[i])}: 'VARCHAR'" for i in indices)
        renamed = ", ".join(f"{_identifier(names[i])} AS c{i}" for i in indices)
        options = "format='newline_delimited', auto_detect=false"
        try:
            return _run(
                f"SELECT {expressions} FROM (SELECT {renamed} FROM read_json(?, columns={{{columns}}}, {options}))",  # noqa: S608 - quoted names
                [glob.escape(str(self.file))],
            )
        except duckdb.Error as error:
            for _ in self.records():  # raises, with the line, where the file is broken
                pass
            raise _refusal(self.file, error) from None

    def cell(self, row: int, index: int) -> tuple[str, str | None]:
        """Where a row is, and what one of its columns says."""
        name = self.header()[index]
        for number, (line, record) in enumerate(self.records()):
            if number == row:
                value = record.get(name)
                return f"{self.file}:{line}", None if value is None else str(value)
        raise IndexError(row)


class _Parquet:
    """A Parquet file; rows count from 1 in errors."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _run(self, sql: str) -> dict[str, NDArray[Any]]:
        import duckdb  # noqa: PLC0415 - late, as in _run

        try:
            return _run(sql, [glob.escape(str(self.file))])
        except duckdb.Error as error:
            raise _refusal(self.file, error) from None

    def header(self) -> list[str]:
        """Names of the columns."""
        described = self._run("SELECT column_name FROM (DESCRIBE SELECT * FROM read_parquet(?))")
        return [str(name) for name in described["column_name"]]

    def query(self, expressions: str, indices: list[int]) -> dict[str, NDArray[Any]]:
        """Evaluate SQL ``expressions`` over the columns, in row order."""
        names = self.header()
        renamed = ", ".join(f"{_identifier(names[i])}::VARCHAR AS c{i}" for i in indices)
        return self._run(f"SELECT {expressions} FROM (SELECT {renamed} FROM read_parquet(?))")  # noqa: S608 - quoted names

    def cell(self, row: int, index: int) -> tuple[str, str | None]:
        """Where a row is, and what one of its columns says."""
        value = self.query(f"c{index} AS value", [index])["value"][row]
        return f"{self.file}: row {row + 1}", None if value is np.ma.masked or value is None else str(value)


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
