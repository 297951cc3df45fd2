"""The tables of published numbers, by name; what computes our side is imported when a table is asked for."""

from dataclasses import dataclass
from importlib import import_module

from simulator.errors import InputError, nearest
from simulator.reproduction.rows import Ours, Row, reproduce_rows


@dataclass(frozen=True)
class Table:
    """One table: what it is, and the function of our side as ``module:function``."""

    title: str
    ours: str
    simulates: bool = False
    """Whether rows run the engine: seconds, once it is compiled, and figures that follow the catalogue's efficiencies."""


TABLES = {
    "napkin": Table("Web agent on Llama-3-70B and TPU v5e, a talk's estimate and its corrections", "napkin:rows_ours"),
    "scaling-book": Table("Scaling book: rooflines, TPUs, sharding, transformers, training", "scaling_book:rows_ours"),
    "inference-math": Table("Scaling book: inference, and Llama-3-70B served on v5e", "inference_math:rows_ours"),
    "gpus": Table("Scaling book: GPUs", "gpus:rows_ours"),
    "parameters": Table("Parameter counts of models and checkpoints", "catalogue:parameters_ours"),
    "kv-cache": Table("Cache and state sizes", "catalogue:kv_cache_ours"),
    "gqa": Table("Multi-head, grouped and multi-query T5-XXL", "gqa:rows_ours"),
    "pope": Table("PaLM on TPU v4, Pope et al. 2022", "pope:rows_ours"),
    "fastertransformer": Table("MT-NLG 530B and GPT-3 175B on A100, FasterTransformer", "fastertransformer:rows_ours"),
    "scaling-laws": Table(
        "Loss laws: optima, fits to published runs, repeated data, over-training", "scaling:laws_ours"
    ),
    "lifetime": Table("Training and serving together, Sardana et al. 2024", "scaling:lifetime_ours"),
    "training": Table("Training: FLOPs, memory, time and utilisation of published runs", "scaling:training_ours"),
    "economics": Table("Dollars, joules and carbon: training runs, slices, an owned chip", "economics:rows_ours"),
    "speculation": Table("Speculative decoding, Leviathan et al. 2023", "speculation:rows_ours"),
    "mlperf": Table("MLPerf Inference v4.1 and v5.1, data centre, closed", "serving:mlperf_ours", simulates=True),
    "trtllm": Table("TensorRT-LLM 1.0 maximum throughput, and one load curve", "serving:trtllm_ours", simulates=True),
    "jetstream": Table("JetStream on eight TPU v5e", "serving:jetstream_ours", simulates=True),
}


def reproduce_table(name: str) -> list[Row]:
    """Compute one table.

    Raises
    ------
    InputError
        If there is no such table.
    """
    if name not in TABLES:
        raise InputError(f"unknown reproduction {name!r}{nearest(name, TABLES)}")
    module, _, function = TABLES[name].ours.partition(":")
    ours: Ours = getattr(import_module(f"simulator.reproduction.{module}"), function)()
    return reproduce_rows(name, ours)
