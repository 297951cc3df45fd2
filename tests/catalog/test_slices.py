"""Slice strings, the wraparound rule, and the published bandwidths of whole pods."""

import doctest
import math
import re
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog import slices as slices_module
from simulator.catalog.chips import chip_names, load_chip, quantity_si
from simulator.catalog.files import data_folder
from simulator.catalog.slices import LinkDomain, legal_slices, resolve_slice
from simulator.errors import InputError

# Reference section 1.1 and 1.2: shape -> whether each axis closes into a ring.
WRAPS = {
    "tpu-v5e:1x1": (False, False),
    "tpu-v5e:2x4": (False, False),
    "tpu-v5e:4x4": (False, False),
    "tpu-v5e:4x8": (False, False),
    "tpu-v5e:8x8": (False, False),
    "tpu-v5e:8x16": (False, True),
    "tpu-v5e:16x16": (True, True),
    "tpu-v6e:8x16": (False, True),
    "tpu-v6e:16x16": (True, True),
    "tpu-v4:2x2x1": (False, False, False),
    "tpu-v4:2x2x4": (False, False, False),
    "tpu-v4:2x4x4": (False, False, False),
    "tpu-v4:4x4x4": (True, True, True),
    "tpu-v4:4x4x12": (True, True, True),
    "tpu-v4:16x16x16": (True, True, True),
    "tpu-v5p:2x4x4": (False, False, False),
    "tpu-v5p:4x4x8": (True, True, True),
    "tpu-v5p:16x16x24": (True, True, True),
    "tpu-7x:2x2x4": (False, False, False),
    "tpu-7x:4x8x8": (True, True, True),
    "trainium2:4x4": (True, True),
    "trainium2:2x4": (False, True),
    "inferentia2:12": (True,),
    "inferentia2:6": (False,),
}


@pytest.mark.parametrize("spec", WRAPS)
def test_wraparound_rule(spec):
    resolved = resolve_slice(spec)
    (domain,) = resolved.domains
    assert (resolved.spec, domain.kind, domain.wraps) == (spec, "torus", WRAPS[spec])


@pytest.mark.parametrize(("spec", "terabytes"), [("tpu-v5e:16x16", 1.6), ("tpu-v6e:16x16", 3.2)])
def test_published_bisection_of_a_pod(spec, terabytes):
    """Reference section 1.2: 16 rows x 2 x the nominal one-way link."""
    (domain,) = resolve_slice(spec, nominal_links=True).domains
    assert domain.bisection_bytes_per_s == terabytes * 1e12


@pytest.mark.parametrize(
    ("spec", "nominal", "published"),
    [("tpu-v5e:16x16", True, 51.2e12), ("tpu-v6e:16x16", True, 102.4e12), ("tpu-v4:16x16x16", False, 1.1e15)],
)
def test_published_all_reduce_bandwidth_of_a_pod(spec, nominal, published):
    """Chips x links x one-way link; v4's published figure counts the achievable 45 GB/s. Reference section 1.2."""
    pod = resolve_slice(spec, nominal_links=nominal)
    total = pod.n_chips * pod.chip.scale_up.links_per_chip * pod.domains[0].bandwidth_bytes_per_s
    assert total == pytest.approx(published, rel=0 if nominal else 0.01)


def test_losing_the_wraparound_halves_the_bisection():
    closed = LinkDomain("torus", (4, 4), (True, True), 45e9, 1e-6)
    open_ends = LinkDomain("torus", (4, 4), (False, False), 45e9, 1e-6)
    assert closed.bisection_bytes_per_s == 2 * open_ends.bisection_bytes_per_s


@pytest.mark.parametrize(
    ("kind", "size", "links"),
    [("switched", 8, 4), ("pcie", 8, 4), ("full_mesh", 8, 16), ("full_mesh", 2, 1), ("switched", 1, 0)],
)
def test_bisection_of_one_domain(kind, size, links):
    assert LinkDomain(kind, (size,), (False,), 10.0, 0).bisection_bytes_per_s == links * 10


def test_torus_slices_use_achievable_links():
    assert resolve_slice("tpu-v5e:4x4").domains[0].bandwidth_bytes_per_s == 45e9
    assert resolve_slice("tpu-v5e:4x4", nominal_links=True).domains[0].bandwidth_bytes_per_s == 50e9
    assert resolve_slice("tpu-v5e:4x4").domains[0].latency_s == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("spec", "levels", "nodes"),
    [
        ("h100-sxm:8", [("switched", 8, 450e9)], 1),
        ("h100-sxm:1", [("switched", 1, 450e9)], 1),
        ("h100-sxm:2x8", [("switched", 8, 450e9), ("switched", 2, 50e9)], 2),
        ("h100-sxm:4x2", [("switched", 2, 450e9), ("switched", 4, 50e9)], 4),
        ("gb200:72", [("switched", 72, 900e9)], 1),
        ("gb200:2x72", [("switched", 72, 900e9), ("switched", 2, 50e9)], 2),
        ("mi300x:8", [("full_mesh", 8, 64e9)], 1),
        ("gaudi2:8", [("full_mesh", 8, 37.5e9)], 1),
        ("l40s:4", [("pcie", 4, 32e9)], 1),
        ("rtx-pro-6000:8", [("pcie", 8, 64e9)], 1),
        ("l4:2x8", [("pcie", 8, 32e9), ("switched", 2, 25e9)], 2),
        ("h100-nvl:2", [("full_mesh", 2, 300e9)], 1),
        ("h100-nvl:1", [("pcie", 1, 64e9)], 1),
        ("h100-nvl:8", [("full_mesh", 2, 300e9), ("pcie", 4, 64e9)], 1),
        ("a100-80-pcie:2", [("pcie", 2, 32e9)], 1),
        ("m4-max:1", [("switched", 1, math.inf)], 1),
    ],
)
def test_levels_of_a_domain_slice(spec, levels, nodes):
    resolved = resolve_slice(spec)
    assert [(d.kind, d.size, d.bandwidth_bytes_per_s) for d in resolved.domains] == levels
    assert (resolved.spec, resolved.n_nodes) == (spec, nodes)


def test_bisection_counts_every_chip_behind_an_outer_level():
    assert resolve_slice("h100-sxm:2x8").bisections_bytes_per_s == (4 * 450e9, 8 * 50e9)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("tpu-v5e:4x2", "tpu-v5e:2x4"),
        ("tpu-v5e:16x8", "tpu-v5e:8x16"),
        ("tpu-v4:1x2x2", "tpu-v4:2x2x1"),
        ("tpu-v4:8x4x4", "tpu-v4:4x4x8"),
        ("tpu-v5e:1", "tpu-v5e:1x1"),
        ("tpu-v4:1", "tpu-v4:1x1x1"),
        ("h100-sxm:1x8", "h100-sxm:8"),
        ("h100-sxm:08", "h100-sxm:8"),
    ],
)
def test_other_spellings_of_a_slice(spec, canonical):
    assert resolve_slice(spec) == resolve_slice(canonical)
    assert resolve_slice(spec).spec == canonical


@pytest.mark.parametrize(
    ("spec", "rule", "nearest"),
    [
        ("tpu-v5e:3x3", "2D shapes: 1x1, 2x2, 2x4", "tpu-v5e:2x4 (8 chips), tpu-v5e:4x4 (16 chips)"),
        ("tpu-v5e:16", "2D shapes", "tpu-v5e:4x4 (16 chips)"),
        ("tpu-v5e:2x2x2", "2D shapes", "tpu-v5e:2x4 (8 chips)"),
        ("tpu-v5e:2x8", "2D shapes", "tpu-v5e:4x4 (16 chips)"),
        ("tpu-v5e:32x32", "2D shapes", "tpu-v5e:16x16 (256 chips)"),
        ("tpu-v4:4x4x6", "multiples of 4 up to 16x16x16", "tpu-v4:4x4x4 (64 chips), tpu-v4:4x4x8 (128 chips)"),
        ("tpu-v5p:4x4", "3D shapes", "tpu-v5p:2x2x2 (8 chips), tpu-v5p:2x4x4 (32 chips)"),
        ("h100-sxm:3", "1, 2, 4, 8 chips", "h100-sxm:2 (2 chips), h100-sxm:4 (4 chips)"),
        ("h100-sxm:16", "1, 2, 4, 8 chips", "h100-sxm:2x8 (16 chips)"),
        ("h100-sxm:2x16", "1, 2, 4, 8 chips", "h100-sxm:4x8 (32 chips)"),
        ("h100-sxm:3x5", "1, 2, 4, 8 chips", "h100-sxm:3x4 (12 chips), h100-sxm:2x8 (16 chips)"),
        ("h100-sxm:2x2x2", "written N or NODESxN", "h100-sxm:8 (8 chips)"),
        ("gb200:71", "32, 36, 64, 72 chips", "gb200:64 (64 chips), gb200:72 (72 chips)"),
        ("gb200:100", "72 chips", "gb200:72 (72 chips), gb200:2x72 (144 chips)"),
        ("m4-max:2", "only :1 is modelled", "m4-max:1 (1 chip)"),
        ("t4:16", "1, 2, 4, 8 chips", "t4:8 (8 chips)"),
    ],
)
def test_impossible_slice_gives_rule_and_nearest(spec, rule, nearest):
    with pytest.raises(
        InputError, match=f"slice {spec} does not exist: .*{re.escape(rule)}.*nearest: {re.escape(nearest)}$"
    ):
        resolve_slice(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tpu-v5e", "has no shape; write e.g. tpu-v5e:1x1"),
        ("tpu-v5e:", "whole numbers joined by 'x'"),
        ("tpu-v5e:4*4", "did you mean 'tpu-v5e:4x4'"),
        ("tpu-v5e:4X4", "did you mean 'tpu-v5e:4x4'"),
        ("tpu-v5e:-4x4", "whole numbers"),
        ("tpu-v5e:4x4.5", "whole numbers"),
        ("tpu-v5e:4xx4", "whole numbers"),
        ("tpu-v5e:٤x٤", "whole numbers"),
        ("tpu-v5e:0x4", "at least one chip"),
        ("h100-sxm:0", "at least one chip"),
        ("h100-sxm:" + "9" * 5000, "no such machine"),
        ("t4:2x4", "no scale-out network"),
        ("v5e:4x4", "unknown chip 'v5e'; did you mean 'tpu-v5e'"),
        ("", "unknown chip ''"),
        (":", "unknown chip ''"),
        ("/nowhere/mine.toml:8", "chip file '/nowhere/mine.toml' does not exist"),
    ],
)
def test_malformed_slice_is_refused(spec, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resolve_slice(spec)


@pytest.mark.parametrize("name", chip_names())
def test_one_chip_is_always_a_slice(name):
    resolved = resolve_slice(f"{name}:1")
    assert (resolved.n_chips, resolved.n_nodes, resolved.domains[0].size) == (1, 1, 1)
    assert resolved.bisections_bytes_per_s == (0.0,)


@pytest.mark.parametrize("name", chip_names())
def test_every_legal_slice_resolves_to_itself_in_any_axis_order(name):
    torus = load_chip(name).scale_up is not None and load_chip(name).scale_up.topology == "torus"
    for spec in legal_slices(name):
        resolved = resolve_slice(spec)
        assert resolved.spec == spec
        assert math.prod(d.size for d in resolved.domains) == resolved.n_chips
        if torus:
            dims = spec.partition(":")[2].split("x")
            assert all(resolve_slice(f"{name}:{'x'.join(p)}") == resolved for p in permutations(dims))


def test_number_of_v4_shapes():
    """Every multiset of three multiples of 4 up to 16, and the four published shapes below a cube, and one chip."""
    assert len(legal_slices("tpu-v4")) == math.comb(4 + 2, 3) + 4 + 1


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(chip_names()), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_any_numbers_resolve_consistently_or_are_refused(name, dims):
    spec = f"{name}:{'x'.join(map(str, dims))}"
    refusal = ""
    try:
        resolved = resolve_slice(spec)
    except InputError as error:
        refusal = str(error)
    if refusal:
        suggested = re.findall(rf"{name}:[\dx]+(?= \()", refusal)
        assert suggested or "no scale-out network" in refusal or "no such machine" in refusal
        assert all(resolve_slice(other).spec == other for other in suggested)
    else:
        assert resolved.n_chips == math.prod(dims) == math.prod(d.size for d in resolved.domains)
        assert resolve_slice(resolved.spec) == resolved


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.text(alphabet="tpuv5eh10-sxm:x0123456789./", max_size=20))
def test_any_string_is_a_slice_or_an_input_error(text):
    try:
        resolve_slice(text)
    except InputError:
        pass
    else:
        assert ":" in text


def test_own_chip_file_in_a_slice_string(tmp_path):
    text = (data_folder("hardware_specs") / "h100-sxm.toml").read_text(encoding="utf-8")
    text = text.replace('name = "h100-sxm"', 'name = "mine"').replace(
        "sizes = [1, 2, 4, 8]", "sizes = [1, 2, 4, 8, 16]"
    )
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    resolved = resolve_slice(f"{file}:16")
    assert (resolved.spec, resolved.n_chips, resolved.chip.name) == (f"{file}:16", 16, "mine")


def test_scale_out_per_tpu_host_is_the_published_nic_rate():
    """Eight v5e chips share two 100 Gb/s NICs. Reference section 1.3."""
    chip = load_chip("tpu-v5e")
    assert chip.host.chips * quantity_si(chip.scale_out.bandwidth) == 2 * 100e9 / 8


def test_slice_strings_of_the_guide_exist():
    guide = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"
    strings = re.findall(r"^\| `([a-z0-9-]+:[0-9x]+)` \|", guide.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(strings) == 6
    assert [resolve_slice(s).spec for s in strings] == strings


def test_examples_in_the_docstrings():
    assert doctest.testmod(slices_module).failed == 0
