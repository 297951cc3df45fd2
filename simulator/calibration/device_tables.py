"""What was measured of a device, and the tables that keep it: those of ``calibrate kernels``, and a few facts beside them.

Needs no library beyond numpy, so that a machine that only measures can write them.
"""

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from simulator.calibration.device_numpy import Device
from simulator.errors import InputError

COLUMNS: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "attention_prefill": ("batch", "seq", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("batch", "kv_len", "heads", "kv_heads", "head_dim"),
    "memory": ("kernel", "rows", "width"),
    "comm": ("num_gpus", "bytes"),
}
"""Tables, and the columns that name a shape."""

MEMORY_KERNELS = {"copy": 2.0, "norm": 4.0, "gate": 3.0}
"""Kernels of the memory table -> elements moved per element of rows x width, as the cost model counts them."""


class Key(NamedTuple):
    """One shape of one table."""

    table: str
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """What was measured of one shape.

    Attributes
    ----------
    median_s, fastest_s
        of its samples. [s]
    spread
        distance of the quartiles over the median.
    samples
        how many.
    """

    median_s: float
    fastest_s: float
    spread: float
    samples: int


@dataclass(frozen=True)
class Measurement:
    """Everything measured on one device.

    Attributes
    ----------
    device, framework, dtype, chip_dtype, element_bytes, mode
        as in :class:`~simulator.calibration.device_numpy.Backend`.
    date
        of the measurement, ISO.
    budget_s
        what was allowed. [s]
    timings
        by shape.
    """

    device: Device
    framework: str
    dtype: str
    chip_dtype: str
    element_bytes: int
    mode: str
    date: str
    budget_s: float
    timings: Mapping[Key, Timing] = field(default_factory=dict)

    def of(self, table: str) -> dict[tuple[Any, ...], Timing]:
        """Timings of one table by shape."""
        return {key.shape: timing for key, timing in self.timings.items() if key.table == table}

    def moved_bytes(self, kernel: str, rows: int, width: int) -> float:
        """Bytes of a row of the memory table. [bytes]"""
        return float(MEMORY_KERNELS[kernel] * rows * width * self.element_bytes)

    @property
    def peak_flops_per_s(self) -> float:
        """The fastest sample of any product. [FLOP/s]"""
        return max(2.0 * float(m * n * k) / t.fastest_s for (m, n, k), t in self.of("gemm").items())

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The fastest sample of a copy larger than the caches, or of weights read for one row. [bytes/s]

        Weights come from all over the memory whatever their size, so none of their products is faster than this.
        """
        reads = [n * k * self.element_bytes / t.fastest_s for (m, n, k), t in self.of("gemm").items() if m == 1]
        copies = {self.moved_bytes(*shape): t for shape, t in self.of("memory").items() if shape[0] == "copy"}
        largest = max(copies)
        large = [moved for moved in copies if moved >= 2 * self.device.cache_bytes] or [largest]
        return max(float(rate) for rate in (*reads, *(moved / copies[moved].fastest_s for moved in large)))

    @property
    def link_bytes_per_s(self) -> float | None:
        """The fastest all-reduce as a ring's traffic over one device's link; None on one device. [bytes/s]"""
        rates = [2 * (n - 1) / n * size / t.fastest_s for (n, size), t in self.of("comm").items()]
        return max(rates, default=None)


def write_tables(measured: Measurement, folder: Path) -> Iterator[Path]:
    """Write the tables that ``calibrate kernels`` reads, and ``device.csv`` with the rest; yield each file.

    Further columns: ``fastest_us``, ``spread`` and ``samples`` of each row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table, columns in COLUMNS.items():
        rows = measured.of(table)
        if not rows:
            continue
        name, constants = _constants(measured, table)
        file = folder / name
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow([*constants, *columns, "latency_us", "fastest_us", "spread", "samples"])
            for shape, t in sorted(rows.items()):
                times = (f"{1e6 * t.median_s:.5g}", f"{1e6 * t.fastest_s:.5g}", f"{t.spread:.3f}", t.samples)
                writer.writerow([*constants.values(), *shape, *times])
        yield file
    file = folder / "device.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows([("field", "value"), *_facts(measured)])
    yield file


def _constants(measured: Measurement, table: str) -> tuple[str, dict[str, str]]:
    """File of a table, and the columns that are the same in all its rows."""
    if table == "comm":
        return "comm.csv", {"collective": "all_reduce", "impl": f"{measured.framework}_nccl", "dtype": measured.dtype}
    constants = {"dtype": measured.dtype}
    if table.startswith("attention"):
        constants["kv_dtype"] = measured.dtype
    return f"{table}_{measured.framework}.csv", constants


def _facts(measured: Measurement) -> list[tuple[str, Any]]:
    d = measured.device
    return [
        ("name", d.name),
        ("kind", d.kind),
        ("count", d.count),
        ("memory_bytes", int(d.memory_bytes)),
        ("cache_bytes", int(d.cache_bytes)),
        ("units", d.units),
        *(("software", one) for one in d.software),
        ("framework", measured.framework),
        ("dtype", measured.dtype),
        ("chip_dtype", measured.chip_dtype),
        ("element_bytes", measured.element_bytes),
        ("mode", measured.mode),
        ("date", measured.date),
        ("budget_s", measured.budget_s),
    ]


def read_measurement(folder: Path) -> Measurement:
    """Read back what :func:`write_tables` wrote.

    Raises
    ------
    InputError
        If ``device.csv`` or a table is missing or malformed.
    """
    facts: dict[str, list[str]] = {}
    for row in _rows(folder / "device.csv", ("field", "value")):
        facts.setdefault(row["field"], []).append(row["value"])
    try:
        one = {name: values[0] for name, values in facts.items()}
        device = Device(
            one["name"],
            one["kind"],  # type: ignore[arg-type]  # one of the three, as written
            int(one["count"]),
            float(one["memory_bytes"]),
            float(one["cache_bytes"]),
            int(one["units"]),
            tuple(facts.get("software", ())),
        )
        found = Measurement(
            device,
            one["framework"],
            one["dtype"],
            one["chip_dtype"],
            int(one["element_bytes"]),
            one["mode"],
            one["date"],
            float(one["budget_s"]),
        )
    except KeyError as error:
        raise InputError(f"{folder / 'device.csv'}: no field {error}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'device.csv'}: {error}") from None
    timings = {}
    for table, columns in COLUMNS.items():
        file = folder / _constants(found, table)[0]
        if table == "comm" and not file.exists():
            continue
        for row in _rows(file, (*columns, "latency_us", "fastest_us", "spread", "samples")):
            try:
                shape = tuple(row[c] if c == "kernel" else int(row[c]) for c in columns)
                timing = Timing(
                    float(row["latency_us"]) * 1e-6,
                    float(row["fastest_us"]) * 1e-6,
                    float(row["spread"]),
                    int(row["samples"]),
                )
            except ValueError as error:
                raise InputError(f"{file}: {error}") from None
            if not 0 < timing.fastest_s <= timing.median_s < math.inf:
                raise InputError(f"{file}: {shape}: need 0 < fastest_us <= latency_us, and both finite")
            timings[Key(table, shape)] = timing
    return Measurement(**{**vars(found), "timings": timings})


def _rows(file: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    if not file.is_file():
        raise InputError(f"{file}: does not exist; a folder of calibrate device has it")
    with file.open(newline="", encoding="utf-8") as text:
        reader = csv.DictReader(text)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{file}: no column {missing[0]!r}; needed: {', '.join(needed)}")
        return list(reader)
