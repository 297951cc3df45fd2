"""Collective times against published worked problems (jax-ml/scaling-book) and their limits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.errors import InputError
from simulator.roofline.collectives import (
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    point_to_point_s,
    reduce_scatter_s,
    scale_out_domain,
    send_s,
)

MATRIX = 2.0 * 2048 * 8192  # bf16[2048, 8192]
V4 = 2.0 * 1024 * 4096  # bf16[1024, 4096]
NAPKIN = 2.0 * 8192 * 8192  # the residual stream of 8192 tokens


def torus(dims, wrapped, link=4.5e10, hop=1e-6):
    return LinkDomain("torus", dims, (wrapped,) * len(dims), link, hop)


def ring(dims):
    return torus(dims, wrapped=True)


def grid(dims, link=4.5e10):
    return torus(dims, wrapped=False, link=link)


def nvlink(n, bandwidth=450e9):
    return LinkDomain("switched", (n,), (False,), bandwidth, 0.0)


@pytest.mark.parametrize(
    ("source", "collective", "size", "domains", "microseconds", "digits"),
    [
        ("sharding pop quiz 2, if wrapped", all_gather_s, MATRIX, [ring((4,))], 372.8, 0.05),
        ("sharding pop quiz 2, v5e axis of 4", all_gather_s, MATRIX, [grid((4,))], 559.2, 0.05),
        ("sharding pop quiz 2, bf16[256, 256]", all_gather_s, 2.0 * 256 * 256, [grid((4,))], 3, 1e-9),
        ("sharding 2a, other axis sharded 4 ways", all_gather_s, V4 / 4, [ring((4,))], 23.30, 0.005),
        ("sharding 2b, two axes", all_gather_s, V4, [ring((4, 4))], 46.60, 0.005),
        ("sharding 2c, operand sharded 16 ways", all_reduce_s, V4 / 16, [ring((4,))], 11.65, 0.005),
        ("sharding 2c, as the book took it", all_reduce_s, V4, [ring((4,))], 186.4, 0.05),
        ("sharding 3, 128 values", all_gather_s, 2.0 * 128, [ring((4,))], 2, 1e-9),
        (
            "tpus 5, corner to corner with 6 us of hops",
            point_to_point_s,
            2.0 * 8 * 128 * 8192,
            [grid((4, 4))],
            192.4,
            0.05,
        ),
        ("napkin prefill, unwrapped 4x4", all_gather_s, NAPKIN, [grid((4, 4))], 1398, 0.5),
        ("napkin prefill, 160 pairs in all", all_reduce_s, 160 * NAPKIN, [grid((4, 4))], 447392, 0.5),
        (
            "napkin prefill, nominal 50 GB/s links",
            all_reduce_s,
            160 * NAPKIN,
            [grid((4, 4), 5e10)],
            402653,
            0.5,
        ),
        ("napkin prefill, if both axes wrapped", all_reduce_s, 160 * NAPKIN, [ring((4, 4))], 238609, 0.5),
        ("napkin decode, 16 KiB on 2x4", all_reduce_s, 16384.0, [grid((2, 4))], 8, 1e-9),
        ("gpus 2.3, bf16[4096, 65536] on 8 H100", all_gather_s, 2.0 * 4096 * 65536, [nvlink(8)], 1043.9, 0.05),
        ("gpus pop quiz 1, with 7/8", all_gather_s, 2.0 * 1024 * 16384, [nvlink(8)], 65.24, 0.005),
        ("gpus pop quiz 1, without", all_gather_s, 2.0 * 1024 * 16384 * 8 / 7, [nvlink(8)], 74.57, 0.01),
    ],
)
def test_published(source, collective, size, domains, microseconds, digits):
    domain = domains[0] if collective is point_to_point_s else domains
    assert 1e6 * collective(size, domain) == pytest.approx(microseconds, abs=digits), source


def test_gpus_all_to_all_in_a_node():
    # B(N − 1)/(W N²)
    assert all_to_all_s(8e9, nvlink(8)) == pytest.approx(8e9 * 7 / (450e9 * 64))


@pytest.mark.parametrize("nodes", [2, 4, 32])
def test_gpus_all_to_all_across_nodes(nodes):
    # B(M − 1)/(M² W_node) between nodes of eight with 400 GB/s each; inside, everything is passed on once.
    node, between = nvlink(8), nvlink(nodes, 50e9)
    outer = all_to_all_s(8e9, [node, between]) - 8e9 / nodes * 7 / (450e9 * 64)
    assert outer == pytest.approx(8e9 * (nodes - 1) / (nodes**2 * 400e9))


@pytest.mark.parametrize(
    ("level", "groups", "chips_inside", "gb_per_s"),
    [("node", 8, 1, 514), ("leaf of 32 nodes", 32, 8, 413), ("spine of 4 leaves", 4, 256, 17100)],
)
def test_gpus_all_gather_bandwidth_of_each_level(level, groups, chips_inside, gb_per_s):
    # Size over time: a leaf's node has 8 x 50 GB/s, a spine's leaf 256 x 50 GB/s.
    levels = [nvlink(chips_inside, math.inf), nvlink(groups, 450e9 if chips_inside == 1 else 50e9)]
    assert 1e12 / all_gather_s(1e12, levels) / 1e9 == pytest.approx(gb_per_s, rel=0.003), level


def test_gpus_4_5_two_nodes_gather_bound_by_the_node():
    # Fabric B/800e9, node B/514e9; here one after the other.
    fabric = all_gather_s(1e9, [nvlink(8, math.inf), nvlink(2, 50e9)])
    node = all_gather_s(1e9, [nvlink(8)])
    assert (1e9 / fabric, 1e9 / node) == (pytest.approx(800e9), pytest.approx(514.3e9, rel=1e-3))
    assert all_gather_s(1e9, [nvlink(8), nvlink(2, 50e9)]) == pytest.approx(fabric + node)


def test_tpu_latency_threshold():
    # 1 us per hop x 45 GB/s: 45 kB per transfer; on an 8-ring, shards of that size make arrays of 360 kB.
    assert all_gather_s(360e3, [ring((8,))]) == pytest.approx(4e-6)
    assert all_gather_s(359e3, [ring((8,))]) == pytest.approx(4e-6)
    assert all_gather_s(400e3, [ring((8,))]) > 4e-6


def test_nvl72_gathers_in_one_domain_where_nodes_of_eight_need_the_network():
    rack = resolve_slice("gb200:72")
    nodes = resolve_slice("b200:9x8")
    assert len(rack.domains) == 1
    assert len(nodes.domains) == 2
    size = 1e9
    expected = size * 71 / 72 / rack.domains[0].bandwidth_bytes_per_s + rack.domains[0].latency_s
    assert all_reduce_s(size, rack.domains) == pytest.approx(2 * expected)
    assert all_reduce_s(size, rack.domains) < all_reduce_s(size, nodes.domains)


def test_tpu_slices_are_joined_by_the_data_centre_network():
    pod = resolve_slice("tpu-v5e:16x16")
    dcn = scale_out_domain(pod, 4)
    # Every chip has 1/256 of the array to exchange at 3.125 GB/s.
    outer = all_gather_s(256e6, [*pod.domains, dcn]) - all_gather_s(256e6, pod.domains)
    assert outer == pytest.approx(1e6 * 3 / 4 / 3.125e9 + dcn.latency_s)


def test_a_chip_without_network_cards_is_not_joined():
    with pytest.raises(InputError, match="no scale-out network"):
        scale_out_domain(resolve_slice("m4-max:1"), 2)


def test_pcie_box_sends_everything_through_the_host_link():
    box = resolve_slice("l4:4").domains
    assert box[0].kind == "pcie"
    W = box[0].bandwidth_bytes_per_s
    assert all_gather_s(1e9, box) == pytest.approx(1e9 * 3 / 4 / W + box[0].latency_s)


def test_send_to_the_next_group_uses_one_link_and_one_hop():
    assert send_s(4.5e6, ring((4, 4))) == pytest.approx(1e-4 + 1e-6)
    assert send_s(4.5e6, nvlink(1)) == 0


def test_all_to_all_on_a_ring_is_a_quarter_of_an_all_gather():
    assert all_to_all_s(1e9, ring((8,))) == pytest.approx(all_gather_s(1e9, [ring((8,))]) / 4)


def test_losing_the_wraparound_about_doubles_a_collective():
    for dims in ((8,), (16, 16), (8, 8, 8)):
        ratio = all_gather_s(1e9, [grid(dims)]) / all_gather_s(1e9, [ring(dims)])
        assert 1.7 < ratio <= 2


def test_8x16_v5e_wraps_only_its_long_axis():
    domain = resolve_slice("tpu-v5e:8x16").domains[0]
    W = domain.bandwidth_bytes_per_s
    assert all_gather_s(1e9, [domain]) == pytest.approx(1e9 * 127 / 128 / (3 * W))


def test_full_mesh_moves_one_shard_per_link():
    mesh = LinkDomain("full_mesh", (8,), (False,), 64e9, 0.0)
    assert all_gather_s(8e9, [mesh]) == pytest.approx(1e9 / 64e9)


def test_two_levels_exchange_shards_between_nodes():
    nodes = resolve_slice("h100-sxm:2x8")
    inner, outer = nodes.domains
    size = 1e9
    expected = (
        size * 7 / 8 / inner.bandwidth_bytes_per_s
        + inner.latency_s
        + (size / 8) / 2 / outer.bandwidth_bytes_per_s
        + outer.latency_s
    )
    assert all_gather_s(size, nodes.domains) == pytest.approx(expected)
    assert all_reduce_s(size, nodes.domains) == pytest.approx(2 * expected)


DOMAINS = st.one_of(
    st.tuples(st.lists(st.integers(1, 16), min_size=1, max_size=3), st.booleans()).map(
        lambda a: torus(tuple(a[0]), a[1])
    ),
    st.builds(
        lambda kind, n: LinkDomain(kind, (n,), (False,), 1e11, 2e-6),
        st.sampled_from(["switched", "full_mesh", "pcie"]),
        st.integers(1, 64),
    ),
)
COLLECTIVES = (all_gather_s, reduce_scatter_s, all_reduce_s)
EVERY = (*COLLECTIVES, all_to_all_s)


def links_of(domain):
    if domain.kind == "torus":
        return sum(2 if w and n > 2 else 1 for n, w in zip(domain.dims, domain.wraps, strict=True) if n > 1)
    return domain.size - 1 if domain.kind == "full_mesh" else 1


@given(DOMAINS, st.floats(1, 1e12), st.sampled_from(COLLECTIVES))
def test_never_below_what_one_chip_must_take_in(domain, size, collective):
    n = domain.size
    passes = 2 if collective is all_reduce_s else 1
    bound = passes * size * (n - 1) / n / (max(1, links_of(domain)) * domain.bandwidth_bytes_per_s)
    assert collective(size, [domain]) >= bound * (1 - 1e-12)


@given(DOMAINS, st.floats(1, 1e12), st.sampled_from(EVERY), st.floats(0.01, 1), st.floats(0, 1e-3))
def test_efficiency_and_latency_never_speed_up(domain, size, collective, link, latency):
    assert collective(size, [domain], link=link, latency_s=latency) >= collective(size, [domain])


@given(DOMAINS, st.floats(1, 1e12))
def test_all_to_all_is_never_below_what_one_chip_must_send(domain, size):
    n = domain.size
    bound = size * (n - 1) / n**2 / (max(1, links_of(domain)) * domain.bandwidth_bytes_per_s)
    assert all_to_all_s(size, domain) >= bound * (1 - 1e-12)


@given(DOMAINS, DOMAINS, st.floats(1, 1e12))
def test_reduce_scatter_and_gather_make_an_all_reduce(inner, outer, size):
    levels = [inner, outer]
    parts = reduce_scatter_s(size, levels) + all_gather_s(size, levels)
    assert all_reduce_s(size, levels) == pytest.approx(parts)


@given(DOMAINS, DOMAINS, st.floats(1, 1e12), st.sampled_from(EVERY))
def test_a_second_level_never_speeds_a_gather_up(inner, outer, size, collective):
    if collective is not all_to_all_s:  # an exchange among more chips has less to send per chip
        assert collective(size, [inner, outer]) >= collective(size, [inner])
    assert collective(size, [inner, outer]) >= 0


@given(DOMAINS, st.floats(1, 1e12), st.sampled_from(EVERY))
def test_doubling_the_links_never_slows(domain, size, collective):
    faster = LinkDomain(domain.kind, domain.dims, domain.wraps, 2 * domain.bandwidth_bytes_per_s, domain.latency_s)
    assert collective(size, [faster]) <= collective(size, [domain])


@given(DOMAINS, st.sampled_from(COLLECTIVES))
def test_nothing_costs_nothing_and_arrays_equal_scalars(domain, collective):
    sizes = np.array([0.0, 1.0, 1e6, 1e9])
    times = collective(sizes, [domain], latency_s=1e-6)
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert times.tolist() == [collective(float(s), [domain], latency_s=1e-6) for s in sizes]


@pytest.mark.parametrize("kind", ["torus", "switched", "full_mesh", "pcie"])
def test_one_chip_needs_no_collective(kind):
    alone = LinkDomain(kind, (1,), (False,), math.inf if kind == "switched" else 1e9, 1e-6)
    for collective in COLLECTIVES:
        assert collective(1e9, [alone], latency_s=1.0) == 0
    assert all_to_all_s(1e9, alone) == point_to_point_s(1e9, alone) == 0


@pytest.mark.parametrize("link", [0.0, -1.0, 1.01, math.nan])
def test_link_fraction_is_checked(link):
    with pytest.raises(InputError, match=r"efficiency\.link"):
        all_reduce_s(1e6, [nvlink(8)], link=link)
