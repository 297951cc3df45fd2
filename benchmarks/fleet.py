"""Speed of fleets: routers that look at replicas, streams split over replicas, agents.

    python benchmarks/fleet.py [--replicas 100] [--requests 200000] [--hour]

Llama-3-8B on one H100 per replica under the length mix of the Azure conversation trace, 15 requests/s for each replica (load 0.7). Times
are processor time of this process, because a shared machine's clock says little; wall time is printed beside it.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from simulator.fleet import Agents, Fleet, Link, Pool, Router, serve, serve_agents
from simulator.run import load_scenario, run_scenario
from simulator.run.fleets import kv_block_bytes
from simulator.run.resolve import resolve
from simulator.run.serving import scenario_requests
from simulator.traffic import build_stream

RATE_PER_S = 15.0


def report(what: str, n: int, action: Callable[[], object], repeats: int = 3) -> None:
    """Print the median rate of ``repeats`` runs and their range, after one that does not count."""
    action()
    rates = []
    wall = time.perf_counter()
    for _ in range(repeats):
        start = time.process_time()
        action()
        rates.append(n / (time.process_time() - start))
    wall = (time.perf_counter() - wall) / repeats
    print(f"{what:<58} {np.median(rates):>12,.0f} /s   ({min(rates):,.0f} … {max(rates):,.0f}; {wall:.2f} s wall)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument(
        "--hour", action="store_true", help="One hour of 10,000 requests/s over 667 replicas, summary only."
    )
    args = parser.parse_args()
    if args.hour:
        hour()
        return
    n, replicas = args.requests, args.replicas
    scenario = load_scenario(
        "llama-3-8b-azure-chat", [f"traffic.n_requests={n}", f"traffic.arrival.rate_per_s={RATE_PER_S * replicas}"]
    )
    resolved = resolve(scenario)
    requests = scenario_requests(scenario, build_stream(scenario.traffic, 1, base_folder=Path.cwd()), 1)

    def pool(role: str, count: int) -> Pool:
        return Pool(role, role, resolved.cost, resolved.settings, count, kv_block_bytes=kv_block_bytes(resolved))

    for policy in ("round-robin", "random", "least-requests", "least-kv", "power-of-two"):
        fleet = Fleet((pool("unified", replicas),), Router(policy))
        report(f"{policy}, {replicas} replicas", n, lambda fleet=fleet: serve(fleet, requests))
    half = replicas // 2
    parts = pool("prefill", half), pool("decode", half)
    split = Fleet(parts, Router("least-requests"), Router("least-kv"), Link(50e9, 5e-6, "source"))
    report(f"{half} prefill + {half} decode, least requests, least KV", n, lambda: serve(split, requests))
    few = min(n, 20_000)
    tasks = Agents(10 * replicas, np.full(few // 10, 10), np.full(few // 10 * 10, 5.0))
    part = requests.take(slice(0, few // 10 * 10))
    whole = Fleet((pool("unified", replicas),), Router("least-requests"))
    report(f"{10 * replicas} agents, {replicas} replicas", few, lambda: serve_agents(whole, part, tasks), 1)
    report(f"{10 * replicas} agents, {half} + {half} replicas", few, lambda: serve_agents(split, part, tasks), 1)


def hour() -> None:
    """One hour of 10,000 requests/s, everything included: arrivals, the run, the capacity run."""
    changes = ["traffic.n_requests=36_000_000", "traffic.arrival.rate_per_s=10_000", "replicas=667"]
    scenario = load_scenario("llama-3-8b-azure-chat", changes)
    wall, start = time.perf_counter(), time.process_time()
    summary = run_scenario(scenario, summary_only=True, workers=2).summary
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{summary.requests.finished:,} requests, 667 replicas, load {summary.load.load:.3f}: "
        f"{time.process_time() - start:.1f} s processor, {time.perf_counter() - wall:.1f} s wall, {memory:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
