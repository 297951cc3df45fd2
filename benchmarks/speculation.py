"""What deterministic progress costs in accuracy: speculative decoding token by token against tokens per pass drawn once.

    python benchmarks/speculation.py [--requests 1500] [--seeds 3]
    python benchmarks/speculation.py --speed 1000000

The compiled engine gives every request a fixed number of tokens per pass (rule P3); the reference engine can draw each pass's
accepted drafts instead. Same requests, same costs (an 8B model on one H100, γ = 4); only the acceptance differs.
"""

import argparse
from dataclasses import replace

import numpy as np
from engine import MAX_SEQS, MAX_TOKENS, describe, stream, table, timed

from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests, Speculation
from simulator.engine.reference import simulate_reference
from simulator.roofline.acceptance import beta_parameters, survival_of_rate
from simulator.roofline.speculation import SpeculationCost
from simulator.roofline.step_cost import StepCost

DEPTH = 4


def prices(depth: int = DEPTH) -> SpeculationCost:
    """Drafting and verifying beside the benchmark's 8B model: a draft of 0.5 ms, verification by the table's own tokens."""
    cost = table()
    levels = depth + 1
    batch = np.arange(MAX_SEQS + 1)
    draft = np.arange(levels)[:, None] * np.where(batch > 0, 5e-4 + 4e-6 * batch, 0.0)
    return SpeculationCost(
        queries=np.arange(1, levels + 1),
        knots=np.zeros(1),
        value_s=np.zeros((levels, 1)),
        slope_s=np.full((levels, 1), cost.decode_slope_s[0]),
        window_slope_s=np.zeros(levels),
        seq_s=np.full(levels, cost.decode_seq_s),
        draft_s=draft,
        draft_value_s=np.zeros((levels, 1)),
        draft_slope_s=np.arange(levels)[:, None] * 1e-9,
        chunk_s=np.arange(MAX_TOKENS + 1) * 1e-7,
    )


def plan(rate: float, *, spread: float = 0.0, levels: np.ndarray | None = None) -> Speculation:
    """A chain of drafts accepted at ``rate``, or at rates of the Beta distribution with that mean and ``spread``."""
    rates = np.arange(1025) / 1024 if spread else np.array([rate])
    survival = np.zeros((len(rates), DEPTH + 1, DEPTH))
    for level in range(1, DEPTH + 1):
        survival[:, level, :level] = [survival_of_rate(a, level) for a in rates]
    table_of_levels = np.full(MAX_SEQS + 1, DEPTH) if levels is None else levels
    return Speculation(prices(), survival, table_of_levels)


def classes(n: int, rate: float, spread: float) -> np.ndarray:
    """Acceptance classes of ``n`` requests."""
    a, b = beta_parameters(rate, spread)
    return np.rint(np.random.default_rng(2).beta(a, b, n) * 1024).astype(np.int64)


def compare(rate: float, spread: float, load: float, n: int, seeds: int) -> str:
    """One line: differences of the deterministic rule from token-by-token runs, relative."""
    speculation = plan(rate, spread=spread)
    settings = EngineSettings(MAX_SEQS, MAX_TOKENS, 16, 12000, speculation=speculation)
    cost = wide_table()
    at_once = dressed(stream(n, np.inf), rate, spread)
    capacity = n / simulate(cost, settings, at_once).end_s
    requests = dressed(stream(n, load * capacity), rate, spread)
    ours = simulate(cost, settings, requests)
    found = []
    for seed in range(seeds):
        drawn = simulate_reference(cost, settings, requests, acceptance_seed=seed + 1)
        e2e, true = ours.finish_s - ours.arrival_s, drawn.finish_s - drawn.arrival_s
        tpot = (ours.finish_s - ours.first_token_s) / np.maximum(requests.output_tokens - 1, 1)
        true_tpot = (drawn.finish_s - drawn.first_token_s) / np.maximum(requests.output_tokens - 1, 1)
        many = requests.output_tokens > 1
        found.append(
            [
                ours.busy_s.sum() / drawn.busy_s.sum() - 1,
                e2e.mean() / true.mean() - 1,
                np.quantile(e2e, 0.99) / np.quantile(true, 0.99) - 1,
                np.quantile(tpot[many], 0.5) / np.quantile(true_tpot[many], 0.5) - 1,
                np.quantile(tpot[many], 0.99) / np.quantile(true_tpot[many], 0.99) - 1,
                np.median(np.abs(e2e / true - 1)),
                (ours.totals["decode_tokens"] / drawn.totals["decode_tokens"]) - 1,
            ]
        )
    mean = np.mean(found, axis=0)
    names = ("busy", "E2E mean", "E2E p99", "TPOT p50", "TPOT p99", "|E2E| of a request", "passes")
    return f"  rate {rate} ± {spread}, load {load}: " + ", ".join(
        f"{name} {value:+.2%}" for name, value in zip(names, mean, strict=True)
    )


def wide_table() -> StepCost:
    """The benchmark's table with logit rows for every draft."""
    rows = np.arange(MAX_SEQS * (DEPTH + 1) + 1)
    return replace(table(), head_s=np.where(rows > 0, 3e-4 + 1e-6 * rows, 0.0), decode_walk_s=np.zeros(0))


def speed(requests: int, repeats: int) -> None:
    """Requests per second of the compiled engine: fixed and batch-adaptive draft length, rates that differ between requests."""
    cost = wide_table()
    stepped = np.clip(DEPTH - np.arange(MAX_SEQS + 1) // 24, 0, DEPTH)
    variants = {
        "4 drafts": plan(0.7),
        "4 drafts, rates differ": plan(0.7, spread=0.15),
        "adaptive, rates differ": plan(0.7, spread=0.15, levels=stepped),
    }
    for blocks, load in ((12000, 0.9), (6800, 0.97)):
        for name, speculation in variants.items():
            settings = EngineSettings(MAX_SEQS, MAX_TOKENS, 16, blocks, speculation=speculation)
            few = min(requests, 200_000)
            spread = 0.15 if len(speculation.survival) > 1 else 0.0
            capacity = few / simulate(cost, settings, dressed(stream(few, np.inf), 0.7, spread)).end_s
            arriving = dressed(stream(requests, load * capacity), 0.7, spread)
            result, seconds = timed(lambda: simulate(cost, settings, arriving), repeats)  # noqa: B023 - called at once
            describe(f"  {name}, {blocks} blocks, load {load}", result, seconds, blocks)


def dressed(requests: Requests, rate: float, spread: float) -> Requests:
    """The requests with their acceptance classes."""
    return replace(requests, acceptance_class=classes(len(requests), rate, spread)) if spread else requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speed", type=int, metavar="REQUESTS", help="Measure speed with so many requests instead.")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.speed:
        speed(args.speed, args.repeats)
        return
    print("deterministic tokens per pass against passes drawn token by token")
    for rate, spread, load in ((0.8, 0.0, 0.3), (0.8, 0.0, 0.8), (0.5, 0.0, 0.8), (0.7, 0.15, 0.8)):
        print(compare(rate, spread, load, args.requests, args.seeds))


if __name__ == "__main__":
    main()
