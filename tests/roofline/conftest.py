"""Builders the roofline tests share."""

import math
from dataclasses import replace

import pytest

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup, SoftmaxAttention
from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import LinkDomain, resolve_slice
from simulator.roofline.deployment import Deployment
from simulator.roofline.precision import parse_precision


def _architecture(
    *, L=4, D=512, H=8, K=4, hd=64, F=1024, V=1000, tied=False, gated=True, n_norms=2, name="small", **attention
):
    layer = LayerGroup(
        count=L,
        mixer=SoftmaxAttention(n_heads=H, n_kv_heads=K, head_dim=hd, **attention),
        ffn=DenseFFN(d_ff=F, gated=gated),
        n_norms=n_norms,
    )
    return Architecture(
        name=name,
        family="test",
        d_model=D,
        vocab_size=V,
        tied_embeddings=tied,
        layers=(layer,),
        final_norm=n_norms > 0,
        source="test",
        kind="assumed",
    )


@pytest.fixture(scope="session")
def architecture():
    """A small dense decoder, by its symbols."""
    return _architecture


@pytest.fixture(scope="session")
def without_norms():
    """The named model without norm weights, which napkins and textbooks leave out."""

    def build(name):
        model = load_model(name)
        layers = tuple(group.model_copy(update={"n_norms": 0}) for group in model.layers)
        return model.model_copy(update={"layers": layers, "final_norm": False})

    return build


@pytest.fixture(scope="session")
def rounded():
    """A model whose streamed parameters are a book's round number: the head's width takes up the difference."""

    def build(model: Architecture, parameters: float):
        group, D = model.layers[0], model.d_model
        a, f = group.mixer, group.ffn
        layer = 2 * D * a.head_dim * (a.n_heads + a.n_kv_heads) + (3 if f.gated else 2) * D * f.d_ff
        columns = round((parameters - model.n_layers * layer) / D)
        assert columns > 0
        return model.model_copy(update={"vocab_size": columns, "tied_embeddings": True})

    return build


@pytest.fixture(scope="session")
def make_slice():
    """A catalogue slice with other constants: compute by dtype, HBM bandwidth and capacity, links or none."""

    def build(spec, *, flops=None, bandwidth=None, capacity=None, links=True):
        found = resolve_slice(spec)
        chip, memory = found.chip, found.chip.memory
        if flops:
            one = next(iter(chip.compute.values()))
            rates = {t: one.model_copy(update={"value": v, "unit": "FLOP/s"}) for t, v in flops.items()}
            chip = chip.model_copy(update={"compute": rates})
        for field, value, unit in (("hbm_bandwidth", bandwidth, "B/s"), ("hbm_capacity", capacity, "B")):
            if value:
                quantity = getattr(memory, field).model_copy(update={"value": value, "unit": unit})
                memory = memory.model_copy(update={field: quantity})
        chip = chip.model_copy(update={"memory": memory})
        domains = found.domains
        if not links:  # textbook rooflines of a step leave the interconnect out
            domains = (LinkDomain("switched", (found.n_chips,), (False,), math.inf, 0.0),)
        return replace(found, chip=chip, domains=domains)

    return build


@pytest.fixture(scope="session")
def textbook():
    """A deployment as textbooks price it: the datasheet, weights and keys alone, KV spread evenly."""

    def build(model, slice_, precision, *, quantize_head=True, **settings):
        settings = {"efficiency": IDEAL, "activation_traffic": False, "kv_layout": "even"} | settings
        return Deployment(model, slice_, parse_precision(precision, quantize_head=quantize_head), **settings)

    return build
