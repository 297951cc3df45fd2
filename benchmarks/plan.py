"""Speed of planning: one deployment's rate within targets, one chip, and the whole catalogue.

    python benchmarks/plan.py [--workers 2] [--skip-catalogue]

Setting: Llama-3-8B on the length mix of the Azure conversation trace, 95 % of requests within 1 s of TTFT and 50 ms of TPOT,
1,000 queries per second; and Llama-3-70B's web agent on TPU v5e, which is infeasible. CPU time beside wall time, so that figures of a
shared machine can be told from those of a quiet one.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from simulator.catalog.chips import chip_names
from simulator.planning import PlanOptions, plan, targets_of
from simulator.planning.loads import Loads
from simulator.planning.rating import Bench
from simulator.results.plan import Plan
from simulator.run.resolve import resolve
from simulator.run.scenario import load_scenario

CHAT, AGENT = (load_scenario(name) for name in ("llama-3-8b-azure-chat", "web-agent"))


def timed(what: str, run: Callable[[], Any]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    print(f"{what:<52} {time.perf_counter() - wall:8.2f} s {time.process_time() - cpu:8.2f} s CPU", end="")
    return found


def count(found: Plan) -> None:
    s = found.searched
    print(f"   {s.considered:,} deployments, {s.simulated:,} simulated in {s.simulations:,} runs")


def rate(slice_: str, n: int) -> None:
    scenario = CHAT.model_copy(update={"slice": slice_})
    resolved, load = resolve(scenario), Loads(scenario, 1, n).first(n)
    found = timed(f"rate of {slice_}, {n:,} requests", lambda: Bench(resolved, load).rate(targets_of(CHAT.slo)))
    print(f"   {found.rate_per_s:.2f} of {found.saturated_per_s:.2f} queries/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--skip-catalogue", action="store_true")
    options = parser.parse_args()
    resolve(CHAT)
    Bench(resolve(CHAT), Loads(CHAT, 1, 300).first(300)).rate(targets_of(CHAT.slo))  # loads the compiled engine
    rate("h100-sxm:1", 3_000)
    rate("h100-sxm:1", 100_000)
    targets = targets_of(CHAT.slo)
    for chips in (["h100-sxm"], ["tpu-v5e"]):
        found = timed(
            f"plan on {chips[0]}",
            lambda chips=chips: plan(CHAT.model, CHAT.traffic, targets, 1000, chips, template=CHAT),
        )
        count(found)
    alone = PlanOptions(look_elsewhere=False)
    found = timed(
        "web agent on tpu-v5e, infeasible",
        lambda: plan(
            AGENT.model, AGENT.traffic, targets_of(AGENT.slo), 10_000, ["tpu-v5e"], options=alone, template=AGENT
        ),
    )
    count(found)
    if not options.skip_catalogue:
        found = timed(
            f"plan over the whole catalogue, {options.workers} workers",
            lambda: plan(CHAT.model, CHAT.traffic, targets, 1000, chip_names(), template=CHAT, workers=options.workers),
        )
        count(found)


if __name__ == "__main__":
    main()
