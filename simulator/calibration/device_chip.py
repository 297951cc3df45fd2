"""A measured device as a chip file and its calibration: what ``calibrate device`` writes.

The tables of :mod:`simulator.calibration.device_tables` go through the fit of ``calibrate kernels``, unchanged. Where the catalogue knows the
device, its file is taken with the measured efficiencies in place of its own; where it does not, peaks are the fastest
product and the fastest traffic that were seen.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simulator.calibration.device_tables import Measurement, read_measurement, write_tables
from simulator.calibration.kernels import ChipCalibration, calibrate_chip, toml_lines
from simulator.calibration.regression import Fit, Parameter, fit_log_ratios
from simulator.catalog.chips import ChipSpec, chip_called, load_chip
from simulator.catalog.files import data_folder, read_toml
from simulator.catalog.kernel_curves import CalibrationFile, read_calibration
from simulator.errors import InputError
from simulator.results.toml import value_text

SOURCE = "this-machine"
"""Key of the measurement in the bibliography of the file."""
MEMORY_TOLERANCE = 0.15
"""By how much a device's memory may differ from that of the catalogue's chip: a slice of a GPU is not that GPU."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class DeviceCalibration:
    """A device, measured and fitted.

    Attributes
    ----------
    chip
        the record as the loader reads it back, with its curves.
    known_as
        the catalogue's chip that it is; None if the catalogue does not know it.
    fit
        of the kernels that were measured.
    constants
        measured efficiencies by their name in chip files, fractions or seconds.
    files
        text of each file by its name, the chip's first.
    notes
        what a reader should know.
    """

    chip: ChipSpec
    known_as: str | None
    fit: ChipCalibration
    constants: Mapping[str, float]
    files: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """Where the files go: ``DIR/NAME.toml``, ``DIR/NAME-kernels.toml`` and the folder ``DIR/NAME-tables``."""

    file: Path

    def __post_init__(self) -> None:
        """Refuse names that no chip can have."""
        if self.file.suffix != ".toml" or not _NAME.fullmatch(self.name):
            raise InputError(
                f"{self.file}: a chip is called as its file: small letters, digits and hyphens, then .toml, such as "
                f"{self.file.parent / 'my-machine.toml'}"
            )

    @property
    def name(self) -> str:
        """Name of the chip."""
        return self.file.stem

    @property
    def kernels(self) -> Path:
        """The calibration."""
        return self.file.with_name(f"{self.name}-kernels.toml")

    @property
    def tables(self) -> Path:
        """The measurements."""
        return self.file.with_name(f"{self.name}-tables")

    def check(self, *, overwrite: bool) -> None:
        """Refuse, before anything is measured, a place that cannot be written or is taken.

        Raises
        ------
        InputError
            If a file is there already and ``overwrite`` is not set, or the folder cannot be written.
        """
        for path in (self.file, self.kernels, self.tables):
            if path.exists() and not overwrite:
                raise InputError(f"{path}: exists already; choose another name, or --force to replace it")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.file.parent):
                pass
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written: {error.strerror}") from None


def save(done: DeviceCalibration, measured: Measurement, target: Target) -> list[Path]:
    """Write the chip, its calibration and the tables; all or, where the disk refuses, an :class:`InputError`."""
    try:
        target.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.file.parent, prefix=f".{target.name}-") as folder:
            fresh = Path(folder)
            tables = fresh / target.tables.name
            names = [file.name for file in write_tables(measured, tables)]
            for name, text in done.files.items():
                (fresh / name).write_text(text, encoding="utf-8")
            if target.tables.exists():
                shutil.rmtree(target.tables)
            tables.rename(target.tables)
            for name in [*done.files][::-1]:  # the chip last: its calibration is there when it is
                (fresh / name).replace(target.file.parent / name)
    except OSError as error:
        raise InputError(f"{target.file}: cannot be written: {error.strerror}") from None
    return [*(target.file.parent / name for name in done.files), *(target.tables / name for name in names)]


def calibrate_device(
    measured: Measurement,
    name: str,
    *,
    chip: str | None,
    command: str,
    progress: Callable[[str], None] | None = None,
) -> DeviceCalibration:
    """Turn measurements into a chip.

    Parameters
    ----------
    name
        of the chip, and of its file.
    chip
        the catalogue's chip that the device is; ``""``: none, whatever its driver calls it; None: the one that goes by the driver's name.
    command
        written into the calibration as its provenance.

    Raises
    ------
    InputError
        If ``chip`` is unknown or no such device, or the tables hold too little to be fitted.
    """
    with tempfile.TemporaryDirectory() as folder:
        bare, tables = Path(folder) / f"{name}.toml", Path(folder) / f"{name}-tables"
        for _ in write_tables(measured, tables):
            pass
        measured = read_measurement(tables)  # rounded as it is kept, so that the tables give the same file again
        known, notes = _known(measured, chip)
        constants, spread = _constants(measured, known)
        data = _unknown_chip(measured, name) if known is None else _known_chip(measured, name, known.name)
        data["efficiency"] = dict(data.get("efficiency", {})) | {
            key: _quantity(measured, *_SHOWN[key](value), locator=_LOCATORS[key]) for key, value in constants.items()
        }
        data["sources"] = dict(data.get("sources", {})) | {SOURCE: _title(measured)}
        bare.write_text(_text({k: v for k, v in data.items() if k != "calibration"}), encoding="utf-8")
        fit = calibrate_chip(str(bare), tables, command=command, source=(f"{name}-tables",), progress=progress)
        kernels = bare.with_name(f"{name}-kernels.toml")
        whole, kept = (fit.file, ()) if known is None else _with_the_catalogues(fit.file, known)
        kernels.write_text("\n".join(toml_lines(whole)) + "\n", encoding="utf-8")
        text = _text(data)
        bare.write_text(text, encoding="utf-8")
        found = load_chip(str(bare))
        _ = found.efficiency  # reads the curves while their file is there
        files = {bare.name: text, kernels.name: kernels.read_text(encoding="utf-8")}
    return DeviceCalibration(
        found, None if known is None else known.name, fit, constants, files, (*notes, *spread, *kept)
    )


def _with_the_catalogues(own: CalibrationFile, known: ChipSpec) -> tuple[CalibrationFile, tuple[str, ...]]:
    """A calibration, and of the catalogue's chip the curves of what was not measured: experts, narrow formats, other collectives."""
    if not known.calibration:
        return own, ()
    theirs = read_calibration(known.calibration)
    measured = {(fit.op, fit.dtype, fit.kv_dtype) for fit in own.fits}
    kept = [fit for fit in theirs.fits if (fit.op, fit.dtype, fit.kv_dtype) not in measured]
    fits = sorted(
        [*own.fits, *kept], key=lambda fit: (fit.op, fit.dtype, fit.kv_dtype, fit.framework, fit.chips, fit.head_dim)
    )
    changes = {
        "fits": tuple(fits),
        "source": (*own.source, *theirs.source),
        "tables": {**theirs.tables, **own.tables},
    }
    note = f"of the catalogue's {theirs.chip} the file keeps {len(kept)} curves of what was not measured here"
    return own.model_copy(update=changes), (note,)


def _known(measured: Measurement, chip: str | None) -> tuple[ChipSpec | None, tuple[str, ...]]:
    """The catalogue's chip that was measured."""
    device = measured.device
    if chip == "":
        return None, ()
    name = chip_called(device.name) if chip is None else chip
    if name is None:
        return None, (f"the catalogue has no chip that a driver calls {device.name!r}: peaks are the fastest seen",)
    spec = load_chip(name)
    held = spec.hbm_capacity_bytes
    if abs(device.memory_bytes / held - 1) <= MEMORY_TOLERANCE:
        return spec, ()
    message = (
        f"{device.name} has {device.memory_bytes / 2**30:.0f} GiB and {name} has {held / 2**30:.0f} GiB: "
        "not the same, or a part of it"
    )
    if chip is not None:
        raise InputError(f"--chip {chip}: {message}")
    return None, (f"{message}; taken as unknown",)


def _constants(measured: Measurement, known: ChipSpec | None) -> tuple[dict[str, float], tuple[str, ...]]:
    """Constant efficiencies, which price what the curves do not; and a note on how steady the machine was."""
    rate, bandwidth = measured.peak_flops_per_s, measured.bandwidth_bytes_per_s
    if known is not None:
        bandwidth = known.hbm_bandwidth_bytes_per_s
        rate = known.peak_flops_per_s(measured.chip_dtype) if known.has_dtype(measured.chip_dtype) else rate
    products, prompts, reads = (measured.of(t) for t in ("gemm", "attention_prefill", "attention_decode"))
    element = measured.element_bytes
    fractions = {
        "matmul": [2.0 * m * n * k / t.median_s / rate for (m, n, k), t in products.items()],
        "attention": [
            2.0 * b * s * (s + 1) * heads * width / t.median_s / rate for (b, s, heads, _, width), t in prompts.items()
        ],
        "kv": [
            2.0 * element * b * length * kv * width / t.median_s / bandwidth
            for (b, length, _, kv, width), t in reads.items()
        ],
    }
    found = {name: float(np.clip(np.quantile(values, 0.9), 1e-3, 1)) for name, values in fractions.items()}
    memory = _memory_fit(measured, bandwidth)
    found |= {"hbm": float(memory.values[0]), "op_overhead": float(memory.values[1])}
    spreads = [t.spread for t in measured.timings.values()]
    median, worst = float(np.median(spreads)), float(np.quantile(spreads, 0.9))
    notes = [
        f"spread of a shape's samples, quartile to quartile: {median:.1%} in the median, {worst:.1%} for one in ten"
    ]
    if median > 0.15:
        notes.append("the machine was busy with something else: measure again when it is idle, or on cores of its own")
    if measured.mode == "eager":
        notes.append("some kernels could not be captured in a graph, so that small ones hold the time of their launch")
    return found, tuple(notes)


def _memory_fit(measured: Measurement, bandwidth_bytes_per_s: float) -> Fit:
    """Fraction of the bandwidth and time per call of kernels that only move bytes: norms and gates.

    Raises
    ------
    InputError
        If there are too few rows.
    """
    rows = {shape: t for shape, t in measured.of("memory").items() if shape[0] != "copy"}
    if len(rows) < 3:
        raise InputError(f"memory: {len(rows)} rows of norms and gates cannot fix a bandwidth and a launch time")
    moved = np.array([measured.moved_bytes(*shape) for shape in rows])
    times = np.array([t.median_s for t in rows.values()])
    free = [Parameter("hbm", 0.5, 1e-3, 1), Parameter("op_overhead_s", 5e-6, 1e-8, 1e-3)]
    return fit_log_ratios(lambda p: p[1] + moved / (bandwidth_bytes_per_s * p[0]), times, free)


_SHOWN: dict[str, Callable[[float], tuple[float, str]]] = {
    **{name: (lambda v: (_digits(v), "fraction")) for name in ("matmul", "attention", "kv", "hbm")},
    "op_overhead": lambda v: (_digits(1e6 * v), "us"),
}
_LOCATORS = {
    "matmul": "table gemm, 90th percentile of rate over peak",
    "attention": "table attention_prefill, 90th percentile of rate over peak",
    "kv": "table attention_decode, 90th percentile of keys read over bandwidth",
    "hbm": "table memory, fit to norms and gates",
    "op_overhead": "table memory, fit to norms and gates",
}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _quantity(measured: Measurement, value: float, unit: str, *, locator: str, note: str = "") -> dict[str, Any]:
    made = {
        "value": value,
        "unit": unit,
        "kind": "measured",
        "source": SOURCE,
        "locator": locator,
        "retrieved": measured.date,
    }
    return made | ({"note": note} if note else {})


def _title(measured: Measurement) -> str:
    d = measured.device
    return (
        f"chipseconds calibrate device on {d.name}, {d.units} {'cores' if d.kind == 'cpu' else 'multiprocessors'}, "
        f"{measured.dtype}, {', '.join(d.software)}, {measured.date}"
    )


def _peak(measured: Measurement) -> dict[str, Any]:
    return _quantity(
        measured, _digits(measured.peak_flops_per_s / 1e9), "GFLOP/s", locator="table gemm, fastest sample"
    )


def _unknown_chip(measured: Measurement, name: str) -> dict[str, Any]:
    d = measured.device

    def told(value: float, unit: str) -> dict[str, Any]:
        return _quantity(measured, value, unit, locator="as the system reports it")

    data: dict[str, Any] = {
        "schema_version": 1,
        "name": name,
        "title": d.name,
        "vendor": {"cpu": "unknown", "nvidia": "NVIDIA", "amd": "AMD"}[d.kind],
        "family": d.kind,
        "note": f"measured on {measured.date}; peaks are the fastest seen",
        "calibration": f"{name}-kernels.toml",
        "multiprocessors": told(d.units, "count"),
        "compute": {measured.chip_dtype: _peak(measured)},
        "memory": {
            "hbm_capacity": told(round(d.memory_bytes / 2**20), "MiB"),
            "hbm_bandwidth": _quantity(
                measured,
                _digits(measured.bandwidth_bytes_per_s / 1e9),
                "GB/s",
                locator="tables memory and gemm, fastest sample",
                note="of a copy, read and write, or of weights read for one row",
            ),
        },
    }
    if d.cache_bytes >= 1e6:
        data["memory"]["on_chip"] = told(round(d.cache_bytes / 2**10), "KiB")
    link = measured.link_bytes_per_s
    if link is not None:
        data["scale_up"] = {
            "topology": "switched",
            "network": "as measured",
            "sizes": [1, d.count],
            "kind": "measured",
            "source": SOURCE,
            "locator": "table comm",
            "bandwidth": _quantity(
                measured, _digits(link / 1e9), "GB/s", locator="table comm, fastest sample as a ring's traffic"
            ),
            "latency": _quantity(
                measured, _digits(1e6 * _message_s(measured)), "us", locator="table comm, smallest over a ring's steps"
            ),
        }
    return data


def _message_s(measured: Measurement) -> float:
    """Time of one message of a ring: the quickest all-reduce over its steps. [s]"""
    return min(t.median_s / (2 * (int(n) - 1)) for (n, _), t in measured.of("comm").items())


def _known_chip(measured: Measurement, name: str, known: str) -> dict[str, Any]:
    """The catalogue's file of a chip under another name, with a calibration of its own."""
    data = read_toml(data_folder("hardware_specs") / f"{known}.toml")
    kept = f"; what was not measured keeps the curves of {data['calibration']}" if data.get("calibration") else ""
    data |= {
        "name": name,
        "title": f"{data['title']}, measured",
        "note": f"{known} of the catalogue, its efficiencies measured on {measured.date}{kept}",
        "calibration": f"{name}-kernels.toml",
    }
    data.pop("driver_names", None)
    if measured.chip_dtype not in data["compute"]:
        data["compute"] = data["compute"] | {measured.chip_dtype: _peak(measured)}
    if "multiprocessors" not in data:
        data["multiprocessors"] = _quantity(
            measured, measured.device.units, "count", locator="as the system reports it"
        )
    return data


def _text(data: Mapping[str, Any]) -> str:
    """A chip file: one line for each number, tables for groups of them."""
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    groups = {k: v for k, v in data.items() if isinstance(v, Mapping) and "unit" not in v}
    repeated = {k: v for k, v in data.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)}
    yield from (f"{k} = {_value(v)}" for k, v in data.items() if k not in groups and k not in repeated)
    for name, group in groups.items():
        yield from ("", f"[{name}]", *(f"{k} = {_value(v)}" for k, v in group.items()))
    for name, entries in repeated.items():
        for entry in entries:
            yield from ("", f"[[{name}]]", *(f"{k} = {_value(v)}" for k, v in entry.items()))


def _value(value: Any) -> str:
    """A TOML value; the standard reader's dates among the nested ones become text, which the loader takes as well."""
    if isinstance(value, Mapping):
        return value_text({k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in value.items()})
    return value_text(value.isoformat() if hasattr(value, "isoformat") else value)
