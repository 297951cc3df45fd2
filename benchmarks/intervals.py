"""Time that intervals add to a run, and to a step: 64 draws of every calibrated parameter.

    python benchmarks/intervals.py [--requests 10000] [--repeats 5] [--workers 1]

``simulate``: the shipped scenario with vLLM's profile, without and with ``--interval 80``; the second figure less the first is what
draws cost, the smaller batches of draws for the variance shares included.
"""

import argparse

from timing import measure

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment
from simulator.roofline.intervals import step_intervals
from simulator.roofline.precision import parse_precision
from simulator.run import load_scenario, run_scenario


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--workers", type=int, default=1)
    given = options.parse_args()
    for profile in (None, "vllm"):
        changes = [f"traffic.n_requests={given.requests}", "traffic.arrival.rate_per_s=12"]
        changes += [f"engine.profile={profile}"] if profile else []
        scenario = load_scenario("llama-3-8b-azure-chat", changes)
        name = f"{given.requests:,} requests, profile {profile or 'none'}"
        measure(name, lambda s=scenario: run_scenario(s), given.repeats)
        measure(
            f"{name}, interval of 64 draws",
            lambda s=scenario: run_scenario(s, interval=80, workers=given.workers),
            given.repeats,
        )
    deployment = Deployment(load_model("llama-3-8b"), resolve_slice("h100-sxm:1"), parse_precision("bf16"))
    report = step_report(deployment, decode=64, context=4096)
    measure("one step, interval of 64 draws", lambda: step_intervals(report, level=80), given.repeats)


if __name__ == "__main__":
    main()
