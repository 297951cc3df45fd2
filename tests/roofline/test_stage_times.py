"""Stages put together from single layers are the stages priced op by op."""

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.compile import step_time_s
from simulator.roofline.memory import Memory, memory_fit
from simulator.roofline.ops import StepShape
from simulator.roofline.pipeline import Shardings, shard, windows
from simulator.roofline.precision import parse_precision
from simulator.roofline.search import shardings
from simulator.roofline.sharding import parse_sharding
from simulator.roofline.stage_times import StepTimes

# Every kind of layer: plain, tied, parallel with multi-query attention, windowed, chunked, biased with sinks and experts,
# latent attention with dense layers first, sparse attention, recurrent.
MODELS = (
    "llama-3-70b",
    "llama-3.2-1b",
    "palm-8b",
    "gemma-3-27b",
    "llama-4-scout",
    "gpt-oss-120b",
    "deepseek-v3",
    "glm-5",
    "qwen3-next-80b-a3b",
    "nemotron-h-8b",
)
DENSE = MODELS[:4]
SLICES = ("h100-sxm:8", "h100-sxm:2x8", "tpu-v5e:4x4", "gb200:8")

steps = st.builds(
    lambda decode, chunk: (decode, chunk),
    st.none() | st.tuples(st.integers(1, 300), st.integers(1, 20_000)),
    st.none() | st.tuples(st.integers(1, 5000), st.integers(0, 20_000), st.booleans()),
).filter(any)


def shape(d, decode, chunk):
    step = StepShape()
    if decode:
        step += StepShape.decode(*decode, **windows(d))
    if chunk:
        tokens, past, completes = chunk
        step += StepShape.prefill(tokens, past, completes=completes, **windows(d))
    return step


LAYOUTS = (
    {"layout": "2d", "kv_layout": "batch"},
    {"layout": "2d", "looped_exchange": True},
    {"layout": "gathered"},
    {"kv_layout": "batch"},
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MODELS),
    st.sampled_from(SLICES),
    st.sampled_from(["bf16", "fp8kv8", "w4a16kv8"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    steps,
    st.data(),
)
def test_time_and_memory_of_stages_are_those_of_their_ops(model, spec, precision, overlap, step, data):
    arch, slice_ = load_model(model), resolve_slice(spec)
    moe = any(g.ffn is not None and g.ffn.kind == "moe" for g in arch.layers)
    chosen = data.draw(st.sampled_from(shardings(slice_.n_chips, experts=moe, prompts=True)))
    dense = model in DENSE and spec.startswith("tpu")
    layout = data.draw(st.sampled_from([{}, *LAYOUTS])) if dense else {}
    try:
        d = shard(
            arch, slice_, chosen, precision=parse_precision(precision), overlap=overlap, expert_imbalance=1.25, **layout
        )
    except InputError:
        reject()
    for part, stage in zip(d.parts, d.stages, strict=True):
        asked = shape(d, *step)
        assert d.part_times.step_time_s(part, asked) == pytest.approx(step_time_s(stage, asked), rel=1e-12)
        ours, plain = d.part_memory.fit(part), memory_fit(stage)
        assert_alike(ours, plain)


def assert_alike(one, other):
    assert one.groups == other.groups
    numbers, others = ({name: value for name, value in vars(fit).items() if name != "groups"} for fit in (one, other))
    assert numbers == pytest.approx(others, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "text"), [("llama-3-70b", "tp4pp4"), ("palm-8b", "tp16"), ("gemma-3-27b", "tp8pp2")])
def test_layouts_on_a_torus(model, text, layout):
    d = shard(load_model(model), resolve_slice("tpu-v5e:4x4"), parse_sharding(text), overlap=0.1, **layout)
    for part, stage in zip(d.parts, d.stages, strict=True):
        for step in (StepShape.decode(50, 3000, **windows(d)), StepShape.prefill(1000, 50, **windows(d))):
            assert d.part_times.step_time_s(part, step) == pytest.approx(step_time_s(stage, step), rel=1e-12)
        assert_alike(d.part_memory.fit(part), memory_fit(stage))


def laid_or_why_not(laid, sharding):
    try:
        return laid.shard(sharding)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(("model", "spec"), [("deepseek-v3", "h200-sxm:2x8"), ("qwen3-next-80b-a3b", "tpu-v5p:2x2x2")])
def test_what_shardings_share_does_not_change_them(model, spec):
    arch, slice_ = load_model(model), resolve_slice(spec)
    together = Shardings(arch, slice_, precision=parse_precision("fp8"))
    compared = 0
    for sharding in shardings(slice_.n_chips, experts=True, prompts=True):
        alone = laid_or_why_not(Shardings(arch, slice_, precision=parse_precision("fp8")), sharding)
        d = laid_or_why_not(together, sharding)
        if isinstance(alone, str):
            assert d == alone
            continue
        assert d.memory == alone.memory
        for step in (StepShape.decode(9, 777, **windows(d)), StepShape.prefill(1000, 50, **windows(d))):
            times = ([x.part_times.step_time_s(part, step) for part in x.parts] for x in (d, alone))
            assert next(times) == next(times)
        compared += 1
    assert compared > 8


def test_a_layer_is_priced_once_however_many_stages_have_it(monkeypatch):
    laid = Shardings(load_model("deepseek-v3"), resolve_slice("h200-sxm:2x8"))
    priced = []
    price = StepTimes._price
    monkeypatch.setattr(StepTimes, "_price", lambda self, step: priced.append(step) or price(self, step))
    looked = []
    look = Memory.__init__
    monkeypatch.setattr(Memory, "__init__", lambda self, d, **rest: looked.append(d.chips) or look(self, d, **rest))
    step = StepShape.decode(8, 1000)
    found = [laid.shard(s) for s in shardings(16)]
    for d in found:
        for part in d.parts:
            d.part_times.step_time_s(part, step)
    assert sum(len(d.parts) for d in found) == 57
    assert len(priced) == len(set(looked)) == len(looked) == 5  # tp1, 2, 4, 8 and 16
