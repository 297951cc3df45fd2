"""What the tables of the scaling book share: its constants on our chips, and roofline steps without interconnect."""

from dataclasses import replace

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup, MoEFFN, SoftmaxAttention
from simulator.catalog.chips import IDEAL, ChipSpec, load_chip
from simulator.catalog.models import load_model
from simulator.catalog.records import Quantity
from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.precision import parse_precision

V5E_LINK, V5E_BIDI, V4P_LINK, HOP_S = 4.5e10, 9e10, 4.5e10, 1e-6
"""ICI of the book: one way per link, both ways per axis, v4p one way, and one hop. [bytes/s, s]"""


def chip_with(
    name: str,
    *,
    hbm: float | None = None,
    capacity: float | None = None,
    peaks: dict[str, float] | None = None,
) -> ChipSpec:
    """Return a catalogue chip with the constants a source uses in place of the datasheet's. [bytes/s, bytes, FLOP/s]"""
    chip = load_chip(name)

    def quantity(value: float, unit: str) -> Quantity:
        known = chip.memory.hbm_bandwidth
        return known.model_copy(
            update={"value": value, "unit": unit, "source": "the reproduced text", "kind": "assumed", "note": ""}
        )

    memory = dict[str, Quantity]()
    if hbm is not None:
        memory["hbm_bandwidth"] = quantity(hbm, "B/s")
    if capacity is not None:
        memory["hbm_capacity"] = quantity(capacity, "B")
    compute = {str(dtype): rate for dtype, rate in chip.compute.items()}
    compute |= {dtype: quantity(rate, "FLOP/s") for dtype, rate in (peaks or {}).items()}
    return chip.model_copy(update={"memory": chip.memory.model_copy(update=memory), "compute": compute})


def v5e(hbm: float = 8.1e11) -> ChipSpec:
    """Return the book's v5e: 16e9 B; it uses 8.1e11 and 8.2e11 B/s of HBM in turns."""
    return chip_with("tpu-v5e", hbm=hbm, capacity=16e9)


def textbook(
    model: str | Architecture,
    spec: str,
    precision: str = "bf16",
    *,
    chip: ChipSpec | None = None,
) -> Deployment:
    """Deploy a model as a textbook roofline does.

    Full rates, no scales, embedding and head in the weights' format, only weights and KV crossing HBM, the cache spread
    evenly.
    """
    found = resolve_slice(spec)
    return Deployment(
        architecture=load_model(model) if isinstance(model, str) else model,
        slice=found if chip is None else replace(found, chip=chip),
        precision=parse_precision(f"{precision}g0", quantize_head=True),
        efficiency=IDEAL,
        activation_traffic=False,
        kv_layout="even",
    )


def step_without_links_s(d: Deployment, step: StepShape) -> float:
    """Time of a step with every collective left out. [s]"""
    return sum(float(op.time_s) for op in step_ops(d, step) if op.kind != "collective")


def axis(n: int, *, wraps: bool, link: float = V5E_LINK, hop_s: float = HOP_S) -> LinkDomain:
    """One torus axis of ``n`` chips."""
    return LinkDomain("torus", (n,), (wraps,), link, hop_s)


def grid(*dims: int, wraps: bool, link: float = V5E_LINK) -> LinkDomain:
    """A torus of these axes."""
    return LinkDomain("torus", dims, (wraps,) * len(dims), link, HOP_S)


def decoder(
    *,
    n_layers: int,
    d_model: int,
    d_ff: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    tied: bool = False,
    n_norms: int = 0,
    experts: tuple[int, int] | None = None,
    gated: bool = True,
) -> Architecture:
    """Describe a decoder by its sizes, as an exercise does; ``experts``: how many, and how many a token uses."""
    dense = DenseFFN(d_ff=d_ff, gated=gated)
    ffn = dense if experts is None else MoEFFN(n_experts=experts[0], top_k=experts[1], d_ff=d_ff, gated=gated)
    mixer = SoftmaxAttention(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)
    return Architecture(
        name="textbook",
        family="textbook",
        d_model=d_model,
        vocab_size=vocab_size,
        tied_embeddings=tied,
        layers=(LayerGroup(count=n_layers, mixer=mixer, ffn=ffn, n_norms=n_norms),),
        final_norm=False,
        source="the reproduced text",
        kind="assumed",
    )


def with_kv_heads(model: str, n_kv_heads: int, *, head_dim: int | None = None) -> Architecture:
    """Return a catalogue model with another number of KV heads in every layer (and another head width)."""
    arch = load_model(model)
    layers = []
    for group in arch.layers:
        if not isinstance(group.mixer, SoftmaxAttention):
            raise TypeError(f"{model} has layers without KV heads")
        changes = {"n_kv_heads": n_kv_heads} | ({} if head_dim is None else {"head_dim": head_dim})
        layers.append(group.model_copy(update={"mixer": group.mixer.model_copy(update=changes)}))
    return arch.model_copy(update={"layers": tuple(layers)})
