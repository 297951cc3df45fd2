"""Two-dimensional and gathered layouts of whole models, and attention spread over sequences (Pope et al. §3.2–3.3)."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup
from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import report
from simulator.roofline.compile import compile_step_cost, hidden_s, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.layouts import FeedForward, layer_layouts, parse_layout
from simulator.roofline.memory import weights_bytes
from simulator.roofline.ops import StepShape, dense_ops, step_op_groups, step_ops
from simulator.roofline.precision import parse_precision

POD, GRID = resolve_slice("tpu-v4:4x4x4"), resolve_slice("tpu-v5e:4x4")
LAYOUTS = ["1d", "2d", "2d-x", "2d-xy", "2d-xz", "gathered", "gathered-y", "gathered-xz", "gathered-xyz"]
STEPS = {
    "decode": StepShape.decode(128, 1000),
    "prefill": StepShape.prefill(4096),
    "chunk": StepShape.prefill(512, 3000),
    "mixed": StepShape.decode(70, 2000) + StepShape.prefill(300, 900),
}


@pytest.fixture(scope="module")
def model(architecture):
    """A model that 64 chips divide in every way."""
    return architecture(D=4096, H=64, K=4, hd=64, F=16384, V=32000)


def total(ops, figure, copied):
    return sum(float(getattr(op, figure)) - float(getattr(op, copied)) for op in ops)


@given(
    layout=st.sampled_from(LAYOUTS),
    kv_layout=st.sampled_from(["heads", "even", "batch"]),
    step=st.sampled_from(list(STEPS)),
    heads=st.sampled_from([(64, 1, False), (64, 64, False), (128, 8, True), (64, 2, True)]),
    gated=st.booleans(),
    parallel=st.booleans(),
    word=st.sampled_from(["bf16", "w8a16kv8", "int8"]),
    data=st.data(),
)
def test_work_is_conserved(architecture, layout, kv_layout, step, heads, gated, parallel, word, data):
    H, K, bias = heads
    arch = architecture(D=4096, H=H, K=K, hd=64, F=16384, gated=gated, qkv_bias=bias, o_bias=bias)
    arch = arch.model_copy(update={"parallel_attention_ffn": parallel})
    if kv_layout == "batch" and layout.startswith("gathered"):
        return
    looped = layout.startswith("2d") and data.draw(st.booleans())
    d = Deployment(arch, POD, parse_precision(word), kv_layout=kv_layout, layout=layout, looped_exchange=looped)
    one = Deployment(arch, resolve_slice("tpu-v4:1"), parse_precision(word))
    shape = STEPS[step]
    split, whole = step_ops(d, shape), step_ops(one, shape)
    assert 64 * total(split, "flops", "copied_flops") == pytest.approx(total(whole, "flops", "copied_flops"), rel=1e-9)
    for figure, copied in (("weight_bytes", "copied_weight_bytes"), ("kv_write_bytes", "copied_kv_bytes")):
        ops = [[op for op in found if op.kind in {"matmul", "elementwise"}] for found in (split, whole)]
        assert 64 * total(ops[0], figure, copied) == pytest.approx(total(ops[1], figure, copied), rel=1e-9)
    reads = [[op for op in found if op.kind == "attention"] for found in (split, whole)]
    assert 64 * total(reads[0], "kv_read_bytes", "copied_kv_bytes") == pytest.approx(
        total(reads[1], "kv_read_bytes", "copied_kv_bytes"), rel=1e-9
    )
    for op in split:
        assert min(op.copied_flops, op.copied_weight_bytes, op.copied_kv_bytes) >= -1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_chip_holds_its_share_of_the_weights(model, layout):
    without = model.model_copy(update={"layers": (model.layers[0].model_copy(update={"n_norms": 0}),)})
    without = without.model_copy(update={"final_norm": False})
    d = Deployment(without, POD, kv_layout="even", layout=layout)
    one = Deployment(without, resolve_slice("tpu-v4:1"))
    assert 64 * weights_bytes(d) == pytest.approx(weights_bytes(one), rel=1e-12)


def feed_forward_alone(F=16384, D=4096, *, gated=False):
    layer = LayerGroup(count=3, mixer=None, ffn=DenseFFN(d_ff=F, gated=gated), n_norms=0)
    return Architecture(
        name="blocks",
        family="test",
        d_model=D,
        vocab_size=64,
        tied_embeddings=True,
        layers=(layer,),
        final_norm=False,
        source="test",
        kind="assumed",
    )


@pytest.mark.parametrize("tokens", [64.0, 4096.0, 1e6])
@pytest.mark.parametrize("layout", ["2d-x", "2d-xy", "gathered-x", "gathered-xyz"])
def test_exchanges_of_a_block_are_those_of_the_formula(layout, tokens):
    # One layer's collectives, priced twice: by the ops of a deployment, and by the closed form of one feed-forward layer.
    d = Deployment(feed_forward_alone(), POD, efficiency=IDEAL, layout=layout)
    names = {"gather, scatter d_model", "gather, scatter columns", "all-gather, weights"}
    ours = sum(float(op.time_s) for op in dense_ops(d, tokens) if op.name in names) / 3
    x, g = d.model_chips, d.gathered_chips
    formula = next(t for t in layer_layouts(POD, FeedForward(4096, 16384), tokens) if (t.x, t.gathered) == (x, g))
    # The layer moves its two matrices apart, and the formula both at once: the same where bandwidth rules.
    assert ours == pytest.approx(formula.time_s, rel=1e-6 if x > 1 or tokens > 1e5 else 0.1)


def test_the_published_crossing_of_one_and_two_dimensions():
    # Scaling book: 64 chips of a 3D torus are below 72, 512 above, for F = 4D; many tokens gather the weights.
    def best(spec, tokens, layouts=("1d", "2d")):
        times = {}
        for layout in layouts:
            d = Deployment(feed_forward_alone(32768, 8192), resolve_slice(spec), efficiency=IDEAL, layout=layout)
            times[layout] = sum(
                float(o.time_s) for o in dense_ops(d, tokens) if o.kind == "collective" and "embed" not in o.name
            )
        return min(times, key=times.get)

    assert [best("tpu-v4:4x4x4", 65536.0), best("tpu-v4:8x8x8", 65536.0)] == ["1d", "2d"]
    assert best("tpu-v4:8x8x8", 8e6, ("1d", "2d", "gathered")) == "gathered"


@pytest.mark.parametrize("step", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "1d"])
def test_step_cost_equals_the_ops(model, layout, step):
    d = Deployment(model, POD, layout=layout, max_num_seqs=128, max_num_batched_tokens=4096)
    shape, table = STEPS[step], compile_step_cost(d)
    sizes = {name: int(value) if name in "nBPR" else value for name, value in vars(shape).items()}
    assert table.step_s(**sizes) == pytest.approx(step_time_s(d, shape), rel=1e-12)


def test_attention_over_sequences_waits_for_the_fullest_chip(model):
    d = Deployment(model, POD, layout="2d-x", kv_layout="batch")

    def attention(batch):
        found = {op.name: op for op in step_ops(d, StepShape.decode(batch, 2000))}
        return float(found["attention, decode"].kv_read_bytes)

    one = attention(1)
    assert attention(64) == one  # a chip each
    assert attention(65) == attention(128) == 2 * one
    assert attention(64) == pytest.approx(4 * 2000 * 4 * d.precision.kv_head_bytes(64))  # 4 layers, 4 whole heads
    even = Deployment(model, POD, layout="2d-x", kv_layout="even")
    assert step_time_s(d, StepShape.decode(64, 2000)) > step_time_s(even, StepShape.decode(64, 2000))


def test_attention_over_sequences_ends_the_copies_of_multi_query_heads():
    palm = load_model("palm-62b")
    slice_ = resolve_slice("tpu-v4:2x2x4")
    heads, batch = (Deployment(palm, slice_, kv_layout=how, layout="2d") for how in ("heads", "batch"))
    assert (heads.kv_copies, batch.kv_copies) == (16, 1)
    many = StepShape.decode(256, 8192)
    assert step_time_s(batch, many) < step_time_s(heads, many) / 2


def test_heads_that_do_not_divide_are_no_obstacle_to_attention_over_sequences():
    palm = load_model("palm-540b")  # 48 heads on 64 chips
    with pytest.raises(InputError, match="48 query heads are split over 64 chips"):
        Deployment(palm, POD, layout="2d")
    assert Deployment(palm, POD, layout="2d", kv_layout="batch").column_chips == 16


@given(
    layout=st.sampled_from(["2d", "2d-xy"]),
    overlap=st.floats(0, 1),
    looped=st.booleans(),
    step=st.sampled_from(list(STEPS)),
)
def test_nothing_hides_more_than_products_take(model, layout, overlap, looped, step):
    d = Deployment(model, POD, layout=layout, overlap=overlap, looped_exchange=looped)
    dense, _, _ = step_op_groups(d, STEPS[step])
    hidden = float(hidden_s(d, dense))
    collectives = sum(float(op.roofline_s) for op in dense if op.kind == "collective")
    assert 0 <= hidden <= min(collectives, sum(float(op.roofline_s) for op in dense if op.kind == "matmul")) + 1e-15
    found = report(d, STEPS[step])
    assert found.time_s == pytest.approx(step_time_s(d, STEPS[step]), rel=1e-9)
    assert found.time_s >= found.roofline_s
    assert all(row.time_s >= 0 for row in found.ops)


def test_a_looped_exchange_leaves_its_first_piece():
    d = Deployment(load_model("palm-540b"), POD, layout="2d-x", looped_exchange=True, kv_layout="batch")
    dense, _, _ = step_op_groups(d, StepShape.prefill(4096))
    columns = sum(float(op.roofline_s) for op in dense if op.name == "gather, scatter columns")
    assert float(hidden_s(d, dense)) == pytest.approx(3 / 4 * columns)  # products take longer here


@given(st.sampled_from(LAYOUTS[1:]), st.sampled_from(["decode", "prefill"]), st.floats(1.0, 8.0))
def test_faster_links_never_slow_a_layout(model, layout, step, factor):
    d = Deployment(model, POD, layout=layout)
    fast = tuple(replace(x, bandwidth_bytes_per_s=x.bandwidth_bytes_per_s * factor) for x in POD.domains)
    better = replace(d, slice=replace(POD, domains=fast))
    assert step_time_s(better, STEPS[step]) <= step_time_s(d, STEPS[step]) * (1 + 1e-12)
    tokens = np.arange(0, 300, dtype=float)
    times = sum(op.time_s for op in dense_ops(d, tokens))
    assert (np.diff(times) >= -1e-15).all()


@pytest.mark.parametrize("text", ["3d", "2d-", "2d-xx", "gathered-q", "1d-x", "", "2D"])
def test_words_that_are_no_layout(text):
    with pytest.raises(InputError, match="must be 1d, 2d or gathered"):
        parse_layout(text)


def test_letters_are_sorted_and_shown():
    assert str(parse_layout("2d-zx")) == "2d-xz"
    d = Deployment(load_model("llama-3-70b"), GRID, layout="2d")
    assert any("laid as 2d-x" in note for note in d.notes)


@pytest.mark.parametrize(
    ("model", "spec", "settings", "rule"),
    [
        ("llama-3-70b", "h100-sxm:8", {"layout": "2d"}, "axes of one torus, and its links are NVLink"),
        ("llama-3-70b", "h100-sxm:2x8", {"layout": "2d"}, "several levels of links"),
        ("llama-3-70b", "tpu-v5e:4x4", {"layout": "2d-z"}, "no axis z longer than one chip; axes: x, y"),
        ("llama-3-70b", "tpu-v5e:4x4", {"layout": "2d-xy"}, "leave one for the columns"),
        ("llama-3-8b", "tpu-v5e:1", {"layout": "2d"}, "leaves one for the columns"),
        ("deepseek-v3", "tpu-v5e:4x4", {"layout": "2d"}, "softmax attention and dense feed-forward blocks alone"),
        ("mixtral-8x7b", "tpu-v5e:4x4", {"layout": "gathered"}, "softmax attention and dense feed-forward"),
        ("llama-3-70b", "tpu-v5e:4x4", {"layout": "gathered-x", "kv_layout": "batch"}, "split over axis x already"),
        ("llama-3-70b", "tpu-v5e:4x4", {"layout": "2d", "sequence_parallel": False}, "contradicts"),
        ("llama-3-70b", "tpu-v5e:4x4", {"looped_exchange": True}, "only 2d layouts exchange in loops"),
        ("deepseek-v3", "tpu-v5e:4x4", {"kv_layout": "batch"}, "softmax attention alone"),
        ("qwen2.5-14b", "tpu-v5e:4x4", {"layout": "2d"}, "40 query heads are split over 16 chips"),
    ],
)
def test_what_cannot_be_is_refused_by_its_rule(model, spec, settings, rule):
    with pytest.raises(InputError, match=rule):
        Deployment(load_model(model), resolve_slice(spec), **settings)


def test_the_engines_refuse_what_their_tables_cannot_say():
    d = Deployment(load_model("llama-3-70b"), GRID, kv_layout="batch")
    with pytest.raises(InputError, match="waits for the chip with most sequences"):
        compile_step_cost(d)


def test_gathering_pays_for_many_tokens_alone():
    d = {x: Deployment(load_model("llama-3-70b"), POD, layout=x) for x in ("1d", "gathered-xyz")}
    few, many = StepShape.decode(64, 2048), StepShape.prefill(131072)
    assert step_time_s(d["gathered-xyz"], few) > 3 * step_time_s(d["1d"], few)
    gain = step_time_s(d["1d"], many) / step_time_s(d["gathered-xyz"], many)
    assert math.isfinite(gain)
    assert gain > 1
