"""The scaling book's chapter on GPUs."""

from dataclasses import replace

from simulator.catalog.chips import load_chip
from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.reproduction.rows import Ours
from simulator.reproduction.textbook import chip_with
from simulator.roofline.collectives import Number, all_gather_s, all_reduce_s, all_to_all_s

BF16 = 2.0
NODE_OUT = 4e11
"""Way out of a node of eight, 400 Gb/s a GPU. [bytes/s]"""


def rows_ours() -> Ours:
    """Our side of ``data/gpus.csv``."""
    h100 = chip_with("h100-sxm", peaks={"bf16": 9.9e14})
    b200 = chip_with("b200", hbm=8e12, peaks={"bf16": 2.25e15, "fp8": 4.5e15})
    node = replace(resolve_slice("h100-sxm:8").domains[0], latency_s=0.0)
    efficiency = h100.efficiency
    d_ff = 28672

    def gather_rate(domain: LinkDomain) -> float:
        return 1.0 / (_s(all_gather_s(1e12, [domain])) / 1e12) / 1e9

    def product_us(rows: int, peak: float) -> float:
        flops, moved = 2 * rows * 4096 * 8192, BF16 * (rows * 4096 + 4096 * 8192 + rows * 8192)
        return max(flops / peak, moved / b200.hbm_bandwidth_bytes_per_s) * 1e6

    def vector_add_s(n: int) -> float:
        return 3 * 4 * n / h100.hbm_bandwidth_bytes_per_s

    def ratio(name: str) -> float:
        found = resolve_slice(f"{name}:8").domains[0]
        peaks = {"h100-sxm": h100, "b200": b200}
        return peaks[name].peak_flops_per_s("bf16") / found.bandwidth_bytes_per_s

    def achieved(size: float) -> float:
        """Ring traffic of an all-reduce over its time, as measurements state it. [GB/s]"""
        domains = resolve_slice("h100-sxm:8").domains
        time = all_reduce_s(size, domains, link=efficiency.link, latency_s=efficiency.collective_latency_s)
        return 2 * size * 7 / 8 / _s(time) / 1e9

    def switched(n: int, bandwidth: float) -> LinkDomain:
        return LinkDomain("switched", (n,), (False,), bandwidth, 0.0)

    pods = resolve_slice("h100-sxm:8").bisections_bytes_per_s[0]
    return {
        "intensity-h100": load_chip("h100-sxm").critical_intensity,
        "intensity-b200": b200.critical_intensity,
        "intensity-h100-fp8": lambda: load_chip("h100-sxm").critical_intensity("fp8"),
        "intensity-b200-fp8": lambda: b200.critical_intensity("fp8"),
        "product-64": lambda: product_us(64, b200.peak_flops_per_s("bf16")),
        "product-512": lambda: product_us(512, 2.3e15),
        "product-512-datasheet": lambda: product_us(512, b200.peak_flops_per_s("bf16")),
        "vector-add": lambda: vector_add_s(2**30) * 1e3,
        "vector-add-small": lambda: vector_add_s(65536) * 1e6,
        "node-bandwidth": lambda: node.size * node.bandwidth_bytes_per_s / 1e12,
        "node-bisection": lambda: 2 * pods / 1e12,
        "gather-large": lambda: _s(all_gather_s(BF16 * 4096 * 65536, [node])) * 1e3,
        "gather-pop": lambda: _s(all_gather_s(BF16 * 1024 * 16384, [node])) * 1e6,
        "gather-pop-simple": lambda: BF16 * 1024 * 16384 / node.bandwidth_bytes_per_s * 1e6,
        "all-to-all": lambda: _s(all_to_all_s(1e9, node)) * 1e3,
        "rate-node": lambda: gather_rate(node),
        "rate-leaf": lambda: gather_rate(switched(32, NODE_OUT)),
        "rate-two-nodes": lambda: gather_rate(switched(2, NODE_OUT)),
        "dp-node": lambda: ratio("h100-sxm"),
        "dp-across": lambda: h100.peak_flops_per_s("bf16") / NODE_OUT,
        "dp-two-nodes": lambda: h100.peak_flops_per_s("bf16") / (gather_rate(switched(2, NODE_OUT)) * 1e9),
        "tp-node": lambda: d_ff / ratio("h100-sxm"),
        "tp-across": lambda: d_ff * NODE_OUT / h100.peak_flops_per_s("bf16"),
        "tp-printed": lambda: d_ff / 1995,
        "b200-tp": lambda: ratio("b200"),
        "b200-dp": lambda: b200.peak_flops_per_s("bf16") / NODE_OUT,
        "train-days": lambda: 6 * 70e9 * 15e12 / (4096 * 0.45 * h100.peak_flops_per_s("bf16")) / 86400,
        "all-reduce-10gb": lambda: achieved(10e9),
        "all-reduce-58mb": lambda: achieved(58e6),
    }


def _s(time: Number) -> float:
    return float(time)
