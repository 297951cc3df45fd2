"""Speed of the roofline: compiling step-cost tables, and the command from a cold start.

    python benchmarks/roofline.py [--repeats 20]

Prints the median and the range of each; tables have 8193 token counts and 257 rows. Compile times are the first, which meets
the deployment's matrices for the first time, the least and the median: of some deployments, and of every model of the
catalogue on the largest slice of every chip whose own kernels were measured.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

from timing import measure

from simulator.catalog.chips import chip_names, load_chip
from simulator.catalog.models import load_model, model_names
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.precision import parse_precision

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [
    "roofline",
    "--model",
    "llama-3-70b",
    "--slice",
    "tpu-v5e:4x4",
    "--precision",
    "w8a16kv8",
    "--decode",
    "32",
    "--context",
    "8192",
]

COMPILED = (
    ("llama-3-70b", "tpu-v5e:4x4", "w8a16kv8"),
    ("llama-3-70b", "h100-sxm:8", "bf16"),
    ("llama-3-8b", "h100-sxm:1", "fp8"),
    ("qwen3-235b-a22b", "h100-sxm:4", "fp8"),
    ("gpt-oss-120b", "h100-sxm:8", "w4a16"),
    ("deepseek-v3", "h100-sxm:8", "fp8"),
)
"""Deployments whose compile times are printed one by one."""


def compile_ms(d: Deployment, repeats: int) -> list[float]:
    """Times to compile a deployment, one after the other. [ms]"""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compile_step_cost(d)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measured_itself(chip: str) -> bool:
    """Whether the kernels of ``chip`` were measured: not only those of one of its family."""
    curves = load_chip(chip).efficiency.curves
    return curves is not None and curves.chip == chip


def fitted_deployments() -> Iterator[Deployment]:
    """Every model, in bf16 and fp8, on the largest slice of every chip whose own kernels were measured."""
    chips = [name for name in chip_names() if measured_itself(name)]
    for chip, model, precision in product(chips, model_names(), ("bf16", "fp8")):
        with suppress(ChipsecondsError):  # a format the chip cannot compute, or heads that do not divide
            yield Deployment(load_model(model), resolve_slice(legal_slices(chip)[-1]), parse_precision(precision))


def print_times(what: str, first: float, least: float, median: float) -> None:
    print(f"{what:<66} {first:9.2f} {least:9.2f} {median:9.2f}")


def print_compile_times(repeats: int) -> None:
    """Print the compile times of the listed deployments, and the median and the slowest of all."""
    print(f"{'compile_step_cost [ms]':<66} {'first':>9} {'least':>9} {'median':>9}")
    for model, spec, precision in COMPILED:
        d = Deployment(load_model(model), resolve_slice(spec), parse_precision(precision))
        times = compile_ms(d, repeats)
        print_times(f"{model} {precision} on {spec}", times[0], min(times), statistics.median(times))
    every = {}
    for d in fitted_deployments():
        times = compile_ms(d, max(3, repeats // 4))
        name = f"{d.architecture.name} {d.precision.name} on {d.slice.spec}"
        every[name] = times[0], min(times), statistics.median(times)
    first, least, median = (statistics.median(column) for column in zip(*every.values(), strict=True))
    print_times(f"median over {len(every)} deployments", first, least, median)
    slowest = max(every, key=lambda name: every[name][1])
    print_times(f"slowest: {slowest}", *every[slowest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    d = Deployment(load_model("llama-3-70b"), resolve_slice("tpu-v5e:4x4"), parse_precision("w8a16kv8"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "simulator.cli.main", *COMMAND]
    print_compile_times(repeats)
    measure("step_report", lambda: step_report(d, decode=32, context=8192), repeats)
    measure(
        "chipseconds roofline, new process",
        lambda: subprocess.run(command, check=True, capture_output=True, env=environment),
        max(3, repeats // 4),
    )
    with tempfile.TemporaryDirectory() as folder:
        plotted = [*command, "--plot", str(Path(folder) / "roofline.png")]
        measure(
            "the same with --plot",
            lambda: subprocess.run(plotted, check=True, capture_output=True, env=environment),
            3,
        )


if __name__ == "__main__":
    main()
