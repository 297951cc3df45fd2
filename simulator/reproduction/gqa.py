"""Multi-head, grouped and multi-query attention of T5-XXL: cache sizes and the order of decoding times.

T5 is an encoder and a decoder; only the decoder makes time here, with the encoder's keys read by cross-attention. A stand-in
decoder has its shapes, and a context that is input and output together, so it reads the same KV.
"""

from functools import partial

from simulator.catalog.architecture import Architecture
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.reproduction.rows import Ours
from simulator.reproduction.textbook import decoder
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment

XXL_HEADS, GROUPS = 64, 8
BATCH_PER_CHIP, CHIPS, INPUT, OUTPUT = 32, 8, 1024, 256
"""Batch as the protocol has it; lengths in the middle of its ranges."""


def rows_ours() -> Ours:
    """Our side of ``data/gqa.csv``."""
    models = {
        "mha": _decoder(XXL_HEADS),
        "gqa": _decoder(GROUPS),
        "mqa": _decoder(1),
        "large": decoder(
            n_layers=24, d_model=1024, d_ff=2816, n_heads=16, n_kv_heads=16, head_dim=64, vocab_size=32128
        ),
    }

    def cache(name: str) -> float:
        return count(models[name]).kv_elements_per_token / count(models["mqa"]).kv_elements_per_token

    def ratio(slow: str, fast: str) -> float:
        return time_per_sample_s(models[slow]) / time_per_sample_s(models[fast])

    pairs = [("mha", "mqa"), ("mha", "gqa"), ("gqa", "mqa"), ("mha", "large"), ("large", "gqa")]
    return (
        {f"cache-{name}": partial(cache, name) for name in ("mha", "gqa", "mqa")}
        | {f"order-{a}-{b}": partial(ratio, a, b) for a, b in pairs}
        | {f"ratio-{a}-{b}": partial(ratio, a, b) for a, b in pairs[:3]}
    )


def time_per_sample_s(arch: Architecture) -> float:
    """Decoding time of one sample on one of eight TPU v4 chips, catalogue efficiencies. [chip-seconds]"""
    d = Deployment(architecture=arch, slice=resolve_slice("tpu-v4:2x2x2"), kv_layout="even")
    batch = BATCH_PER_CHIP * CHIPS
    step = step_report(d, decode=batch, context=INPUT + OUTPUT // 2)
    return OUTPUT * step.time_s * CHIPS / batch


def _decoder(n_kv_heads: int) -> Architecture:
    return decoder(
        n_layers=24,
        d_model=4096,
        d_ff=10240,
        n_heads=XXL_HEADS,
        n_kv_heads=n_kv_heads,
        head_dim=64,
        vocab_size=32128,
    )
