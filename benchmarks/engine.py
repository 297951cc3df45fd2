"""Speed of the compiled engine: requests per second on one core, warm.

    python benchmarks/engine.py [--requests 1000000] [--repeats 7] [--traces ../shared/data/traces]

Setting: prompts ~1k and outputs ~250 tokens on average, lognormal with sigma 0.8; a step-cost table in the shape of an 8B
model on one H100; arrivals at a stated load (share of the throughput of the same requests all queued at t = 0); every output and the ITL histogram on. ``reference`` is the step-by-step engine on the first requests of the same stream.

With ``--traces``, the folder of Mooncake's traces, the prefix cache is timed on them: blocks of 512 tokens, the trace's own unit, and of
16 tokens, into which each unit is split, and a KV cache of 3 million tokens for each group of layers: one group, or those of models with windows.
"""

import argparse
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.compiled import simulate, warm_up
from simulator.engine.records import EngineResult, EngineSettings, Requests
from simulator.engine.reference import simulate_reference
from simulator.engine.scheduling import Scheduling
from simulator.randomness import draw, normal, uniform
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.step_cost import StepCost
from simulator.traffic import read_trace

MAX_TOKENS, MAX_SEQS = 8192, 256
#: (KV blocks, load). A KV cache that limits the batch is never 95 % full at a load of 0.8 of the capacity it sets, so both
#: are run: mean batch 64 at load 0.8, and a nearly full cache at the load that fills it.
SETTINGS = ((12000, 0.8), (6800, 0.97))


def table() -> StepCost:
    """Times like those of an 8B model in bf16 on one H100."""
    n = np.arange(MAX_TOKENS + 1)
    r = np.arange(MAX_SEQS + 1)
    dense = np.where(n > 0, np.maximum(4.8e-3, n * 1.9e-5) + 1e-3, 0.0)
    head = np.where(r > 0, 3e-4 + 1e-6 * r, 0.0)
    planes = np.array([[2e-9, 0.0, 0.0], [0.0, 4e-8, 0.0]])
    knots = np.zeros(1)
    return StepCost(
        dense, head, knots, knots, np.array([4e-8]), 1e-6, planes, 1, dense, dense, head, head, 1.0, 1.0, 1.0, 1.0
    )


def stream(n: int, rate_per_s: float) -> Requests:
    """Poisson arrivals (all at 0 if the rate is infinite), lognormal lengths."""
    sigma = 0.8
    prompt = np.clip(np.exp(np.log(1000) - sigma**2 / 2 + sigma * normal(1, "prompt", 0, n)), 1, 16000).astype(np.int64)
    output = np.clip(np.exp(np.log(250) - sigma**2 / 2 + sigma * normal(1, "output", 0, n)), 1, 4000).astype(np.int64)
    gaps = draw(1, "arrival", 0, n, lambda rng, k: rng.standard_exponential(k))
    return Requests(np.cumsum(gaps) / rate_per_s, prompt, output, np.zeros(n, dtype=np.int64), output)


def describe(name: str, result: EngineResult, seconds: list[float], blocks: int) -> None:
    n = len(result.status)
    totals = result.totals
    busy = result.end_s - result.idle_s
    kv = result.timeline["kv_blocks"] / blocks
    median = statistics.median(seconds)
    print(
        f"{name:<12}{n:>9,} req  {n / median / 1e6:6.3f} M req/s (best {n / min(seconds) / 1e6:.3f}, "
        f"worst {n / max(seconds) / 1e6:.3f})  segments/req {totals['segments'] / n:.2f}  steps/req {totals['steps'] / n:.2f}  "
        f"mean batch {totals['decode_tokens'] / totals['steps']:.1f}  KV mean {totals['kv_blocks_s'] / busy / blocks:.1%} "
        f"p90 {np.quantile(kv, 0.9):.1%}  preempted {totals['preemptions'] / n:.2%}"
    )


def timed(run: Callable[[], EngineResult], repeats: int) -> tuple[EngineResult, list[float]]:
    seconds = []
    result: EngineResult | None = None
    for _ in range(repeats):
        result = None  # or two results would be in memory at once
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    assert result is not None
    return result, seconds


def arrays(run: Callable[[], EngineResult]) -> tuple[int, int]:
    """Bytes of all arrays at once that a run takes at most, and of the result's columns among them."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n = len(result.status)
    columns = [value for value in vars(result).values() if isinstance(value, np.ndarray) and value.shape[:1] == (n,)]
    return peak, sum(column.nbytes for column in columns)


def prefix_caches(cost: StepCost, folder: Path, repeats: int) -> None:
    """Mooncake's traces, with and without a prefix cache; of layers without a window, and in the groups of gpt-oss, Mistral 7B v0.1 and Gemma 3."""
    print("\nPrefix cache, 3,000,000 tokens of a group")
    models = {
        "": KvGroups(),
        "gpt-oss": KvGroups(1, 1, 128),
        "Mistral": KvGroups(0, 1, 4096),
        "Gemma 3": KvGroups(1, 6, 1024),
    }
    for name in ("conversation", "synthetic"):
        trace = read_trace(folder / f"mooncake_{name}_trace.jsonl.gz")
        n = len(trace)
        none = np.zeros(n, dtype=np.int64)
        times = np.arange(n, dtype=np.float64) if trace.arrival_s is None else trace.arrival_s
        hashes = None if trace.blocks is None else BlockHashes(**vars(trace.blocks))
        requests = Requests(times, trace.prompt_tokens, trace.output_tokens, none, trace.output_tokens, hashes=hashes)
        for (model, groups), block_size, kind in product(models.items(), (512, 16), ("off", "blocks")):
            blocks = groups.count * 3_000_000 // block_size
            settings = EngineSettings(MAX_SEQS, MAX_TOKENS, block_size, blocks, prefix_cache=kind, kv_groups=groups)
            seeing = with_window(cost, groups)
            simulate(seeing, settings, requests)  # compiles, if it is the first
            result, seconds = timed(lambda: simulate(seeing, settings, requests), repeats)  # noqa: B023 - called at once
            found = result.totals.get("cache_hit_tokens", 0) / result.totals.get("cache_queried_tokens", 1)
            print(
                f"  {name:<13}{model:<8}{block_size:>4} tokens/block  {kind:<7}{n / statistics.median(seconds) / 1e3:8,.0f} k req/s "
                f"(best {n / min(seconds) / 1e3:,.0f}, worst {n / max(seconds) / 1e3:,.0f})  hits {found:.1%}"
            )


def with_window(cost: StepCost, groups: KvGroups) -> StepCost:
    """The table of layers with the groups' window, which here see what they do for nothing."""
    if not groups.windowed:
        return cost
    planes = np.concatenate([cost.prefill_planes[:, :3], np.zeros((len(cost.prefill_planes), 2))], axis=1)
    return replace(cost, window=groups.window, prefill_planes=planes)


def policies(cost: StepCost, requests: Requests, repeats: int) -> None:
    """Other policies, batching modes and impatient clients, next to the plain replica on the same requests."""
    n = len(requests)
    columns = {
        "priority": (3 * uniform(1, "priority", 0, n)).astype(np.int64),
        "tenant": (8 * uniform(1, "tenant", 0, n)).astype(np.int64),
        "predicted_tokens": requests.output_tokens.astype(np.float64),
        "deadline_s": np.full(n, 5.0),
    }
    base = EngineSettings(MAX_SEQS, MAX_TOKENS, 16, SETTINGS[0][0])
    chosen: dict[str, Scheduling] = {"plain": Scheduling()}
    chosen |= {policy: Scheduling(policy=policy) for policy in ("priority", "sjf", "edf", "fair")}
    chosen["preempt_lower"] = Scheduling(policy="priority", preempt_lower=True)
    chosen |= {batching: Scheduling(batching=batching) for batching in ("orca", "prefill_first", "static")}
    chosen["chunks of 512"] = Scheduling(long_prefill_token_threshold=512)
    print("\nPolicies, batching modes, clients")
    warm_up("policies")
    rates = {}
    for name, scheduling in chosen.items():
        settings = replace(base, scheduling=scheduling)
        served = replace(requests, **columns)
        result, seconds = timed(lambda: simulate(cost, settings, served), repeats)  # noqa: B023 - called at once
        rates[name] = n / min(seconds)
        describe(f"  {name}", result, seconds, base.num_kv_blocks)
    impatient = replace(requests, ttft_timeout_s=np.full(n, 10.0), timeout_s=np.full(n, 60.0))
    result, seconds = timed(lambda: simulate(cost, base, impatient), repeats)
    describe("  timeouts", result, seconds, base.num_kv_blocks)
    print(f"  best of priority ÷ best of plain: {rates['priority'] / rates['plain']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--traces", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    warm_up()
    print(f"compile or load machine code: {time.perf_counter() - start:.1f} s")
    cost = table()
    for blocks, load in SETTINGS:
        settings = EngineSettings(MAX_SEQS, MAX_TOKENS, 16, blocks)
        few = min(args.requests, 200_000)
        capacity = few / simulate(cost, settings, stream(few, np.inf)).end_s
        print(f"\n{blocks} KV blocks, capacity {capacity:.2f} req/s, arrivals at {load:.2f} of it")
        requests = stream(args.requests, load * capacity)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result, seconds = timed(lambda: simulate(cost, settings, requests), args.repeats)  # noqa: B023 - called at once
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        describe("  compiled", result, seconds, blocks)
        names = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
        part = Requests(*(getattr(requests, column)[:2000] for column in names))
        slow, slow_seconds = timed(lambda: simulate_reference(cost, settings, part), 2)  # noqa: B023 - called at once
        same = simulate(cost, settings, part)
        rate = 2000 / statistics.median(slow_seconds)
        ratio = args.requests / statistics.median(seconds) / rate
        error = np.nanmax(np.abs(slow.finish_s - same.finish_s) / (slow.finish_s - slow.arrival_s))
        conserved = (result.busy_s.sum() + result.idle_s) / result.end_s - 1
        print(
            f"  reference {rate:,.0f} req/s: compiled is {ratio:,.0f} times as fast; finish times differ by {error:.0e} of a latency"
        )
        peak, columns = (size / args.requests for size in arrays(lambda: simulate(cost, settings, requests)))  # noqa: B023
        print(
            f"  chip-seconds conserved to {conserved:+.0e}; bytes per request: arrays at most {peak:.0f}, of them the result's columns "
            f"{columns:.0f}; resident memory grew by {grown * 1024 / args.requests:.0f}"
        )
        if load == SETTINGS[0][1]:
            policies(cost, requests, args.repeats)
    if args.traces is not None:
        prefix_caches(cost, args.traces, args.repeats)


if __name__ == "__main__":
    main()
