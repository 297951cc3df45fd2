"""The shared half of Pope et al. 2022: PaLM on TPU v4, MFU by its definition, longest contexts, and latencies.

Rows of ``data/pope.csv`` with a ``model`` are measured: their time is priced with the catalogue's efficiencies, without a
parameter per row. The ops of a step are those of tensor parallelism over all chips, heads padded to divide; the exchanges of
a layer are those of the two-dimensional weight-stationary layout that the rows name, and where attention is sharded over the
batch, an all-to-all of the queries before it and one of its outputs after it.
"""

from collections.abc import Callable
from functools import partial

from simulator.catalog.architecture import Architecture, SoftmaxAttention
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count, kv_elements
from simulator.catalog.slices import resolve_slice
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.reproduction.textbook import chip_with, with_kv_heads
from simulator.roofline.collectives import all_to_all_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.layouts import FeedForward, layer_layouts, two_dimensional_beats_one
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.precision import parse_precision

CHIPS, PROMPT, CACHE_SHARE = 64, 2048, 0.3
SLICES = {"64": "tpu-v4:4x4x4", "16": "tpu-v4:2x2x4"}


def rows_ours() -> Ours:
    """Our side of ``data/pope.csv``."""
    ours = _scale() | _contexts()
    for row in read_published("pope"):
        if row["model"]:
            ours[row["id"]] = partial(_mfu if row["unit"] == "%" else _time_s, row)
    return ours


def _mfu(row: Published) -> float:
    """2·N·tokens over peak FLOPs of the published time: the paper's definition, attention left out. [%]"""
    peak = int(row["chips"]) * resolve_slice(SLICES[row["chips"]]).chip.peak_flops_per_s("bf16")
    return 2 * count(load_model(row["model"])).total * float(row["tokens"]) / (peak * float(row["time_s"])) * 100


def _time_s(row: Published) -> float:
    """Prefill of one prompt, or 64 decode steps from 2048 tokens on. [s]"""
    batch, chips, prefill = int(row["batch"]), int(row["chips"]), row["phase"] == "prefill"
    step = StepShape.prefill(PROMPT) if prefill else StepShape.decode(batch, PROMPT + 32)
    d = Deployment(
        architecture=_padded(row["model"], chips),
        slice=resolve_slice(SLICES[row["chips"]]),
        precision=parse_precision(row["precision"]),
        kv_layout="even",
    )
    ops_s = sum(float(op.time_s) for op in step_ops(d, step) if op.name != "all-reduce, layers")
    arch = d.architecture
    d_ff = next(group.ffn.d_ff for group in arch.layers if group.ffn is not None)
    layouts = layer_layouts(
        d.slice,
        FeedForward(arch.d_model, d_ff, matrices=3),
        step.n,
        link=d.eff.link,
        latency_s=d.eff.collective_latency_s,
    )
    exchange_s = next(layout.time_s for layout in layouts if layout.name == "2d-stationary")
    if row["attention"] == "batch":
        heads = max(mixer.n_heads * mixer.head_dim for _, mixer in d.mixers if isinstance(mixer, SoftmaxAttention))
        queries = step.n * heads * d.precision.wide_bytes
        latency_s = d.eff.collective_latency_s
        exchange_s += 2 * float(all_to_all_s(queries, d.slice.domains[0], link=d.eff.link, latency_s=latency_s))
    return (ops_s + arch.n_layers * exchange_s) * (1 if prefill else 64)


def _padded(model: str, chips: int) -> Architecture:
    """Return the model with its query heads rounded up to a multiple of the chips."""
    arch = load_model(model)
    layers = []
    for group in arch.layers:
        mixer = group.mixer
        if isinstance(mixer, SoftmaxAttention):
            mixer = mixer.model_copy(update={"n_heads": -(-mixer.n_heads // chips) * chips})
        layers.append(group.model_copy(update={"mixer": mixer}))
    return arch.model_copy(update={"layers": tuple(layers)})


def _scale() -> dict[str, Callable[[], float]]:
    bandwidth = CHIPS * chip_with("tpu-v4", hbm=1.2e12).hbm_bandwidth_bytes_per_s
    palm = count(load_model("palm-540b"))
    return {
        "two-dimensional": lambda: two_dimensional_beats_one(FeedForward(16384, 65536)),
        "load-int8": lambda: palm.total / bandwidth * 1e3,
        "load-bf16": lambda: 2 * palm.total / bandwidth * 1e3,
        "load-kv": lambda: 64 * PROMPT * 2 * palm.kv_elements_per_token / bandwidth * 1e3,
    }


def _contexts() -> dict[str, Callable[[], float]]:
    """Longest contexts with 30 % of the memory of 64 chips for the cache."""
    memory = CACHE_SHARE * chip_with("tpu-v4", capacity=32 * 2**30).hbm_capacity_bytes
    plain = load_model("palm-540b")

    def per_token(n_kv_heads: int, head_dim: int) -> float:
        layer = with_kv_heads("palm-540b", 1, head_dim=head_dim).layers[0].mixer
        return 2.0 * plain.n_layers * n_kv_heads * kv_elements(layer)

    ours: dict[str, Callable[[], float]] = {}
    for batch in (128, 512):
        ours[f"multi-head-{batch}"] = partial(lambda b: CHIPS * memory / (b * per_token(64, 128)), batch)
        ours[f"multi-query-heads-{batch}"] = partial(lambda b: memory / (b * per_token(1, 256)), batch)
        ours[f"multi-query-batch-{batch}"] = partial(lambda b: CHIPS * memory / (b * per_token(1, 256)), batch)
    ours["multi-head-unpadded"] = lambda: CHIPS * memory / (128 * per_token(48, 128))
    return ours
