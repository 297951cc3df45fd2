"""The chip files against the reference table, written out again by hand, and the rules a file must keep."""

import csv
import doctest
import gzip
import re
from dataclasses import replace
from pathlib import Path

import pytest

from simulator.catalog import chips as chips_module
from simulator.catalog.chips import (
    IDEAL,
    ChipSpec,
    chip_names,
    load_chip,
    quantity_si,
    sources,
)
from simulator.catalog.engines import engine_names, load_engine
from simulator.catalog.files import data_folder
from simulator.catalog.price_book import operator_table, ownership_defaults, region_table
from simulator.catalog.records import quantities_in
from simulator.errors import InputError, UnpriceableError

ALL = chip_names()
GIB = 2.0**30
MIB = 2.0**20

EXPECTED = """
tpu-v4 tpu-v5e tpu-v5p tpu-v6e tpu-7x
v100-16-sxm v100-32-sxm t4 a10g a40 a30 a100-40-sxm a100-40-pcie a100-80-sxm a100-80-pcie l4 l40s rtx-4090 rtx-pro-6000
h100-sxm h100-pcie h100-nvl h20 h200-sxm gh200 gh200-144 b200 gb200 b300 gb300
mi250x mi300x mi325x mi355x
inferentia2 trainium1 trainium2 trainium3 gaudi2 gaudi3
m2-ultra m3-ultra m4-max groq-lpu-v1 cerebras-wse-3
"""

# chip: what the accelerator reference table says of it. Rates in 1e12 per second, bandwidths in 1e9 bytes/s.
REFERENCE = {
    "tpu-v4": {"bf16": 275, "int8": 275, "hbm": 32 * GIB, "bw": 1200, "link": 50, "reach": 45, "out": 6.25, "tdp": 192, "pcie": 16, "dram": 407 * GIB, "price": 3.22},
    "tpu-v5e": {"bf16": 197, "int8": 394, "hbm": 16 * GIB, "bw": 819, "vmem": 128 * MIB, "link": 50, "reach": 45, "out": 3.125, "tdp": 200, "pcie": 15, "dram": 512 * GIB, "price": 1.20},
    "tpu-v5p": {"bf16": 459, "int8": 918, "fp8": 459, "hbm": 95 * GIB, "bw": 2765, "vmem": 128e6, "link": 100, "reach": 90, "out": 6.25, "tdp": 450, "pcie": 16, "dram": 448e9, "price": 4.20},
    "tpu-v6e": {"bf16": 918, "int8": 1836, "fp8": 918, "hbm": 32 * GIB, "bw": 1638, "vmem": 128 * MIB, "link": 100, "reach": 90, "out": 12.5, "tdp": 300, "pcie": 32, "dram": 1536 * GIB, "price": 2.70},
    "tpu-7x": {"bf16": 2307, "fp8": 4614, "hbm": 192 * GIB, "bw": 7380, "link": 100, "reach": 90, "out": 12.5, "tdp": 1000, "dram": 960 * GIB},
    "v100-16-sxm": {"fp16": 125, "int8": 62, "hbm": 16 * GIB, "bw": 900, "vmem": 6e6, "link": 150, "out": 12.5, "tdp": 300, "pcie": 16, "price": 3.06},
    "t4": {"fp16": 65, "int8": 130, "int4": 260, "hbm": 16 * GIB, "bw": 320, "vmem": 4e6, "link": 16, "tdp": 70, "pcie": 16, "price": 0.526},
    "a100-80-sxm": {"bf16": 312, "int8": 624, "int4": 1248, "hbm": 85.9e9, "bw": 2039, "vmem": 40e6, "link": 300, "out": 25, "tdp": 400, "pcie": 32},
    "l4": {"bf16": 121, "fp8": 242, "int8": 242, "int4": 485, "hbm": 24 * GIB, "bw": 300, "vmem": 48e6, "link": 32, "out": 25, "tdp": 72, "pcie": 32, "price": 0.71},
    "l40s": {"bf16": 362.05, "fp8": 733, "int8": 733, "int4": 1466, "hbm": 48.3e9, "bw": 864, "vmem": 96e6, "link": 32, "out": 50, "tdp": 350, "pcie": 32, "price": 1.86},
    "rtx-pro-6000": {"bf16": 467.8, "fp8": 935.6, "int8": 935.6, "fp4": 1871, "hbm": 102.6e9, "bw": 1792, "vmem": 128e6, "link": 64, "out": 50, "tdp": 600, "pcie": 64},
    "h100-sxm": {"bf16": 989, "fp8": 1978, "int8": 1978, "hbm": 85.5e9, "bw": 3350, "vmem": 50e6, "link": 450, "out": 50, "tdp": 700, "pcie": 64, "price": 2.95},
    "h100-pcie": {"bf16": 756.5, "fp8": 1513, "int8": 1513, "hbm": 80 * GIB, "bw": 2000, "vmem": 50e6, "link": 64, "out": 50, "tdp": 350, "pcie": 64},
    "h20": {"bf16": 148, "fp8": 296, "int8": 296, "hbm": 96 * GIB, "bw": 4000, "vmem": 60e6, "link": 450, "out": 50, "tdp": 400, "pcie": 64},
    "h200-sxm": {"bf16": 989, "fp8": 1978, "int8": 1978, "hbm": 150.8e9, "bw": 4800, "vmem": 50e6, "link": 450, "out": 50, "tdp": 700, "pcie": 64},
    "b200": {"bf16": 2250, "fp8": 4500, "int8": 4500, "fp4": 9000, "hbm": 193e9, "bw": 7700, "vmem": 126e6, "link": 900, "out": 50, "tdp": 1000, "price": 14.24},
    "gb200": {"bf16": 2500, "fp8": 5000, "int8": 5000, "fp4": 10000, "hbm": 198.7e9, "bw": 8000, "vmem": 126e6, "link": 900, "out": 50, "tdp": 1200, "pcie": 64},
    "b300": {"bf16": 2250, "fp8": 4500, "int8": 153.5, "fp4": 14000, "hbm": 288.4e9, "bw": 7750, "vmem": 126e6, "link": 900, "out": 100, "tdp": 1100, "pcie": 128},
    "gb300": {"bf16": 2500, "fp8": 5000, "int8": 165, "fp4": 15000, "hbm": 298.0e9, "bw": 8000, "vmem": 126e6, "link": 900, "out": 100, "tdp": 1400, "pcie": 64},
    "mi300x": {"bf16": 1307, "fp8": 2615, "int8": 2615, "hbm": 192 * GIB, "bw": 5300, "vmem": 256e6, "link": 64, "tdp": 750, "pcie": 64, "price": 6.00},
    "mi355x": {"bf16": 2517, "fp8": 5033, "int8": 5033, "fp4": 10066, "hbm": 288 * GIB, "bw": 8000, "vmem": 256e6, "link": 76.8, "tdp": 1400, "pcie": 64},
    "trainium2": {"bf16": 667, "fp8": 1299, "hbm": 96 * GIB, "bw": 2900, "vmem": 192 * MIB, "tdp": 500},
    "gaudi2": {"bf16": 432, "fp8": 865, "hbm": 96 * GIB, "bw": 2450, "vmem": 48e6, "link": 37.5, "out": 37.5, "tdp": 600, "price": 1.3},
    "groq-lpu-v1": {"fp16": 188, "int8": 750, "hbm": 230e6, "bw": 80_000, "tdp": 215},
}  # fmt: skip

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int4", "fp4")


def test_every_chip_of_the_reference_table_has_a_file():
    assert sorted(EXPECTED.split()) == ALL


@pytest.mark.parametrize("name", REFERENCE)
def test_numbers_of_the_reference_table(name):
    chip, row = load_chip(name), REFERENCE[name]
    same_as_bf16 = {"fp16"} if "bf16" in row else set()
    assert set(chip.compute) - same_as_bf16 - {"int4"} == set(row) & set(DTYPES) - {"int4"} | (
        {"int8"} if name == "tpu-7x" else set()
    )
    for dtype in set(row) & set(DTYPES):
        assert chip.peak_flops_per_s(dtype) == pytest.approx(row[dtype] * 1e12, rel=1e-12)
    assert chip.hbm_capacity_bytes == pytest.approx(row["hbm"], rel=1.5e-3)  # 1e9 bytes are rounded in the table
    assert chip.hbm_bandwidth_bytes_per_s == row["bw"] * 1e9
    assert chip.tdp_w == row["tdp"]
    optional = {
        "vmem": (chip.memory.on_chip, 1.0),
        "link": (chip.scale_up and chip.scale_up.bandwidth, 1e9),
        "reach": (chip.scale_up and chip.scale_up.achievable, 1e9),
        "out": (chip.scale_out and chip.scale_out.bandwidth, 1e9),
        "pcie": (chip.host.pcie, 1e9),
        "dram": (chip.host.dram, 1.0),
    }
    for key, (quantity, unit) in optional.items():
        if key in row:
            assert quantity_si(quantity) == pytest.approx(row[key] * unit, rel=1e-9), key
    if "price" in row:
        assert chip.default_price.usd_per_hour == row["price"]


@pytest.mark.parametrize(
    ("name", "intensity"),
    [
        ("tpu-v5e", 240.5), ("tpu-v4", 229), ("tpu-v5p", 166), ("tpu-v6e", 560), ("tpu-7x", 313), ("a100-80-sxm", 153),
        ("h100-sxm", 295), ("h200-sxm", 206), ("h20", 37), ("b200", 292), ("mi300x", 247), ("mi355x", 315), ("trainium2", 230),
    ],
)  # fmt: skip
def test_critical_intensity_of_reference_section_5(name, intensity):
    assert load_chip(name).critical_intensity("bf16") == pytest.approx(intensity, abs=0.5)


@pytest.mark.parametrize(("name", "alpha"), [("tpu-v5p", 2550), ("tpu-v5e", 2189), ("tpu-v6e", 5100), ("tpu-v4", 3056)])
def test_compute_over_one_axis_of_bidirectional_ici(name, alpha):
    chip = load_chip(name)
    assert chip.peak_flops_per_s("bf16") / (2 * quantity_si(chip.scale_up.achievable)) == pytest.approx(alpha, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "links", "per_chip"), [("tpu-v5e", 4, 400), ("tpu-v5p", 6, 1200), ("tpu-v6e", 4, 800), ("tpu-7x", 6, 1200)]
)
def test_published_ici_per_chip_is_both_ways_over_all_nominal_links(name, links, per_chip):
    rule = load_chip(name).scale_up
    assert rule.links_per_chip == links
    assert quantity_si(rule.published_per_chip) == 2 * links * quantity_si(rule.bandwidth) == per_chip * 1e9


@pytest.mark.parametrize("name", ["mi300x", "mi325x", "mi355x", "gaudi2", "gaudi3"])
def test_full_mesh_aggregate_is_seven_links_both_ways(name):
    rule = load_chip(name).scale_up
    assert quantity_si(rule.published_per_chip) == pytest.approx(14 * quantity_si(rule.bandwidth), rel=1e-3)


def test_nvlink_generations_are_ports_times_rate():
    assert [quantity_si(load_chip(n).scale_up.bandwidth) for n in ("a100-80-sxm", "h100-sxm", "b200")] == [
        12 * 25e9,
        18 * 25e9,
        18 * 50e9,
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_number_says_where_it_comes_from(name):
    chip = load_chip(name)
    known = sources()
    paths = chip.quantities()
    assert {f"compute.{d}" for d in chip.compute} <= set(paths)
    assert {"memory.hbm_capacity", "memory.hbm_bandwidth", "efficiency.matmul", "efficiency.row_overhead"} <= set(paths)
    for path, quantity in paths.items():
        assert quantity.source in known, path
        if quantity.kind == "assumed":
            assert quantity.note, f"{path}: an assumption states its basis"
        else:
            assert quantity.locator, path
        if quantity.kind == "recalled":
            assert quantity.source == "hardware-reference", path
        if quantity.kind in {"datasheet", "measured"}:
            assert quantity.source != "project-assumption", path
    for price in chip.prices:
        assert price.source in known
        assert 0.05 < price.usd_per_hour < 50


def test_no_source_goes_uncited():
    cited = {q.source for n in ALL for q in load_chip(n).quantities().values()}
    cited |= {p.source for n in ALL for p in load_chip(n).prices}
    cited |= {load_chip(n).scale_up.source for n in ALL if load_chip(n).scale_up}
    cited |= {
        q.source for table in (operator_table, ownership_defaults, region_table) for _, q in quantities_in("", table())
    }
    cited |= {q.source for n in engine_names() for q in load_engine(n).quantities().values()}
    mentioned = " ".join(q.note for n in ALL for q in load_chip(n).quantities().values())
    assert {key for key in sources() if key not in cited and key not in mentioned} == set()


def test_conflicting_hbm_bandwidth_of_v5e_is_written_down():
    quantity = load_chip("tpu-v5e").memory.hbm_bandwidth
    assert (quantity.low, quantity.high) == (810, 820)
    assert "800 GiB/s" in quantity.note


@pytest.mark.parametrize("name", ALL)
def test_efficiencies_lie_in_their_ranges_and_below_the_ideal(name):
    efficiency = load_chip(name).efficiency
    assert IDEAL.curves is None
    for field, value in efficiency.constants.items():
        if field.endswith("_s"):
            assert 0 <= value <= 2e-3, field
            assert IDEAL.constants[field] == 0
        else:
            assert 0.1 < value <= 1, field
            assert IDEAL.constants[field] == 1


def test_missing_type_names_those_the_chip_has():
    chip = load_chip("v100-16-sxm")
    assert not chip.has_dtype("bf16")
    with pytest.raises(InputError, match=r"v100-16-sxm does not compute in 'bf16'; it has fp16, int8"):
        chip.peak_flops_per_s("bf16")


def test_unpublished_rate_is_refused_by_name():
    chip = load_chip("tpu-7x")
    assert chip.has_dtype("int8")
    with pytest.raises(UnpriceableError, match=r"tpu-7x: compute.int8 is not published"):
        chip.peak_flops_per_s("int8")


def test_missing_price_and_power_are_refused_by_name():
    chip = load_chip("h20")
    with pytest.raises(UnpriceableError, match="h20 has no price"):
        _ = chip.default_price
    without = chip.model_copy(update={"power": type(chip.power)()})
    with pytest.raises(UnpriceableError, match=r"h20: power.tdp is not in the chip's file"):
        _ = without.tdp_w


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("h100", "'h100-nvl' or 'h100-pcie' or 'h100-sxm'"), ("tpu-v5", "'tpu-v5e'"), ("mi300", "'mi300x'"), ("sources", "known: a100")],
)  # fmt: skip
def test_unknown_chip_suggests_near_names(asked, hint):
    with pytest.raises(InputError, match=f"unknown chip '{asked}'.*{hint}"):
        load_chip(asked)


@pytest.fixture
def own_chip(tmp_path: Path):
    """Write a copy of the H100's file, edited, and load it."""

    def load(*edits: tuple[str, str], name: str = "mine") -> ChipSpec:
        text = (data_folder("hardware_specs") / "h100-sxm.toml").read_text(encoding="utf-8")
        for pattern, replacement in (('name = "h100-sxm"', 'name = "mine"'), *edits):
            text, n = re.subn(pattern, replacement, text, count=1)
            assert n == 1, pattern
        file = tmp_path / f"{name}.toml"
        file.write_text(text, encoding="utf-8")
        return load_chip(str(file))

    return load


def test_own_file_loads(own_chip):
    chip = own_chip((r"value = 3350, unit", "value = 4000, unit"))
    assert chip.name == "mine"
    assert chip.hbm_bandwidth_bytes_per_s == 4e12


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ((r'value = 3350, unit = "GB/s"', 'value = 3350, unit = "GB"'), "hbm_bandwidth.*measures bytes, expected bytes/s"),
        ((r'value = 3350, unit = "GB/s"', 'value = 3350, unit = "Gb"'), "hbm_bandwidth.*unknown unit 'Gb'"),
        ((r'value = 3350, unit = "GB/s"', 'value = 3350, unit = "MB/s"'), "no plausible memory bandwidth"),
        ((r"fp8 = \{ value = 1978", "fp8 = { value = 197"), r"compute.fp8 is slower than compute.bf16"),
        ((r"value = 81559", "value = 8"), "no plausible capacity"),
        ((r"low = 5, high = 10", "low = 6, high = 10"), "value 5 lies outside low 6"),
        ((r'source = "inference-sim"|source = "aiconfigurator"', 'source = "aiconfigurater"'), "'aiconfigurater' is not in the bibliography; did you mean 'aiconfigurator'"),
        ((r"\nbf16 =", "\nbf61 ="), "bf61.*'bf16'"),
        ((r"\nhbm_bandwidth", "\nhbm_bandwith"), "hbm_bandwith.*did you mean 'hbm_bandwidth'"),
        ((r'family = "nvidia"', 'family = "nvida"'), "did you mean 'nvidia'"),
        ((r'topology = "switched"', 'topology = "ring"'), "scale_up.*'switched'"),
        ((r"schema_version = 1", "schema_version = 2"), "schema_version"),
        ((r'date = "2026-05"', 'date = "May 2026"'), "prices.0.date"),
        ((r"collective_latency = \{ value = 3.0", "matmul = { value = 1.3"), "efficiency"),
        ((r'name = "mine"', 'name = "other"'), "must be the file's own name"),
        ((r'launched = "2022"', 'launched = "2022'), "not valid TOML"),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_with_file_and_field(own_chip, edit, message):
    with pytest.raises(InputError, match=f"(?s)mine.toml.*{message}"):
        own_chip(edit)


def test_missing_file_is_refused():
    with pytest.raises(InputError, match=r"chip file '/nowhere/x.toml' does not exist"):
        load_chip("/nowhere/x.toml")


def test_own_efficiency_overrides_the_family_and_says_so(own_chip):
    family = load_chip("h20").efficiency
    chip = own_chip((r"\[efficiency\]\n", '[efficiency]\nmatmul = { value = 0.5, unit = "fraction", kind = "measured", source = "project-assumption", locator = "x", retrieved = 2026-01-01 }\n'))  # fmt: skip
    assert chip.efficiency == replace(family, matmul=0.5)
    kernels = "; kernels as measured on h100-sxm, of its family"
    assert chip.efficiency_source == f"defaults of family 'nvidia'; the chip's own: matmul, collective_latency{kernels}"
    assert load_chip("h20").efficiency_source == f"defaults of family 'nvidia'{kernels}"
    assert "kernels" not in load_chip("t4").efficiency_source


def test_own_file_may_bring_its_own_bibliography(own_chip):
    chip = own_chip(
        (r"\[compute\]", '[sources]\nlab = "My laboratory"\n\n[compute]'),
        (r'source = "aiconfigurator"', 'source = "lab"'),
    )
    assert chip.quantities()["compute.bf16"].source == "lab"


def _rows(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a100-80-sxm", "a100_sxm"), ("h100-sxm", "h100_sxm"), ("b200", "b200_sxm"), ("l40s", "l40s"), ("rtx-pro-6000", "rtx_pro_6000_server")],
)  # fmt: skip
def test_link_latency_is_the_measured_slope_of_small_all_reduces(shared, name, folder):
    """A ring all-reduce of n chips takes 2(n - 1) steps: 2 on two chips, 14 on eight."""
    rows = [
        r
        for r in _rows(shared / "data/kernels" / folder / "comm.csv.gz")
        if r["collective"] == "all_reduce" and "nccl" in r["impl"]
    ]
    smallest = {n: min(float(r["latency_us"]) for r in rows if r["num_gpus"] == n) for n in ("2", "8")}
    slope_s = 1e-6 * (smallest["8"] - smallest["2"]) / 12
    assert quantity_si(load_chip(name).scale_up.latency) == pytest.approx(slope_s, rel=0.01)


@pytest.mark.parametrize(
    ("name", "file"),
    [("h100-sxm", "h100_sxm/gemm_trtllm"), ("b200", "b200_sxm/gemm_trtllm"), ("l40s", "l40s/gemm_trtllm")],
)
def test_matmul_efficiency_lies_in_the_middle_half_of_the_measured_large_products(shared, name, file):
    chip = load_chip(name)
    reached = sorted(
        2 * m * n * k / (1e-6 * float(r["latency_us"])) / chip.peak_flops_per_s("bf16")
        for r in _rows(shared / "data/kernels" / f"{file}.csv.gz")
        if r["dtype"] == "bfloat16"
        and (m := int(r["m"])) >= 2048
        and (n := int(r["n"])) >= 4096
        and (k := int(r["k"])) >= 4096
    )
    assert len(reached) > 500
    assert reached[len(reached) // 4] <= chip.efficiency.matmul <= reached[3 * len(reached) // 4]


def test_examples_in_the_docstrings():
    assert doctest.testmod(chips_module).failed == 0
