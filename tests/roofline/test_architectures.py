"""Every architecture of the catalogue, and hand counts of what sets it apart from a dense decoder."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.architecture import DenseFFN, GatedDeltaNet, LatentAttention, Mamba2, SoftmaxAttention
from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model, model_names
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import critical_batch, report, step_report
from simulator.roofline.blocks import touched_experts
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.memory import memory_fit, mixer_memory, weights_bytes
from simulator.roofline.ops import StepShape, dense_ops, step_ops
from simulator.roofline.pipeline import shard
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharding import Sharding
from simulator.roofline.sweep import max_batch

MODELS = model_names()


@cache
def one_chip(name, precision="bf16", **changes):
    settings = {"max_num_batched_tokens": 2048, "max_num_seqs": 64} | changes
    return Deployment(load_model(name), resolve_slice("h100-sxm:1"), parse_precision(precision), **settings)


def shapes(d):
    """A decode step, a prefill chunk on a cached context past every window but the largest, and both in one step."""
    seen = {"window": d.window, "chunked": d.window_chunked}
    decode = StepShape.decode(40, 5000, **seen) + StepShape.decode(3, 7, **seen)
    prefill = StepShape.prefill(900, 3000, **seen) + StepShape.prefill(17, 0, completes=False, **seen)
    return decode, prefill, decode + prefill


def vectors(model):
    """Parameters of mixers and feed-forward blocks that multiply no matrix."""
    total, D = 0, model.d_model
    for g in model.layers:
        each = 0
        match g.mixer:
            case SoftmaxAttention(n_heads=N, n_kv_heads=K, head_dim=H):
                a = g.mixer
                each += ((N + 2 * K) * H if a.qkv_bias else 0) + (D if a.o_bias else 0) + (N if a.sinks else 0)
                each += {"none": 0, "per_head": 2 * H, "full": (N + K) * H}[a.qk_norm]
            case LatentAttention():
                each += (g.mixer.q_rank or 0) + g.mixer.kv_rank
                each += 2 * g.mixer.indexer.head_dim if g.mixer.indexer else 0
            case GatedDeltaNet(n_value_heads=n, key_dim=dk, value_dim=dv, conv=conv):
                each += conv * (2 * g.mixer.n_key_heads * dk + n * dv) + 2 * n + dv
            case Mamba2(n_heads=n, head_dim=P, n_groups=G, state_dim=S, conv=conv):
                each += (conv + 1) * (n * P + 2 * G * S) + 3 * n + n * P
        f = g.ffn
        if f is not None:
            inputs = 2 if f.gated else 1
            if isinstance(f, DenseFFN):
                each += inputs * f.d_ff + D if f.bias else 0
            else:
                each += f.top_k * (inputs * f.d_ff + D) if f.expert_bias else 0
                each += f.n_experts * (f.router_bias + f.score_correction_bias)
        total += g.count * each
    return total + (model.vocab_size if model.head_bias else 0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_stored_and_read_are_the_models_parameters(name):
    d, parameters = one_chip(name), count(load_model(name))
    assert weights_bytes(d) == 2 * parameters.total
    every_expert = sum(op.weight_bytes for op in step_ops(d, replace(shapes(d)[0], n=10**7)))
    assert every_expert == pytest.approx(2 * (parameters.read_per_step - parameters.positions), rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_one_token_reads_its_own_experts_alone(name):
    d, parameters = one_chip(name), count(load_model(name))
    one = sum(op.weight_bytes for op in step_ops(d, StepShape.decode(1, 9, window=d.window, chunked=d.window_chunked)))
    assert one == pytest.approx(2 * (parameters.active_without_embedding - parameters.positions), rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_two_flops_per_matrix_parameter_a_token_uses(name):
    d, model, parameters = one_chip(name), load_model(name), count(load_model(name))
    flops = sum(op.flops for op in step_ops(d, shapes(d)[0]) if op.kind == "matmul")
    matrices = parameters.active_without_embedding - parameters.positions - parameters.norms - vectors(model)
    assert flops == pytest.approx(2 * 43 * matrices, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes_per_token_are_those_of_the_reference_table(name):
    d, parameters = one_chip(name), count(load_model(name))
    # The index keys of sparse attention are FP8 with one FP32 scale whatever the rest is held in.
    index = sum(
        g.count * (g.mixer.indexer.head_dim + 4)
        for g in load_model(name).layers
        if isinstance(g.mixer, LatentAttention) and g.mixer.indexer
    )
    assert d.kv_bytes_per_token == 2 * parameters.kv_elements_per_token + index
    state = 4 * parameters.state_elements_per_sequence + 2 * parameters.conv_elements_per_sequence
    assert sum(layers * mixer_memory(d, mixer).state_bytes for layers, mixer in d.mixers) == state


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_ops_and_no_step_beats_its_bound(name):
    d = one_chip(name)
    cost = compile_step_cost(d)
    for step in shapes(d):
        answer, n, R = report(d, step), int(step.n), int(step.R)
        sums = {f: getattr(step, f) for f in ("S", "A", "K", "SW", "AW", "KW")}
        table = cost.step_s(n=n, B=int(step.B), P=int(step.P), R=R, **sums)
        assert table == pytest.approx(answer.time_s, rel=1e-12)
        assert answer.time_s == pytest.approx(step_time_s(d, step), rel=1e-12)
        assert answer.time_s >= answer.roofline_s
        flops = cost.dense_flops[n] + cost.head_flops[R] + cost.attention_flops_per_pair * (step.S + step.A)
        flops += cost.window_flops_per_pair * (step.SW + step.AW)
        assert flops == pytest.approx(answer.model_flops, rel=1e-12)
        moved = cost.dense_bytes[n] + cost.head_bytes[R] + cost.kv_bytes_per_token * (step.S + step.K)
        moved += cost.window_kv_bytes_per_token * (step.SW + step.KW) + cost.decode_seq_bytes * (step.B + step.P)
        assert moved == pytest.approx(answer.required_bytes, rel=1e-12)
    np.testing.assert_allclose(np.sum(list(cost.dense_parts.values()), axis=0), cost.dense_s, rtol=1e-12)
    assert all((part >= 0).all() for part in cost.dense_parts.values())


def test_block_scales_of_an_fp8_checkpoint_to_the_last_one():
    # models.md 3.1: MiniMax-M2.5's FP8 checkpoint counts 13,880,064 values more than its parameters, its block scales.
    scaled, bare = (weights_bytes(one_chip("minimax-m2.5", word)) for word in ("fp8g128", "fp8g0"))
    assert (scaled - bare) / 4 == 13_880_064


def test_kimis_checkpoint_to_the_last_byte():
    # models.md 3.1: routed experts in INT4 with one bf16 scale per 32, everything else bf16. Besides the text model the
    # checkpoint holds a vision tower and projector, FP32 score biases, and 8 bytes of shape per packed matrix.
    vision, biases, packed = 416_866_032 + 54_277_888, 60 * 384, 60 * 384 * 3
    text = weights_bytes(one_chip("kimi-k2.5", "int4g32-experts"))
    assert text + 2 * vision + 2 * biases + 8 * packed == 595_148_192_736


def test_experts_alone_may_be_quantised():
    d = one_chip("gpt-oss-120b", "mxfp4-experts")
    found = {op.name: op for op in dense_ops(d, 1e6)}
    routed = count(load_model("gpt-oss-120b")).routed_experts
    biases = 36 * 128 * (2 * 2880 + 2880)
    held = found["experts gate, up"].weight_bytes + found["experts down"].weight_bytes
    assert held == pytest.approx((routed - biases) * 4.25 / 8 + 2 * biases)
    assert found["QKV projection"].weight_bytes == dense_ops(one_chip("gpt-oss-120b"), 1e6)[2].weight_bytes
    fp8 = {op.name: op.dtype for op in dense_ops(one_chip("mixtral-8x7b", "fp8-experts"), 8.0)}
    assert (fp8["experts down"], fp8["QKV projection"], fp8["router"]) == ("fp8", "bf16", "bf16")
    with pytest.raises(InputError, match="llama-3-8b has no routed experts"):
        one_chip("llama-3-8b", "mxfp4-experts")


# Windows


def op_named(d, step, name):
    return next(op for op in step_ops(d, step) if op.name == name)


@pytest.mark.parametrize(
    ("name", "tokens", "gigabytes"),
    [
        ("gpt-oss-120b", 131072, (4.83, 0.0047)),  # models.md 3.2
        ("gemma-3-27b", 131072, (10.74, 0.44)),
    ],
)
def test_keys_read_by_a_long_decode_are_the_full_layers_and_the_windows(name, tokens, gigabytes):
    d = one_chip(name)
    read = op_named(d, StepShape.decode(1, tokens, window=d.window), "attention, decode").kv_read_bytes
    assert read == pytest.approx(1e9 * sum(gigabytes), rel=2e-3)
    cost = compile_step_cost(d)
    assert cost.window_kv_bytes_per_token * d.window == pytest.approx(1e9 * gigabytes[1], rel=1e-2)


def test_windowed_layers_forget_in_prefill_too():
    d = one_chip("mistral-7b-v0.1")
    for past, pairs, keys in ((0, 500 * 501 // 2, 500), (100_000, 500 * 4096, 500 + 4095)):
        op = op_named(d, StepShape.prefill(500, past, window=4096), "attention, prefill")
        assert op.flops == pairs * 4 * 32 * 32 * 128
        assert op.kv_read_bytes == keys * 131_072


def test_chunked_windows_start_anew():
    scout = one_chip("llama-4-scout")
    assert (scout.window, scout.window_chunked) == (8192, True)
    near, far = (StepShape.decode(1, t, window=8192, chunked=True).SW for t in (8192, 8193))
    assert (near, far) == (8192, 1)


def test_a_step_that_does_not_say_what_windows_see_is_refused():
    with pytest.raises(
        InputError, match=r"gpt-oss-20b has layers with a window of 128 keys: the step needs SW, AW and KW"
    ):
        report(one_chip("gpt-oss-20b"), StepShape.decode(1, 100))


@pytest.mark.parametrize(
    ("name", "full", "windowed", "layers"),
    [
        ("gemma-2-9b", 1, 1, 21),  # 21 of each
        ("gemma-3-12b", 1, 5, 8),  # 8 and 40
        ("gemma-3-27b", 1, 6, 10),  # 10 and 52: the sixth group has two layers, and room for ten
        ("gpt-oss-20b", 1, 1, 12),  # 12 of each
        ("llama-4-scout", 1, 3, 12),  # 12 and 36
        ("mistral-7b-v0.1", 0, 1, 32),
    ],
)
def test_groups_are_those_of_vllm(name, full, windowed, layers):
    d = Deployment(load_model(name), resolve_slice("h100-sxm:8"))
    fit = memory_fit(d)
    assert fit.groups == KvGroups(full, windowed, d.window, d.window_chunked)
    mixer = d.architecture.layers[0].mixer
    assert fit.kv_bytes_per_token == layers * 2 * 2 * mixer.n_kv_heads * mixer.head_dim / 8
    assert fit.reserved_bytes == 0
    kept = memory_fit(replace(d, windowed_kv="kept"))
    assert kept.groups == KvGroups()
    assert kept.kv_bytes_per_token == d.kv_bytes_per_token
    short, long = (max_batch(fit, tokens) / max_batch(kept, tokens) for tokens in (64, 100_000))
    assert short == pytest.approx(d.kv_bytes_per_token / (fit.kv_bytes_per_token * (full + windowed)), rel=0.02)
    assert long > 1.5


def test_layers_nearly_as_many_of_both_kinds_lie_in_two_groups():
    gemma = load_model("gemma-2-9b")
    windowed, full = gemma.layers[0], gemma.layers[1]
    layers = (windowed.model_copy(update={"count": 12}), full.model_copy(update={"count": 13}))
    fit = memory_fit(replace(one_chip("gemma-2-9b"), architecture=gemma.model_copy(update={"layers": layers})))
    assert (fit.groups.full, fit.groups.windowed) == (1, 1)
    assert fit.kv_bytes_per_token == 13 * 2 * 2 * 8 * 256


@pytest.mark.parametrize(
    ("name", "pp", "groups", "page"),
    [
        ("gpt-oss-20b", 2, (1, 1), (6 * 2 * 2 * 8 * 64,) * 2),  # 12 layers of either kind
        (
            "gemma-3-27b",
            2,
            (1, 6),
            (5 * 2 * 2 * 16 * 128,) * 2,
        ),  # 10 and 52: five layers, and six groups of at most five
        ("gemma-3-12b", 4, (1, 5), (2 * 2 * 2 * 8 * 256,) * 4),  # 2 and 10
        ("mistral-7b-v0.1", 8, (0, 1), (4 * 2 * 2 * 8 * 128,) * 8),
    ],
)
def test_stages_share_the_groups_and_the_tightest_sets_the_number_of_blocks(name, pp, groups, page):
    d = shard(load_model(name), resolve_slice(f"h100-sxm:{pp}"), Sharding(tp=1, pp=pp))
    fits = [memory_fit(stage) for stage in d.stages]
    assert {(fit.groups.full, fit.groups.windowed) for fit in fits} == {groups}
    assert {fit.groups for fit in fits} == {memory_fit(d.whole).groups} == {d.memory.groups}
    assert tuple(fit.kv_bytes_per_token for fit in fits) == page
    assert all(fit.reserved_bytes == 0 for fit in fits)
    blocks = [int(fit.kv_bytes // (16 * bytes_)) - 1 for fit, bytes_ in zip(fits, page, strict=True)]
    assert d.memory.kv_blocks == min(blocks)
    kept = shard(load_model(name), resolve_slice(f"h100-sxm:{pp}"), Sharding(tp=1, pp=pp), windowed_kv="kept")
    assert max_batch(d.memory, 100_000) > 1.5 * max_batch(kept.memory, 100_000)


def test_windows_are_set_aside_or_paged_whichever_holds_more_where_they_are_not_pooled():
    d = replace(one_chip("gemma-3-12b"), max_num_seqs=8, windowed_kv="reserved")
    fit = memory_fit(d)
    full, windowed = (2 * 2 * 8 * 256 * layers for layers in (8, 40))
    assert fit.kv_bytes_per_token == full
    assert fit.reserved_bytes == 8 * 1024 * windowed
    crowded = memory_fit(replace(d, max_num_seqs=256))
    assert crowded.kv_bytes_per_token == full + windowed
    assert crowded.reserved_bytes == 0
    assert crowded.kv_tokens < fit.kv_tokens
    everywhere = memory_fit(replace(one_chip("mistral-7b-v0.1"), windowed_kv="reserved"))
    assert everywhere.kv_bytes_per_token == 131_072
    assert everywhere.reserved_bytes == 0


# Experts


@given(st.integers(1, 512), st.data(), st.integers(1, 10_000))
def test_touched_experts_lie_between_those_of_one_token_and_all(experts, data, n):
    top_k = data.draw(st.integers(1, experts))
    touched = touched_experts(experts, top_k, float(n))
    assert top_k * (1 - 1e-9) <= touched <= experts * (1 + 1e-9)
    assert touched <= n * top_k * (1 + 1e-9)
    assert touched <= touched_experts(experts, top_k, n + 1.0) * (1 + 1e-12)


def test_touched_experts_by_hand():
    # Two tokens, each choosing one of two experts: 1.5 different ones on average.
    assert touched_experts(2, 1, 2.0) == pytest.approx(1.5)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", 1920), ("w8a16g0", 960)])
def test_book_inference_q5_critical_batch_of_a_moe(precision, expected, make_slice):
    # jax-ml/scaling-book, inference Q5: E = 16, k = 2 and about 240 FLOPs per byte: 240 · 16/2 tokens, half of it with
    # int8 weights and bf16 products. The routed experts alone, as there.
    mixtral = load_model("mixtral-8x7b")
    ffn = mixtral.layers[0].ffn.model_copy(update={"n_experts": 16, "top_k": 2})
    model = mixtral.model_copy(update={"layers": (mixtral.layers[0].model_copy(update={"ffn": ffn}),)})
    chip = make_slice("tpu-v5e:1x1", flops={"bf16": 240e12}, bandwidth=1e12)
    d = Deployment(model, chip, parse_precision(precision), efficiency=IDEAL, activation_traffic=False)
    experts = [op for op in dense_ops(d, 1e9) if op.name.startswith("experts")]
    batch = 1e9 * sum(op.memory_s for op in experts) / sum(op.compute_s for op in experts)
    assert batch == pytest.approx(expected)
    assert critical_batch(d) < expected  # the attention products have a batch of 240


@pytest.mark.parametrize(("sixteen", "published", "exact"), [(True, 74.4e12, 75.905e12), (False, 183.5e12, 184.254e12)])
def test_deepseek_moe_training_flops_per_4k_tokens(sixteen, published, exact):
    # Table 3 of the DeepSeekMoE paper, 16B of experts against a dense 7B. The convention behind it: three forward passes,
    # of the activated matrices with the head, and of whole squares of scores, not causal halves. Configurations as in
    # the scaling-law reference table, whose figures from the same rule are ``exact``.
    if sixteen:
        lite = load_model("deepseek-v2-lite")
        attention = SoftmaxAttention(n_heads=16, n_kv_heads=16, head_dim=128)
        dense, routed = (g.model_copy(update={"mixer": attention}) for g in lite.layers)
        layers = (dense, routed.model_copy(update={"count": 27}))
        model = lite.model_copy(update={"layers": layers})
    else:
        seven = load_model("llama-2-7b")
        layers = (seven.layers[0].model_copy(update={"count": 30}),)
        model = seven.model_copy(update={"layers": layers, "vocab_size": 102_400})
    step = replace(StepShape.prefill(4096), A=4096.0**2, R=4096)
    flops = 3 * report(Deployment(model, resolve_slice("h100-sxm:1")), step).model_flops
    assert flops == pytest.approx(exact, rel=1e-4)
    assert flops == pytest.approx(published, rel=0.025)


def test_imbalance_stretches_experts_and_nothing_else():
    d = one_chip("mixtral-8x7b")
    even, skewed = ({op.name: op for op in dense_ops(replace(d, expert_imbalance=x), 64.0)} for x in (1.0, 1.5))
    for name, op in even.items():
        factor = 1.5 if name.startswith("experts") else 1.0
        assert skewed[name].roofline_s == pytest.approx(factor * op.roofline_s)
    with pytest.raises(InputError, match=r"expert_imbalance = 0\.9: must be finite and at least 1"):
        replace(d, expert_imbalance=0.9)


# Latents


def test_latents_decode_absorbed_and_prefill_expanded():
    d = one_chip("deepseek-v3")
    decode = op_named(d, StepShape.decode(2, 1000), "attention, decode")
    assert decode.flops == 2000 * 61 * 2 * 128 * (2 * 512 + 64)
    assert decode.kv_read_bytes == 2000 * 70_272  # models.md 3.2
    prefill = op_named(d, StepShape.prefill(100), "attention, prefill")
    assert prefill.flops == 5050 * 61 * 2 * 128 * (128 + 64 + 128)
    # Model FLOPs are those of the expanded form in both: the absorbed one spends more to read less.
    assert decode.flops - decode.copied_flops == 2000 * prefill.flops / 5050


def test_cached_latents_are_expanded_again_and_new_ones_once():
    d = one_chip("deepseek-v3")
    per_token = 61 * 2 * 512 * 128 * (128 + 128)
    for past in (0, 1000):
        ops = {op.name: op for op in step_ops(d, StepShape.prefill(100, past))}
        assert ops["latent up-projection"].flops == 100 * per_token
        assert ops["latent up-projection, context"].flops == past * per_token
        assert ops["latent up-projection, context"].copied_flops == past * per_token


def test_every_rank_holds_the_latents():
    sixteen = Deployment(load_model("deepseek-v3"), resolve_slice("h100-sxm:2x8"))
    assert sixteen.kv_bytes_per_token == 70_272
    assert sixteen.kv_copies == 16
    assert "16 chips each need the whole latents: the KV cache is held 16 times" in sixteen.notes


def test_absorbed_decode_turns_compute_bound_where_the_chip_is_narrow(make_slice):
    model = load_model("deepseek-v3")
    intensity = 2 * 128 * 1088 / 1152  # FLOPs per byte of latent
    for flops, bound in ((1e12 * intensity * 1.1, "HBM"), (1e12 * intensity * 0.9, "compute")):
        chip = make_slice("h100-sxm:1", flops={"bf16": flops}, bandwidth=1e12)
        answer = step_report(Deployment(model, chip, efficiency=IDEAL), decode=4, context=100_000)
        assert next(row.bound for row in answer.ops if row.op.name == "attention, decode") == bound


# Sparse attention


def test_sparse_attention_by_the_reference_tables_figures():
    d = one_chip("glm-5")
    assert d.kv_bytes_per_token == 100_152  # models.md 3.2, bf16 latents
    assert one_chip("glm-5", "fp8kv8").kv_bytes_per_token == 61_464
    cost = compile_step_cost(d)
    assert cost.window == 2048
    assert cost.kv_bytes_per_token == 78 * 132
    assert cost.window_kv_bytes_per_token == 89_856
    for context, indexer_costs_more in ((34_815, False), (34_817, True)):
        ops = {op.name: op for op in step_ops(d, StepShape.decode(1, context, window=2048))}
        assert ops["indexer, decode"].flops == 78 * context * 8192
        assert ops["attention, decode"].flops == 78 * 2048 * 139_264
        assert (ops["indexer, decode"].flops > ops["attention, decode"].flops) == indexer_costs_more


# Recurrent state


@pytest.mark.parametrize(
    ("name", "state", "conv"),
    [
        ("qwen3.5-397b-a17b", 188_743_680, 3_317_760),
        ("qwen3-next-80b-a3b", 75_497_472, 1_769_472),
        ("nemotron-h-56b", 905_969_664, 6_635_520),
        ("nemotron-h-8b", 100_663_296, 1_474_560),
    ],
)
def test_state_is_read_and_written_whole_by_every_sequence(name, state, conv):
    d = one_chip(name)
    short, long = (op_named(d, StepShape.decode(7, t), "state, decode") for t in (10, 100_000))
    assert short == long
    assert short.kv_read_bytes == short.kv_write_bytes == 7 * (state + conv)  # models.md 3.2
    assert memory_fit(d).reserved_bytes == 64 * (state + conv)
    eight = Deployment(load_model(name), resolve_slice("h100-sxm:8"))
    assert 8 * memory_fit(eight).reserved_bytes == eight.max_num_seqs * (state + conv)


# Parallel blocks, and blocks alone


@pytest.mark.parametrize(
    ("name", "reductions"), [("gpt-j-6b", 28), ("falcon-180b", 80), ("llama-2-70b", 160), ("nemotron-h-56b", 118)]
)
def test_all_reduces_follow_the_blocks(name, reductions):
    d = Deployment(load_model(name), resolve_slice("h100-sxm:8"))
    assert d.reductions == reductions
    found = op_named(d, StepShape.decode(1, 1), "all-reduce, layers")
    assert found.count == reductions


@pytest.mark.parametrize(
    ("name", "tp", "what"),
    [
        ("qwen3-next-80b-a3b", "h100-sxm:4x8", "16 key heads"),
        ("nemotron-h-8b", "h100-sxm:8x8", "32 query heads"),
        ("gpt-oss-20b", "h100-sxm:16x8", "64 query heads"),
    ],
)
def test_what_tensor_parallelism_does_not_divide_is_named(name, tp, what):
    with pytest.raises(InputError, match=f"has {what}, which"):
        Deployment(load_model(name), resolve_slice(tp))


settings.register_profile("architectures", max_examples=60, deadline=None)
settings.load_profile("architectures")
