"""Number formats of a deployment: what weights, products and the KV cache are held in, scales counted.

A precision is written as one word::

    fp32  bf16  fp16  fp8  int8  fp4  int4       one format, see below
    nvfp4  mxfp4                                 fp4 with one scale per 16 (activations too) or per 32 (weights only)
    w<W>a<A>                                     weights W, activations (the products' inputs) A
    …kv<K>                                       KV-cache format; without it the cache stays 16-bit
    …-experts                                    routed experts alone are in this format, all other weights stay 16-bit
    …g<N>                                        weights per scale; for fp8, N x N weights; g0: no scales at all, KV included

``W``, ``A``, ``K`` are 16, 8, 4 or a format's name (nvfp4 and mxfp4 for ``W`` alone); 8 and 4 mean the family (``fp`` or ``int``) of the leading word,
``int`` when there is none. ``fp8`` and ``int8`` alone are weights *and* activations, ``int4`` and ``fp4`` alone are
weights only (16-bit products), because that is what checkpoints of that name hold; under ``fp32`` nothing is 16-bit. ``fp8g128`` is
the block-scaled FP8 of DeepSeek-V3's checkpoint. Examples: ``w8a16kv8``,
``w4a16kv8``, ``w8a8kv8``, ``fp8kv8``, ``wfp8a16kvfp8``, ``w4a16kv4g0`` (4.0 bits, as napkins count them).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

from simulator.errors import InputError, nearest

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]
BITS: dict[str, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}

#: Where products go on a chip without units for a format: the next one that loses nothing, in this order.
WIDER: dict[str, tuple[Dtype, ...]] = {
    "int4": ("int8", "bf16", "fp16"),
    "fp4": ("fp8", "bf16", "fp16"),
    "int8": ("bf16", "fp16"),
    "fp8": ("bf16", "fp16"),
    "fp32": (),
    "bf16": ("fp16",),
    "fp16": ("bf16",),
}

#: Weights that share a scale, and bytes of the scale: int4 as AWQ and GPTQ ship it (assumed), fp4 as NVFP4 (recalled).
INT4_GROUP, INT4_SCALE_BYTES = 128, 2
FP4_GROUP, FP4_SCALE_BYTES = 16, 1
CHANNEL_SCALE_BYTES = 2
"""One 16-bit scale per output channel of 8-bit weights (assumed; per-tensor scales are smaller still)."""
BLOCK_SCALE_BYTES = 4
"""One FP32 scale per block of FP8 weights, as in the checkpoints of DeepSeek-V3 and GLM-5."""
MXFP4_GROUP = 32
KV_SCALE_BYTES = 2
"""One 16-bit scale per token and head for each of K and V in an integer cache (assumed). fp8 caches have one per tensor."""

_BLOCKS = {"nvfp4": FP4_GROUP, "mxfp4": MXFP4_GROUP}
_EXAMPLES = ("bf16", "fp16", "fp8", "int8", "int4", "w8a16kv8", "w4a16kv8", "w8a8kv8", "w4a8kv4", "fp8kv8")
_FORMAT = "fp32|bf16|fp16|fp8|int8|fp4|int4"
_WEIGHTS = f"{_FORMAT}|nvfp4|mxfp4"
_WORD = re.compile(
    rf"(?P<word>{_WEIGHTS})?"
    rf"(?:w(?P<w>16|8|4|{_WEIGHTS})a(?P<a>16|8|4|{_FORMAT}))?"
    rf"(?:kv(?P<kv>16|8|4|{_FORMAT}))?"
    r"(?:g(?P<group>\d+))?"
    r"(?P<only>-experts)?"
)


@dataclass(frozen=True)
class Precision:
    """Formats of weights, activations and KV cache.

    Attributes
    ----------
    weights, activations, kv
        storage of linear layers' weights; format of the products' inputs, and so of the arithmetic; KV cache.
    group_size
        weights per scale of 4-bit formats and int8, side of a square of weights per scale of fp8; None: 128 for int4,
        16 for fp4, a whole column for 8-bit formats. 0: no scales are counted, KV included.
    quantize_head
        whether embedding and output head are held in ``weights`` too; engines keep them 16-bit.
    experts_only
        whether ``weights`` and ``activations`` are those of routed experts alone, as released for gpt-oss and Kimi-K2.5;
        all other layers are held and computed in 16 bits.

    >>> parse_precision("w4a16kv8").matrix_bytes(8192, 1024) * 8 / (8192 * 1024)  # bits per weight
    4.125
    >>> parse_precision("w4a16kv8g32").matrix_bytes(8192, 1024) * 8 / (8192 * 1024)
    4.5
    """

    weights: Dtype = "bf16"
    activations: Dtype = "bf16"
    kv: Dtype = "bf16"
    group_size: int | None = None
    quantize_head: bool = False
    experts_only: bool = False

    def __post_init__(self) -> None:
        """Check the formats."""
        for name in ("weights", "activations", "kv"):
            value = getattr(self, name)
            if value not in BITS:
                raise InputError(f"precision.{name} = {value!r}{nearest(str(value), BITS)}")
        if self.group_size is not None and self.group_size < 0:
            raise InputError(f"precision.group_size = {self.group_size}: must be 0 (no scales) or positive")
        if self.experts_only and self.quantize_head:
            raise InputError("precision: quantize_head and experts_only contradict each other")

    @cached_property
    def wide(self) -> Dtype:
        """The format of residuals, norms, attention arithmetic and unquantised matrices: 16-bit, or fp32 with fp32 activations."""
        if self.activations == "fp32":
            return "fp32"
        for dtype in (self.activations, self.weights, self.kv):
            if dtype in {"bf16", "fp16"}:
                return dtype
        return "bf16"

    @cached_property
    def wide_bytes(self) -> float:
        """Bytes of one element of :attr:`wide`."""
        return BITS[self.wide] / 8

    @cached_property
    def input_bytes(self) -> float:
        """Bytes of one element going into a linear layer."""
        return BITS[self.activations] / 8

    @property
    def name(self) -> str:
        """A word that :func:`parse_precision` reads back as this precision (``quantize_head`` aside)."""
        group = "" if self.group_size is None else f"g{self.group_size}"
        group += "-experts" if self.experts_only else ""
        if self.weights == self.activations and BITS[self.weights] > 4:
            default = self.weights if self.weights in {"fp16", "fp32"} else "bf16"
            kv = "" if self.kv == default else f"kv{'8' if self.kv == self.weights else self.kv}"
            return f"{self.weights}{kv}{group}"
        return f"w{_short(self.weights)}a{_short(self.activations)}kv{_short(self.kv)}{group}"

    def matrix_bytes(self, n_in: float, n_out: float, *, head: bool = False) -> float:
        """Stored bytes of an ``[n_in, n_out]`` weight matrix with its scales; ``head``: embedding or output head. [bytes]"""
        if head and not self.quantize_head:
            return n_in * n_out * self.wide_bytes
        values = n_in * n_out * BITS[self.weights] / 8
        if self.group_size == 0 or BITS[self.weights] >= 16:
            return values
        match self.weights:
            case "int4":
                return values + n_out * -(-n_in // (self.group_size or INT4_GROUP)) * INT4_SCALE_BYTES
            case "fp4":
                return values + n_out * -(-n_in // (self.group_size or FP4_GROUP)) * FP4_SCALE_BYTES
            case "fp8" if self.group_size:
                blocks = -(-n_in // self.group_size) * -(-n_out // self.group_size)
                return values + blocks * BLOCK_SCALE_BYTES
            case "int8" if self.group_size:
                return values + n_out * -(-n_in // self.group_size) * INT4_SCALE_BYTES
            case _:
                return values + n_out * CHANNEL_SCALE_BYTES

    def kv_head_bytes(self, head_dim: int) -> float:
        """Bytes of one token's key *and* value in one KV head of one layer, scales included. [bytes]

        >>> parse_precision("w8a16kv8").kv_head_bytes(128), parse_precision("w8a16kv8g0").kv_head_bytes(128)
        (260.0, 256.0)
        """
        scale = 0.0
        if self.group_size != 0:
            if self.kv in {"int8", "int4"}:
                scale = KV_SCALE_BYTES
            elif self.kv == "fp4":
                scale = -(-head_dim // FP4_GROUP) * FP4_SCALE_BYTES
        return 2 * (head_dim * BITS[self.kv] / 8 + scale)

    def latent_bytes(self, kv_rank: int, rope_dim: int, *, sparse: bool = False) -> float:
        """Bytes of one token's latent in one layer, scales included; ``sparse``: in the layout of sparse kernels. [bytes]

        >>> Precision().latent_bytes(512, 64), parse_precision("fp8kv8").latent_bytes(512, 64, sparse=True)
        (1152.0, 656.0)
        """
        if self.kv == "fp8" and sparse and self.group_size != 0:
            return kv_rank + -(-kv_rank // 128) * 4 + rope_dim * self.wide_bytes
        return self.kv_head_bytes(kv_rank + rope_dim) / 2

    def index_key_bytes(self, head_dim: int) -> float:
        """Bytes of one token's index key in one layer: FP8 with an FP32 scale, whatever the precision. [bytes]"""
        return head_dim + (0.0 if self.group_size == 0 else 4.0)


def parse_precision(text: str, *, quantize_head: bool = False) -> Precision:
    """Read a precision word (grammar at the top of this module).

    Raises
    ------
    InputError
        If the word does not follow the grammar, or says one thing twice.

    >>> parse_precision("fp8kv8")
    Precision(weights='fp8', activations='fp8', kv='fp8', group_size=None, quantize_head=False, experts_only=False)
    """
    found = _WORD.fullmatch(text.strip().lower())
    if found is None or not any(found.group(part) for part in ("word", "w")):
        raise InputError(
            f"precision = {text!r}: not a precision; write one format ({', '.join(get_args(Dtype))}) or "
            f"w<4|8|16>a<8|16>, then kv<4|8|16> and g<weights per 4-bit scale> if needed{nearest(text, _EXAMPLES)}"
        )
    word, w, a, kv, group = (found.group(part) for part in ("word", "w", "a", "kv", "group"))
    if word and w:
        raise InputError(f"precision = {text!r}: says the weights twice, as {word!r} and as 'w{w}'; drop one")
    block = next((x for x in (word, w) if x in _BLOCKS), None)
    if block:
        if group is not None:
            raise InputError(f"precision = {text!r}: {block} has a scale per {_BLOCKS[block]} weights; drop 'g{group}'")
        group = str(_BLOCKS[block])
        word, w = (None if x is None else x.removeprefix("nv").removeprefix("mx") for x in (word, w))
    wide: Dtype = "fp16" if word == "fp16" else "fp32" if word == "fp32" else "bf16"
    family = "fp" if word in {"fp8", "fp4"} else "int"
    if word:
        weights = _dtype(word, wide, family)
        activations = wide if BITS[weights] == 4 and block != "nvfp4" else weights
    else:
        weights, activations = _dtype(w, wide, family), _dtype(a, wide, family)
    return Precision(
        weights=weights,
        activations=activations,
        kv=_dtype(kv or "16", wide, family),
        group_size=None if group is None else int(group),
        quantize_head=quantize_head,
        experts_only=found["only"] is not None,
    )


def _dtype(written: str, wide: Dtype, family: str) -> Dtype:
    """Turn 16, 8, 4 or a format's name into the format."""
    name = wide if written == "16" else f"{family}{written}" if written in {"8", "4"} else written
    return next(dtype for dtype in cast("tuple[Dtype, ...]", get_args(Dtype)) if dtype == name)


def _short(dtype: Dtype) -> str:
    """The shortest token for a format outside a word: int8 is 8, int4 is 4, bf16 is 16."""
    return {"bf16": "16", "int8": "8", "int4": "4"}.get(dtype, dtype)
