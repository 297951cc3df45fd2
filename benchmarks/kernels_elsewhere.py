"""Committed kernel curves against tables of other sources, which none was fitted to.

    python benchmarks/kernels_elsewhere.py ../shared/data/kernels

Vidur's products (PyTorch, 16 bits) and all-reduces (an older NCCL) on A100 and H100, and what vLLM 0.19 does on RTX PRO 6000
(LLMServingSim): products, and attention of decodes alone, of prompts alone, and of both in one call. Errors are predicted
over measured less 1, as priced; rows under 10 us are mostly launches, whose gaps each source counts its own way.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np

from simulator.calibration.kernels_models import problems
from simulator.calibration.kernels_tables import Table
from simulator.calibration.measurements import model_name
from simulator.calibration.regression import quantiles
from simulator.catalog.chips import load_chip
from simulator.catalog.kernel_curves import KernelFit, preferred_fits, read_calibration
from simulator.catalog.models import load_model

LAUNCH_S = 1e-5


def columns(file: Path, where: str) -> dict[str, np.ndarray]:
    with duckdb.connect(":memory:") as connection:
        return connection.execute(f"SELECT * FROM read_csv(?) WHERE {where}", [str(file)]).fetchnumpy()  # noqa: S608  # the conditions are this script's own


def table(kind: str, framework: str, found: dict[str, np.ndarray]) -> Table:
    numbers = {
        k: np.asarray(v, dtype=str if v.dtype == object else float) for k, v in found.items() if k != "latency_us"
    }
    return Table(kind, framework, {**numbers, "latency_s": np.asarray(found["latency_us"], dtype=float) * 1e-6}, "")


def fit_of(chip: str, op: str, framework: str, chips: int, head_dim: int) -> KernelFit:
    """The fit in force for an op, in 16 bits; the framework's own where it has one."""
    calibration = read_calibration(chip)
    known = [
        f for f in calibration.fits if f.op == op and f.dtype in {"", "bfloat16"} and f.kv_dtype in {"", "bfloat16"}
    ]
    known = [f for f in known if f.chips == chips and f.head_dim in {0, head_dim}]
    own = [f for f in known if f.framework == framework]
    return own[0] if own else next(f for f in preferred_fits(calibration) if f in known)


def report(
    what: str, chip: str, tables: list[Table], head_dim: int = 0, least_s: float = LAUNCH_S
) -> Iterator[np.ndarray]:
    """One line per problem: errors of all rows and of those that take longer. Gives the predictions of each."""
    for problem in problems(load_chip(chip), tables):
        fit = fit_of(chip, problem.op, problem.framework, problem.chips, head_dim)
        # As priced: no keys come from the on-die memory. Decodes' keys are dealt as the shapes say.
        priced = {name: 0.0 if name == "resident" else value for name, value in fit.parameters.items()}
        way = next(way for way in (problem, *problem.others) if way.schedule == fit.schedule)
        predicted = way.model(priced, np.arange(len(problem.measured)))
        ratios = np.log(predicted / problem.measured)
        size = f"on {problem.chips}" if problem.chips > 1 else ""
        line = f"{what:34s} {problem.op:18s} {size:5s} curve of {fit.framework:7s}"
        for name, keep in (
            ("all", np.ones(len(ratios), dtype=bool)),
            (f">{1e6 * least_s:g} us", problem.measured > least_s),
        ):
            if keep.any():
                median, p90, bias = quantiles(ratios[keep])
                line += f"  {name} {keep.sum():5d} rows {median:6.1%} p90 {p90:6.1%} bias {bias:+6.1%}"
        print(line)
        yield predicted


def products(file: Path, where: str) -> Table:
    found = columns(file, f"n > 0 AND k > 0 AND latency_us > 0 AND {where}")
    rows = {
        "dtype": np.full(len(found["n"]), "bfloat16", dtype=object),
        "m": found["tokens"],
        "n": found["n"],
        "k": found["k"],
    }
    return table("gemm", "pytorch", {**rows, "latency_us": found["latency_us"]})


def vllm_products(file: Path, model: str) -> Table:
    """The four products of a dense layer, by their shapes in the model."""
    arch = load_model(model_name(model))
    layer = arch.layers[0]
    heads, kv, width = layer.mixer.n_heads, layer.mixer.n_kv_heads, layer.mixer.head_dim
    hidden, inner = arch.d_model, layer.ffn.d_ff
    whole = {
        "qkv_proj": ((heads + 2 * kv) * width, hidden, "n"),
        "o_proj": (hidden, heads * width, "k"),
        "gate_up_proj": (2 * inner, hidden, "n"),
        "down_proj": (hidden, inner, "k"),
    }
    parts = []
    for op, (n, k, split) in whole.items():
        found = columns(file, f"model = '{model}' AND op = '{op}'")
        tp = found["tp"].astype(float)
        n_rows, k_rows = (n / tp, k + 0 * tp) if split == "n" else (n + 0 * tp, k / tp)
        parts.append((found["tokens"].astype(float), n_rows, k_rows, found["latency_us"].astype(float)))
    m, n_all, k_all, us = (np.concatenate(column) for column in zip(*parts, strict=True))
    return table(
        "gemm",
        "vllm",
        {"dtype": np.full(len(m), "bfloat16", dtype=object), "m": m, "n": n_all, "k": k_all, "latency_us": us},
    )


def attention(found: dict[str, np.ndarray], model: str, kind: str) -> Table:
    mixer = load_model(model_name(model)).layers[0].mixer
    count = len(found["tp"])
    tp = found["tp"].astype(float)
    rows = {
        "dtype": np.full(count, "bfloat16", dtype=object),
        "kv_dtype": np.full(count, "bfloat16", dtype=object),
        "heads": mixer.n_heads / tp,
        "kv_heads": mixer.n_kv_heads / tp,
        "head_dim": np.full(count, float(mixer.head_dim)),
        "latency_us": found["latency_us"],
    }
    if kind == "attention_decode":
        rows |= {"batch": found["n_decode"], "kv_len": found["kv_decode"] + 1}
    else:
        rows |= {"batch": np.ones(count), "seq": found["prefill_chunk"], "history": found["kv_prefill"]}
    return table(kind, "vllm", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for chip, name in (("a100-80-sxm", "a100_sxm"), ("h100-sxm", "h100_sxm")):
        list(report(f"Vidur, {chip}", chip, [products(folder / name / "layer_ops_vidur.csv.gz", "true")]))
        found = columns(
            folder / "vidur_network/comm_vidur.csv.gz",
            f"system = '{name[:4]}_dgx' AND collective = 'all_reduce' AND num_gpus = gpus_per_node AND num_gpus IN (2, 8)",
        )
        rows = {k: found[k] for k in ("collective", "num_gpus", "bytes", "latency_us")}
        impl = np.full(len(found["bytes"]), "nccl", dtype=object)
        list(report(f"Vidur's NCCL, {chip}", chip, [table("comm", "", {**rows, "impl": impl})], least_s=2e-4))
    source = folder / "rtx_pro_6000_server_llmservingsim"
    llama = "meta-llama/Llama-3.1-8B"
    list(report("vLLM 0.19, rtx-pro-6000", "rtx-pro-6000", [vllm_products(source / "layer_ops_vllm.csv.gz", llama)]))
    mixed = source / "attention_mixed_vllm.csv.gz"
    model = f"model = '{llama}' AND latency_us > 0"
    alone = {
        "attention_decode": "prefill_chunk = 0 AND n_decode > 0",
        "attention_prefill": "prefill_chunk > 0 AND n_decode = 0",
    }
    for kind, where in alone.items():
        found = columns(mixed, f"{model} AND {where}")
        list(report("vLLM 0.19, rtx-pro-6000", "rtx-pro-6000", [attention(found, llama, kind)], 128, 3e-5))
    both = columns(mixed, f"{model} AND prefill_chunk > 0 AND n_decode > 0")
    parts = [
        next(report("  parts of mixed calls", "rtx-pro-6000", [attention(both, llama, kind)], 128)) for kind in alone
    ]
    measured = both["latency_us"] * 1e-6
    for what, joined in (("sum", parts[0] + parts[1]), ("longer", np.maximum(*parts))):
        median, p90, bias = quantiles(np.log(joined / measured))
        print(
            f"mixed calls as the {what} of both parts: {len(measured)} rows, median {median:.1%}, p90 {p90:.1%}, bias {bias:+.1%}"
        )


if __name__ == "__main__":
    main()
