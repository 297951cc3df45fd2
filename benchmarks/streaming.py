"""Memory and speed of summary-only runs against runs that keep every request.

    python benchmarks/streaming.py [--requests 1000000 10000000] [--scenario llama-3-8b-azure-chat]

Each run is a process of its own: `chipseconds simulate SCENARIO`, everything included. A summary-only run makes and serves its
requests twice (the run itself and the capacity run) and makes their arrival times twice more.
"""

import argparse
import json
import os
import subprocess
import sys
import time

KEPT_AT_MOST = 2_000_000
PERCENTILES = ("p50", "p90", "p95", "p99")


def simulate(scenario: str, n: int, *options: str) -> tuple[dict, float, float, int]:
    """Summary, wall time [s], processor time [s] and peak resident memory [KiB] of one run."""
    command = [sys.executable, "-m", "simulator.cli.main", "simulate", scenario, "-q", "--json"]
    command += ["--set", f"traffic.n_requests={n}", *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"simulate failed: {status}"
    return json.loads(printed), time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--scenario", default="llama-3-8b-azure-chat")
    args = parser.parse_args()
    simulate(args.scenario, 1000)
    for n in args.requests:
        found, wall_s, cpu_s, memory = simulate(args.scenario, n, "--summary-only")
        print(
            f"summary only {n:>12,} requests  {wall_s:7.1f} s wall, {cpu_s:7.1f} s processor, {memory / 1024:6.0f} MiB, "
            f"{n / cpu_s / 1e6:.2f} M requests per processor second"
        )
        if n > KEPT_AT_MOST:
            continue
        kept, wall_s, cpu_s, memory = simulate(args.scenario, n)
        print(
            f"kept         {n:>12,} requests  {wall_s:7.1f} s wall, {cpu_s:7.1f} s processor, {memory / 1024:6.0f} MiB"
        )
        worst = max(
            abs(found["latency"][name][p]["value"] / kept["latency"][name][p]["value"] - 1)
            for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s")
            for p in PERCENTILES
        )
        print(f"  counts equal: {found['requests'] == kept['requests']}; percentiles differ by at most {worst:.1e}")


if __name__ == "__main__":
    main()
