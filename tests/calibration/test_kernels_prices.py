"""Prices by curves: never under a bound, whatever the parameters; monotone; replaced by constants given by hand."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.chips import IDEAL, Efficiency, load_chip
from simulator.catalog.kernel_curves import (
    SCHEDULES,
    CollectiveCurve,
    DecodeCurve,
    GemmCurve,
    GroupedCurve,
    KernelCurves,
    PrefillCurve,
    load_curves,
)
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.attention_times import block_key_s, busiest_s, deal, scheduled_key_s, scheduled_line
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernel_times import collective_s, soft_max
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.pipeline import shard as shard_
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharding import Sharding

H100 = load_chip("h100-sxm")
fraction = st.floats(0.02, 1)
seconds = st.floats(0, 1e-4)
sharp = st.sampled_from([1.0, 2.0, 4.0, 3.3])
gemm = st.builds(GemmCurve, fraction, fraction, seconds, st.floats(0, 1e8), st.floats(0, 5e3), st.floats(0, 1e5), seconds, st.floats(0, 9), sharp, st.floats(0, 9), st.floats(0, 1e-7), st.just(0.0) | st.floats(1e-3, 2))  # fmt: skip
grouped = st.builds(GroupedCurve, fraction, fraction, seconds, st.floats(0, 1e8), st.floats(0, 5e3), st.floats(0, 1e5), st.floats(1, 40), st.floats(0, 1e-6), sharp)  # fmt: skip
prefill = st.builds(PrefillCurve, fraction, st.floats(0, 400), seconds, st.floats(0, 9), st.floats(1, 9))
walk = st.sampled_from([0.0, 3e-10, 5e-9, 4e-8])
decode = st.builds(DecodeCurve, fraction, fraction, seconds, seconds, st.floats(1e6, 1e9), st.floats(0, 1e-6), st.floats(0, 1e-6), walk, st.floats(1, 2), item_s=st.floats(0, 1e-5), split_s=st.floats(0, 1e-5), sharpness=sharp, schedule=st.sampled_from(SCHEDULES))  # fmt: skip
collective = st.builds(CollectiveCurve, seconds, fraction, st.floats(0.3, 8), st.just(0.0) | st.floats(1, 20), seconds)


@st.composite
def any_curves(draw):
    found = {("gemm", name, "", 1): draw(gemm) for name in ("bfloat16", "fp8", "int4_wo") if draw(st.booleans())}
    found |= {("moe", name, "", 1): draw(grouped) for name in ("bfloat16", "fp8") if draw(st.booleans())}
    for op, curve in (
        ("attention_prefill", prefill),
        ("mla_prefill", prefill),
        ("attention_decode", decode),
        ("mha_decode", decode),
        ("mla_decode", decode),
    ):
        if draw(st.booleans()):
            found[op, "bfloat16", draw(st.sampled_from(["bfloat16", "fp8"])), 1] = draw(curve)
    for op in ("all_reduce", "all_gather", "alltoall"):
        found |= {(op, "", "", n): draw(collective) for n in (2, 8) if draw(st.booleans())}
    return KernelCurves("drawn", found)


CASES = [
    ("llama-3-8b", "h100-sxm:4", "bf16"),
    ("qwen3-235b-a22b", "h100-sxm:8", "fp8kv8"),
    ("deepseek-v3", "h200-sxm:8", "fp8"),
    ("gpt-oss-120b", "h100-sxm:2", "mxfp4-experts"),
    ("llama-3-70b", "h100-sxm:8", "int4"),
]
BUILT = [
    Deployment(load_model(m), resolve_slice(s), parse_precision(p), max_num_batched_tokens=512) for m, s, p in CASES
]


def step_of(d, draw_decode, context, tokens, past):
    step = StepShape()
    if draw_decode:
        step += StepShape.decode(draw_decode, context, window=d.window, chunked=d.window_chunked)
    if tokens or not draw_decode:
        step += StepShape.prefill(tokens or 1, past, window=d.window, chunked=d.window_chunked)
    return step


@settings(max_examples=150, deadline=None)
@given(
    any_curves(),
    st.integers(0, len(CASES) - 1),
    st.integers(0, 200),
    st.integers(1, 60_000),
    st.integers(0, 300),
    st.integers(0, 30_000),
)
def test_no_parameter_pushes_an_op_under_compute_memory_or_link_bounds(curves, case, batch, context, tokens, past):
    d = replace(BUILT[case], efficiency=replace(IDEAL, curves=curves))
    step = step_of(d, batch, context, tokens, past)
    chip, domain = d.slice.chip, d.slice.domains[0]
    for op in step_ops(d, step):
        least = float(op.hbm_bytes) / chip.hbm_bandwidth_bytes_per_s
        if op.dtype and float(op.flops):
            least = max(least, float(op.flops) / chip.peak_flops_per_s(op.dtype))
        least = max(least, float(op.comm_bytes) / domain.bandwidth_bytes_per_s)
        assert float(op.time_s) >= least * (1 - 1e-9), op.name
        assert float(op.overhead_s) >= 0
        assert float(op.roofline_s) >= 0


@settings(max_examples=60, deadline=None)
@given(
    any_curves(), st.integers(0, len(CASES) - 1), st.integers(0, 200), st.integers(1, 60_000), st.integers(0, 300), st.integers(0, 30_000)
)  # fmt: skip
def test_the_compiled_table_is_the_sum_of_the_ops_for_any_curves(curves, case, batch, context, tokens, past):
    d = replace(BUILT[case], efficiency=replace(IDEAL, curves=curves))
    step = step_of(d, batch, context, tokens, past)
    cost = compile_step_cost(d)
    table = cost.step_s(**{name: int(value) for name, value in vars(step).items()})
    assert table == pytest.approx(step_time_s(d, step), rel=1e-9)
    intercepts = cost.decode_value_s - cost.decode_slope_s * cost.decode_knots
    assert (intercepts >= -1e-12).all()  # so no sequence gets a negative share of decode attention


@settings(max_examples=60, deadline=None)
@given(decode, st.integers(0, len(CASES) - 1), st.integers(1, 60_000))
def test_sequences_dealt_to_blocks_take_a_step_no_less_than_fewer(curve, case, context):
    keys = [("attention_decode", "bfloat16", kv, 1) for kv in ("bfloat16", "fp8")]
    curves = KernelCurves("drawn", dict.fromkeys(keys, curve))
    cost = compile_step_cost(replace(BUILT[case], efficiency=replace(IDEAL, curves=curves), max_num_seqs=128))
    batch = np.arange(1, 129)
    took = np.array([cost.decode_attention_s(int(B) * context, int(B)) for B in batch])
    assert (np.diff(took) >= -1e-9 * took[1:]).all()
    if not curve.schedule:
        assert not cost.decode_walk_s.any()


def test_sequences_that_a_kernel_does_not_split_fill_a_chip_by_their_number():
    # TensorRT-LLM's kernel for an 8-bit cache on L40S: 8,192 keys of one sequence, of four, and of sixteen, which fill the memory,
    # were measured to take 139.4, 139.4 and 386.6 us (32 heads, 8 KV heads).
    d = Deployment(load_model("llama-3-8b"), resolve_slice("l40s:1"), parse_precision("bf16kv8"), max_num_seqs=64)
    cost = compile_step_cost(d)
    context = 8192
    one, four, sixteen = (cost.decode_attention_s(B * context, B) / 32 for B in (1, 4, 16))
    assert (one, four, sixteen) == pytest.approx((139.4e-6, 139.4e-6, 386.6e-6), rel=0.07)


@pytest.mark.parametrize(
    ("sequences", "keys", "measured_us"),
    [(32, 8192, 136.0), (32, 16384, 351.4), (64, 8192, 355.2), (128, 8192, 683.4), (64, 256, 23.4), (128, 2048, 196.5)],
)
def test_flash_attention_deals_sequences_so_that_twice_the_keys_may_take_far_longer(sequences, keys, measured_us):
    """SGLang's kernel on A100, 8 heads that share one KV head, as measured: 32 sequences of 8,192 keys are dealt in three parts each,
    a block for most multiprocessors; of 16,384 keys in four, two for some. What the committed curve says, launch included.
    """
    chip, curve = (
        load_chip("a100-80-sxm"),
        load_curves("a100-80-sxm").of("sglang").at_width(DecodeCurve, "attention_decode", "bfloat16", "bfloat16", 128),
    )
    units, hbm = chip.multiprocessor_count, chip.hbm_bandwidth_bytes_per_s
    dealt = deal(curve.schedule, np.array([float(sequences)]), np.array([float(keys)]), units)
    read = sequences * keys * 512
    work = soft_max(busiest_s(dealt, block_key_s(128, curve), curve)[0], read / (hbm * curve.hbm), curve.sharpness)
    rest = curve.launch_s + curve.ramp_s * min(1, read / curve.ramp_bytes) + curve.split_s * dealt.split[0]
    assert 1e6 * (rest + work + sequences * 8 * curve.head_s) == pytest.approx(measured_us, rel=0.1)


def test_a_price_is_the_time_of_reading_where_sequences_are_many_and_long():
    curve = DecodeCurve(
        hbm=0.8, peak=1.0, launch_s=1e-5, item_s=2e-6, walk_s=2e-9, pair=1.5, sharpness=4.0, split_s=2e-6
    )
    for schedule in SCHEDULES[1:]:
        line = scheduled_line(replace(curve, schedule=schedule), 8.0, 1e-9, 2e-9, 132.0)
        assert line.table[0] == 0
        assert (np.diff(line.table) >= 0).all()
        batch = np.array([1.0, 2.0, 16.0, 512.0, 5000.0])
        per_key = scheduled_key_s(batch, line.table, 1e-9)
        assert (per_key >= 1e-9).all()  # never under reading
        assert per_key[-1] == pytest.approx(1e-9, rel=0.01)
        assert scheduled_key_s(0.0, line.table, 1e-9) == 1e-9
        longest = 16384.0  # where reading takes over, price and time are one
        dealt = deal(schedule, 8.0 * batch, np.full(5, longest), 132.0)
        took = (
            soft_max(busiest_s(dealt, 2e-9, curve), batch * longest * 1e-9, curve.sharpness)
            + curve.split_s * dealt.split
        )
        priced = line.launch_s + batch * (line.sequence_s + longest * per_key)
        assert priced[3:] == pytest.approx(took[3:], rel=0.02)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ideal_is_the_bare_datasheet_still(case):
    d = replace(BUILT[case], efficiency=IDEAL)
    report = step_report(d, decode=16, context=2000)
    assert IDEAL.curves is None
    for row in report.ops:
        op = row.op
        if op.kind == "collective" or op.name == "attention, decode":
            continue
        assert float(op.overhead_s) == 0
        assert float(op.roofline_s) == max(float(op.compute_s), float(op.memory_s))


def test_a_chip_without_tables_is_priced_by_its_familys_and_says_so():
    assert load_chip("h200-sxm").efficiency.curves == load_curves("h100-sxm")
    assert "as measured on h100-sxm, of its family" in load_chip("h200-sxm").efficiency_source
    assert "as measured on this chip" in H100.efficiency_source
    assert load_chip("mi300x").efficiency.curves is None


def test_constants_given_by_hand_replace_the_curves_of_what_they_describe():
    measured = H100.efficiency
    by_hand = measured.override(matmul=0.4)
    assert by_hand.matmul == 0.4
    assert by_hand.curves.get(GemmCurve, "gemm", "bfloat16") is None
    assert by_hand.curves.at_width(DecodeCurve, "attention_decode", "bfloat16", "bfloat16", 128) is not None
    d = replace(BUILT[0], efficiency=by_hand)
    slower = replace(BUILT[0], efficiency=measured.override(matmul=0.2))
    assert step_report(slower, prefill=512).time_s > step_report(d, prefill=512).time_s
    assert all("gemm" not in {key[0] for key in own} for own in by_hand.curves.own.values())
    assert measured.override() == measured
    assert Efficiency(**measured.constants).curves is None


@settings(max_examples=40, deadline=None)
@given(gemm, st.integers(1, 60000), st.integers(1, 30000))
def test_products_never_get_faster_with_more_rows(curve, n, k):
    from simulator.roofline.kernel_times import gemm_compute_s

    kw = {"peak_flops_per_s": 989e12, "hbm_bytes_per_s": 3.35e12, "multiprocessors": 132.0}
    m = np.arange(600.0)
    times = gemm_compute_s(m, float(n), float(k), curve, **kw)
    assert times[0] == 0
    assert (np.diff(times) >= -1e-18).all()
    assert times[333] == gemm_compute_s(333.0, float(n), float(k), curve, **kw)


@settings(max_examples=60, deadline=None)
@given(grouped, st.integers(64, 9000), st.integers(64, 9000), st.sampled_from([(8, 2), (128, 8), (256, 8)]))
def test_experts_never_get_faster_with_more_tokens(curve, n, k, experts):
    from simulator.roofline.blocks import touched_experts
    from simulator.roofline.kernel_times import grouped_compute_s

    tokens = np.arange(0.0, 3000.0, 7)
    groups = touched_experts(*experts, tokens)
    times = grouped_compute_s(
        tokens * experts[1], groups, float(n), float(k), curve, peak_flops_per_s=989e12, multiprocessors=132.0
    )
    assert times[0] == 0
    assert (np.diff(times) >= -1e-15).all()


def test_wave_quantisation_shows_where_tiles_outnumber_the_multiprocessors():
    """132 multiprocessors: a product of one more wave of tiles takes a step up, and fills no more of the chip."""
    from simulator.roofline.kernel_times import gemm_compute_s

    curve = replace(H100.efficiency.curves.get(GemmCurve, "gemm", "bfloat16"), split_s=1.0)
    kw = {"peak_flops_per_s": 989e12, "hbm_bytes_per_s": 3.35e12, "multiprocessors": 132.0}
    full, over = (gemm_compute_s(m, 256.0 * 132, 8192.0, curve, **kw) for m in (128.0, 128.0 + 1))
    assert over > 1.3 * full


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (GemmCurve, {"peak": 1.2, "hbm": 0.5, "launch_s": 0.0}, r"GemmCurve\.peak = 1\.2"),
        (GemmCurve, {"peak": 0.9, "hbm": 0.5, "launch_s": -1e-6}, r"launch_s = -1e-06"),
        (GemmCurve, {"peak": 0.9, "hbm": 0.5, "launch_s": 0.0, "sharpness": 0.5}, "at least 1"),
        (GroupedCurve, {"peak": 0.9, "hbm": 0.5, "launch_s": 0.0, "traffic": 0.5}, "at least 1"),
        (CollectiveCurve, {"latency_s": 1e-6, "link": 0.5, "sharpness": 0.0}, "above 0"),
    ],
)
def test_parameters_that_could_break_a_bound_are_refused(kind, values, message):
    with pytest.raises(InputError, match=message):
        kind(**values)


@pytest.mark.parametrize(("shard", "held"), [({"tp": 1}, 128), ({"tp": 4}, 128), ({"tp": 4, "ep": 4}, 32)])
def test_every_expert_a_chip_holds_takes_its_time_idle_or_not(shard, held):
    """A token of Qwen3-30B-A3B visits 8 of 128 experts; all those that its chip holds are walked."""

    def experts_s(expert_s):
        curve = GroupedCurve(peak=0.8, hbm=0.8, launch_s=0.0, expert_s=expert_s)
        found = shard_(load_model("qwen3-30b-a3b"), resolve_slice(f"h100-sxm:{shard['tp']}"), Sharding(**shard),
            efficiency=replace(H100.efficiency, curves=KernelCurves("drawn", {("moe", "bfloat16", "", 1): curve})))  # fmt: skip
        (stage,) = found.stages
        return sum(op.roofline_s for op in step_ops(stage, StepShape.decode(1, 100)) if op.name.startswith("experts"))

    assert experts_s(1e-7) - experts_s(0.0) == pytest.approx(48 * held * 1e-7)


def test_other_frameworks_skip_what_tensorrt_llm_walks():
    """8-bit blocks on Blackwell: TensorRT-LLM's kernels stand for vLLM's, without more of its walk than vLLM's own takes on H100."""
    key = ("moe", "fp8_block", "", 1)
    blackwell, hopper = load_curves("b200"), load_curves("h100-sxm")
    walk_s = {name: blackwell.of(name).curves[key].expert_s for name in ("trtllm", "vllm", "sglang")}
    assert walk_s["trtllm"] > 5 * walk_s["vllm"]
    assert walk_s["vllm"] == walk_s["sglang"] == pytest.approx(hopper.of("vllm").curves[key].expert_s, rel=0.1)


def test_an_all_reduce_of_a_small_message_takes_one_shot():
    """Measured on eight H100 with TensorRT-LLM 1.3.0rc20 (aiconfigurator @ 095f58a5, comm): every chip reads all others' up to half a megabyte."""
    curve = load_curves("h100-sxm").of("trtllm").get(CollectiveCurve, "all_reduce", chips=8)
    link = H100.scale_up.achievable or H100.scale_up.bandwidth
    rate = link.si("h100-sxm: link", "bytes/s")
    for message, measured_us in (
        (16_384, 3.56),
        (65_536, 4.59),
        (524_288, 17.6),
        (2_097_152, 35.5),
        (134_217_728, 575.5),
    ):
        assert 1e6 * collective_s(2 * 7 / 8 * message / rate, curve) == pytest.approx(measured_us, rel=0.15)
    # Seven whole messages come in where the long way takes 2 * 7/8 of one: four times its transfer at the least.
    assert 4 < curve.direct < 8


def test_fixed_times_of_every_curve_scale_together():
    curves = load_curves("b200")
    twice = curves.with_fixed_times(kernels=2.0, collectives=3.0)
    for key, curve in curves.curves.items():
        factor = 3.0 if isinstance(curve, CollectiveCurve) else 2.0
        for item in fields(curve):
            value = getattr(curve, item.name)
            assert getattr(twice.curves[key], item.name) == (factor * value if item.name.endswith("_s") else value)
