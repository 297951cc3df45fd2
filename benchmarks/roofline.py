"""Speed of the roofline: compiling a step-cost table, and the command from a cold start.

    python benchmarks/roofline.py [--repeats 20]

Prints the median and the range of each; the table has 8193 token counts and 257 rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import measure

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    d = Deployment(load_model("llama-3-70b"), resolve_slice("tpu-v5e:4x4"), parse_precision("w8a16kv8"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "simulator.cli.main", *COMMAND]
    measure("compile_step_cost, 8192 tokens", lambda: compile_step_cost(d), repeats)
    experts = Deployment(load_model("deepseek-v3"), resolve_slice("h100-sxm:8"), parse_precision("fp8"))
    measure("… of DeepSeek-V3 on h100-sxm:8", lambda: compile_step_cost(experts), repeats)
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
