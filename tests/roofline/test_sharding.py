"""Shardings: what may be written, what is legal, and which links each degree of parallelism gets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.collectives import all_gather_s
from simulator.roofline.sharding import Sharding, check_sharding, link_domains, parse_sharding, subdomains

SLICES = (
    "tpu-v5e:16x16",
    "tpu-v5e:8x16",
    "tpu-v5p:4x4x4",
    "tpu-v4:4x4x8",
    "h100-sxm:4x8",
    "mi300x:8",
    "gb200:72",
    "l4:4",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp8", Sharding(tp=8)),
        ("tp8pp2", Sharding(tp=8, pp=2)),
        ("pp2tp8", Sharding(tp=8, pp=2)),
        ("dp8ep8", Sharding(dp=8, ep=8)),
        ("tp4cp2", Sharding(tp=4, cp=2)),
        ("tp1", Sharding()),
    ],
)
def test_reads_what_it_writes(text, expected):
    assert parse_sharding(text) == expected
    assert parse_sharding(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write degrees like"),
        ("8", "write degrees like"),
        ("tp", "write degrees like"),
        ("tp8,pp2", "write degrees like"),
        ("tp-8", "write degrees like"),
        ("sp8", "sp is not one of tp, cp, pp, dp, ep"),
        ("tp8tp2", "tp is given twice"),
        ("tp0", "must be at least 1"),
    ],
)
def test_refuses_other_texts(text, message):
    with pytest.raises(InputError, match=message):
        parse_sharding(text)


@pytest.mark.parametrize(
    ("model", "spec", "text", "message"),
    [
        ("llama-3-70b", "h100-sxm:8", "tp4", "every chip must be used"),
        ("llama-3-8b", "h100-sxm:8x8", "pp64", "64 stages for 32 layers"),
        ("llama-3-70b", "h100-sxm:8", "cp2pp4", "inside a pipeline"),
        ("llama-3-70b", "h100-sxm:8", "dp8ep8", "this model has none"),
        ("deepseek-v3", "h100-sxm:8", "dp8ep4", "ep must be tp x dp = 8, not 4"),
        ("deepseek-v3", "gb200:72", "dp72ep72", "does not divide the 256 experts"),
        ("llama-3-8b", "h100-sxm:2x8", "tp16", None),
        ("deepseek-v3", "h100-sxm:8", "dp8ep8", None),
    ],
)
def test_names_the_rule_that_is_broken(model, spec, text, message):
    arguments = load_model(model), resolve_slice(spec), parse_sharding(text)
    if message is None:
        check_sharding(*arguments)
    else:
        with pytest.raises(InputError, match=message):
            check_sharding(*arguments)


def test_a_group_may_not_straddle_nodes_unevenly():
    with pytest.raises(InputError, match="tp = 6 on h100-sxm:3x8: 8 chips"):
        link_domains(resolve_slice("h100-sxm:3x8"), Sharding(tp=6, pp=4))


def test_tensor_parallelism_inside_the_node_pipeline_between():
    links = link_domains(resolve_slice("h100-sxm:2x8"), parse_sharding("tp8pp2"))
    assert [(d.network, d.size) for d in links.tp] == [("NVLink", 8)]
    assert [d.size for d in links.pp] == [2]
    assert links.pp[0].bandwidth_bytes_per_s == resolve_slice("h100-sxm:2x8").domains[1].bandwidth_bytes_per_s


def test_a_wide_group_takes_the_node_and_then_the_network():
    links = link_domains(resolve_slice("h100-sxm:4x8"), parse_sharding("tp16dp2"))
    assert [d.size for d in links.tp] == [8, 2]
    assert [d.size for d in links.dp] == [2]


def test_ranks_that_share_experts_are_nearer_than_stages():
    links = link_domains(resolve_slice("h100-sxm:4x8"), parse_sharding("dp8ep8pp4"))
    assert [d.network for d in links.dp] == ["NVLink"]


def test_part_of_a_ring_is_a_line_and_a_whole_one_a_ring():
    pod = resolve_slice("tpu-v5e:16x16")
    block, blocks = subdomains(pod, [64, 4])
    assert (block[0].dims, block[0].wraps) == ((4, 16), (False, True))
    assert (blocks[0].dims, blocks[0].wraps) == ((4, 1), (True, False))  # four blocks round the wrapped axis
    assert blocks[0].bandwidth_bytes_per_s == pod.domains[0].bandwidth_bytes_per_s / 4


def test_interleaved_groups_share_a_link():
    # On an axis of 16, groups of 2 neighbours: their peers are two hops off, and two chains share each link.
    slice_ = resolve_slice("tpu-v5p:4x4x4")
    pair, rest = subdomains(slice_, [2, 32])
    link = slice_.domains[0]
    assert sorted(pair[0].dims) == [1, 1, 2]
    assert rest[0].bandwidth_bytes_per_s == link.bandwidth_bytes_per_s / 2
    assert rest[0].latency_s == 2 * link.latency_s


@st.composite
def groups(draw):
    slice_ = resolve_slice(draw(st.sampled_from(SLICES)))
    first = draw(st.sampled_from([k for k in range(1, slice_.n_chips + 1) if slice_.n_chips % k == 0]))
    left = slice_.n_chips // first
    second = draw(st.sampled_from([k for k in range(1, left + 1) if left % k == 0]))
    return slice_, [first, second, left // second]


@given(groups())
def test_groups_have_their_size_and_never_more_bandwidth_than_the_slice(case):
    slice_, sizes = case
    try:
        found = subdomains(slice_, sizes)
    except InputError:  # uneven over nodes: only where the sizes are not powers of two
        assert slice_.spec == "gb200:72" or any(s & (s - 1) for s in sizes)
        return
    best = max(d.bandwidth_bytes_per_s for d in slice_.domains)
    for size, domains in zip(sizes, found, strict=True):
        assert math.prod(d.size for d in domains) == size
        assert all(d.bandwidth_bytes_per_s <= best for d in domains)


@pytest.mark.parametrize("spec", SLICES)
def test_the_whole_slice_as_one_group_is_the_slice(spec):
    slice_ = resolve_slice(spec)
    (whole,) = subdomains(slice_, [slice_.n_chips])
    assert all_gather_s(1e9, whole) == pytest.approx(all_gather_s(1e9, slice_.domains))


def test_sizes_must_make_the_slice():
    with pytest.raises(InputError, match="4 x 4 do not make the 8 chips"):
        subdomains(resolve_slice("h100-sxm:8"), [4, 4])
