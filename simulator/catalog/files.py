"""Where catalogue files live, and how one is read into a record with errors a person can act on."""

import json
import tomllib
from collections.abc import Mapping
from datetime import date, time
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from simulator.errors import InputError, nearest

R = TypeVar("R", bound=BaseModel)


def data_folder(name: str) -> Traversable:
    """Return the data folder ``hardware_specs`` or ``workloads``: inside the wheel, else beside the checkout."""
    packaged = package_files("simulator") / "_data" / name
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[2] / name
    if checkout.is_dir():
        return checkout
    raise InputError(f"data folder {name!r} is neither in the installed package ({packaged}) nor at {checkout}")


def names_in(folder: Traversable) -> list[str]:
    """Names (without ``.toml``) of the catalogue files in a folder, sorted."""
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def find(kind: str, name: str, folder: Traversable, *, suffixes: tuple[str, ...] = (".toml",)) -> Traversable:
    """Resolve ``name``: a catalogue name, or a path to the user's own file (it has a suffix or a slash).

    ``kind`` ("model", "chip", …) names what is looked for in errors.
    """
    if name.endswith(suffixes) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{kind} file {name!r} does not exist")
        return path
    entry = folder / f"{name}.toml"
    if not entry.is_file():
        raise InputError(f"unknown {kind} {name!r}{nearest(name, names_in(folder))}")
    return entry


def read_toml(file: Traversable) -> dict[str, Any]:
    """Parse a TOML file; a syntax error names file, line and column."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error}") from None


def parse(record: type[R], data: Mapping[str, Any], where: str) -> R:
    """Validate ``data`` as ``record``; the error names file, field, value and what is allowed.

    Validation is strict, as for JSON: a string is no number and a fraction no count, but a list is a tuple and ``1`` a float.
    """
    try:
        return record.model_validate_json(json.dumps(data, default=_as_json), strict=True)
    except ValidationError as error:
        raise InputError("\n".join(_explain(record, item, where) for item in error.errors())) from None


def _as_json(value: date | time | BaseModel) -> Any:
    """Spell TOML's dates and times (a datetime is a date) and nested records as JSON does."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value.isoformat()


def _explain(record: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        owner = _owner(record, item["loc"][:-1])
        return f"{where}: unknown field {path!r}{nearest(str(item['loc'][-1]), owner)}"
    if item["type"] == "missing":
        return f"{where}: {path}: required, but missing"
    shown = f" = {item['input']!r}" if not isinstance(item["input"], dict) else ""
    return f"{where}: {path or 'file'}{shown}: {item['msg'].removeprefix('Value error, ')}"


def _owner(record: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the (nested) record a location points into; falls back to the outermost."""
    current: type[BaseModel] = record
    for part in loc:
        field = current.model_fields.get(str(part))
        annotation = field.annotation if field else None
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        found = next((a for a in nested if issubclass(a, BaseModel)), None)
        if found is None:
            break
        current = found
    return list(current.model_fields)
