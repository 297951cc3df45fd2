"""Does a measured chip predict a whole model? A small decoder with random weights, run here, against its roofline.

Calibrates the device (or takes earlier measurements), predicts prefill and decode steps of a decoder that calibration has
never seen, runs them with the same library, and prints both. The decoder is a bare loop over its layers: no scheduler and no
detokeniser, so the prediction leaves the chip's host times per step and sequence out. On a GPU a step is a captured graph.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from decoder import SIZES, Size, backend_of, backend_options, read_steps, run_steps

from simulator.calibration.device_chip import calibrate_device
from simulator.calibration.device_measure import measure
from simulator.calibration.device_tables import read_measurement
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment
from simulator.roofline.precision import parse_precision


def predicted_s(chip: str, size: Size, precision: str, *, prefill: int | None, decode: tuple[int, int] | None) -> float:
    """Roofline of one step of a bare loop. [s]"""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.toml"
        file.write_text(size.toml(), encoding="utf-8")
        model = load_model(str(file))
    place = resolve_slice(f"{chip}:1")
    bare = place.chip.efficiency.override(step_overhead_s=0.0, row_overhead_s=0.0)
    d = Deployment(
        model, place, parse_precision(precision), efficiency=bare, max_num_batched_tokens=2**14, max_num_seqs=1024
    )
    batch, context = decode or (None, None)
    return step_report(d, prefill=prefill, decode=batch, context=context).time_s


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    backend_options(options)
    options.add_argument("--tables", type=Path, help="earlier measurements instead of a calibration now")
    options.add_argument("--steps", type=Path, metavar="CSV", help="steps measured by decoder.py, with --tables")
    options.add_argument("--chip", help="also predict with this chip, such as h100-sxm")
    asked = options.parse_args()
    if asked.steps is not None:
        if asked.tables is None:
            options.error("--steps needs --tables of the same machine")
        measured, steps = read_measurement(asked.tables), read_steps(asked.steps)
    else:
        backend = backend_of(asked)
        measured = read_measurement(asked.tables) if asked.tables else measure(backend, asked.budget, progress=print)
        steps = run_steps(backend, asked.repeats)
    size = SIZES["cpu" if measured.device.kind == "cpu" else "gpu"]
    precision = measured.chip_dtype
    with tempfile.TemporaryDirectory() as folder:
        done = calibrate_device(measured, "measured", chip=None, command="benchmarks/device.py")
        for name, text in done.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        chips = [str(Path(folder) / "measured.toml"), *([asked.chip] if asked.chip else [])]
        d = measured.device
        print(f"\n{d.name}, {d.units} units, {measured.dtype}, {', '.join(d.software)}, {measured.date}")
        print(
            f"{'step':<28} {'measured':>11} {'spread':>7}" + "".join(f" {Path(c).stem:>11} {'error':>7}" for c in chips)
        )
        errors: dict[str, list[float]] = {c: [] for c in chips}
        for kind, n, context, samples in steps:
            shown = f"prefill of {n}" if kind == "prefill" else f"decode of {n} at {context}"
            low, seconds, high = np.quantile(samples, [0.25, 0.5, 0.75])
            line = f"{shown:<28} {1e3 * seconds:8.3f} ms {(high - low) / seconds:7.1%}"
            for chip in chips:
                at = {"prefill": n, "decode": None} if kind == "prefill" else {"prefill": None, "decode": (n, context)}
                found = predicted_s(chip, size, precision, **at)
                errors[chip].append(found / seconds - 1)
                line += f" {1e3 * found:8.3f} ms {errors[chip][-1]:+7.1%}"
            print(line)
        for chip in chips:
            size_of = np.abs(errors[chip])
            print(f"{Path(chip).stem}: median error {np.median(size_of):.1%}, largest {size_of.max():.1%}")


if __name__ == "__main__":
    main()
