"""Prediction against measurement, without any fitting: the catalogue's defaults on a trace of a real server.

    python benchmarks/accuracy.py

The measurement is the per-request log of vLLM 0.19 (Llama-3.1-8B in bf16, one RTX PRO 6000 Server Edition, 300 ShareGPT
requests at about 10 per second, max_num_seqs 128, max_num_batched_tokens 2048) in the shared data folder. Prefix hits are at
most what the log's upper bound says; both ends are run.
"""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit
from simulator.roofline.precision import parse_precision

LOG = Path(__file__).resolve().parents[2] / "shared/data/serving/vllm_requests_rtx_pro_6000_llama-3_1-8b_tp1dp1.csv"
BLOCK = 16


def predict(*, prefix_hits: bool) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Predicted and measured TTFT, TPOT and E2E of every request. [s]"""
    with LOG.open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["queued_s"]))

    def column(name: str) -> NDArray[np.float64]:
        return np.array([float(row[name]) for row in rows])

    queued = np.maximum(column("queued_s"), 0.0)
    prompt, output = (column(name).astype(np.int64) for name in ("input_tokens", "output_tokens"))
    hits = column("prefix_hit_tokens_upper_bound").astype(np.int64)
    cached = np.minimum(hits // BLOCK * BLOCK, prompt - 1) * int(prefix_hits)
    deployment = Deployment(
        load_model("llama-3-8b"),
        resolve_slice("rtx-pro-6000:1"),
        parse_precision("bf16"),
        max_num_seqs=128,
        max_num_batched_tokens=2048,
    )
    settings = EngineSettings(128, 2048, BLOCK, memory_fit(deployment).kv_blocks)
    result = simulate(compile_step_cost(deployment), settings, Requests(queued, prompt, output, cached, output))
    first, last = column("first_token_s"), column("last_token_s")
    steps = np.maximum(output - 1, 1)
    return {
        "TTFT": (result.first_token_s - queued, first - queued),
        "TPOT": ((result.finish_s - result.first_token_s) / steps, (last - first) / steps),
        "E2E": (result.finish_s - queued, last - queued),
    }


def main() -> None:
    print(
        "| prefix hits | metric | predicted mean | measured mean | bias of the mean | median error per request | p90 |"
    )
    print("|---|---|---|---|---|---|---|")
    for prefix_hits in (False, True):
        for name, (ours, theirs) in predict(prefix_hits=prefix_hits).items():
            error = np.abs(ours / theirs - 1)
            print(
                f"| {'upper bound' if prefix_hits else 'none'} | {name} | {ours.mean() * 1e3:,.1f} ms | {theirs.mean() * 1e3:,.1f} ms "
                f"| {ours.mean() / theirs.mean() - 1:+.1%} | {np.median(error):.1%} | {np.quantile(error, 0.9):.1%} |"
            )


if __name__ == "__main__":
    main()
