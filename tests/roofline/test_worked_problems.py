"""Published and recomputed worked problems, through the code that prices deployments.

Napkin: "Gemini Pretraining" slides (V. Feinberg, 2025), corrected values recomputed. Book: jax-ml/scaling-book, chapters
named in each test. Constants are those of the source; where they differ from the catalogue the chip is a copy with
theirs. "Exact" marks a value recomputed from the source's own inputs where its printed one is rounded or slipped.
"""

from dataclasses import replace

import pytest

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.roofline.analysis import critical_batch, report, step_report
from simulator.roofline.collectives import all_gather_s, all_reduce_s
from simulator.roofline.compile import sum_over
from simulator.roofline.memory import memory_fit, smallest_slice, weights_bytes
from simulator.roofline.ops import StepShape, dense_ops, step_ops

C, T = 131072, 8192


def ops(d, step):
    return {op.name: op for op in step_ops(d, step)}


def total(d, step, figure, *, only=None, without=()):
    """Sum of a figure over the step's ops and chips."""
    chosen = [o for o in ops(d, step).values() if o.name not in without and (only is None or o.kind == only)]
    return d.chips * float(sum_over(getattr(op, figure) for op in chosen))


# --- the napkin, corrected ----------------------------------------------------------------------------------------


@pytest.fixture
def napkin(without_norms, make_slice, textbook):
    def build(spec, precision="w4a16kv4g0"):
        return textbook(without_norms("llama-3-70b"), make_slice(spec, links=False), precision)

    return build


@pytest.mark.parametrize(
    ("what", "step", "kind", "expected"),
    [
        ("linear, head on the last token", StepShape.prefill(T, C - T), "matmul", 1.121503962e15),
        ("linear, head on every token", replace(StepShape.prefill(T, C - T), R=T), "matmul", 1.138716089e15),
        ("attention, 122880 cached", StepShape.prefill(T, C - T), "attention", 2.726799574e15),
        ("attention, on top of 131072", StepShape.prefill(T, C), "attention", 2.902721435e15),
        ("attention inside the 8192 alone", StepShape.prefill(T), "attention", 8.797166764e13),
    ],
)
def test_napkin_prefill_flops(napkin, what, step, kind, expected):
    assert total(napkin("tpu-v5e:1x1"), step, "flops", only=kind) == pytest.approx(expected, rel=1e-9), what


@pytest.mark.parametrize(
    ("step", "kind", "seconds"),
    [
        (StepShape.prefill(T, C - T), "matmul", 5.692913511),
        (StepShape.prefill(T, C - T), "attention", 13.841622205),
        (StepShape.prefill(C), "matmul", 91.0865),
        (StepShape.prefill(C), "attention", 114.3054),
    ],
)
def test_napkin_prefill_seconds_on_one_chip(napkin, step, kind, seconds):
    assert total(napkin("tpu-v5e:1x1"), step, "compute_s", only=kind) == pytest.approx(seconds, rel=5e-7)


def test_napkin_incremental_prefill_is_19_5_s_and_bound_by_compute(napkin):
    answer = step_report(napkin("tpu-v5e:1x1"), prefill=T, context=C)
    # The head works on one row and so takes its bytes' time, 1.3 ms at 8 bits; everything else is compute.
    head_s = answer.bound_s["HBM"]
    assert answer.time_s - head_s == pytest.approx(19.534535716, rel=1e-6)
    assert answer.bound == "compute"


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [(1, C, 6.942654985), (1, C + 63.5, 6.943448928), (8, C, 18.4142)],
)
def test_napkin_int4_decode_step_on_2x4(napkin, batch, context, milliseconds):
    answer = report(napkin("tpu-v5e:2x4"), StepShape.decode(batch, context))
    assert 1e3 * answer.time_s == pytest.approx(milliseconds, abs=1e-4 if batch > 1 else 1e-9)
    assert answer.bound == "HBM"
    assert answer.mbu == pytest.approx(1)


def test_napkin_decode_flops(napkin):
    answer = report(napkin("tpu-v5e:2x4"), StepShape.decode(1, C))
    assert answer.model_flops == pytest.approx(4.826008125e11, rel=1e-9)
    assert 1e3 * total(napkin("tpu-v5e:2x4"), StepShape.decode(1, C), "compute_s") / 8 == pytest.approx(0.306, abs=5e-4)


def test_napkin_int4_memory_with_one_sequence(napkin):
    fit = memory_fit(napkin("tpu-v5e:2x4"))
    assert 8 * (fit.weights_bytes + C * fit.kv_bytes_per_token) == pytest.approx(46.01e9, rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "tokens", "gigabytes"),
    [("bf16", T, 2.684), ("w4a16kv4g0", T, 0.671), ("bf16", C - T, 40.27), ("w4a16kv4g0", C - T, 10.07)],
)
def test_napkin_kv_to_move(napkin, spec, tokens, gigabytes):
    d = napkin("tpu-v5e:1x1", spec)
    assert tokens * d.kv_bytes_per_token == pytest.approx(gigabytes * 1e9, rel=5e-4)


def test_napkin_decode_all_reduces_take_1_28_ms_on_2x4(without_norms, make_slice, textbook):
    d = textbook(without_norms("llama-3-70b"), make_slice("tpu-v5e:2x4"), "w4a16kv4g0")
    assert ops(d, StepShape.decode(1, C))["all-reduce, layers"].network_s == pytest.approx(1.28e-3)


# --- rooflines and TPUs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "precision", "flops", "bandwidth", "expected"),
    [
        ("R1 int8", "int8", {"bf16": 1.97e14, "int8": 3.94e14}, 8.1e11, 243),
        ("R2 int8 weights, bf16 math", "w8a16", {"bf16": 1.97e14}, 8.2e11, 120),
        ("R5 H100", "bf16", {"bf16": 1e15}, 3.35e12, 298),
        ("R5 H100 with 989e12", "bf16", {"bf16": 989e12}, 3.35e12, 295),
        ("A7 bf16", "bf16", {"bf16": 1.97e14}, 8.2e11, 240),
        ("A7 int8 weights, bf16 math", "w8a16g0", {"bf16": 1.97e14}, 8.2e11, 120),
        ("A7 int8", "int8", {"bf16": 1.97e14, "int8": 3.94e14}, 8.2e11, 240),
    ],
)
def test_book_critical_batch(make_slice, textbook, source, precision, flops, bandwidth, expected):
    d = textbook(load_model("llama-3-8b"), make_slice("tpu-v5e:1x1", flops=flops, bandwidth=bandwidth), precision)
    assert critical_batch(d) == pytest.approx(expected, rel=0.005), source


def test_book_t1_200e9_bf16_parameters_from_32_v4(make_slice, textbook, rounded, architecture):
    model = rounded(architecture(L=100, D=12288, H=96, K=96, hd=128, F=32768, n_norms=0), 200e9)
    d = textbook(model, make_slice("tpu-v4:2x4x4", bandwidth=1.23e12, links=False), "bf16")
    load_s = total(d, StepShape.decode(1, 1), "memory_s", only="matmul") / 32
    assert 1e3 * load_s == pytest.approx(10.163, abs=5e-4)


# --- transformer arithmetic ---------------------------------------------------------------------------------------


def test_book_x1b_int8_kv_is_512_kib_per_token(architecture, make_slice, textbook):
    d = textbook(architecture(L=64, D=4096, H=32, K=32, hd=128, F=16384), make_slice("tpu-v5e:1x1"), "w8a16kv8g0")
    assert d.kv_bytes_per_token == 524288


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (16, 1)])
def test_book_x4_decode_attention_intensity_is_the_group_size(architecture, make_slice, textbook, heads):
    H, K = heads
    d = textbook(architecture(H=H, K=K), make_slice("tpu-v5e:1x1"), "bf16")
    op = ops(d, StepShape.decode(3, 1000))["attention, decode"]
    assert op.flops / op.hbm_bytes == pytest.approx(H / K)


def test_book_x5_attention_flops_equal_the_projections_at_2d_without_a_mask(architecture, make_slice, textbook):
    d = textbook(architecture(L=2, D=4096, H=32, K=32, hd=128), make_slice("tpu-v5e:1x1"), "bf16")
    tokens = 2 * 4096
    step = replace(StepShape.prefill(tokens), A=float(tokens * tokens))
    found = ops(d, step)
    projections = found["QKV projection"].flops + found["output projection"].flops
    assert found["attention, prefill"].flops == pytest.approx(projections)


# --- inference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "milliseconds"), [(4, 2.568), (256, 21.055)])
def test_book_inference_popquiz_30e9_parameters_on_4x4(architecture, make_slice, textbook, batch, milliseconds):
    model = architecture(
        L=50, D=8000, H=64, K=8, hd=125, F=18992, V=1200, tied=True, n_norms=0
    )  # 30e9, 100 kB per token
    chips = make_slice("tpu-v5e:4x4", bandwidth=8.1e11, links=False)
    d = textbook(model, chips, "w8a16kv8g0", max_num_seqs=256)
    assert 16 * weights_bytes(d) == 30e9
    assert 16 * d.kv_bytes_per_token == 100e3
    assert 1e3 * report(d, StepShape.decode(batch, 8192)).time_s == pytest.approx(milliseconds, abs=5e-4)


def test_book_inference_kv_of_llama_2_13b(make_slice, textbook):
    d = textbook(load_model("llama-2-13b"), make_slice("tpu-v5e:1x1"), "bf16")
    assert 8192 * d.kv_bytes_per_token == pytest.approx(6.7e9, rel=0.005)


@pytest.mark.parametrize(
    ("batch", "step_ms", "tokens_per_s", "gqa_ms", "gqa_tokens_per_s"),
    [
        (1, 4.98, 200.61, 4.17, 239.94),
        (8, 12.13, 659.30, 5.60, 1429.19),
        (16, 20.30, 787.99, 7.23, 2212.48),
        (32, 36.65, 873.21, 10.50, 3047.62),
        (64, 69.33, 923.13, 17.04, 3756.62),
        (240, 249.09, 963.53, 52.99, 4529.34),
    ],
)
def test_book_inference_llama_2_13b_table_to_the_last_digit(
    without_norms, rounded, make_slice, textbook, batch, step_ms, tokens_per_s, gqa_ms, gqa_tokens_per_s
):
    # The table has 6.7 GB of KV per sequence (6.71 exact), 26 GB of weights, and 6.56e12 B/s.
    base = without_norms("llama-2-13b")
    chips = make_slice("tpu-v5e:2x4", bandwidth=8.2e11, links=False)
    context = 6.7e9 / 819200
    group = base.layers[0]
    gqa = base.model_copy(
        update={"layers": (group.model_copy(update={"mixer": group.mixer.model_copy(update={"n_kv_heads": 8})}),)}
    )
    for model, ms, rate in ((base, step_ms, tokens_per_s), (gqa, gqa_ms, gqa_tokens_per_s)):
        d = textbook(rounded(model, 13e9), chips, "bf16")
        # Loads only: the table leaves compute out, which at batch 240 is above the weights' load by a quarter.
        seconds = total(d, StepShape.decode(batch, context), "memory_s") / 8
        assert 1e3 * seconds == pytest.approx(ms, abs=0.005001)
        assert batch / seconds == pytest.approx(rate, abs=0.02)


def test_book_inference_q2_q3_capacity_and_load_on_4x4(architecture, make_slice, textbook):
    chips = make_slice("tpu-v5e:4x4", bandwidth=8.1e11, capacity=16e9, links=False)
    settings = {"gpu_memory_utilization": 1.0, "workspace_bytes": 0.0, "max_num_batched_tokens": 1, "max_num_seqs": 1}
    for kv_heads, tokens in ((8, 906_428), (1, 7.28e6)):
        model = architecture(L=64, D=4096, F=16384, H=32, K=kv_heads, hd=256, V=32128, tied=True, n_norms=0)
        fit = memory_fit(textbook(model, chips, "w8a16kv8g0", **settings))
        assert fit.kv_tokens == pytest.approx(tokens, rel=2e-3 if kv_heads == 1 else 1e-4)
    model = architecture(L=64, D=4096, F=16384, H=32, K=8, hd=256, V=32128, tied=True, n_norms=0)
    for precision, milliseconds in (("w8a16kv8g0", 1.419), ("bf16", 2.837)):
        load_s = total(textbook(model, chips, precision), StepShape.decode(1, 1), "memory_s", only="matmul") / 16
        assert 1e3 * load_s == pytest.approx(milliseconds, abs=5.1e-4)


def test_book_inference_most_useful_decode_tp_is_f_over_b_beta(architecture, make_slice, textbook):
    # Beta = HBM over ICI bandwidth = 8: gathering [B, D] takes as long as loading the shard of [D, F].
    F, B, D = 16384, 32, 4096
    chips = make_slice("tpu-v5e:2x4", bandwidth=8 * 9e10)
    d = textbook(architecture(D=D, F=F, H=8, K=8, L=1, gated=False), chips, "bf16")
    load_s = ops(d, StepShape.decode(B, 1))["FFN up"].memory_s
    ring = replace(chips.domains[0], dims=(8,), wraps=(True,), bandwidth_bytes_per_s=4.5e10, latency_s=0.0)
    assert 8 * load_s / all_gather_s(2.0 * B * D, [ring]) == pytest.approx(64)


# --- serving Llama-3-70B ------------------------------------------------------------------------------------------


@pytest.fixture
def serving(without_norms, rounded, make_slice, textbook):
    """70e9 parameters, as the chapter counts them."""

    def build(spec, precision, *, bandwidth=8.1e11, **settings):
        chips = make_slice(spec, bandwidth=bandwidth, capacity=16e9, links=False)
        return textbook(rounded(without_norms("llama-3-70b"), 70e9), chips, precision, **settings)

    return build


def test_book_serving_a2_a3_int8_kv(serving):
    d = serving("tpu-v5e:1x1", "w8a16kv8g0")
    assert d.kv_bytes_per_token == 163_840
    assert 32768 * d.kv_bytes_per_token == pytest.approx(5.369e9, rel=1e-4)
    assert 240 * 32768 * d.kv_bytes_per_token == pytest.approx(1.288e12, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "milliseconds", "tokens_per_s", "per_chip"),
    [("tpu-v5e:2x4", 17.28, 1852, 231.5), ("tpu-v5e:4x4", 8.638, 2 * 1852, 231.5)],
)
def test_book_serving_a5_a6_decode_step(serving, spec, milliseconds, tokens_per_s, per_chip):
    d = serving(spec, "w8a16kv8g0")
    keys = 32 * 8192 * 160e3 / 163840  # the chapter rounds KV to 160 kB per token
    answer = report(d, StepShape(n=32, B=32, S=keys, R=32))
    assert 1e3 * answer.time_s == pytest.approx(milliseconds, rel=4e-4)
    assert answer.tokens_per_s == pytest.approx(tokens_per_s, rel=4e-4)
    assert answer.tokens_per_s_per_chip == pytest.approx(per_chip, rel=4e-4)


@pytest.mark.parametrize(
    ("precision", "least_chips", "smallest", "kv_gigabytes"),
    [
        ("bf16", 8.75, "tpu-v5e:4x4", 116),
        ("w8a16kv8g0", 4.375, "tpu-v5e:2x4", 58),
        ("w4a16kv4g0", 2.1875, "tpu-v5e:2x2", 29),
    ],
)
def test_book_serving_a8_to_a12_exact_memory(serving, precision, least_chips, smallest, kv_gigabytes):
    settings = {"gpu_memory_utilization": 1.0, "workspace_bytes": 0.0, "max_num_batched_tokens": 1, "max_num_seqs": 1}
    d = serving("tpu-v5e:1x1", precision, **settings)
    assert weights_bytes(d) / 16e9 == pytest.approx(least_chips, rel=1e-6)
    assert smallest_slice(d) == smallest
    fit = memory_fit(serving(smallest, precision, **settings))
    d = serving(smallest, precision, **settings)
    assert d.chips * fit.kv_bytes == pytest.approx(kv_gigabytes * 1e9, rel=5e-4)
    assert fit.kv_tokens / 8192 == pytest.approx(43.2, rel=1e-3)


def test_book_serving_a13_step_with_hbm_full(serving):
    settings = {"gpu_memory_utilization": 1.0, "workspace_bytes": 0.0, "max_num_batched_tokens": 1, "max_num_seqs": 1}
    d = serving("tpu-v5e:4x4", "bf16", bandwidth=8.2e11, **settings)
    step = StepShape(n=1, B=1, S=memory_fit(d).kv_tokens, R=1)
    assert 1e3 * report(d, step).time_s == pytest.approx(19.512, rel=5e-4)


def test_book_serving_a16_tp_limit_of_ici(architecture, make_slice, textbook):
    # F·axes·W/C = 22.49 with C/W = 2550: computing the two matrices of a block takes as long as its all-reduce.
    F, D, n = 28672, 8192, 4096
    chips = make_slice("tpu-v5e:4x4", flops={"bf16": 2550 * 9e10})
    d = textbook(architecture(L=1, D=D, F=F, H=16, K=16, gated=False), chips, "bf16")
    found = {op.name: op for op in dense_ops(d, float(n))}
    math_s = 16 * (found["FFN up"].compute_s + found["FFN down"].compute_s)
    torus = replace(chips.domains[0], wraps=(True, True), bandwidth_bytes_per_s=4.5e10)
    assert math_s / all_reduce_s(2.0 * n * D, [torus]) == pytest.approx(22.49, abs=0.005)


def test_book_serving_a17_one_matrix_on_4x8_at_batch_64(architecture, make_slice, textbook):
    B, D, F = 64, 8192, 28672
    chips = make_slice("tpu-v5e:4x8", bandwidth=8.1e11)
    d = textbook(architecture(L=1, D=D, F=F, H=32, K=32, gated=False), chips, "bf16")
    op = ops(d, StepShape.decode(B, 1))["FFN up"]
    assert 1e6 * op.memory_s == pytest.approx(18.12, abs=0.01)
    assert 1e6 * op.compute_s == pytest.approx(4.77, abs=0.005)
    ring = replace(chips.domains[0], dims=(32,), wraps=(True,), bandwidth_bytes_per_s=4.5e10, latency_s=0.0)
    gather_s = all_gather_s(2.0 * B * D, [ring])
    assert 1e6 * gather_s == pytest.approx(11.65, abs=0.005)
    assert 32 * op.memory_s / gather_s == pytest.approx(56, rel=0.12), "the book takes beta = 8; it is 9 here, so 49.8"


def test_book_serving_a18_prefill_of_8192_on_16_chips_at_40_percent(serving):
    efficiency = replace(IDEAL, matmul=0.4)
    d = serving("tpu-v5e:4x4", "bf16", efficiency=efficiency)
    step = replace(StepShape.prefill(8192), R=8192)
    seconds = total(d, step, "roofline_s", only="matmul") / 16
    assert seconds == pytest.approx(0.909645, rel=1e-6)


# --- GPUs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "microseconds"), [(64, 8.585), (512, 14.94)])
def test_book_gpus_g1_4_one_product_on_b200(architecture, make_slice, textbook, tokens, microseconds):
    chips = make_slice("b200:1", flops={"fp16": 2.3e15, "bf16": 2.3e15}, bandwidth=8e12)
    model = architecture(L=1, D=8192, H=32, K=32, hd=128)  # output projection: [4096, 8192]
    d = textbook(model, chips, "fp16", activation_traffic=True)
    op = ops(d, StepShape.decode(tokens, 1))["output projection"]
    assert 1e6 * op.roofline_s == pytest.approx(microseconds, abs=0.006)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", 295), ("fp8", 590)])
def test_book_gpus_g1_3_h100_intensity(textbook, make_slice, dtype, expected):
    d = textbook(load_model("llama-3-8b"), make_slice("h100-sxm:1"), f"{dtype}g0")
    # Tokens per load of the weights: peak ÷ bandwidth × bytes per weight ÷ 2.
    bytes_per_weight = 2 if dtype == "bf16" else 1
    assert critical_batch(d) * 2 / bytes_per_weight == pytest.approx(expected, rel=2e-3)
