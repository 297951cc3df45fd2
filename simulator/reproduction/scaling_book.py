"""Worked problems of the scaling book on rooflines, TPUs, sharding and transformer arithmetic."""

import math
from collections.abc import Callable
from dataclasses import replace

from simulator.catalog.chips import ChipSpec, load_chip
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.errors import UnpriceableError
from simulator.reproduction.rows import Ours
from simulator.reproduction.textbook import V4P_LINK, axis, chip_with, decoder, grid, textbook, v5e
from simulator.roofline.analysis import critical_batch
from simulator.roofline.collectives import all_gather_s, all_reduce_s, point_to_point_s
from simulator.roofline.layouts import FeedForward, two_dimensional_beats_one_on_three_axes
from simulator.roofline.ops import Op, StepShape, step_ops
from simulator.roofline.precision import parse_precision

BF16 = 2.0
V5P_POD = 16 * 20 * 28
"""Chips of a whole pod, more than the largest slice on offer."""


def rows_ours() -> Ours:
    """Our side of ``data/scaling-book.csv``."""
    return _rooflines() | _tpus() | _sharding() | _transformers() | _training()


def _rooflines() -> dict[str, Callable[[], float]]:
    def critical(precision: str, chip: ChipSpec) -> Callable[[], float]:
        return lambda: critical_batch(textbook("llama-2-7b", "tpu-v5e:1", precision, chip=chip))

    def two_chips() -> float:
        """Contraction length at which summing bf16 partial products of two chips takes as long as computing them."""
        link = replace(axis(2, wraps=False), latency_s=0.0)
        return float(point_to_point_s(BF16, link)) * v5e().peak_flops_per_s("bf16")

    def own_keys() -> float:
        op = _op("llama-2-7b", "w8a16kv8", StepShape.decode(1, 1024), "attention, decode")
        return float(op.flops / op.kv_read_bytes)

    return {
        "two-chips": two_chips,
        "critical-int8": critical("w8a8kv8", v5e()),
        "critical-w8a16": critical("w8a16kv8", v5e(8.2e11)),
        "own-weights": own_keys,
        "critical-h100": lambda: chip_with("h100-sxm", peaks={"bf16": 1e15}).critical_intensity(),
        "critical-h100-datasheet": lambda: load_chip("h100-sxm").critical_intensity(),
    }


def _tpus() -> dict[str, Callable[[], float]]:
    v4p = chip_with("tpu-v4", hbm=1.23e12)
    v5p = chip_with("tpu-v5p", capacity=96e9)
    v5e_pod = replace(resolve_slice("tpu-v5e:16x16"), chip=v5e())
    corner = grid(4, 4, wraps=False)
    bytes_t6 = parse_precision("int8g0").matrix_bytes(131072, 131072)

    def pcie_batch() -> float:
        chip = chip_with("tpu-v6e", peaks={"bf16": 9.2e14})
        return chip.peak_flops_per_s("bf16") / _pcie()

    def int8_batch(bandwidth: float) -> float:
        """B of int8[B, 4096] @ int8[4096, 16384], bytes in and out counted, at which both bounds meet."""
        intensity = chip_with("tpu-v5e", hbm=bandwidth).critical_intensity("int8")
        weights = 4096 * 16384
        return intensity * weights / (2 * weights - intensity * (4096 + 16384))

    def hosts(pod_chips: int, chip: ChipSpec) -> float:
        return pod_chips / (chip.host.chips or 1)

    return {
        "load-200b": lambda: (
            parse_precision("bf16").matrix_bytes(1, 200e9) / (32 * v4p.hbm_bandwidth_bytes_per_s) * 1e3
        ),
        "v5e-hosts": lambda: hosts(v5e_pod.n_chips, v5e_pod.chip),
        "v5e-flops": lambda: v5e_pod.n_chips * v5e_pod.chip.peak_flops_per_s("bf16"),
        "v5e-hbm": lambda: v5e_pod.n_chips * v5e_pod.chip.hbm_capacity_bytes / 1e12,
        "v5p-hosts": lambda: hosts(V5P_POD, v5p),
        "v5p-flops": lambda: V5P_POD * v5p.peak_flops_per_s("bf16"),
        "v5p-hbm": lambda: V5P_POD * v5p.hbm_capacity_bytes / 1e12,
        "pcie-batch": pcie_batch,
        "int8-hbm": lambda: int8_batch(8.1e11),
        "int8-vmem": lambda: int8_batch(22 * 8.1e11),
        "corner-first": lambda: float(point_to_point_s(1e-6, corner)) * 1e6,
        "corner-all": lambda: float(point_to_point_s(BF16 * 8 * 128 * 8192, corner)) * 1e6,
        "dram-pcie": lambda: bytes_t6 / (16 * _pcie()) * 1e3,
        "dram-ici": lambda: float(all_gather_s(bytes_t6, [corner])) * 1e3,
        "dram-hbm": lambda: bytes_t6 / v5e().hbm_bandwidth_bytes_per_s * 1e3,
        "dram-flops": lambda: 2 * 8 * bytes_t6 / v5e().peak_flops_per_s("bf16") * 1e3,
    }


def _sharding() -> dict[str, Callable[[], float]]:
    big, small = BF16 * 2048 * 8192, BF16 * 256 * 256
    cube = BF16 * 1024 * 4096
    ring = axis(4, wraps=True, link=V4P_LINK)
    plane = grid(4, 4, wraps=True, link=V4P_LINK)

    def gather(size: float, domain: LinkDomain) -> Callable[[], float]:
        return lambda: float(all_gather_s(size, [domain])) * 1e6

    def latency_bytes(shards: int) -> float:
        """Array below which an all-gather over ``shards`` chips of a ring is nothing but hops."""
        domain = axis(shards, wraps=True)
        per_byte = float(all_gather_s(1e12, [domain])) / 1e12
        return float(all_gather_s(1e-6, [domain])) / per_byte

    return {
        "gather-wrapped": gather(big, axis(4, wraps=True)),
        "gather-open": gather(big, axis(4, wraps=False)),
        "gather-small": gather(small, axis(4, wraps=False)),
        "gather-x": gather(cube / 4, ring),
        "gather-xy": gather(cube, plane),
        "reduce-z": lambda: float(all_reduce_s(cube / 16, [ring])) * 1e6,
        "reduce-z-whole": lambda: float(all_reduce_s(cube, [ring])) * 1e6,
        "gather-tiny": gather(BF16 * 128, ring),
        "hop-bytes": lambda: latency_bytes(8) / 8 / 1e3,
        "hop-bytes-8": lambda: latency_bytes(8) / 1e3,
        "two-dimensional": lambda: two_dimensional_beats_one_on_three_axes(FeedForward(8192, 32768)),
    }


def _transformers() -> dict[str, Callable[[], float]]:
    arch = decoder(
        n_layers=64, d_model=4096, d_ff=16384, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=32000, n_norms=1
    )
    counts = count(arch)

    def decode_intensity() -> float:
        op = _op("llama-3-70b", "bf16", StepShape.decode(1, 8192), "attention, decode")
        return float(op.flops / op.kv_read_bytes)

    def prefill_intensity() -> float:
        """Of T = 4096 tokens that attend to each other without a mask, queries and outputs read and written."""
        T = 4096
        op = _op("llama-3-70b", "bf16", StepShape(n=T, P=1, A=T * T, K=T, R=1), "attention, prefill")
        queries = 64 * 128 * BF16 * T * 80
        return float(op.flops / (op.kv_read_bytes + 2 * queries))

    def equal_context() -> float:
        d = textbook("llama-2-7b", "tpu-v5e:1")
        ops = {op.name: op for op in step_ops(d, StepShape.decode(1, 1))}
        projections = float(ops["QKV projection"].flops) + float(ops["output projection"].flops)
        return projections / float(ops["attention, decode"].flops)

    return {
        "parameters": lambda: counts.total,
        "attention-share": lambda: counts.attention / (counts.attention + counts.ffn),
        "kv-int8": lambda: counts.kv_elements_per_token,
        "decode-intensity": decode_intensity,
        "prefill-intensity": prefill_intensity,
        "equal-context": equal_context,
    }


def _training() -> dict[str, Callable[[], float]]:
    counts = count(load_model("llama-3-70b"))
    chip = load_chip("tpu-v5p")
    peak, pod = chip.peak_flops_per_s("bf16"), V5P_POD
    link = resolve_slice("tpu-v5p:4x4x4").domains[0].bandwidth_bytes_per_s
    ratio = peak / (2 * link)
    flops, batch, d_ff = 6 * 70e9 * 15e12, 2.0**22, 28672
    memory = 2 * 70e9 + 8 * 70e9 + 2 * 8192 * 4e6 * 4 * 80
    return {
        "ffn": lambda: counts.ffn / 1e9,
        "vocabulary": lambda: (counts.embedding + counts.head) / 1e9,
        "attention": lambda: counts.attention / 1e9,
        "train-flops": lambda: flops,
        "train-years": lambda: flops / peak / (365 * 86400),
        "train-days": lambda: flops / (0.4 * pod * peak) / 86400,
        "train-memory": lambda: memory / 1e12,
        "train-chips": lambda: memory / chip_with("tpu-v5p", capacity=96e9).hbm_capacity_bytes,
        "per-chip-batch": lambda: batch / pod,
        "axis-ratio": lambda: ratio,
        "fsdp-bound": lambda: ratio / 3,
        "mixed-bound": lambda: 2 * ratio**2 / d_ff,
        "x-opt": lambda: math.sqrt(2 * batch * pod / d_ff),
    }


def _op(model: str, precision: str, step: StepShape, name: str) -> Op:
    return next(op for op in step_ops(textbook(model, "tpu-v5e:1", precision), step) if op.name == name)


def _pcie() -> float:
    """PCIe rate of a v5e; the book takes it for every TPU. [bytes/s]"""
    pcie = load_chip("tpu-v5e").host.pcie
    if pcie is None:
        raise UnpriceableError("tpu-v5e: host.pcie is not in its file")
    return pcie.si("tpu-v5e: host.pcie", "bytes/s")
