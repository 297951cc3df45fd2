"""Measured decode attention against the straight lines that prices make of the fitted schedules.

    python benchmarks/decode_priced.py ../shared/data/kernels

A fit knows each length's tiles and waves; a price is a line in the keys for each number of sequences, and takes no keys from
the on-die memory. Errors are predicted over measured less 1, of all rows, of contexts of 512 keys and more, and of short ones.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simulator.calibration.kernels_attention import MLA_LATENT, MLA_ROPE, MOST_HEADS_PER_KV_HEAD
from simulator.calibration.kernels_problems import FORMATS, KV_BYTES
from simulator.calibration.kernels_tables import Table, chip_folders, read_tables
from simulator.calibration.regression import quantiles
from simulator.catalog.chips import ChipSpec, load_chip
from simulator.catalog.kernel_curves import DecodeCurve, KernelCurves, load_curves
from simulator.roofline.attention_times import (
    block_key_s,
    decode_blocks,
    decode_key_s,
    padded_heads,
    scheduled_key_s,
    scheduled_line,
)


def curve_of(curves: KernelCurves, latent: bool, dtype: str, kv_dtype: str, heads: float, kv_heads: float, width: int) -> DecodeCurve | None:  # fmt: skip
    if latent:
        return curves.get(DecodeCurve, "mla_decode", dtype, kv_dtype)
    own = curves.at_width(DecodeCurve, "mha_decode", dtype, kv_dtype, width) if heads == kv_heads else None
    return own or curves.at_width(DecodeCurve, "attention_decode", dtype, kv_dtype, width)


def priced(chip: ChipSpec, curves: KernelCurves, table: Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys of each sequence and log(priced/measured), head configuration by head configuration."""
    latent = table.kind == "mla_decode"
    names = ("dtype", "kv_dtype", "heads") if latent else ("dtype", "kv_dtype", "heads", "kv_heads", "head_dim")
    units, hbm = chip.multiprocessor_count, chip.hbm_bandwidth_bytes_per_s
    for dtype, kv_dtype, *numbers in table.groups(*names):
        heads, kv_heads, width = (float(x) for x in (*numbers, *((1, MLA_LATENT + MLA_ROPE / 2) if latent else ())))
        if not latent and heads / kv_heads > MOST_HEADS_PER_KV_HEAD:
            continue
        curve = curve_of(curves, latent, dtype, kv_dtype, heads, kv_heads, int(width))
        if curve is None:
            continue
        keep = np.ones(len(table.columns["batch"]), dtype=bool)
        for name, value in zip(names, (dtype, kv_dtype, *map(float, numbers)), strict=True):
            keep &= table.columns[name] == value
        batch, keys, time = (table.columns[name][keep] for name in ("batch", "kv_len", "latency_s"))
        peak = chip.peak_flops_per_s(FORMATS[dtype][0])
        values = MLA_LATENT + MLA_ROPE if latent else 2 * kv_heads * width
        read = values * KV_BYTES[kv_dtype]
        flops = 4 * padded_heads(heads, kv_heads) * width
        key_s = decode_key_s(read, flops, curve, peak_flops_per_s=peak, hbm_bytes_per_s=hbm)
        each, launch_s, per_key = kv_heads * curve.kv_head_s + heads * curve.head_s, curve.launch_s, key_s
        if curve.schedule:
            block_s = block_key_s(width, curve)
            blocks = float(decode_blocks(heads, kv_heads, latent=latent))
            line = scheduled_line(curve, blocks, key_s, float(block_s), units)
            each, launch_s = each + line.sequence_s, launch_s + line.launch_s
            per_key = scheduled_key_s(batch, line.table, key_s)
        ramp_s = curve.ramp_s * np.minimum(1, batch * keys * read / curve.ramp_bytes)
        yield keys, np.log((launch_s + ramp_s + batch * (each + keys * per_key)) / time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, folder in chip_folders(parser.parse_args().folder, None).items():
        chip = load_chip(name)
        for table in read_tables(folder):
            if table.kind not in {"attention_decode", "mla_decode"}:
                continue
            found = list(priced(chip, load_curves(name).of(table.framework), table))
            keys, ratios = (np.concatenate(column) for column in zip(*found, strict=True))
            line = f"{name:13s} {table.kind:16s} of {table.framework:7s}"
            for what, rows in (("all", keys > 0), (">= 512 keys", keys >= 512), ("<= 128 keys", keys <= 128)):
                median, p90, bias = quantiles(ratios[rows])
                line += f"  {what} {rows.sum():6d} rows {median:5.1%} p90 {p90:6.1%} bias {bias:+5.1%}"
            print(line)


if __name__ == "__main__":
    main()
