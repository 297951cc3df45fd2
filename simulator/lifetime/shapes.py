"""From a number of parameters to an architecture that a cost model can price.

A loss law knows N; a serving cost needs layers, heads and widths. The rule ``llama-3`` makes decoders of the kind of Llama 3: heads
of 128, eight key-value heads, a gated feed-forward of 3.5 widths, untied embeddings of 128,256 words, and 120 columns of
width per layer. Llama 3's own members have 102 to 130 (8B: 128, 70B: 102, 405B: 130); the 8B comes out exactly. Widths are
multiples of 1,024, so that eight chips share the heads evenly; the number of layers makes up the rest.
"""

import math
from collections.abc import Callable, Sequence

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup, SoftmaxAttention
from simulator.catalog.parameters import count
from simulator.errors import InputError, nearest

_WIDTH_PER_LAYER = 120
_VOCABULARY = 128_256
_HEAD = 128
_WIDTHS = (512, 1024, *range(2048, 65537, 1024))

ShapeRule = Callable[[float], Architecture]


def llama_3_shape(parameters: float) -> Architecture:
    """Architecture of about ``parameters`` parameters by the rule ``llama-3``.

    Of every width the number of layers that comes nearest is looked at; the width is taken whose proportions are nearest to the rule's.

    >>> shape = llama_3_shape(8.03e9)
    >>> shape.d_model, shape.n_layers
    (4096, 32)

    Raises
    ------
    InputError
        Below 0.15 or above 10,000 billion, where no width gives such proportions.
    """
    if not 1.5e8 <= parameters <= 1e13:
        raise InputError(f"shape rule llama-3: {parameters:.4g} parameters: from 0.15 to 10,000 billion")
    choices = []
    for width in _WIDTHS:
        one, two = _llama_3(width, 1), _llama_3(width, 2)
        per_layer = count(two).total - count(one).total
        layers = max(1, round((parameters - count(one).total) / per_layer) + 1)
        off = abs(math.log(width / layers / _WIDTH_PER_LAYER))
        choices.append((off, width, layers))
    _, width, layers = min(choices)
    return _llama_3(width, layers)


def _llama_3(width: int, layers: int) -> Architecture:
    heads = width // _HEAD
    return Architecture(
        name=f"llama-3-like-{width}x{layers}",
        family="llama",
        d_model=width,
        vocab_size=_VOCABULARY,
        tied_embeddings=False,
        layers=(
            LayerGroup(
                count=layers,
                mixer=SoftmaxAttention(n_heads=heads, n_kv_heads=min(8, heads), head_dim=_HEAD),
                ffn=DenseFFN(d_ff=width * 7 // 2),
            ),
        ),
        source="shape rule llama-3",
        kind="assumed",
    )


SHAPE_RULES: dict[str, ShapeRule] = {"llama-3": llama_3_shape}
"""Every rule, by name."""


def shape_rule(name: str) -> ShapeRule:
    """Return a rule by name.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in SHAPE_RULES:
        raise InputError(f"unknown shape rule {name!r}{nearest(name, SHAPE_RULES)}")
    return SHAPE_RULES[name]


def distinct_shapes(rule: ShapeRule, sizes: Sequence[float]) -> list[tuple[float, Architecture]]:
    """Architectures of several sizes, smallest first and each once, with the parameters they really have."""
    found = {}
    for size in sizes:
        shape = rule(size)
        found[float(count(shape).total)] = shape
    return sorted(found.items())
