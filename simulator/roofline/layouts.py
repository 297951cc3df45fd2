"""Communication of a feed-forward layer under the layouts of Pope et al. on a torus of N = X·YZ chips.

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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError
from simulator.roofline.collectives import all_gather_s, reduce_scatter_s

Name = Literal["1d-stationary", "2d-stationary", "gathered"]


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
    axes = [i for i, n in enumerate(torus.dims) if n > 1]
    found = []
    for over_g, rest in _splits(axes):
        for over_x, over_f in _splits(rest):
            if rest and not over_f:
                continue  # splitting d_model alone needs no second dimension: it is the mirror image of 1D
            g_domain, x_domain, f_domain = (_axes(torus, chosen) for chosen in (over_g, over_x, over_f))
            g, x, f = g_domain.size, x_domain.size, f_domain.size
            if layer.d_model % (x * g) or layer.d_ff % f:
                continue
            n = tokens / g

            def both(size: float, domain: LinkDomain) -> float:
                way = {"link": link, "latency_s": latency_s}
                return float(all_gather_s(size, [domain], **way)) + float(reduce_scatter_s(size, [domain], **way))

            weights = layer.matrices * layer.d_model * layer.d_ff * weight_bytes / (x * f)
            weights_s = float(all_gather_s(weights, [g_domain], link=link, latency_s=latency_s))
            hidden = layer.matrices - 1  # gate and up are summed over x apart, their product gathered once
            tokens_s = both(n * layer.d_model * activation_bytes / x, f_domain)
            inner = n * layer.d_ff / f * activation_bytes
            tokens_s += both(inner, x_domain)
            tokens_s += (hidden - 1) * float(reduce_scatter_s(inner, [x_domain], link=link, latency_s=latency_s))
            name: Name = "gathered" if g > 1 else "2d-stationary" if x > 1 else "1d-stationary"
            found.append(LayoutTime(name, x, g, weights_s, tokens_s))
    if not found:
        raise InputError(f"no axis of {slice_.spec} divides d_model = {layer.d_model} and d_ff = {layer.d_ff}")
    return sorted(found, key=lambda t: (t.time_s, t.gathered, t.x))


def _splits(axes: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Every way to take some of the axes, and what is left."""
    for k in range(len(axes) + 1):
        for chosen in combinations(axes, k):
            yield list(chosen), [a for a in axes if a not in chosen]


def _axes(torus: LinkDomain, chosen: list[int]) -> LinkDomain:
    """The torus along some of its axes."""
    dims = tuple(n if i in chosen else 1 for i, n in enumerate(torus.dims))
    wraps = tuple(w and i in chosen for i, w in enumerate(torus.wraps))
    return LinkDomain("torus", dims, wraps, torus.bandwidth_bytes_per_s, torus.latency_s, torus.network)
