"""A result folder: written whole or not at all, byte for byte the same for the same run.

::

    meta.json          format, schema version, seed, package versions, digests of input files
    scenario.toml      the resolved scenario: run it again and the same bytes come out
    summary.json       keys sorted, full precision
    requests.parquet   one row per request, in stream order
    timeline.parquet   one row per replica and interval

No wall time, host name or user is inside, so equal runs give equal folders on one version set and CPU family.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from simulator.errors import InputError
from simulator.results import toml
from simulator.results.summary import SCHEMA_VERSION, Summary
from simulator.results.tables import REQUEST_COLUMNS, REQUEST_STATES, TIMELINE_COLUMNS, Column, Table, as_table

FORMAT = "chipseconds-result"
#: Files of a result folder.
FILES = ("meta.json", "scenario.toml", "summary.json", "requests.parquet", "timeline.parquet")
_ROWS_PER_GROUP = 122_880


@dataclass(frozen=True)
class Result:
    """One run, as written and as read back."""

    scenario: Mapping[str, Any]
    summary: Summary
    requests: Table
    timeline: Table
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every file outside the package that the run read, by the name the scenario gives it."""


def check_writable(folder: Path) -> None:
    """Refuse, before a long run, an ``--out`` folder that :func:`write_result` would refuse after it.

    Raises
    ------
    InputError
        If ``folder`` is a file, or holds something that is not a result.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not is_result(folder):
            raise InputError(f"--out {folder}: the folder holds something that is not a result; it is left alone")
    elif folder.exists() or folder.is_symlink():
        raise InputError(f"--out {folder}: exists and is not a folder")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"--out {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: {parent} cannot be written to")


def is_result(folder: Path) -> bool:
    """Whether ``folder`` was written by :func:`write_result`, of whatever version."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def write_result(result: Result, folder: Path) -> None:
    """Write ``result`` to ``folder``, replacing an earlier result there but no other file that lies beside it.

    Everything goes to a temporary folder first, so a failure or a kill leaves the old state.

    Raises
    ------
    InputError
        If ``folder`` is not free and not a result folder, or cannot be written.
    """
    check_writable(folder)
    try:
        _write(result, folder.absolute())
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written: {error.strerror or error}") from None


def _write(result: Result, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        meta = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "seed": result.seed,
            "versions": dict(result.versions),
            "inputs": dict(result.inputs),
        }
        _write_text(temporary / "meta.json", json_text(meta))
        _write_text(temporary / "scenario.toml", toml.dumps(result.scenario))
        _write_text(temporary / "summary.json", summary_json(result.summary))
        write_parquet(as_table(REQUEST_COLUMNS, result.requests, what="requests"), temporary / "requests.parquet")
        write_parquet(
            as_table(TIMELINE_COLUMNS, result.timeline, what="timeline"),
            temporary / "timeline.parquet",
            columns=TIMELINE_COLUMNS,
        )
        temporary.chmod(0o755)
        if folder.exists():
            old = Path(mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / folder.name)
            temporary.rename(folder)
            for other in (old / folder.name).iterdir():
                if other.name not in FILES:
                    other.rename(folder / other.name)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def json_text(document: Mapping[str, Any]) -> str:
    """JSON as this package writes it to files: sorted keys, shortest exact floats, no NaN."""
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_json_file(document: Mapping[str, Any], path: Path) -> None:
    """Write a JSON record to a file, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json_text(document), encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def has_format(path: Path, name: str) -> bool:
    """Whether a file is a JSON record that calls itself ``name``, of whatever version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == name


def summary_json(summary: Summary) -> str:
    """``summary.json`` as text."""
    return json_text(summary.model_dump(mode="json"))


def write_parquet(table: Table, path: Path, *, columns: tuple[Column, ...] = REQUEST_COLUMNS) -> None:
    """Write a table in row order on one thread: equal tables give equal bytes. NaN becomes null."""
    import duckdb  # noqa: PLC0415 - a tenth of a second, and only writers and readers need it

    selected = []
    for column in columns:
        name = f'"{column.name}"'
        if column.dtype == "state":
            states = ", ".join(f"'{state}'" for state in REQUEST_STATES)
            selected.append(f"[{states}][{name} + 1] AS {name}")
        elif column.nullable:
            selected.append(f"CASE WHEN isnan({name}) THEN NULL ELSE {name} END AS {name}")
        else:
            selected.append(name)
    quoted = str(path).replace("'", "''")
    with duckdb.connect(config={"threads": 1, "preserve_insertion_order": True}) as connection:
        connection.register("source", dict(table))
        try:
            connection.execute(
                f"COPY (SELECT {', '.join(selected)} FROM source) TO '{quoted}' "  # noqa: S608 - names from our own schema
                f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROWS_PER_GROUP})"
            )
        except duckdb.IOException as error:
            raise InputError(f"{path.name} cannot be written: {str(error).splitlines()[0]}") from None


def read_parquet(path: Path, columns: tuple[Column, ...]) -> Table:
    """Read a table written by :func:`write_parquet`; nulls become NaN, states their codes."""
    import duckdb  # noqa: PLC0415 - as above

    selected = []
    for column in columns:
        name = f'"{column.name}"'
        if column.dtype == "state":
            states = ", ".join(f"'{state}'" for state in REQUEST_STATES)
            selected.append(f"CAST(list_position([{states}], {name}) - 1 AS TINYINT) AS {name}")
        else:
            selected.append(name)
    quoted = str(path).replace("'", "''")
    try:
        with duckdb.connect(config={"threads": 1, "preserve_insertion_order": True}) as connection:
            query = f"SELECT {', '.join(selected)} FROM read_parquet('{quoted}')"  # noqa: S608 - names from our own schema
            arrays = connection.execute(query).fetchnumpy()
    except duckdb.Error as error:
        raise InputError(f"{path}: not a table of a result: {str(error).splitlines()[0]}") from None
    filled = {
        name: array.filled(np.nan) if isinstance(array, np.ma.MaskedArray) and array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }
    return as_table(columns, filled, what=str(path))


def read_result(folder: Path) -> Result:
    """Read a result folder.

    Raises
    ------
    InputError
        If it is not one, is of another schema version, or a file in it is missing or damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such result folder")
    if not is_result(folder):
        raise InputError(f"{folder}: not a result folder (no meta.json with format = {FORMAT!r})")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{folder}: result schema version {meta.get('schema_version')}; this version reads {SCHEMA_VERSION}: "
            "run its scenario.toml again"
        )
    try:
        summary = Summary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
        scenario = tomllib.loads((folder / "scenario.toml").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder}: damaged result: {error.filename} cannot be read") from None
    except ValueError as error:
        raise InputError(f"{folder}: damaged result: {str(error).splitlines()[0]}") from None
    return Result(
        scenario=scenario,
        summary=summary,
        requests=read_parquet(folder / "requests.parquet", REQUEST_COLUMNS),
        timeline=read_parquet(folder / "timeline.parquet", TIMELINE_COLUMNS),
        seed=meta["seed"],
        versions=meta["versions"],
        inputs=meta["inputs"],
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
