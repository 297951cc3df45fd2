"""Physics of the ops: counts, conservation under sharding, bounds, limits, monotonicity."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    GatedDeltaNet,
    LatentAttention,
    LayerGroup,
    Mamba2,
    MoEFFN,
    SoftmaxAttention,
    SparseIndexer,
)
from simulator.catalog.chips import IDEAL, Efficiency
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import critical_batch, report, step_report
from simulator.roofline.compile import step_time_s, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape, dense_ops, head_ops, step_ops
from simulator.roofline.precision import parse_precision


@st.composite
def mixers(draw, window):
    kind = draw(st.sampled_from(["attention", "attention", "mla", "gdn", "mamba2", "none"]))
    size, chunked = window
    match kind:
        case "attention":
            kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
            return SoftmaxAttention(
                n_heads=kv_heads * draw(st.sampled_from([8, 16])),
                n_kv_heads=kv_heads,
                head_dim=draw(st.sampled_from([64, 128])),
                qkv_bias=draw(st.booleans()),
                o_bias=draw(st.booleans()),
                qk_norm=draw(st.sampled_from(["none", "per_head", "full"])),
                sinks=draw(st.booleans()),
                gated_output=draw(st.booleans()),
                window=draw(st.sampled_from([None, size])),
                window_kind="chunked" if chunked else "sliding",
            )
        case "mla":
            indexer = SparseIndexer(n_heads=draw(st.integers(1, 32)), head_dim=128, top_k=size)
            return LatentAttention(
                n_heads=draw(st.sampled_from([8, 128])),
                q_rank=draw(st.sampled_from([None, 1536])),
                kv_rank=512,
                nope_dim=128,
                rope_dim=64,
                v_dim=draw(st.sampled_from([128, 256])),
                indexer=None if chunked else draw(st.sampled_from([None, indexer])),
            )
        case "gdn":
            keys = draw(st.sampled_from([8, 16]))
            return GatedDeltaNet(
                n_key_heads=keys, n_value_heads=keys * draw(st.integers(1, 4)), key_dim=128, value_dim=64, conv=4
            )
        case "mamba2":
            return Mamba2(
                n_heads=draw(st.sampled_from([64, 128])),
                head_dim=64,
                n_groups=draw(st.sampled_from([1, 4, 8])),
                state_dim=128,
                conv=4,
            )
    return None


@st.composite
def feed_forwards(draw):
    gated = draw(st.booleans())
    if draw(st.booleans()):
        return DenseFFN(d_ff=draw(st.integers(1, 64)) * 256, gated=gated, bias=draw(st.booleans()))
    experts, shared = draw(st.integers(1, 300)), draw(st.integers(0, 2))
    return MoEFFN(
        n_experts=experts,
        top_k=draw(st.integers(1, min(experts, 10))),
        d_ff=draw(st.integers(1, 16)) * 128,
        gated=gated,
        expert_bias=draw(st.booleans()),
        router_bias=draw(st.booleans()),
        score_correction_bias=draw(st.booleans()),
        n_shared=shared,
        shared_d_ff=draw(st.sampled_from([None, 512])) if shared else None,
        shared_gate=bool(shared) and draw(st.booleans()),
    )


@st.composite
def architectures(draw):
    groups = []
    window = draw(st.tuples(st.sampled_from([1, 128, 2048]), st.booleans()))
    for _ in range(draw(st.integers(1, 3))):
        mixer = draw(mixers(window))
        ffn = draw(feed_forwards()) if mixer is None else draw(st.none() | feed_forwards())
        groups.append(LayerGroup(count=draw(st.integers(1, 4)), mixer=mixer, ffn=ffn, n_norms=draw(st.integers(0, 4))))
    return Architecture(
        name="drawn",
        family="test",
        d_model=draw(st.integers(1, 32)) * 256,
        vocab_size=draw(st.integers(1, 200_000)),
        tied_embeddings=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        head_bias=draw(st.booleans()),
        learned_positions=draw(st.sampled_from([0, 2048])),
        parallel_attention_ffn=draw(st.booleans()),
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
        expert_imbalance=draw(st.sampled_from([1.0, 1.5])),
        kv_layout=draw(st.sampled_from(["heads", "even"])),
        activation_traffic=draw(st.booleans()),
    )


@st.composite
def steps(draw, d):
    step, seen = StepShape(), {"window": d.window, "chunked": d.window_chunked}
    if draw(st.booleans()):
        step += StepShape.decode(draw(st.integers(1, 300)), draw(st.integers(1, 100_000)), **seen)
    for _ in range(draw(st.integers(0 if step.n else 1, 3))):
        chunk = StepShape.prefill(
            draw(st.integers(1, 2048)), draw(st.integers(0, 100_000)), completes=draw(st.booleans()), **seen
        )
        step += chunk
    return step


@st.composite
def cases(draw):
    d = draw(deployments())
    return d, draw(steps(d))


def total(d, step, *figures):
    return d.chips * sum(float(sum_over(getattr(op, f) for op in step_ops(d, step))) for f in figures)


@given(cases())
def test_flops_weights_and_kv_are_conserved_under_sharding(case):
    d, step = case
    alone = replace(d, slice=resolve_slice(d.slice.spec.split(":")[0] + (":1x1" if "tpu" in d.slice.spec else ":1")))
    for figures, copies in (
        (("flops",), "copied_flops"),
        (("weight_bytes",), "copied_weight_bytes"),
        (("kv_read_bytes", "kv_write_bytes"), "copied_kv_bytes"),
    ):
        # One chip copies nothing, but MLA may expand latents again or spend FLOPs on a form that reads less.
        assert copies == "copied_flops" or total(alone, step, copies) == pytest.approx(0, abs=1e-6)
        assert total(d, step, copies) >= -1e-6
        own = total(alone, step, *figures) - total(alone, step, copies)
        sharded = total(d, step, *figures) - total(d, step, copies)
        assert sharded == pytest.approx(own, rel=1e-9, abs=1e-3)


def test_more_chips_than_kv_heads_copy_the_cache_and_its_projections(architecture):
    d = Deployment(architecture(H=32, K=4), resolve_slice("tpu-v5e:4x4"), parse_precision("bf16"))
    assert d.kv_copies == 4
    assert d.chips * d.kv_bytes_per_token == 4 * 4 * 2 * 2 * 4 * 64  # copies · layers · (K, V) · bytes · heads · width
    found = {op.name: op for op in step_ops(d, StepShape.decode(8, 1000))}
    assert found["attention, decode"].copied_kv_bytes == pytest.approx(0.75 * found["attention, decode"].kv_read_bytes)
    assert found["QKV projection"].copied_flops == 2 * 8 * 4 * 512 * (2 * 64 - 2 * 4 * 64 / 16)
    assert "held 4 times" in " ".join(d.notes)
    assert replace(d, kv_layout="even").kv_bytes_per_token == d.kv_bytes_per_token / 4


@given(cases())
def test_no_parameter_pushes_a_step_or_an_op_under_its_bound(case):
    d, step = case
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
    assert 0 <= answer.mfu <= 1 + 1e-9 or not d.attention_dtype == d.compute_dtype == d.index_dtype


@given(cases(), st.sampled_from(["hbm_bandwidth", "links", "compute"]))
def test_doubling_a_resource_never_slows(case, resource):
    d, step = case
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


@given(cases(), st.sampled_from(["n", "B", "S", "P", "A", "K", "R", "SW", "AW", "KW"]), st.integers(1, 1000))
def test_more_work_never_takes_less_time(case, symbol, extra):
    d, step = case
    symbols = {"n": ["n", "K"], "S": ["S", "SW"], "A": ["A", "AW", "KW"]}.get(
        symbol, [symbol]
    )  # none without the other
    more = replace(step, **{symbol: getattr(step, symbol) + extra for symbol in symbols})
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
        computed, loaded = ([op for op in dense_ops(bare, x) if op.kind == "matmul"] for x in (n, 1e9))  # all experts
        assert sum_over(op.compute_s for op in computed) == pytest.approx(
            ratio * sum_over(op.memory_s for op in loaded), rel=1e-6
        )


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


@given(cases())
def test_overlap_hides_collectives_and_nothing_else(case):
    d, step = case
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


def test_narrow_weights_pay_for_unpacking_once_per_tile_of_rows(architecture):
    d = Deployment(architecture(), resolve_slice("h100-sxm:1"), parse_precision("w4a16"), dequantization_flops=32.0)
    d = replace(d, efficiency=replace(d.eff, curves=None))  # a measured kernel's time holds its unpacking
    free, chip = replace(d, dequantization_flops=0.0), d.slice.chip

    def extra_s(n, dear=d, cheap=free):
        pairs = zip(dense_ops(dear, n), dense_ops(cheap, n), strict=True)
        return {a.name: a.compute_s - b.compute_s for a, b in pairs if a.kind == "matmul"}

    weights = 4 * 512 * 1024  # four layers of the down projection
    for n, times in ((1.0, 1), (128.0, 1), (1280.0, 10)):
        expected = times * 32 * weights / (chip.peak_flops_per_s("bf16") * d.eff.matmul)
        assert extra_s(n)["FFN down"] == pytest.approx(expected)
    assert step_ops(d, StepShape.decode(9, 9))[1].flops == step_ops(free, StepShape.decode(9, 9))[1].flops
    for same in (replace(d, precision=parse_precision("int8")), replace(d, activation_traffic=False)):
        assert set(extra_s(64.0, same, replace(same, dequantization_flops=0.0)).values()) == {0.0}
    assert step_time_s(replace(d, efficiency=IDEAL), StepShape.prefill(500)) == step_time_s(
        replace(free, efficiency=IDEAL), StepShape.prefill(500)
    )
    with pytest.raises(InputError, match=r"dequantization_flops = -1\.0"):
        replace(d, dequantization_flops=-1.0)


def test_weights_a_chip_has_no_units_for_are_unpacked_too():
    a100 = Deployment(load_model("llama-3-8b"), resolve_slice("a100-80-sxm:1"), parse_precision("fp8"))
    assert a100.compute_dtype == "bf16"
    step = StepShape.prefill(4096)
    assert step_time_s(a100, step) > step_time_s(replace(a100, dequantization_flops=0.0), step)


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
