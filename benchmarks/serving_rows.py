"""Time per output token against published serving runs, without any fitting: catalogue defaults through the engine.

    python benchmarks/serving_rows.py [--per-model]

Every aggregated row of the shared InferenceX dump that the cost model and the engine can run is simulated as it was measured: a
closed loop of ``concurrency`` clients, random lengths uniform in [0.8 L, L], ignore-EOS, no prefix cache; the first round is cut. Rows it
cannot run are counted with the reason. TTFT is left out: it hinges on the client's start and on host overheads that only
a calibrated engine profile can give.
"""

import argparse
import csv
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.engine.compiled import simulate, warm_up
from simulator.engine.records import EngineSettings, Requests
from simulator.errors import ChipsecondsError
from simulator.randomness import uniform
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import require_fit
from simulator.roofline.precision import parse_precision

ROWS = Path(__file__).resolve().parents[2] / "shared/data/serving/inferencex_agg.csv"
ROUNDS = 6
MODELS = {
    "meta-llama/Llama-3.1-70B": "llama-3-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3-8b",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2.5",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "Qwen/Qwen3.5-397B-A17B": "qwen3.5-397b-a17b",
    "moonshotai/Kimi-K2.5": "kimi-k2.5",
}
CHIPS = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "b200_sxm": "b200", "gb200": "gb200"}
#: What the recipes of these rows run: fp8 weights with an fp8 cache; 4-bit experts under 16-bit arithmetic.
PRECISIONS = {"fp8": "fp8kv8", "bf16": "bf16", "fp4": "wfp4a16", "int4": "w4a16"}
#: Checkpoints whose FP8 has a scale per 128 x 128 block.
BLOCK_FP8 = {"Qwen/Qwen3-235B-A22B-FP8", "deepseek-ai/DeepSeek-R1", "MiniMaxAI/MiniMax-M2.5"}


def lengths(row: str, cause: str, longest: float, n: int) -> NDArray[np.int64]:
    """Lengths uniform in [0.8 L, L], at least 1."""
    low = int(0.8 * longest)
    draws = uniform(0, f"{row}/{cause}", 0, n)
    return np.asarray(np.maximum(low + np.floor(draws * (int(longest) - low + 1)), 1), dtype=np.int64)


def predict_tpot_s(row: dict[str, str]) -> float:
    """Mean time per output token of one row. [s]"""
    if any(float(row[name] or 1) > 1 for name in ("pp", "attention_dp")):
        raise ChipsecondsError("pipeline or attention data parallelism")
    if row["gpu"] not in CHIPS:
        raise ChipsecondsError(f"chip {row['gpu']} has no entry here")
    deployment = Deployment(
        load_model(MODELS[row["model"]]),
        resolve_slice(f"{CHIPS[row['gpu']]}:{float(row['n_gpus']):.0f}"),
        parse_precision(
            PRECISIONS[row["precision"]] + ("g128" if row["precision"] == "fp8" and row["model"] in BLOCK_FP8 else "")
        ),
        max_num_seqs=1024,
    )
    clients = int(float(row["concurrency"]))
    n = ROUNDS * clients
    output = lengths(row["id"], "output", float(row["osl"]), n)
    requests = Requests(
        np.zeros(n), lengths(row["id"], "prompt", float(row["isl"]), n), output, 0 * output, output, clients
    )
    settings = EngineSettings(1024, deployment.max_num_batched_tokens, 16, require_fit(deployment).kv_blocks)
    result = simulate(compile_step_cost(deployment), settings, requests)
    each = (result.finish_s - result.first_token_s) / np.maximum(output - 1, 1)
    return float(each[clients:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-model", action="store_true")
    args = parser.parse_args()
    with ROWS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    warm_up()
    start = time.perf_counter()
    errors: dict[str, list[float]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            ours = predict_tpot_s(row)
        except ChipsecondsError as error:
            left_out[str(error)[:100]] += 1
            continue
        kind = f"{MODELS[row['model']]} {row['precision']} on {row['gpu']}" if args.per_model else "all"
        errors[kind].append(ours * 1e3 / float(row["tpot_ms"]) - 1)
    seconds = time.perf_counter() - start
    done = sum(map(len, errors.values()))
    print("| rows | median error | mean | p90 | median bias | |")
    print("|---|---|---|---|---|---|")
    for kind, values in sorted(errors.items()):
        e = np.array(values)
        size = np.abs(e)
        print(
            f"| {len(e)} | {np.median(size):.1%} | {size.mean():.1%} | {np.quantile(size, 0.9):.1%} | {np.median(e):+.1%} | {kind} |"
        )
    print(f"\n{done} of {len(rows)} rows in {seconds:.1f} s on one core ({done / seconds:.0f} rows/s)")
    for reason, n in left_out.most_common():
        print(f"left out: {n} rows: {reason}")


if __name__ == "__main__":
    main()
