"""The shared half of Pope et al. 2022: PaLM on TPU v4, MFU by its definition, longest contexts, and latencies.

Rows of ``data/pope.csv`` with a ``model`` are measured: their time is priced with the catalogue's efficiencies, without a
parameter per row. Parallel attention and feed-forward blocks, and two-dimensional layouts, are priced or refused by the
cost model, not here.
"""

from collections.abc import Callable
from functools import partial

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count, kv_elements
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError, UnpriceableError
from simulator.reproduction.rows import Ours, Published, read_published
from simulator.reproduction.textbook import chip_with, with_kv_heads
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape
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
    batch, prefill = int(row["batch"]), row["phase"] == "prefill"
    step = StepShape.prefill(PROMPT) if prefill else StepShape.decode(batch, PROMPT + 32)
    try:
        d = Deployment(
            architecture=load_model(row["model"]),
            slice=resolve_slice(SLICES[row["chips"]]),
            precision=parse_precision(row["precision"]),
            kv_layout="even",
        )
    except UnpriceableError:
        raise
    except InputError as refused:  # heads that do not divide by the chips: the paper lays FFNs out in two dimensions
        raise UnpriceableError(f"{row['model']} on {row['chips']} chips: {refused}") from refused
    return step_time_s(d, step) * (1 if prefill else 64)


def _scale() -> dict[str, Callable[[], float]]:
    bandwidth = CHIPS * chip_with("tpu-v4", hbm=1.2e12).hbm_bandwidth_bytes_per_s
    palm = count(load_model("palm-540b"))
    return {
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
