"""The shared half of Pope et al. 2022: PaLM on TPU v4, MFU by its definition, longest contexts, and latencies.

Rows of ``data/pope.csv`` with a ``model`` are measured: their time is that of a deployment with the catalogue's efficiencies,
without a parameter per row. All are laid out as the rows say: two-dimensional weights, exchanged as in the published code
(``looped_exchange``), heads padded to divide the chips as in the paper, prefills with attention over heads, decodes over the
batch. Axes are those that the layout picks by itself.
"""

from collections.abc import Callable
from functools import partial

from simulator.catalog.architecture import Architecture, SoftmaxAttention
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count, kv_elements
from simulator.catalog.slices import resolve_slice
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.reproduction.textbook import chip_with, with_kv_heads
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.layouts import FeedForward, two_dimensional_beats_one
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision

CHIPS, PROMPT, STEPS, CACHE_SHARE = 64, 2048, 64, 0.3
SLICES = {"64": "tpu-v4:4x4x4", "16": "tpu-v4:2x2x4"}


def rows_ours() -> Ours:
    """Our side of ``data/pope.csv``."""
    ours = _scale() | _contexts()
    for row in read_published("pope"):
        if row["model"]:
            ours[row["id"]] = partial(PRICES[row["unit"]], row)
    return ours


def _mfu(row: Published) -> float:
    """2·N·tokens over peak FLOPs of the published time: the paper's definition, attention left out. [%]"""
    peak = int(row["chips"]) * resolve_slice(SLICES[row["chips"]]).chip.peak_flops_per_s("bf16")
    return 2 * count(load_model(row["model"])).total * float(row["tokens"]) / (peak * float(row["time_s"])) * 100


def _deployment(row: Published, *, serial: bool = False) -> Deployment:
    chips = int(row["chips"])
    model = _padded(row["model"], chips)
    if serial:  # a norm for each block
        layers = tuple(g.model_copy(update={"n_norms": 2}) for g in model.layers)
        model = model.model_copy(update={"parallel_attention_ffn": False, "layers": layers})
    return Deployment(
        architecture=model,
        slice=resolve_slice(SLICES[row["chips"]]),
        precision=parse_precision(row["precision"]),
        kv_layout="batch" if row["attention"] == "batch" else "heads",
        layout="2d",
        looped_exchange=True,
    )


def _time_s(row: Published) -> float:
    """Prefill of one prompt, or 64 decode steps from 2048 tokens on. [s]"""
    return _steps_s(_deployment(row), row)


def _step_ms(row: Published) -> float:
    """One of those decode steps. [ms]"""
    return _steps_s(_deployment(row), row) / STEPS * 1e3


def _serial_cost(row: Published) -> float:
    """Time that attention before feed-forward takes, over that of both in parallel, less 1. [%]"""
    return (_steps_s(_deployment(row, serial=True), row) / _steps_s(_deployment(row), row) - 1) * 100


def _steps_s(d: Deployment, row: Published) -> float:
    if row["phase"] == "prefill":
        return step_time_s(d, StepShape.prefill(PROMPT))
    return STEPS * step_time_s(d, StepShape.decode(int(row["batch"]), PROMPT + STEPS // 2))


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


#: How rows with a model are priced, by their unit.
PRICES: dict[str, Callable[[Published], float]] = {
    "%": _mfu,
    "s": _time_s,
    "ms a step": _step_ms,
    "% slower": _serial_cost,
}
