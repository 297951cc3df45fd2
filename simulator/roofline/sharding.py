"""How a model lies on a slice: the degrees of parallelism, their legality, and the links each of them gets.

======  ==================================================================================================
``tp``  tensor parallelism: matrices split over chips, two all-reduces per layer
``cp``  context parallelism: the tokens of a long prompt split over chips (prefill only)
``pp``  pipeline parallelism: layers split into stages that pass activations on
``dp``  data parallelism: replicas of everything; with ``ep``, of the attention alone
``ep``  expert parallelism: the routed experts spread over the ``tp`` × ``dp`` chips of a stage
======  ==================================================================================================

The chips of a slice are handed out innermost first: ``tp`` gets the fastest links, then ``cp``, then ``dp`` where ranks
exchange tokens with each other's experts, then ``pp``, then ``dp`` where replicas do not talk.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product

from simulator.catalog.architecture import Architecture, GatedDeltaNet, Mamba2, MoEFFN
from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError
from simulator.roofline.collectives import all_gather_s

_TERM = re.compile(r"([a-z]+)([0-9]+)")


@dataclass(frozen=True)
class Sharding:
    """Degrees of parallelism; 1 means none.

    Examples
    --------
    >>> sharding = parse_sharding("tp8pp2")
    >>> sharding.tp, sharding.pp, sharding.chips, str(sharding)
    (8, 2, 16, 'tp8pp2')
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        """Refuse degrees below one."""
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise InputError(f"sharding.{item.name} = {getattr(self, item.name)}: must be at least 1")

    @property
    def chips(self) -> int:
        """Chips it takes; experts share those of attention."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def replicas(self) -> int:
        """Copies of the whole model: ``dp``, unless its ranks share one set of experts."""
        return self.dp if self.ep == 1 else 1

    def __str__(self) -> str:
        """As :func:`parse_sharding` reads it; degrees of 1 are left out."""
        return "".join(f"{f.name}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "tp1"


def parse_sharding(text: str) -> Sharding:
    """Read ``tp8``, ``tp8pp2``, ``dp8ep8``, ``tp4cp2`` …: degrees in any order, each at most once.

    Raises
    ------
    InputError
        If the text is anything else.
    """
    names = [f.name for f in fields(Sharding)]
    terms = _TERM.findall(text)
    if not terms or "".join(a + b for a, b in terms) != text:
        raise InputError(
            f"sharding {text!r}: write degrees like tp8, tp8pp2 or dp8ep8; each is one of {', '.join(names)}"
        )
    degrees: dict[str, int] = {}
    for name, value in terms:
        if name not in names:
            raise InputError(f"sharding {text!r}: {name} is not one of {', '.join(names)}")
        if name in degrees:
            raise InputError(f"sharding {text!r}: {name} is given twice")
        degrees[name] = int(value)
    return Sharding(**degrees)


def check_sharding(architecture: Architecture, slice_: Slice, s: Sharding) -> None:
    """Refuse a sharding that this model cannot have on this slice, naming the rule it breaks.

    How ``tp`` divides heads and widths is checked where the matrices are: :class:`~simulator.roofline.deployment.Deployment`.

    Raises
    ------
    InputError
        With the rule, the figures, and what is allowed.
    """
    broken = next(_broken_rules(architecture, slice_, s), None)
    if broken is not None:
        raise InputError(f"sharding {s} of {architecture.name} on {slice_.spec}: {broken}")
    link_domains(slice_, s)


def _broken_rules(architecture: Architecture, slice_: Slice, s: Sharding) -> Iterator[str]:
    if s.chips != slice_.n_chips:
        yield f"tp x cp x pp x dp = {s.chips}, and the slice has {slice_.n_chips} chips; every chip must be used"
    if s.pp > architecture.n_layers:
        yield f"{s.pp} stages for {architecture.n_layers} layers; a stage needs at least one layer"
    if s.cp > 1 and s.pp > 1:
        yield "context parallelism inside a pipeline is not priced; use cp or pp"
    if s.cp > 1 and s.ep > 1:
        yield "context parallelism of attention ranks is not priced; use cp or ep"
    if s.cp > 1 and any(isinstance(g.mixer, GatedDeltaNet | Mamba2) for g in architecture.layers):
        yield "recurrent layers pass a state from token to token, so cp cannot split a prompt"
    if s.ep > 1:
        moe = [g.ffn for g in architecture.layers if isinstance(g.ffn, MoEFFN)]
        if not moe:
            yield "ep spreads routed experts, and this model has none; use tp, pp or dp"
        if s.ep != s.tp * s.dp:
            yield f"experts lie on all chips of a stage, so ep must be tp x dp = {s.tp * s.dp}, not {s.ep}"
        for ffn in moe:
            if ffn.n_experts % s.ep:
                yield f"ep = {s.ep} does not divide the {ffn.n_experts} experts evenly"


@dataclass(frozen=True)
class Links:
    """The interconnect each degree of parallelism runs over, innermost level first; a degree of 1 has none."""

    tp: tuple[LinkDomain, ...]
    cp: tuple[LinkDomain, ...]
    pp: tuple[LinkDomain, ...]
    dp: tuple[LinkDomain, ...]


def link_domains(slice_: Slice, s: Sharding) -> Links:
    """Hand the chips of a slice out to the degrees of a sharding, innermost first."""
    order = ("tp", "cp", "dp", "pp") if s.ep > 1 else ("tp", "cp", "pp", "dp")
    found = subdomains(slice_, [getattr(s, name) for name in order], names=order)
    return Links(**dict(zip(order, found, strict=True)))


def one_chip(slice_: Slice) -> Slice:
    """A single chip of a slice, whose links lead nowhere.

    >>> from simulator.catalog.slices import resolve_slice
    >>> one_chip(resolve_slice("tpu-v5e:4x4")).n_chips
    1
    """
    return Slice(f"{slice_.spec} (one chip of it)", slice_.chip, 1, links_of_one(slice_))


def links_of_one(slice_: Slice) -> tuple[LinkDomain, ...]:
    """Links of a group of one chip: none, of the kind of the innermost."""
    inner = slice_.domains[0]
    return (replace(inner, dims=(1,) * len(inner.dims), wraps=(False,) * len(inner.dims)),)


def subdomains(slice_: Slice, sizes: Sequence[int], *, names: Sequence[str] = ()) -> tuple[tuple[LinkDomain, ...], ...]:
    """Domains of nested groups of chips: ``sizes[0]`` neighbours, then ``sizes[1]`` of those groups, and so on.

    Levels are used up inner first. Inside a level, a group takes the best-connected sub-box of a torus (a part of a
    ring is a line), and any chips of a switch or mesh. On an axis of which an inner group has taken k chips, the
    outer group's neighbours are k hops apart and the k interleaved groups share each link, so bandwidth is 1/k and
    latency k times that of a link; the largest such k holds for all axes of the group (conservative).

    Parameters
    ----------
    sizes
        group sizes, innermost first; their product must be the chips of the slice.
    names
        what to call them in errors.

    Raises
    ------
    InputError
        If a group would straddle a level unevenly.

    Examples
    --------
    >>> from simulator.catalog.slices import resolve_slice
    >>> tp, pp = subdomains(resolve_slice("h100-sxm:2x8"), [8, 2])
    >>> [(d.network, d.size) for d in (*tp, *pp)]
    [('NVLink', 8), ('InfiniBand or Ethernet', 2)]

    Eight of the 16 chips of a 4x4 without wraparound are two of its rows:

    >>> rows, pairs = subdomains(resolve_slice("tpu-v5e:4x4"), [8, 2])
    >>> rows[0].dims, pairs[0].dims, pairs[0].bandwidth_bytes_per_s / rows[0].bandwidth_bytes_per_s
    ((2, 4), (2, 1), 0.5)
    """
    if math.prod(sizes) != slice_.n_chips:
        raise InputError(
            f"groups of {' x '.join(map(str, sizes))} do not make the {slice_.n_chips} chips of {slice_.spec}"
        )
    groups, uneven = _groups(slice_.domains, tuple(sizes))
    if uneven:
        at, left, level = len(groups), *uneven
        label = names[at] if names else f"group {at}"
        raise InputError(
            f"{label} = {sizes[at]} on {slice_.spec}: {level.left} chips or groups are left on its "
            f"{level.domain.network or level.domain.kind} level, which {left} neither divides nor is a multiple of"
        )
    return groups


@lru_cache(maxsize=1024)  # a search asks for the same groups under every model and precision
def _groups(
    domains: tuple[LinkDomain, ...], sizes: tuple[int, ...]
) -> tuple[tuple[tuple[LinkDomain, ...], ...], "tuple[int, _Level] | None"]:
    """Groups up to the first that would straddle a level, and what is left to place of that one, on which level."""
    levels = [_Level(d, d.dims, (1,) * len(d.dims)) for d in domains]
    groups: list[tuple[LinkDomain, ...]] = []
    for size in sizes:
        taken: list[LinkDomain] = []
        left = size
        for i, level in enumerate(levels):
            if left == 1:
                break
            if level.left == 1:
                continue
            share = math.gcd(left, level.left)
            if share < min(left, level.left):
                return tuple(groups), (left, level)
            domain, levels[i] = level.take(share)
            taken.append(domain)
            left //= share
        groups.append(tuple(taken))
    return tuple(groups), None


@dataclass(frozen=True)
class _Level:
    """A level of a slice with what inner groups have left of it: ``lengths`` per axis, at ``strides`` of links."""

    domain: LinkDomain
    lengths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def left(self) -> int:
        return math.prod(self.lengths)

    @lru_cache(maxsize=4096)  # noqa: B019  # levels are values, few, and the same for every sharding that is tried
    def take(self, size: int) -> tuple[LinkDomain, "_Level"]:
        """The best group of ``size`` and the level without it."""
        boxes = [dims for dims in product(*(_divisors(n) for n in self.lengths)) if math.prod(dims) == size]
        best = min(boxes, key=lambda dims: self._badness(self._group(dims)))
        lengths = tuple(n // k for n, k in zip(self.lengths, best, strict=True))
        strides = tuple(s * k for s, k in zip(self.strides, best, strict=True))
        return self._group(best), _Level(self.domain, lengths, strides)

    def _group(self, dims: tuple[int, ...]) -> LinkDomain:
        d = self.domain
        if d.kind != "torus":
            return LinkDomain(d.kind, dims, d.wraps, d.bandwidth_bytes_per_s, d.latency_s, d.network)
        wraps = tuple(w and k == n > 1 for w, k, n in zip(d.wraps, dims, self.lengths, strict=True))
        stride = max((s for s, k in zip(self.strides, dims, strict=True) if k > 1), default=1)
        return LinkDomain("torus", dims, wraps, d.bandwidth_bytes_per_s / stride, d.latency_s * stride, d.network)

    @staticmethod
    def _badness(domain: LinkDomain) -> tuple[float, float, int]:
        large, small = (float(all_gather_s(size, [domain])) for size in (1e12, 1.0))
        return large, small, -max(domain.dims)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
