"""How weights lie on the axes of a torus: the layouts of Pope et al., and what a feed-forward layer communicates in each.

A :class:`Layout` is a word, such as ``2d-x``; on a torus it makes an :class:`AxisSplit`, which
:class:`~simulator.roofline.deployment.Deployment` prices for whole models. The rest is one feed-forward layer on N = X·YZ
chips, to compare layouts by.

The layer maps tokens of width E over a hidden width F and back. What each chip communicates per forward pass:

==================  ===========================================================================================
``1d-stationary``   weights split over F, N ways: gather n·E over all chips, scatter n·E
``2d-stationary``   weights split X ways over E and YZ ways over F: gather n·E/X and scatter it over the YZ axes,
                    gather n·F/YZ and scatter it over the X axes
``gathered``        weights stored as in 2D, gathered over g chips before use, tokens split g ways: weights
                    matrices·E·F·g/N, and the 1D or 2D exchange of n/g tokens; g = N moves weights alone
==================  ===========================================================================================

Sizes are those of the array that a collective completes on each chip. [1]_ takes the time of a collective as that
size over the bandwidth of a chip, whatever axes it runs on (:func:`volume_elements`); :func:`layer_s` prices the same
collectives on the axes of a real slice, where fewer axes mean less bandwidth, as [2]_ does.

.. [1] R. Pope et al., "Efficiently Scaling Transformer Inference", 2022, §3.2 (layouts; as transcribed in the project's
   target tables, formulas derived).
.. [2] jax-ml/scaling-book, chapter "inference" (commit 0819a7d8), appendix on two-dimensional weight-stationary sharding.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError
from simulator.roofline.collectives import all_gather_s, reduce_scatter_s

Name = Literal["1d-stationary", "2d-stationary", "gathered"]

AXES = "xyzuvw"
"""Names of a torus's axes, in the order of its shape."""

_LAYOUT = re.compile(r"1d|(2d|gathered)(?:-([a-z]+))?")


@dataclass(frozen=True)
class Layout:
    """Where the weights of a layer are.

    Attributes
    ----------
    kind
        ``1d``: split over heads and feed-forward columns alone. ``2d``: over d_model too. ``gathered``: stored in shards,
        gathered over some axes before use, while the tokens are split over those axes and the rest works as in ``1d``.
    axes
        axes that d_model is split over, or weights are gathered over; empty: the best ones (:func:`best_axes`).
    """

    kind: Literal["1d", "2d", "gathered"] = "1d"
    axes: str = ""

    def __str__(self) -> str:
        """As :func:`parse_layout` reads it."""
        return f"{self.kind}-{self.axes}" if self.axes else self.kind


def parse_layout(text: str) -> Layout:
    """Read ``1d``, ``2d``, ``2d-x``, ``gathered-xyz`` …: letters name axes of the slice in the order of its shape.

    >>> parse_layout("2d-xy")
    Layout(kind='2d', axes='xy')

    Raises
    ------
    InputError
        If the text is anything else.
    """
    found = _LAYOUT.fullmatch(text)
    axes = (found[2] or "") if found else ""
    if found is None or any(a not in AXES for a in axes) or len(set(axes)) < len(axes):
        raise InputError(
            f"layout {text!r}: must be 1d, 2d or gathered, the last two optionally with axes of the torus: 2d-x, "
            "2d-xy, gathered-xyz; each axis at most once"
        )
    kind: Literal["1d", "2d", "gathered"] = "1d" if text == "1d" else "2d" if text.startswith("2d") else "gathered"
    return Layout(kind, "".join(sorted(axes, key=AXES.index)))


@dataclass(frozen=True)
class AxisSplit:
    """A layout on a torus: chips along ``model`` split d_model, along ``columns`` heads and d_ff, along ``gathered`` tokens."""

    layout: Layout
    model: LinkDomain
    columns: LinkDomain
    gathered: LinkDomain


def split_axes(torus: LinkDomain, layout: Layout, layer: "FeedForward | None" = None, *, where: str) -> AxisSplit:
    """Lay a layout on the axes of a torus. ``layer`` is what to choose axes by where the layout names none.

    Raises
    ------
    InputError
        If it is no torus, lacks an axis, or none would be left for the columns.
    """
    if torus.kind != "torus":
        raise InputError(
            f"layout {layout} on {where}: 2d and gathered layouts are laid on the axes of one torus, and its links are "
            f"{torus.network or torus.kind}; use 1d"
        )
    long = "".join(a for a, n in zip(AXES, torus.dims, strict=False) if n > 1)
    if not layout.axes:
        layout = Layout(layout.kind, best_axes(torus, layout.kind, layer, where=where))
    for axis in layout.axes:
        if axis not in long:
            raise InputError(
                f"layout {layout} on {where}: its torus {'x'.join(map(str, torus.dims))} has no axis {axis} longer than "
                f"one chip; axes: {', '.join(long) or 'none'}"
            )
    if layout.kind == "2d" and layout.axes == long:
        raise InputError(
            f"layout {layout} on {where}: d_model cannot be split over all axes ({long}); leave one for the columns"
        )
    chosen = [AXES.index(a) for a in layout.axes]
    rest = [i for i, n in enumerate(torus.dims) if n > 1 and i not in chosen]
    none: list[int] = []
    over_d, over_g = (chosen, none) if layout.kind == "2d" else (none, chosen)
    return AxisSplit(layout, _axes(torus, over_d), _axes(torus, rest), _axes(torus, over_g))


@lru_cache(maxsize=1024)
def best_axes(
    torus: LinkDomain,
    kind: str,
    layer: "FeedForward | None",
    *,
    tokens: float = 1e9,
    weight_bytes: float = 2.0,
    where: str = "",
) -> str:
    """Axes with which ``kind`` exchanges a layer of ``tokens`` fastest, those that divide its widths; by default, of many tokens.

    >>> from simulator.catalog.slices import resolve_slice
    >>> pod = resolve_slice("tpu-v4:4x4x8").domains[0]
    >>> best_axes(pod, "2d", FeedForward(8192, 32768)), best_axes(pod, "gathered", FeedForward(8192, 32768))
    ('x', 'xyz')
    """
    times: dict[str, float] = {}
    for over_g, over_x, over_f in _ways(torus):
        chosen = over_x if kind == "2d" else over_g
        if not chosen or (over_x and over_g):
            continue
        found = layer and _layer_time(torus, layer, tokens, (over_g, over_x, over_f), weight_bytes, 2.0, 1.0, 0.0)
        if layer is None or found:
            times["".join(AXES[i] for i in chosen)] = found.time_s if found else 0.0
    if not times:
        raise InputError(
            f"layout {kind} on {where}: no choice of the axes of {'x'.join(map(str, torus.dims))} leaves one for the columns "
            f"and divides {f'd_model = {layer.d_model} and d_ff = {layer.d_ff}' if layer else 'the model'}; use 1d"
        )
    return min(times, key=lambda axes: (times[axes], len(axes), axes))


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer: tokens of width ``d_model`` to ``d_ff`` and back over ``matrices`` (2 plain, 3 gated)."""

    d_model: int
    d_ff: int
    matrices: int = 2

    def __post_init__(self) -> None:
        """Refuse what is no layer."""
        if min(self.d_model, self.d_ff) < 1 or self.matrices not in {2, 3}:
            raise InputError(f"feed-forward layer {self}: widths must be at least 1, matrices 2 or 3")


def volume_1d_elements(layer: FeedForward, tokens: float) -> float:
    """Elements a chip takes in and gives out per layer, weights split one way. Independent of the chips. [elements]

    >>> volume_1d_elements(FeedForward(16384, 65536), 512) == 2 * 512 * 16384
    True
    """
    return 2.0 * tokens * layer.d_model


def volume_2d_elements(layer: FeedForward, tokens: float, *, chips: int, x: float) -> float:
    """As :func:`volume_1d_elements`, weights split ``x`` ways over d_model and chips/x ways over d_ff. [elements]"""
    return 2.0 * tokens * (layer.d_model / x + layer.d_ff * x / chips)


def best_x(layer: FeedForward, chips: int) -> float:
    """Split of d_model that moves least, sqrt(N·E/F): half the square root of the chips for F = 4E.

    >>> best_x(FeedForward(16384, 65536), 64)
    4.0
    """
    return math.sqrt(chips * layer.d_model / layer.d_ff)


def two_dimensional_beats_one(layer: FeedForward) -> float:
    """Chips above which the best 2D split moves less than the 1D one, 4F/E: 16 for F = 4E. [chips]

    From 2·sqrt(F/(E·N)) < 1. [1]_ (module) writes it as sqrt(N) > F/E, which is the same at F = 4E alone.
    """
    return 4.0 * layer.d_ff / layer.d_model


def volume_gathered_elements(layer: FeedForward, tokens: float, *, chips: int, gathered: int) -> float:
    """Weights gathered over ``gathered`` chips, tokens split as many ways, 1D exchange among the others. [elements]

    >>> layer = FeedForward(16384, 65536)
    >>> volume_gathered_elements(layer, 1e6, chips=64, gathered=64) / 64  # all weights, and no tokens
    33554432.0
    """
    weights = layer.matrices * layer.d_model * layer.d_ff * gathered / chips
    tokens_moved = volume_1d_elements(layer, tokens) / gathered if gathered < chips else 0.0
    return weights + tokens_moved


def best_gathered(layer: FeedForward, tokens: float, chips: int) -> float:
    """Chips to gather weights over that move least, sqrt(2·tokens·N/(matrices·F)); grows with the batch."""
    return math.sqrt(2 * tokens * chips / (layer.matrices * layer.d_ff))


def best_x_on_three_axes(layer: FeedForward, chips: int) -> tuple[float, float]:
    """X and YZ of least time where X is one axis of a 3D torus and YZ the other two: sqrt(N·D/(2F)) and N/X [2]_ (module).

    The X exchange has half the bandwidth of the YZ one, so X is smaller than :func:`best_x`: sqrt(N/8) for F = 4D.

    >>> best_x_on_three_axes(FeedForward(8192, 32768), 128)
    (4.0, 32.0)
    """
    x = math.sqrt(chips * layer.d_model / (2 * layer.d_ff))
    return x, chips / x


def two_dimensional_beats_one_on_three_axes(layer: FeedForward) -> float:
    """Chips above which that 2D split takes less time than 1D over all three axes: 32·(F/D)·(3/4)². [chips]

    72 for F = 4D; the book rounds the square root, 8.49, up to 9 and prints 81.
    """
    return 32 * layer.d_ff / layer.d_model * (3 / 4) ** 2


@dataclass(frozen=True)
class LayoutTime:
    """Time of a layer's collectives under one layout.

    Attributes
    ----------
    name, x, gathered
        the layout; ways of splitting d_model, and chips that weights are gathered over (1: stationary).
    weights_s, tokens_s
        gathers of weights, and exchanges of activations. [s]
    """

    name: Name
    x: int
    gathered: int
    weights_s: float
    tokens_s: float

    @property
    def time_s(self) -> float:
        """Both together. [s]"""
        return self.weights_s + self.tokens_s


def layer_layouts(
    slice_: Slice,
    layer: FeedForward,
    tokens: float,
    *,
    weight_bytes: float = 2.0,
    activation_bytes: float = 2.0,
    link: float = 1.0,
    latency_s: float = 0.0,
) -> list[LayoutTime]:
    """Every layout that whole axes of a torus allow, fastest first. [s]

    ``weight_bytes`` and ``activation_bytes`` are per element; ``link`` and ``latency_s`` as in
    :mod:`simulator.roofline.collectives`.

    Raises
    ------
    InputError
        If the slice is no torus, or a split does not divide d_model or d_ff.

    Examples
    --------
    A gated layer of PaLM's widths on v4: with few tokens one dimension is enough for 64 chips and not for 512, and many
    tokens gather the weights.

    >>> from simulator.catalog.slices import resolve_slice
    >>> palm, small, large = FeedForward(18432, 73728, matrices=3), *map(resolve_slice, ("tpu-v4:4x4x4", "tpu-v4:8x8x8"))
    >>> [layer_layouts(s, palm, n)[0].name for s, n in ((small, 512), (large, 512), (small, 1_000_000))]
    ['1d-stationary', '2d-stationary', 'gathered']
    """
    torus = slice_.domains[0]
    if torus.kind != "torus" or len(slice_.domains) > 1:
        raise InputError(f"layouts of {slice_.spec}: they are laid on the axes of one torus, and this is none")
    if tokens < 0:
        raise InputError(f"tokens = {tokens}: must not be negative")
    every = (
        _layer_time(torus, layer, tokens, axes, weight_bytes, activation_bytes, link, latency_s)
        for axes in _ways(torus)
    )
    found = [time for time in every if time is not None]
    if not found:
        raise InputError(f"no axis of {slice_.spec} divides d_model = {layer.d_model} and d_ff = {layer.d_ff}")
    return sorted(found, key=lambda t: (t.time_s, t.gathered, t.x))


_Ways = tuple[list[int], list[int], list[int]]
"""Axes that weights are gathered over, that split d_model, and that split d_ff."""


def _layer_time(
    torus: LinkDomain,
    layer: FeedForward,
    tokens: float,
    axes: _Ways,
    weight_bytes: float,
    activation_bytes: float,
    link: float,
    latency_s: float,
) -> LayoutTime | None:
    """Collectives of a layer, its axes used so; None if a split does not divide it."""
    g_domain, x_domain, f_domain = (_axes(torus, chosen) for chosen in axes)
    g, x, f = g_domain.size, x_domain.size, f_domain.size
    if layer.d_model % (x * g) or layer.d_ff % f:
        return None
    n, way = tokens / g, {"link": link, "latency_s": latency_s}

    def both(size: float, domain: LinkDomain) -> float:
        return float(all_gather_s(size, [domain], **way)) + float(reduce_scatter_s(size, [domain], **way))

    weights = layer.matrices * layer.d_model * layer.d_ff * weight_bytes / (x * f)
    weights_s = float(all_gather_s(weights, [g_domain], **way))
    # Gate and up are summed over x apart, their product is gathered once.
    inner = n * layer.d_ff / f * activation_bytes
    tokens_s = both(n * layer.d_model * activation_bytes / x, f_domain) + both(inner, x_domain)
    tokens_s += (layer.matrices - 2) * float(reduce_scatter_s(inner, [x_domain], **way))
    name: Name = "gathered" if g > 1 else "2d-stationary" if x > 1 else "1d-stationary"
    return LayoutTime(name, x, g, weights_s, tokens_s)


def _ways(torus: LinkDomain) -> Iterator[_Ways]:
    """Every way to use the axes of a torus."""
    for over_g, rest in _splits([i for i, n in enumerate(torus.dims) if n > 1]):
        for over_x, over_f in _splits(rest):
            if over_f or not rest:  # splitting d_model alone needs no second dimension: it is the mirror image of 1D
                yield over_g, over_x, over_f


def _splits(axes: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Every way to take some of the axes, and what is left."""
    for k in range(len(axes) + 1):
        for chosen in combinations(axes, k):
            yield list(chosen), [a for a in axes if a not in chosen]


def single_axes(torus: LinkDomain) -> list[LinkDomain]:
    """Each axis longer than one chip, on its own."""
    return [_axes(torus, [i]) for i, n in enumerate(torus.dims) if n > 1]


def _axes(torus: LinkDomain, chosen: list[int]) -> LinkDomain:
    """The torus along some of its axes."""
    dims = tuple(n if i in chosen else 1 for i, n in enumerate(torus.dims))
    wraps = tuple(w and i in chosen for i, w in enumerate(torus.wraps))
    return LinkDomain("torus", dims, wraps, torus.bandwidth_bytes_per_s, torus.latency_s, torus.network)
