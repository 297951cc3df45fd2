"""The scaling book's inference chapters: its exercises, its Llama-2-13B table, and Llama-3-70B served on v5e."""

import math
from collections.abc import Callable
from functools import partial

from simulator.catalog.chips import load_chip
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count, sequence_kv_elements
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.reproduction.rows import Ours
from simulator.reproduction.textbook import (
    V5E_BIDI,
    axis,
    chip_with,
    decoder,
    step_without_links_s,
    textbook,
    v5e,
    with_kv_heads,
)
from simulator.roofline.analysis import critical_batch
from simulator.roofline.collectives import all_gather_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import weights_bytes
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.precision import parse_precision

CONTEXT, BYTES_BF16 = 8192, 2.0
TABLE_BATCHES = (1, 8, 16, 32, 64, 240)
FAST = 8.2e11
"""The faster of the book's two rates for v5e HBM. [bytes/s]"""
FORMATS = {"bf16": ("bf16", 16), "int8": ("int8kv8", 8), "int4": ("w4a16kv4", 4)}
"""Of weights and cache: our word, and the chips the book takes."""


def rows_ours() -> Ours:
    """Our side of ``data/inference-math.csv``."""
    return _exercises() | _table() | _serving() | _full_memory() | _layout() | _worked()


def _exercises() -> dict[str, Callable[[], float]]:
    popular = decoder(
        n_layers=50, d_model=10_000, d_ff=16_000, n_heads=16, n_kv_heads=8, head_dim=125, vocab_size=300_000, tied=True
    )
    sized = partial(
        decoder, n_layers=64, d_model=4096, d_ff=16384, n_heads=32, head_dim=256, vocab_size=32128, tied=True
    )
    grouped, single = sized(n_kv_heads=8), sized(n_kv_heads=1)
    mixture = count(sized(n_kv_heads=8, experts=(16, 2)))
    experts = mixture.total - mixture.router
    bandwidth = v5e().hbm_bandwidth_bytes_per_s
    active = mixture.active - mixture.router

    def popular_step(batch: int) -> float:
        d = textbook(popular, "tpu-v5e:4x4", "w8a16kv8", chip=v5e())
        return step_without_links_s(d, StepShape.decode(batch, CONTEXT)) * 1e3

    def cache_tokens(d: Deployment) -> float:
        left = d.slice.chip.hbm_capacity_bytes - weights_bytes(d)
        return left / d.kv_bytes_per_token

    def load_ms(precision: str) -> float:
        d = textbook(grouped, "tpu-v5e:4x4", precision, chip=v5e())
        return weights_bytes(d) / bandwidth * 1e3

    def cache(arch_name: str) -> float:
        return BYTES_BF16 * sequence_kv_elements(load_model(arch_name), CONTEXT)

    return {
        "pop-4": lambda: popular_step(4),
        "pop-256": lambda: popular_step(256),
        "kv-13b": lambda: cache("llama-2-13b") / 1e9,
        "q1": lambda: count(grouped).total,
        "q1-kv": lambda: count(grouped).kv_elements_per_token,
        "q2": lambda: cache_tokens(textbook(grouped, "tpu-v5e:4x4", "w8a16kv8", chip=v5e())),
        "q2-one": lambda: cache_tokens(textbook(single, "tpu-v5e:4x4", "w8a16kv8", chip=v5e())),
        "q3-int8": lambda: load_ms("w8a16"),
        "q3-bf16": lambda: load_ms("bf16"),
        "q5-total": lambda: experts,
        "q5-active": lambda: active,
        "q5-flops": lambda: 2 * active,
        "q5-batch": lambda: v5e(FAST).critical_intensity() * 16 / 2,
        "q5-kv": lambda: mixture.kv_elements_per_token,
        "q6-int8": lambda: experts / (128 * bandwidth) * 1e3,
        "q6-bf16": lambda: 2 * experts / (128 * bandwidth) * 1e3,
        "q6-free": lambda: (v5e().hbm_capacity_bytes - experts / 128) / 1e9,
        "q6-chips": lambda: experts / v5e().hbm_capacity_bytes,
        "tp-printed": lambda: 16384 / (8 * 32),
        "tp-beta": lambda: bandwidth / V5E_BIDI,
        "speculation": lambda: parse_precision("bf16").matrix_bytes(1, 600e6) / (4 * FAST) * 1e6,
    }


def _table() -> dict[str, Callable[[], float]]:
    """Llama-2-13B on eight v5e: the table's own formula, and our step."""
    ours: dict[str, Callable[[], float]] = {}
    models = {"mha": load_model("llama-2-13b"), "gqa": with_kv_heads("llama-2-13b", 8)}

    def written_ms(batch: int, kv_gb: float) -> float:
        return (kv_gb * batch + 26) / 6.56

    def step_ms(kind: str, batch: int) -> float:
        d = textbook(models[kind], "tpu-v5e:2x4", chip=v5e(FAST))
        return step_without_links_s(d, StepShape.decode(batch, CONTEXT)) * 1e3

    def per_second(batch: int, kv_gb: float) -> float:
        return batch / written_ms(batch, kv_gb) * 1e3

    for batch in TABLE_BATCHES:
        for kind, kv_gb in (("mha", 6.7), ("gqa", 6.7 / 5)):
            ours[f"written-{kind}-{batch}"] = partial(written_ms, batch, kv_gb)
            ours[f"written-{kind}-{batch}-rate"] = partial(per_second, batch, kv_gb)
            ours[f"step-{kind}-{batch}"] = partial(step_ms, kind, batch)
    return ours


def _serving() -> dict[str, Callable[[], float]]:
    arch = load_model("llama-3-70b")
    kv = count(arch).kv_elements_per_token
    peaks = {"h100-sxm": 9.9e14, "tpu-v5p": 4.59e14, "tpu-v5e": 1.97e14}
    sequences = 32

    def per_dollar(name: str) -> float:
        chip = chip_with(name, peaks={"bf16": peaks[name]})
        price = next(quote for quote in chip.prices if quote.source == "scaling-book-prices")
        return chip.peak_flops_per_s("bf16") / price.usd_per_chip_hour

    def written_gb() -> float:
        return (sequences * CONTEXT * 160e3 + 70e9) / 1e9

    def held_gb() -> float:
        d = textbook("llama-3-70b", "tpu-v5e:2x4", "w8a16kv8", chip=v5e())
        return d.chips * (weights_bytes(d) + sequences * CONTEXT * d.kv_bytes_per_token) / 1e9

    def step_ms(spec: str) -> float:
        d = textbook("llama-3-70b", spec, "w8a16kv8", chip=v5e())
        return step_without_links_s(d, StepShape.decode(sequences, CONTEXT)) * 1e3

    def written_ms(chips: int) -> float:
        return written_gb() / (chips * 810) * 1e3

    def critical(precision: str) -> float:
        return critical_batch(textbook("llama-3-70b", "tpu-v5e:1", precision, chip=v5e(FAST)))

    return {
        "a1-h100": lambda: per_dollar("h100-sxm"),
        "a1-v5p": lambda: per_dollar("tpu-v5p"),
        "a1-v5e": lambda: per_dollar("tpu-v5e"),
        "a2": lambda: kv,
        "a3": lambda: sequence_kv_elements(arch, 32768) / 1e9,
        "a3-240": lambda: 240 * sequence_kv_elements(arch, 32768) / 1e12,
        "a3-chips": lambda: (240 * sequence_kv_elements(arch, 32768) + 70e9) / v5e().hbm_capacity_bytes,
        "a4-written": written_gb,
        "a4": held_gb,
        "a4-chips": lambda: _smallest(held_gb() * 1e9),
        "a5-written": lambda: written_ms(8),
        "a5-written-rate": lambda: sequences / written_ms(8) * 1e3,
        "a5-written-chip": lambda: sequences / written_ms(8) * 1e3 / 8,
        "a5": lambda: step_ms("tpu-v5e:2x4"),
        "a6-written": lambda: written_ms(16),
        "a6": lambda: step_ms("tpu-v5e:4x4"),
        "a7-bf16": lambda: critical("bf16"),
        "a7-w8a16": lambda: critical("w8a16kv8"),
        "a7-int8": lambda: critical("int8kv8"),
        "a13": lambda: v5e(FAST).hbm_capacity_bytes / v5e(FAST).hbm_bandwidth_bytes_per_s * 1e3,
    }


def _full_memory() -> dict[str, Callable[[], float]]:
    """Llama-3-70B with the HBM full of caches, in three formats."""
    ours: dict[str, Callable[[], float]] = {}
    step_s = v5e(FAST).hbm_capacity_bytes / v5e(FAST).hbm_bandwidth_bytes_per_s

    def weights(word: str) -> float:
        return weights_bytes(textbook("llama-3-70b", "tpu-v5e:1", word, chip=v5e()))

    def left(word: str, chips: int) -> float:
        return chips * v5e().hbm_capacity_bytes - weights(word)

    def caches(word: str, chips: int) -> float:
        per_token = textbook("llama-3-70b", "tpu-v5e:1", word, chip=v5e()).kv_bytes_per_token
        return left(word, chips) / (CONTEXT * per_token)

    def rate(word: str, chips: int) -> float:
        return caches(word, chips) / step_s / 512 / chips

    for name, (word, chips) in FORMATS.items():
        ours |= {
            f"a8-{name}": partial(lambda w: weights(w) / v5e().hbm_capacity_bytes, word),
            f"a9-{name}": partial(lambda w: _smallest(weights(w)), word),
            f"a10-{name}": partial(lambda w: weights(w) / 1e9, word),
            f"a11-{name}": partial(lambda w, n: left(w, n) / 1e9, word, chips),
            f"a12-{name}": partial(caches, word, chips),
            f"a14-{name}": partial(rate, word, chips),
            f"a15-left-{name}": partial(lambda w, n: left(w, n) / 1e9, word, 2 * chips),
            f"a15-batch-{name}": partial(caches, word, 2 * chips),
            f"a15-{name}": partial(rate, word, 2 * chips),
        }
    return ours


def _layout() -> dict[str, Callable[[], float]]:
    """Interconnect, prefill and disaggregation of the same model."""
    d_ff = 28672
    sliced = textbook("llama-3-70b", "tpu-v5e:4x8", chip=v5e())
    down = next(op for op in step_ops(sliced, StepShape.decode(64, 1)) if op.name == "FFN down")

    def ratio(name: str, shape: str) -> float:
        found = resolve_slice(f"{name}:{shape}")
        return found.chip.peak_flops_per_s("bf16") / (2 * found.domains[0].bandwidth_bytes_per_s)

    def prefill_s(*, attention: bool) -> float:
        d = textbook("llama-3-70b", "tpu-v5e:4x4", chip=v5e())
        ops = step_ops(d, StepShape.prefill(CONTEXT))
        kinds = {"matmul", "attention"} if attention else {"matmul"}
        return sum(float(op.compute_s) for op in ops if op.kind in kinds) / 0.4

    def servers(batch: int) -> float:
        return 0.91 * batch / (512 * 0.019)

    def floor_ms() -> float:
        d = textbook("llama-3-70b", "tpu-v5e:4x4", "int8kv8", chip=v5e(FAST))
        return step_without_links_s(d, StepShape.decode(1, 1)) * 1e3

    def plateau() -> float:
        d = textbook("llama-3-70b", "tpu-v5e:4x4", "int8kv8", chip=v5e(FAST))
        return 120 / step_without_links_s(d, StepShape.decode(120, 2048)) / 1e3 / 16

    return {
        "a16-printed": lambda: 2 * d_ff / ratio("tpu-v5p", "4x4x4"),
        "a16": lambda: 2 * d_ff / ratio("tpu-v5e", "4x4"),
        "a17-ici": lambda: float(all_gather_s(BYTES_BF16 * 64 * 8192, [axis(8, wraps=True)])) * 1e6,
        "a17-hbm": lambda: float(down.memory_s) / down.count * 1e6,
        "a17-math": lambda: float(down.compute_s) / down.count * 1e6,
        "a17-limit": lambda: d_ff / (8 * 64),
        "a18-written": lambda: 2 * 70e9 * CONTEXT / (16 * load_chip("tpu-v5e").peak_flops_per_s("bf16") * 0.4),
        "a18": lambda: prefill_s(attention=False),
        "a18-attention": lambda: prefill_s(attention=True),
        "a19": lambda: 32 * (8192 + 4096) / 4096,
        "a20": lambda: servers(32),
        "a20-43": lambda: servers(43),
        "a21": floor_ms,
        "a21-plateau": plateau,
    }


def _worked() -> dict[str, Callable[[], float]]:
    """The questions the book leaves open."""
    large, small = count(load_model("llama-3.1-405b")), load_model("llama-3-8b")
    chip = v5e()

    def rate(spec: str) -> tuple[float, float]:
        """Batch whose step takes 15 ms, and its tokens per second and chip."""
        d = textbook("llama-3.1-405b", spec, "w8a16kv8", chip=chip)
        low, high = 1.0, 4096.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            step = StepShape(n=middle, B=middle, S=middle * CONTEXT, R=middle)
            low, high = (middle, high) if step_without_links_s(d, step) < 15e-3 else (low, middle)
        return low, low / 15e-3 / d.chips

    def load_ms(spec: str) -> float:
        d = textbook("llama-3.1-405b", spec, "w8a16kv8", chip=chip)
        return weights_bytes(d) / chip.hbm_bandwidth_bytes_per_s * 1e3

    def small_bytes() -> float:
        d = textbook(small, "tpu-v5e:1", "int8kv8", chip=chip)
        return weights_bytes(d) + 240 * CONTEXT * d.kv_bytes_per_token

    return {
        "w1-flops": lambda: 2 * large.total,
        "w1-products": lambda: large.matmul_flops_per_token,
        "w1-compute": lambda: 2 * large.total / chip.peak_flops_per_s("bf16") * 1e3,
        "w1-load": lambda: large.total / chip.hbm_bandwidth_bytes_per_s,
        "w2": lambda: small_bytes() / 1e9,
        "w2-chips": lambda: _smallest(small_bytes()),
        "w3-batch-64": lambda: rate("tpu-v5e:8x8")[0],
        "w3-rate-64": lambda: rate("tpu-v5e:8x8")[1],
        "w3-batch-128": lambda: rate("tpu-v5e:8x16")[0],
        "w3-load-64": lambda: load_ms("tpu-v5e:8x8"),
        "w3-load-128": lambda: load_ms("tpu-v5e:8x16"),
    }


def _smallest(size_bytes: float) -> float:
    """Chips of the smallest v5e slice that holds so much. [chips]"""
    needed = math.ceil(size_bytes / v5e().hbm_capacity_bytes)
    return min(n for spec in legal_slices("tpu-v5e") if (n := resolve_slice(spec).n_chips) >= needed)
