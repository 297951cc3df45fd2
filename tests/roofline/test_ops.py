"""Physics of the ops: counts, conservation under sharding, bounds, limits, monotonicity."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup, SoftmaxAttention
from simulator.catalog.chips import IDEAL, Efficiency
from simulator.catalog.models import load_model, model_names, unpriceable_features
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import critical_batch, report, step_report
from simulator.roofline.compile import step_time_s, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import weights_bytes
from simulator.roofline.ops import StepShape, dense_ops, head_ops, step_ops
from simulator.roofline.precision import parse_precision

DENSE_MODELS = [name for name in model_names() if not unpriceable_features(load_model(name))]


@st.composite
def architectures(draw):
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
        groups.append(
            LayerGroup(
                count=draw(st.integers(1, 4)),
                mixer=SoftmaxAttention(
                    n_heads=kv_heads * draw(st.sampled_from([8, 16])),
                    n_kv_heads=kv_heads,
                    head_dim=draw(st.sampled_from([64, 128])),
                    qkv_bias=draw(st.booleans()),
                    o_bias=draw(st.booleans()),
                    qk_norm=draw(st.sampled_from(["none", "per_head", "full"])),
                ),
                ffn=DenseFFN(d_ff=draw(st.integers(1, 64)) * 256, gated=draw(st.booleans()), bias=draw(st.booleans())),
                n_norms=draw(st.integers(0, 4)),
            )
        )
    return Architecture(
        name="drawn",
        family="test",
        d_model=draw(st.integers(1, 32)) * 256,
        vocab_size=draw(st.integers(1, 200_000)),
        tied_embeddings=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        head_bias=draw(st.booleans()),
        learned_positions=draw(st.sampled_from([0, 2048])),
        layers=tuple(groups),
        source="test",
        kind="assumed",
    )


SLICES = ["h100-sxm:1", "h100-sxm:2", "h100-sxm:8", "tpu-v5e:1x1", "tpu-v5e:2x2", "tpu-v5e:2x4", "mi300x:8", "l40s:4"]
PRECISIONS = ["bf16", "fp8", "int8kv8", "w8a16kv8", "w4a16kv8", "w4a8kv4", "w4a16g32", "w4a16kv4g0"]
fraction, overhead = st.floats(0.05, 1), st.floats(0, 1e-3)
EFFICIENCIES = st.one_of(
    st.just(IDEAL), st.builds(Efficiency, *[fraction] * 5, *[st.floats(0, 1e-4)] * 2, overhead, st.floats(0, 1e-5))
)


@st.composite
def deployments(draw, *, slices=tuple(SLICES), efficiencies=EFFICIENCIES):
    return Deployment(
        draw(architectures()),
        resolve_slice(draw(st.sampled_from(slices))),
        parse_precision(draw(st.sampled_from(PRECISIONS)), quantize_head=draw(st.booleans())),
        efficiency=draw(efficiencies),
        overlap=draw(st.sampled_from([0.0, 0.5, 1.0])),
        kv_layout=draw(st.sampled_from(["heads", "even"])),
        activation_traffic=draw(st.booleans()),
    )


@st.composite
def steps(draw):
    step = StepShape()
    if draw(st.booleans()):
        step += StepShape.decode(draw(st.integers(1, 300)), draw(st.integers(1, 100_000)))
    for _ in range(draw(st.integers(0 if step.n else 1, 3))):
        chunk = StepShape.prefill(
            draw(st.integers(1, 2048)), draw(st.integers(0, 100_000)), completes=draw(st.booleans())
        )
        step += chunk
    return step


def total(d, step, *figures):
    return d.chips * sum(float(sum_over(getattr(op, f) for op in step_ops(d, step))) for f in figures)


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_weights_read_and_stored_are_the_models_parameters(name):
    model, parameters = load_model(name), count(load_model(name))
    d = Deployment(model, resolve_slice("h100-sxm:1"))
    read = total(d, StepShape.decode(1, 1), "weight_bytes")
    assert read == 2 * (parameters.read_per_step - parameters.positions)
    assert weights_bytes(d) == 2 * parameters.total


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_linear_flops_are_two_per_matrix_parameter(name):
    model, parameters = load_model(name), count(load_model(name))
    d = Deployment(model, resolve_slice("h100-sxm:1"))
    flops = sum(op.flops for op in step_ops(d, StepShape.decode(7, 100)) if op.kind == "matmul")
    vectors = 0  # biases and norms do no matrix work
    for g in model.layers:
        a, f = g.mixer, g.ffn
        vectors += g.count * (
            ((a.n_heads + 2 * a.n_kv_heads) * a.head_dim if a.qkv_bias else 0)
            + (model.d_model if a.o_bias else 0)
            + {"none": 0, "per_head": 2 * a.head_dim, "full": (a.n_heads + a.n_kv_heads) * a.head_dim}[a.qk_norm]
            + (a.n_heads if a.sinks else 0)
            + (((2 if f.gated else 1) * f.d_ff + model.d_model) if f.bias else 0)
        )
    head_bias = model.vocab_size if model.head_bias else 0
    matrices = parameters.read_per_step - parameters.positions - parameters.norms - vectors - head_bias
    assert flops == 2 * 7 * matrices


@given(deployments(), steps())
def test_flops_weights_and_kv_are_conserved_under_sharding(d, step):
    alone = replace(d, slice=resolve_slice(d.slice.spec.split(":")[0] + (":1x1" if "tpu" in d.slice.spec else ":1")))
    for figures, copies in (
        (("flops",), "copied_flops"),
        (("weight_bytes",), "copied_weight_bytes"),
        (("kv_read_bytes", "kv_write_bytes"), "copied_kv_bytes"),
    ):
        assert total(alone, step, copies) == pytest.approx(0, abs=1e-6)
        assert total(d, step, copies) >= -1e-6
        sharded = total(d, step, *figures) - total(d, step, copies)
        assert sharded == pytest.approx(total(alone, step, *figures), rel=1e-9, abs=1e-3)


def test_more_chips_than_kv_heads_copy_the_cache_and_its_projections(architecture):
    d = Deployment(architecture(H=32, K=4), resolve_slice("tpu-v5e:4x4"), parse_precision("bf16"))
    assert d.kv_copies == 4
    assert d.chips * d.kv_bytes_per_token == 4 * 4 * 2 * 2 * 4 * 64  # copies · layers · (K, V) · bytes · heads · width
    found = {op.name: op for op in step_ops(d, StepShape.decode(8, 1000))}
    assert found["attention, decode"].copied_kv_bytes == pytest.approx(0.75 * found["attention, decode"].kv_read_bytes)
    assert found["QKV projection"].copied_flops == 2 * 8 * 4 * 512 * (2 * 64 - 2 * 4 * 64 / 16)
    assert "held 4 times" in " ".join(d.notes)
    assert replace(d, kv_layout="even").kv_bytes_per_token == d.kv_bytes_per_token / 4


@given(deployments(), steps())
def test_no_parameter_pushes_a_step_or_an_op_under_its_bound(d, step):
    answer = report(d, step)
    assert answer.time_s >= answer.roofline_s * (1 - 1e-12)
    assert answer.time_s == pytest.approx(step_time_s(d, step), rel=1e-12)
    assert sum(answer.bound_s.values()) == pytest.approx(answer.time_s, rel=1e-12)
    assert sum(row.share for row in answer.ops) == pytest.approx(1)
    chip = d.slice.chip
    for row in answer.ops:
        peak = chip.peak_flops_per_s(row.dtype) if row.dtype else 1.0
        assert row.time_s >= row.op.flops / peak * (1 - 1e-12)
        assert row.time_s >= row.op.hbm_bytes / chip.hbm_bandwidth_bytes_per_s * (1 - 1e-12)
    assert 0 <= answer.mbu <= 1 + 1e-9
    assert 0 <= answer.mfu <= 1 + 1e-9 or d.attention_dtype != d.compute_dtype


@given(deployments(), steps(), st.sampled_from(["hbm_bandwidth", "links", "compute"]))
def test_doubling_a_resource_never_slows(d, step, resource):
    chip, domains = d.slice.chip, d.slice.domains
    if resource == "hbm_bandwidth":
        q = chip.memory.hbm_bandwidth
        chip = chip.model_copy(
            update={"memory": chip.memory.model_copy(update={resource: q.model_copy(update={"value": 2 * q.value})})}
        )
    elif resource == "compute":
        chip = chip.model_copy(
            update={"compute": {t: q.model_copy(update={"value": 2 * q.value}) for t, q in chip.compute.items()}}
        )
    else:
        domains = tuple(replace(x, bandwidth_bytes_per_s=2 * x.bandwidth_bytes_per_s) for x in domains)
    faster = replace(d, slice=replace(d.slice, chip=chip, domains=domains))
    assert step_time_s(faster, step) <= step_time_s(d, step) * (1 + 1e-12)


@given(deployments(), steps(), st.sampled_from("nBSPAKR"), st.integers(1, 1000))
def test_more_work_never_takes_less_time(d, step, symbol, extra):
    more = replace(step, **{symbol: getattr(step, symbol) + extra})
    assert step_time_s(d, more) >= step_time_s(d, step) * (1 - 1e-12)


@given(deployments())
def test_zero_tokens_and_rows_cost_nothing(d):
    for op in [*dense_ops(d, 0.0), *head_ops(d, 0.0)]:
        assert op.time_s == 0
        assert op.flops == op.hbm_bytes == op.comm_bytes == 0


@given(deployments(efficiencies=st.just(IDEAL)))
def test_a_large_batch_is_compute_bound_and_a_small_one_is_not(d):
    bare = replace(d, activation_traffic=False)
    batch = critical_batch(bare)
    for n, ratio in ((0.01 * batch, 0.01), (100 * batch, 100)):
        linear = [op for op in dense_ops(bare, n) if op.kind == "matmul"]
        assert sum_over(op.compute_s for op in linear) == pytest.approx(ratio * sum_over(op.memory_s for op in linear))


@pytest.mark.parametrize("spec", ["h100-sxm:1", "tpu-v5e:4x4"])
def test_the_whole_step_becomes_compute_bound_as_the_batch_grows(spec):
    d = Deployment(load_model("llama-3-70b"), resolve_slice(spec), efficiency=IDEAL, overlap=1.0)
    answers = [report(d, StepShape(n=n, B=n, S=n, R=0)) for n in (1, 64, 4096)]
    assert answers[0].bound in {"HBM", "interconnect"}
    utilisations = [a.mfu for a in answers]
    assert utilisations == sorted(utilisations)
    assert (
        report(
            Deployment(load_model("llama-3-70b"), resolve_slice("h100-sxm:1"), efficiency=IDEAL), StepShape(n=8192)
        ).bound
        == "compute"
    )


@given(deployments(), steps())
def test_overlap_hides_collectives_and_nothing_else(d, step):
    none, half, full = (report(replace(d, overlap=o), step) for o in (0.0, 0.5, 1.0))
    assert full.time_s <= half.time_s <= none.time_s
    assert half.time_s == pytest.approx((none.time_s + full.time_s) / 2)
    for name in ("compute", "HBM", "overhead"):
        assert full.bound_s[name] == pytest.approx(none.bound_s[name])


def test_decode_step_of_the_catalogue_by_hand():
    # Llama-3-8B on one H100, bf16, ideal, weights and keys only: everything is memory-bound at batch 16.
    d = Deployment(load_model("llama-3-8b"), resolve_slice("h100-sxm:1"), efficiency=IDEAL, activation_traffic=False)
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    keys = 16 * 4096 * 2 * 2 * 32 * 8 * 128
    answer = step_report(d, decode=16, context=4096)
    assert answer.time_s == pytest.approx((weights + keys) / 3.35e12)
    assert answer.tokens_per_s == pytest.approx(16 / answer.time_s)
    assert answer.mbu == pytest.approx(1)


def test_overheads_are_counted_once_per_launch(architecture):
    bare = Deployment(architecture(L=3), resolve_slice("h100-sxm:2"), efficiency=IDEAL)
    step = StepShape.decode(5, 10)

    def extra(**overheads):
        return step_time_s(replace(bare, efficiency=replace(IDEAL, **overheads)), step) - step_time_s(bare, step)

    # Launches: embedding; per layer QKV, rotary, attention, output, 2 norms, up, activation, down; final norm, head, sampler.
    assert extra(op_overhead_s=1e-6) == pytest.approx((1 + 3 * 9 + 3) * 1e-6)
    assert extra(collective_latency_s=1e-6) == pytest.approx((1 + 2 * 3 + 1) * 1e-6)
    assert extra(step_overhead_s=1e-3) == pytest.approx(1e-3)
    assert extra(row_overhead_s=1e-5) == pytest.approx(5e-5)


def test_tokens_split_over_a_torus_do_their_norms_once(architecture):
    d = Deployment(architecture(), resolve_slice("tpu-v5e:2x2"))
    norms = {x: step_ops(replace(d, sequence_parallel=x), StepShape.prefill(64))[2] for x in (True, False, None)}
    assert norms[True].name == "norms, residuals"
    assert norms[False].activation_bytes == 4 * norms[True].activation_bytes
    assert norms[None] == norms[True]


def test_step_shapes_add_and_refuse_nonsense():
    both = StepShape.decode(3, 100) + StepShape.prefill(10, 5)
    assert both == StepShape(n=13, B=3, S=300, P=1, A=10 * 5 + 55, K=15, R=4)
    assert StepShape.prefill(10, completes=False).R == 0
    for bad in (
        lambda: StepShape.decode(0, 5),
        lambda: StepShape.prefill(0),
        lambda: StepShape(n=-1),
        lambda: StepShape(S=float("nan")),
    ):
        with pytest.raises(InputError):
            bad()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"prefill": 5, "decode": 5}, {"decode": 5}, {"prefill": 10, "context": 5}, {"decode": 0, "context": 5}],
)
def test_reports_refuse_contradictory_steps(arguments):
    d = Deployment(load_model("llama-3-8b"), resolve_slice("h100-sxm:1"))
    with pytest.raises(InputError):
        step_report(d, **arguments)


settings.register_profile("roofline", max_examples=60, deadline=None)
settings.load_profile("roofline")
