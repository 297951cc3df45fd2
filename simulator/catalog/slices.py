"""Slices: chips of one kind with an interconnect, and the strings that name them.

``chip:shape``, where the shape is

======================  =====================================================================================
``tpu-v5e:4x4``         a torus or grid, in the shapes its vendor offers; axes in any order
``h100-sxm:8``          chips of one scale-up domain (NVLink switch, full mesh, PCIe box)
``h100-sxm:2x8``        domains × chips per domain, joined by the scale-out network
``any-chip:1``          one chip
======================  =====================================================================================

Which shapes exist, and which axes of a torus close into rings, is data in the chip's file.
"""

import math
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations_with_replacement
from typing import Literal

from simulator.catalog.chips import ChipSpec, DomainScaleUp, TorusScaleUp, load_chip
from simulator.errors import InputError

#: More chips than any machine has; also keeps the arithmetic of error messages in range.
_MAX_CHIPS = 1_000_000


@dataclass(frozen=True)
class LinkDomain:
    """One level of an interconnect.

    Attributes
    ----------
    kind
        ``torus``: point-to-point links along axes. ``switched``: every chip reaches every other at full bandwidth
        (NVSwitch, a NIC network). ``full_mesh``: one link per pair (AMD). ``pcie``: through the host.
    dims, wraps
        Axis lengths, and whether each axis closes into a ring. One axis unless ``kind == "torus"``.
    bandwidth_bytes_per_s
        One direction. Per link for ``torus`` and ``full_mesh``; per chip, all links together, otherwise.
        Infinite for the one-chip domain of a chip without links: nothing moves.
    latency_s
        Per hop for ``torus``; per message otherwise.
    network
        What people call it: ICI, NVLink, PCIe, InfiniBand …
    """

    kind: Literal["torus", "switched", "full_mesh", "pcie"]
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]
    bandwidth_bytes_per_s: float
    latency_s: float
    network: str = ""

    @property
    def size(self) -> int:
        """Chips (or, for outer levels, groups) joined by this level."""
        return math.prod(self.dims)

    @property
    def bisection_bytes_per_s(self) -> float:
        """One-direction bandwidth across the cut that halves this level where it is narrowest. [bytes/s]

        A cut across an axis of a torus meets each of the other axes' rows once, twice where the axis wraps. A switch
        passes half the chips' traffic; a full mesh has one link per pair across the cut. Zero for a single chip.

        >>> LinkDomain("torus", (16, 16), (True, True), 50e9, 1e-6).bisection_bytes_per_s / 1e12
        1.6
        """
        if self.size == 1:
            return 0.0
        if self.kind == "torus":
            cuts = [self.size // d * (2 if w else 1) for d, w in zip(self.dims, self.wraps, strict=True) if d > 1]
            return min(cuts) * self.bandwidth_bytes_per_s
        half = self.size // 2
        links = half * (self.size - half) if self.kind == "full_mesh" else half
        return links * self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Slice:
    """Chips of one kind, joined.

    Attributes
    ----------
    spec
        Canonical string: ``resolve_slice(spec)`` gives this slice again.
    chip, n_chips
        What, and how many.
    domains
        Levels of the interconnect, innermost first; the product of their sizes is ``n_chips``.
    n_nodes
        Scale-up domains joined by the scale-out network; 1 inside one torus or NVLink domain.
    """

    spec: str
    chip: ChipSpec
    n_chips: int
    domains: tuple[LinkDomain, ...]
    n_nodes: int = 1

    @property
    def bisections_bytes_per_s(self) -> tuple[float, ...]:
        """One-direction bisection of each level, all chips inside its groups sending. [bytes/s]

        >>> resolve_slice("h100-sxm:2x8").bisections_bytes_per_s
        (1800000000000.0, 400000000000.0)
        """
        inner = [math.prod(d.size for d in self.domains[:level]) for level in range(len(self.domains))]
        return tuple(n * d.bisection_bytes_per_s for n, d in zip(inner, self.domains, strict=True))


def resolve_slice(spec: str, *, nominal_links: bool = False) -> Slice:
    """Resolve a slice string.

    Parameters
    ----------
    spec
        ``chip:shape``; the chip is a catalogue name or the path of a chip file.
    nominal_links
        Use nominal link bandwidths instead of achievable ones.

    Raises
    ------
    InputError
        If the string is malformed, the chip unknown, or the slice does not exist; the message gives the rule and
        the nearest slices that do.

    >>> s = resolve_slice("tpu-v5e:4x2")
    >>> s.spec, s.n_chips, s.domains[0].wraps
    ('tpu-v5e:2x4', 8, (False, False))
    """
    name, colon, shape = spec.rpartition(":")
    if not colon:
        chip = load_chip(spec)
        raise InputError(f"slice {spec!r} has no shape; write e.g. {_some(spec, chip)}")
    chip = load_chip(name)
    dims = _parse_shape(name, chip, shape)
    if isinstance(chip.scale_up, TorusScaleUp):
        return _torus(name, chip, chip.scale_up, dims, nominal=nominal_links)
    return _domain(name, chip, dims, nominal=nominal_links)


def legal_slices(name: str) -> list[str]:
    """Every slice of one scale-up domain of a chip, smallest first.

    >>> legal_slices("h100-sxm")
    ['h100-sxm:1', 'h100-sxm:2', 'h100-sxm:4', 'h100-sxm:8']
    """
    return [f"{name}:{_text(dims)}" for dims in _legal(load_chip(name))]


def _parse_shape(name: str, chip: ChipSpec, shape: str) -> tuple[int, ...]:
    parts = shape.split("x")
    if not all(p.isascii() and p.isdigit() for p in parts):
        close = get_close_matches(shape.lower(), [_text(d) for d in _legal(chip)], n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(repr(f'{name}:{c}') for c in close)}?" if close else ""
        raise InputError(
            f"slice {name}:{shape}: the shape must be whole numbers joined by 'x', e.g. {_some(name, chip)}{hint}"
        )
    if max(map(len, parts)) > len(str(_MAX_CHIPS)) or math.prod(map(int, parts)) > _MAX_CHIPS:
        raise InputError(f"slice {name}:{shape[:40]}: more than {_MAX_CHIPS:,} chips; no such machine exists")
    dims = tuple(map(int, parts))
    if 0 in dims:
        raise InputError(f"slice {name}:{shape}: a slice has at least one chip along every axis")
    return dims


def _torus(name: str, chip: ChipSpec, rule: TorusScaleUp, dims: tuple[int, ...], *, nominal: bool) -> Slice:
    legal = _legal(chip)
    rank = len(rule.shapes[0])
    asked = (1,) * rank if dims == (1,) else dims
    found = next((shape for shape in legal if sorted(shape) == sorted(asked)), None)
    if found is None:
        text = f"{chip.title} comes in these {rank}D shapes: {', '.join(_text(s) for s in rule.shapes)}"
        if rule.multiples_of is not None:
            text += f", and any shape of multiples of {rule.multiples_of} up to {_text(rule.largest)}"
        raise InputError(f"slice {name}:{_text(dims)} does not exist: {text}; {_nearest(name, legal, asked)}")
    link = rule.bandwidth if nominal or rule.achievable is None else rule.achievable
    domain = LinkDomain(
        "torus",
        found,
        rule.wrap.wraps(found),
        link.si(f"{chip.name}: scale_up.bandwidth", "bytes/s"),
        rule.latency.si(f"{chip.name}: scale_up.latency", "s"),
        rule.network,
    )
    return Slice(f"{name}:{_text(found)}", chip, domain.size, (domain,))


def _domain(name: str, chip: ChipSpec, dims: tuple[int, ...], *, nominal: bool) -> Slice:
    rule = chip.scale_up
    legal = _legal(chip)
    if len(dims) > 2:
        raise InputError(
            f"slice {name}:{_text(dims)} does not exist: {chip.title} slices are written N or NODESxN; "
            f"{_nearest(name, _options(chip, dims), dims)}"
        )
    n_nodes, size = dims if len(dims) == 2 else (1, dims[0])
    if (size,) not in legal:
        counts = ", ".join(_text(s) for s in legal)
        text = f"one {rule.network} domain of {chip.title} holds {counts} chips" if rule else "only :1 is modelled"
        raise InputError(
            f"slice {name}:{_text(dims)} does not exist: {text}; {_nearest(name, _options(chip, dims), dims)}"
        )
    levels = _inner_levels(chip, rule, size, nominal=nominal) if isinstance(rule, DomainScaleUp) else ()
    if n_nodes > 1:
        if chip.scale_out is None:
            raise InputError(
                f"slice {name}:{_text(dims)}: {chip.name} has no scale-out network in its file, so nodes cannot be "
                f"joined; the largest slice is {name}:{_text(legal[-1])}"
            )
        out = chip.scale_out
        bandwidth = out.bandwidth.si(f"{chip.name}: scale_out.bandwidth", "bytes/s")
        latency = out.latency.si(f"{chip.name}: scale_out.latency", "s")
        levels = (*levels, LinkDomain("switched", (n_nodes,), (False,), bandwidth, latency, out.network))
    if not levels:
        levels = (LinkDomain("switched", (1,), (False,), math.inf, 0.0, "none"),)
    text = _text((n_nodes, size)) if n_nodes > 1 else str(size)
    return Slice(f"{name}:{text}", chip, n_nodes * size, levels, n_nodes)


def _inner_levels(chip: ChipSpec, rule: DomainScaleUp, size: int, *, nominal: bool) -> tuple[LinkDomain, ...]:
    link = rule.bandwidth if nominal or rule.achievable is None else rule.achievable
    bandwidth = link.si(f"{chip.name}: scale_up.bandwidth", "bytes/s")
    latency = rule.latency.si(f"{chip.name}: scale_up.latency", "s")
    if chip.bridge is None or not chip.bridge.fitted or size == 1:
        return (LinkDomain(rule.topology, (size,), (False,), bandwidth, latency, rule.network),)
    bridge = LinkDomain(
        "full_mesh",
        (2,),
        (False,),
        chip.bridge.bandwidth.si(f"{chip.name}: bridge.bandwidth", "bytes/s"),
        chip.bridge.latency.si(f"{chip.name}: bridge.latency", "s"),
        "NVLink bridge",
    )
    if size == 2:
        return (bridge,)
    return bridge, LinkDomain(rule.topology, (size // 2,), (False,), bandwidth, latency, rule.network)


def _legal(chip: ChipSpec) -> list[tuple[int, ...]]:
    """Shapes of one scale-up domain, canonical axis order, smallest first."""
    rule = chip.scale_up
    if rule is None:
        return [(1,)]
    if isinstance(rule, DomainScaleUp):
        return sorted((n,) for n in {1, *rule.sizes})
    shapes = {tuple(sorted(s)): s for s in [(1,) * len(rule.shapes[0]), *rule.shapes]}
    if rule.multiples_of is not None:
        axis = range(rule.multiples_of, max(rule.largest) + 1, rule.multiples_of)
        for shape in combinations_with_replacement(axis, len(rule.largest)):
            if all(a <= b for a, b in zip(shape, sorted(rule.largest), strict=True)):
                shapes.setdefault(shape, shape)
    return sorted(shapes.values(), key=lambda s: (math.prod(s), s))


def _options(chip: ChipSpec, asked: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Legal slices worth suggesting for a domain chip: one domain, the same number of nodes, or enough nodes."""
    legal = _legal(chip)
    if chip.scale_out is None:
        return legal
    most = legal[-1][0]
    nodes = {math.prod(asked) // most, -(-math.prod(asked) // most)}
    several = {(n, most) for n in nodes if n > 1}
    if len(asked) == 2 and asked[0] > 1:
        several |= {(asked[0], size) for (size,) in legal}
    return [*legal, *(s for s in several if math.prod(s) <= _MAX_CHIPS)]


def _nearest(name: str, legal: list[tuple[int, ...]], asked: tuple[int, ...]) -> str:
    """The legal slices nearest in chip count, at least one on either side where both exist."""
    n = math.prod(asked)
    ranked = sorted(legal, key=lambda s: (abs(math.log(math.prod(s) / n)), abs(len(s) - len(asked)), s))
    chosen = [s for s in ranked if math.prod(s) == n][:3]
    if not chosen:
        chosen = [s for s in ranked if math.prod(s) < n][:1] + [s for s in ranked if math.prod(s) > n][:1]
    return "nearest: " + ", ".join(
        f"{name}:{_text(s)} ({math.prod(s)} chip{'s' if math.prod(s) > 1 else ''})" for s in chosen
    )


def _some(name: str, chip: ChipSpec) -> str:
    legal = _legal(chip)
    return " or ".join(f"{name}:{_text(s)}" for s in dict.fromkeys((legal[0], legal[len(legal) // 2], legal[-1])))


def _text(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
