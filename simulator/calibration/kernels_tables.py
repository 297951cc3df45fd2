"""Tables of measured kernel times: which there are, their columns, and how a folder of them is read.

The formats are those of ``docs/calibration.md``: comma-separated, one header line, ``latency_us`` in microseconds, gzipped or not. A
file's name says what it holds: ``gemm_vllm.csv.gz`` is the table *gemm* of the framework *vllm*.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.measurements import model_name
from simulator.catalog.architecture import SoftmaxAttention
from simulator.catalog.chips import chip_names
from simulator.catalog.models import load_model
from simulator.errors import InputError, nearest

Column = NDArray[Any]

#: Folders of the shared measurements whose name is not that of a chip of the catalogue.
FOLDERS = {
    "h100_sxm": "h100-sxm",
    "a100_sxm": "a100-80-sxm",
    "b200_sxm": "b200",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
    "tpu_v6e": "tpu-v6e",
}

_TEXT = {"dtype", "kv_dtype", "collective", "impl", "distribution", "model", "phase"}

COLUMNS: dict[str, tuple[str, ...]] = {
    "gemm": ("dtype", "m", "n", "k"),
    "attention_prefill": ("dtype", "kv_dtype", "batch", "seq", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("dtype", "kv_dtype", "batch", "kv_len", "heads", "kv_heads", "head_dim"),
    "mla_prefill": ("dtype", "kv_dtype", "batch", "seq", "heads"),
    "mla_decode": ("dtype", "kv_dtype", "batch", "kv_len", "heads"),
    "moe": ("dtype", "hidden", "inter", "gated", "topk", "experts", "tp", "ep", "distribution", "tokens"),
    "comm": ("collective", "impl", "dtype", "num_gpus", "bytes"),
    "act_quant_compute_scale": ("dtype", "m", "k"),
    "act_quant_scale_matrix": ("dtype", "m", "k"),
    "attention_tpu": ("model", "phase", "batch", "chunk", "kv_cache"),
}
"""Columns each table must have besides ``latency_us``; further ones are ignored. The last is of one model, in 16 bits."""


@dataclass(frozen=True)
class Table:
    """One table of one framework.

    Attributes
    ----------
    kind, framework
        from the file's name; ``comm`` names its frameworks in the column ``impl``.
    columns
        numbers and words by column, ``latency_s`` among them. [s]
    digest
        start of the SHA-256 of the text of its rows.
    """

    kind: str
    framework: str
    columns: Mapping[str, Column]
    digest: str

    def __len__(self) -> int:
        """Rows."""
        return len(self.columns["latency_s"])

    def where(self, keep: NDArray[np.bool_]) -> "Table":
        """Some of the rows."""
        return Table(self.kind, self.framework, {k: v[keep] for k, v in self.columns.items()}, self.digest)

    def groups(self, *names: str) -> list[tuple[str, ...]]:
        """Different combinations of some text columns, sorted."""
        return sorted({tuple(map(str, row)) for row in zip(*(self.columns[name] for name in names), strict=True)})


def read_tables(folder: Path) -> list[Table]:
    """Every table of a folder this project fits, by name; or the one table a file holds.

    Raises
    ------
    InputError
        If there is none, or one lacks a column or holds a time that is not positive.
    """
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if ".csv" in p.suffixes)
    found = [table for file in files if folder.is_file() or _kind(file) for table in _by_kernel(file, read_table(file))]
    if not found:
        raise InputError(
            f"{folder}: no table to fit; a file is called after what it holds and the framework, such as gemm_vllm.csv or "
            f"comm.csv: {', '.join(COLUMNS)}"
        )
    return found


def read_table(file: Path) -> Table:
    """Read one table. See :func:`read_tables`."""
    import duckdb  # noqa: PLC0415  # 0.1 s, and only this command needs it

    kind = _kind(file)
    if kind is None:
        raise InputError(f"{file}: the name must start with one of {', '.join(COLUMNS)}{nearest(file.name, COLUMNS)}")
    with duckdb.connect(":memory:") as connection:
        try:
            relation = connection.execute("SELECT * FROM read_csv(?, header = true, all_varchar = true)", [str(file)])
            raw = relation.fetchnumpy()
        except duckdb.Error as error:
            raise InputError(f"{file}: not a CSV table: {str(error).splitlines()[0]}") from None
    needed = (*COLUMNS[kind], "latency_us")
    for name in needed:
        if name not in raw:
            raise InputError(f"{file}: no column {name!r}{nearest(name, raw)}; needed: {', '.join(needed)}")
    columns = {name: _column(file, name, np.ma.filled(raw[name], "")) for name in needed}
    latency_us = columns.pop("latency_us")
    if not (np.isfinite(latency_us).all() and (latency_us >= 0).all()):
        worst = int(np.argmin(np.where(np.isfinite(latency_us), latency_us, -1)))
        raise InputError(f"{file}: row {worst + 2}: latency_us = {latency_us[worst]}: must be finite and not negative")
    seen = latency_us > 0  # a time of 0 is below the clock's resolution
    columns = {name: column[seen] for name, column in columns.items()}
    columns["latency_s"] = latency_us[seen] * 1e-6
    framework = file.name.split(".")[0].removeprefix(kind).strip("_") or ("" if kind == "comm" else "user")
    digest = hashlib.sha256()
    for name in needed:
        digest.update("\n".join(map(str, raw[name])).encode())
    return Table(kind, framework, columns, digest.hexdigest()[:16])


def _by_kernel(file: Path, table: Table) -> list[Table]:
    """The two tables of a table of a model's attention; any other is one already."""
    if table.kind != "attention_tpu":
        return [table]
    names = {str(name) for name in table.columns["model"]}
    if len(names) > 1:
        raise InputError(f"{file}: attention of {len(names)} models; one table is of one model")
    mixer = load_model(model_name(names.pop())).layers[0].mixer
    if not isinstance(mixer, SoftmaxAttention):
        raise InputError(f"{file}: not a model with plain attention")
    return _attention(table, mixer)


def _attention(table: Table, mixer: SoftmaxAttention) -> list[Table]:
    """A chunk of a prompt on its cached history, and decoding sequences over their cached keys and the new one."""
    found = []
    for phase in ("decode", "prefill"):
        rows = table.where(table.columns["phase"] == phase).columns
        count = len(rows["latency_s"])
        columns = {
            **{name: np.full(count, "bfloat16") for name in ("dtype", "kv_dtype")},
            **{
                name: np.full(count, float(value))
                for name, value in (
                    ("heads", mixer.n_heads),
                    ("kv_heads", mixer.n_kv_heads),
                    ("head_dim", mixer.head_dim),
                )
            },
            "batch": rows["batch"],
            "seq": rows["chunk"],
            "history": rows["kv_cache"],
            "kv_len": rows["kv_cache"] + 1,
            "latency_s": rows["latency_s"],
        }
        found.append(Table(f"attention_{phase}", "llmservingsim", columns, table.digest))
    return found


def chip_folders(data: Path, chip: str | None) -> dict[str, Path]:
    """Chips to calibrate, each with its folder of tables.

    ``data`` is one chip's folder or table, which needs ``chip`` unless its name says it, or a folder of such folders.

    Raises
    ------
    InputError
        If ``data`` does not exist or holds no chip this catalogue knows.
    """
    if not data.exists():
        raise InputError(f"{data}: does not exist; give a folder of tables, or a folder of such folders, one per chip")
    if chip is not None:
        return {chip: data}
    own = _chip_of(data.name)
    if own is not None:
        return {own: data}
    found = (
        {name: sub for sub in sorted(data.iterdir()) if (name := _chip_of(sub.name)) is not None}
        if data.is_dir()
        else {}
    )
    if not found:
        raise InputError(f"{data}: neither it nor a folder in it is named after a chip; say which with --chip")
    return found


def _chip_of(folder: str) -> str | None:
    name = FOLDERS.get(folder, folder)
    return name if name in chip_names() else None


def _kind(file: Path) -> str | None:
    fitting = [kind for kind in COLUMNS if file.name.split(".")[0] == kind or file.name.startswith(f"{kind}_")]
    return max(fitting, key=len, default=None)


def _column(file: Path, name: str, raw: Column) -> Column:
    if name in _TEXT:
        return raw.astype(str)
    try:
        return raw.astype(np.float64)
    except ValueError:
        bad = next(i for i, value in enumerate(raw) if not _is_number(value))
        raise InputError(f"{file}: row {bad + 2}: {name} = {raw[bad]!r}: must be a number") from None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
