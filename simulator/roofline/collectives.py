"""Times of collectives on a link domain: a latency and a bandwidth term per algorithm and topology.

Sizes follow one convention: ``size_bytes`` is the *whole* array of the group — the gathered result of an all-gather,
the operand of a reduce-scatter, the reduced array of an all-reduce (as held by each chip), and the sum over chips of
what an all-to-all moves. All functions take numpy arrays of sizes.

*Torus.* Transfers of a ring are pipelined hop by hop, so a collective takes the longer of its bandwidth time and its
latency time, as in [1]_. On axes that all wrap, W one way per link, a chip sends half an array each way round each axis:
V/(2·W·axes) and n/2 hops per axis. The ideal (n − 1)/n is left out, as there: with whole shards the furthest one
travels n/2 hops in either direction. Without a wrap the chip in the corner is the limit: it has one link per unwrapped
axis (two per wrapped one) to take in (n − 1)/n of the array, over n − 1 hops per axis.

*Switched and PCIe.* Every chip takes in (n − 1)/n of the array at its own bandwidth [2]_, plus one message latency.
*Full mesh.* Each pair has its own link, and moves one shard over it.

An all-reduce is a reduce-scatter and an all-gather. In-network reduction (SHARP) is not modelled.

*Several levels* (nodes of NVLink domains, slices on a data-centre network). Domains are listed inner first. An array is
reduce-scattered inside, all-reduced between the groups by shards, and gathered inside, so all network cards of a node
work at once; an all-to-all first passes everything to the chip whose rank is the target's, inside, then between the
groups. The levels' times add.

``link`` is the achieved fraction of link bandwidth, in (0, 1]; ``latency_s`` is added once per collective.

.. [1] jax-ml/scaling-book, chapters "sharding" and "tpus" (commit 0819a7d8).
.. [2] jax-ml/scaling-book, chapter "gpus" (commit 1a55377a).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError

Number = float | NDArray[np.float64]
"""A number of bytes or seconds, or an array of them."""


def all_gather_s(
    size_bytes: Number, domains: Sequence[LinkDomain], *, link: float = 1.0, latency_s: float = 0.0
) -> Number:
    """Time to gather an array of ``size_bytes`` on every chip, each chip holding one shard before. [s]

    Examples
    --------
    The 4-chip axis of a v5e slice has no wraparound; bf16[2048, 8192] takes 559.2 us over it:

    >>> axis = LinkDomain("torus", (4,), (False,), 4.5e10, 1e-6)
    >>> round(1e6 * all_gather_s(2.0 * 2048 * 8192, [axis]), 1)
    559.2
    """
    return _levels(size_bytes, domains, 1, link, latency_s)


def reduce_scatter_s(
    size_bytes: Number, domains: Sequence[LinkDomain], *, link: float = 1.0, latency_s: float = 0.0
) -> Number:
    """Time to sum an array of ``size_bytes`` over the chips, each keeping one shard of the sum. [s]

    The mirror image of an all-gather, so it takes as long; the additions are not counted.
    """
    return _levels(size_bytes, domains, 1, link, latency_s)


def all_reduce_s(
    size_bytes: Number, domains: Sequence[LinkDomain], *, link: float = 1.0, latency_s: float = 0.0
) -> Number:
    """Time to sum an array of ``size_bytes`` over the chips, all of them getting the sum. [s]

    A reduce-scatter and an all-gather, with one ``latency_s`` for both.

    Examples
    --------
    16 KiB over an unwrapped 2x4 slice is all latency: four hops there, four back, 1 us each.

    >>> slice_2x4 = LinkDomain("torus", (2, 4), (False, False), 4.5e10, 1e-6)
    >>> f"{all_reduce_s(16384.0, [slice_2x4]):.2e}"
    '8.00e-06'
    """
    return _levels(size_bytes, domains, 2, link, latency_s)


def all_to_all_s(
    size_bytes: Number, domains: LinkDomain | Sequence[LinkDomain], *, link: float = 1.0, latency_s: float = 0.0
) -> Number:
    """Time to re-shard an array of ``size_bytes`` (of all chips) along another dimension. [s]

    A quarter of the array must cross each way of the cut through a torus axis; on a bidirectional ring that is a
    quarter of an all-gather [1]_. A switched chip sends (n − 1)/n of its own n-th; M nodes exchange in
    V(M − 1)/(M²·W_node) [2]_. A ragged exchange, such as tokens going to k of N experts, is one of a smaller array.

    Examples
    --------
    1 GB over two nodes of eight, 450 GB/s inside and 50 GB/s per network card:

    >>> node = LinkDomain("switched", (8,), (False,), 450e9, 0.0)
    >>> pair = LinkDomain("switched", (2,), (False,), 50e9, 0.0)
    >>> round(1e6 * all_to_all_s(1e9, [node, pair]), 1), round(1e6 * 1e9 * (2 - 1) / (2**2 * 400e9), 1)
    (746.5, 625.0)
    """
    levels = [domains] if isinstance(domains, LinkDomain) else domains
    _check_link(link)
    chips = math.prod(d.size for d in levels)
    time = np.multiply(size_bytes, 0.0)
    for domain in levels:
        # Every group of the level exchanges what its own chips hold.
        time = time + _exchange_s(np.multiply(size_bytes, domain.size / chips), domain, link)
    if chips > 1:
        time = time + np.greater(size_bytes, 0) * latency_s
    return _like(size_bytes, time)


def point_to_point_s(size_bytes: Number, domain: LinkDomain, *, link: float = 1.0, latency_s: float = 0.0) -> Number:
    """Time to send ``size_bytes`` between the two chips furthest apart, over all the links a corner has. [s]

    Examples
    --------
    bf16[8, 128, 8192] across a v5e 4x4: 186.4 us on two links, after 6 us until the first byte is there:

    >>> slice_4x4 = LinkDomain("torus", (4, 4), (False, False), 4.5e10, 1e-6)
    >>> round(1e6 * point_to_point_s(2.0 * 8 * 128 * 8192, slice_4x4), 1)
    192.4
    """
    _check_link(link)
    if domain.size == 1:
        return _like(size_bytes, np.multiply(size_bytes, 0.0))
    links, hops = 1, 1
    if domain.kind == "torus":
        links, hops = _corner_links(domain), _hops(domain)
    time = np.divide(size_bytes, links * link * domain.bandwidth_bytes_per_s)
    return _like(size_bytes, time + np.greater(size_bytes, 0) * (hops * domain.latency_s + latency_s))


def send_s(size_bytes: Number, domain: LinkDomain, *, link: float = 1.0, latency_s: float = 0.0) -> Number:
    """Time for every chip to send ``size_bytes`` to its peer in the next group of ``domain``: stage to stage. [s]

    One link and one hop of a torus or mesh; the chip's own bandwidth otherwise.
    """
    _check_link(link)
    if domain.size == 1:
        return _like(size_bytes, np.multiply(size_bytes, 0.0))
    time = np.divide(size_bytes, link * domain.bandwidth_bytes_per_s)
    return _like(size_bytes, time + np.greater(size_bytes, 0) * (domain.latency_s + latency_s))


def scale_out_domain(inside: Slice, n_groups: int) -> LinkDomain:
    """The level that joins ``n_groups`` slices like ``inside``: network cards, or the data-centre network of TPUs.

    >>> from simulator.catalog.slices import resolve_slice
    >>> level = scale_out_domain(resolve_slice("tpu-v5e:16x16"), 2)
    >>> level.network, level.bandwidth_bytes_per_s
    ('data-centre network', 3125000000.0)
    """
    chip = inside.chip
    if chip.scale_out is None:
        raise InputError(f"{inside.spec}: {chip.name} has no scale-out network in its file, so slices cannot be joined")
    if n_groups < 1:
        raise InputError(f"{n_groups} slices of {inside.spec}: at least one")
    bandwidth = chip.scale_out.bandwidth.si(f"{chip.name}: scale_out.bandwidth", "bytes/s")
    latency = chip.scale_out.latency.si(f"{chip.name}: scale_out.latency", "s")
    return LinkDomain("switched", (n_groups,), (False,), bandwidth, latency, chip.scale_out.network)


def _levels(size_bytes: Number, domains: Sequence[LinkDomain], passes: int, link: float, latency_s: float) -> Number:
    """``passes`` gathers (or their mirror images) on every level, inner first. [s]"""
    _check_link(link)
    time = np.multiply(size_bytes, 0.0)
    inside = 1
    for domain in domains:
        # Between groups, the chips of equal rank exchange only the shard their group's chips have split already.
        time = time + passes * _gather_s(np.divide(size_bytes, inside), domain, link)
        inside *= domain.size
    if inside > 1:
        time = time + np.greater(size_bytes, 0) * latency_s
    return _like(size_bytes, time)


def _gather_s(size_bytes: Number, domain: LinkDomain, link: float) -> Number:
    """An all-gather on one level. [s]"""
    n = domain.size
    if n == 1:
        return _like(size_bytes, np.multiply(size_bytes, 0.0))
    W = link * domain.bandwidth_bytes_per_s
    if domain.kind == "torus":
        in_fraction = 1.0 if _all_wrapped(domain) else (n - 1) / n
        bandwidth_s = np.divide(size_bytes, _corner_links(domain) * W / in_fraction)
        return _like(size_bytes, np.maximum(bandwidth_s, np.greater(size_bytes, 0) * _hops(domain) * domain.latency_s))
    per_byte = 1 / (n * W) if domain.kind == "full_mesh" else (n - 1) / (n * W)
    return _like(size_bytes, np.multiply(size_bytes, per_byte) + np.greater(size_bytes, 0) * domain.latency_s)


def _exchange_s(size_bytes: Number, domain: LinkDomain, link: float) -> Number:
    """An all-to-all on one level, ``size_bytes`` held by the chips of one group. [s]"""
    n = domain.size
    if n == 1:
        return np.multiply(size_bytes, 0.0)
    W = link * domain.bandwidth_bytes_per_s
    some = np.greater(size_bytes, 0)
    if domain.kind == "torus":
        across = min(n // length * (2 if wrap else 1) for length, wrap in _axes(domain))
        return np.maximum(np.divide(size_bytes, 4 * across * W), some * _hops(domain) * domain.latency_s)
    per_chip = n * n * W if domain.kind == "full_mesh" else n * n * W / (n - 1)
    return np.divide(size_bytes, per_chip) + some * domain.latency_s


def _check_link(link: float) -> None:
    if not 0 < link <= 1:
        raise InputError(f"efficiency.link = {link}: must be above 0 and at most 1")


def _axes(domain: LinkDomain) -> list[tuple[int, bool]]:
    """Axes longer than one chip; an axis of two chips has one link, wrapped or not."""
    return [(n, wrap and n > 2) for n, wrap in zip(domain.dims, domain.wraps, strict=True) if n > 1]


def _all_wrapped(domain: LinkDomain) -> bool:
    return all(wrap for _, wrap in _axes(domain))


def _corner_links(domain: LinkDomain) -> int:
    """Links of the chip that has fewest: two per ring, one per open axis."""
    return sum(2 if wrap else 1 for _, wrap in _axes(domain))


def _hops(domain: LinkDomain) -> int:
    """Hops between the two chips furthest apart."""
    return sum(n // 2 if wrap else n - 1 for n, wrap in _axes(domain))


def _like(size_bytes: Number, time_s: Number) -> Number:
    """A float for a float, an array for an array."""
    return time_s if isinstance(size_bytes, np.ndarray) else float(time_s)
