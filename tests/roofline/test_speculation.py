"""Speculative decoding in the cost model: published formula values, bounds, limits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError, UnpriceableError
from simulator.roofline.acceptance import (
    best_draft_tokens,
    beta_parameters,
    operations_factor,
    survival_of_curve,
    survival_of_lengths,
    survival_of_rate,
    tokens_per_pass,
    walltime_factor,
)
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit, weights_bytes
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision
from simulator.roofline.speculation import (
    Drafter,
    best_levels,
    chain_levels,
    compile_speculation,
    drafter_weights_bytes,
    layer_drafter,
    memory_with_drafter,
    model_drafter,
    pass_time_s,
    speedup,
    verify_terms,
    with_drafter,
)

DEPTH = 4
#: α, γ, operations, speed-up; Leviathan et al. 2023, Table 1 (c = ĉ = 0).
LEVIATHAN_TABLE_1 = [
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]
#: α, γ, c, formula of theorem 3.8; Leviathan et al. 2023, Table 2 (T5-XXL, batch 1).
LEVIATHAN_TABLE_2 = [
    (0.75, 7, 0.02, 3.16),
    (0.62, 7, 0.02, 2.26),
    (0.65, 5, 0.02, 2.40),
    (0.53, 5, 0.02, 1.89),
    (0.80, 7, 0.04, 3.25),
    (0.68, 5, 0.04, 2.35),
    (0.73, 5, 0.04, 2.62),
    (0.55, 3, 0.04, 1.80),
    (0.82, 7, 0.11, 2.50),
    (0.71, 3, 0.11, 1.93),
    (0.74, 3, 0.11, 2.02),
    (0.56, 3, 0.11, 1.54),
]
ALPHAS = st.floats(0, 1)


@pytest.mark.parametrize(("alpha", "gamma", "operations", "speed"), LEVIATHAN_TABLE_1)
def test_leviathan_table_1(alpha, gamma, operations, speed):
    assert operations_factor(alpha, gamma, 0.0) == pytest.approx(operations, abs=0.005)
    assert walltime_factor(alpha, gamma, 0.0) == pytest.approx(speed, abs=0.005)


@pytest.mark.parametrize(("alpha", "gamma", "ratio", "speed"), LEVIATHAN_TABLE_2)
def test_leviathan_table_2(alpha, gamma, ratio, speed):
    assert walltime_factor(alpha, gamma, ratio) == pytest.approx(speed, abs=0.01)


@pytest.mark.parametrize(
    ("alpha", "ratio", "gamma", "speed"), [(0.8, 0.05, 8, 3.0921), (0.9, 0.1, 10, 3.4309), (0.6, 0.2, 2, 1.4)]
)
def test_best_draft_length(alpha, ratio, gamma, speed):
    assert best_draft_tokens(alpha, ratio) == gamma
    assert walltime_factor(alpha, gamma, ratio) == pytest.approx(speed, abs=5e-5)


@given(ALPHAS.filter(lambda a: a < 0.999), st.integers(0, 20))
def test_tokens_per_pass_is_the_closed_form(alpha, gamma):
    assert tokens_per_pass(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha), rel=1e-9)
    assert 1 <= tokens_per_pass(alpha, gamma) <= gamma + 1


def test_all_accepted_and_none_accepted():
    assert tokens_per_pass(1.0, 5) == 6
    assert tokens_per_pass(0.0, 5) == 1


@given(ALPHAS, st.integers(1, 8))
def test_curves_and_histograms_of_a_constant_rate_are_that_rate(alpha, gamma):
    want = survival_of_rate(alpha, gamma)
    np.testing.assert_allclose(survival_of_curve([alpha] * gamma, gamma), want, rtol=1e-9, atol=1e-12)
    exactly = [alpha**k * (1 - alpha) for k in range(gamma)] + [alpha**gamma]
    np.testing.assert_allclose(survival_of_lengths(exactly, gamma), want, rtol=1e-6, atol=1e-9)


def test_drafting_pays_only_above_its_cost():
    assert best_draft_tokens(0.3, 0.3) == 0
    assert best_draft_tokens(0.3, 0.29) >= 1


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.2))
def test_beta_parameters_have_the_moments(mean, spread):
    a, b = beta_parameters(mean, spread)
    assert a / (a + b) == pytest.approx(mean)
    assert a * b / ((a + b) ** 2 * (a + b + 1)) == pytest.approx(spread**2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: survival_of_rate(1.2, 3), "0 … 1"),
        (lambda: survival_of_curve([0.5], 2), "at least 2 entries"),
        (lambda: survival_of_lengths([1, 1], 2), "0 … 2"),
        (lambda: beta_parameters(0.5, 0.6), "below √"),
    ],
)
def test_bad_acceptance_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.fixture(scope="module")
def target():
    return Deployment(load_model("llama-3-70b"), resolve_slice("h100-sxm:8"), max_num_seqs=256, decode_tokens=DEPTH + 1)


@pytest.fixture(scope="module")
def drafters(target):
    small = Deployment(load_model("llama-3-8b"), resolve_slice("h100-sxm:8"))
    return {
        "model": model_drafter(small),
        "layer": layer_drafter(target),
        "heads": Drafter("heads"),
        "lookup": Drafter("lookup", sequence_s=2e-5),
    }


@pytest.fixture(scope="module")
def compiled(target, drafters):
    cost = compile_step_cost(target)
    return cost, {name: compile_speculation(target, cost, d, chain_levels(DEPTH)) for name, d in drafters.items()}


def test_level_0_is_a_plain_step(compiled):
    cost, tables = compiled
    for table in tables.values():
        for batch, context in ((1, 100), (64, 2048)):
            plain = cost.step_s(n=batch, B=batch, S=batch * context, R=batch)
            assert pass_time_s(cost, table, 0, batch, context) == pytest.approx(plain, rel=1e-12)


def test_draft_steps_are_the_draft_models_own(compiled, drafters):
    """γ serial steps, each at a context longer by the drafts before it."""
    _, tables = compiled
    d = replace(drafters["model"].deployment, max_num_seqs=256)
    for batch, context in ((1, 300), (32, 4096)):
        steps = sum(step_time_s(d, StepShape.decode(batch, context + depth)) for depth in range(DEPTH))
        table = tables["model"]
        # Exact but for the drafts' own keys, priced as beyond the bend of the curve.
        assert table.drafting_s(DEPTH, B=batch, S=batch * context) == pytest.approx(steps, rel=1e-4)


def test_verification_is_one_step_of_as_many_tokens(compiled):
    """Linear layers and head see (γ + 1)·B tokens; attention reads the cache once."""
    cost, tables = compiled
    table, batch, context = tables["lookup"], 16, 1024
    tokens = batch * (DEPTH + 1)
    attention = table.decode_s(DEPTH, B=batch, S=batch * context) - table.draft_s[DEPTH, batch]
    verify = pass_time_s(cost, table, DEPTH, batch, context) - table.draft_s[DEPTH, batch]
    assert verify == pytest.approx(float(cost.dense_s[tokens] + cost.head_s[tokens]) + attention)
    plain = cost.decode_attention_s(batch * context) + cost.decode_seq_s * batch
    assert plain <= attention < (DEPTH + 1) * plain
    assert attention < 1.02 * plain  # memory-bound: further queries are all but free


@pytest.mark.parametrize("model", ["llama-3-8b", "deepseek-v3"])
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 64])
def test_verification_is_never_under_its_bound(model, queries):
    """Pairs at the attention rate, and keys at the bandwidth; whichever binds, at any context."""
    d = Deployment(load_model(model), resolve_slice("h200-sxm:8"), parse_precision("fp8"))
    terms, cost = verify_terms(d, queries), compile_step_cost(d)
    assert 0 <= terms.key_s <= (queries - 1) * cost.decode_slope_s[-1] * (1 + 1e-9)
    for context in (queries, 1000, 100_000):
        pairs = sum(context + j for j in range(queries))
        flops_s = cost.attention_flops_per_pair * pairs / cost.peak_flops_per_s
        bytes_s = cost.kv_bytes_per_token * (context + queries - 1) / cost.hbm_bandwidth_bytes_per_s
        priced = cost.decode_attention_s(context) + cost.decode_seq_s + terms.key_s * context + terms.sequence_s
        assert priced >= max(flops_s / 2, bytes_s)  # FP8 peak counts attention, which runs in BF16, at half


def test_latent_attention_turns_compute_bound_before_grouped_queries():
    """Every head shares DeepSeek's latents, so a byte of cache has more FLOPs on it from the start."""
    mla = Deployment(load_model("deepseek-v3"), resolve_slice("h200-sxm:8"), parse_precision("fp8"))
    gqa = Deployment(load_model("llama-3-8b"), resolve_slice("h200-sxm:8"))

    def turning_point(d):
        return next(q for q in range(1, 1000) if verify_terms(d, q).key_s > 0)

    assert 2 < turning_point(mla) < turning_point(gqa) / 2


def test_the_gain_at_batch_1_is_nearly_the_formula_and_collapses_with_the_batch(compiled):
    cost, tables = compiled
    table = tables["model"]
    tokens = tokens_per_pass(0.8, DEPTH)
    gains = [speedup(cost, table, DEPTH, tokens, batch, 2048) for batch in (1, 8, 32, 128, 256)]
    assert sorted(gains, reverse=True) == gains
    ratio = table.drafting_s(1, B=1, S=2048) / pass_time_s(cost, table, 0, 1, 2048)
    assert gains[0] == pytest.approx(walltime_factor(0.8, DEPTH, ratio), rel=0.05)
    assert gains[0] > 1.8
    assert gains[-1] < 0.9


def test_adaptive_levels_fall_with_the_batch_and_never_lose(compiled):
    cost, tables = compiled
    tokens = np.array([tokens_per_pass(0.6, depth) for depth in range(DEPTH + 1)])
    levels = best_levels(cost, tables["lookup"], tokens, max_num_seqs=256, context=1024)
    assert levels[1] == DEPTH
    assert levels[256] == 0
    for batch in (1, 16, 64, 200):
        level = int(levels[batch])
        assert speedup(cost, tables["lookup"], level, float(tokens[level]), batch, 1024) >= 1


def test_experts_make_small_batches_gain_less():
    """Every draft of a mixture of experts touches experts of its own, until all are touched anyway."""
    d = Deployment(
        load_model("deepseek-v3"), resolve_slice("h200-sxm:8"), parse_precision("fp8"), decode_tokens=DEPTH + 1
    )
    cost = compile_step_cost(d)
    table = compile_speculation(d, cost, layer_drafter(d), chain_levels(2))
    gains = [speedup(cost, table, 2, tokens_per_pass(0.8, 2), batch, 2048) for batch in (1, 8, 128)]
    assert gains[1] < gains[0]
    assert gains[1] < gains[2]


def test_trees_and_medusa_verify_every_node(target):
    cost = compile_step_cost(replace(target, decode_tokens=16))
    table = compile_speculation(replace(target, decode_tokens=16), cost, Drafter("heads"), [(), (4, 6, 5)])
    assert table.queries.tolist() == [1, 16]
    assert table.lookahead == 15
    one = compile_speculation(target, cost, Drafter("heads"), chain_levels(1))
    assert table.draft_s[1, 8] > 2.5 * one.draft_s[1, 8]  # three output heads, not one


def test_a_drafters_prompt_pass_is_its_own_prefill(target, compiled, drafters):
    cost, tables = compiled
    d = replace(drafters["model"].deployment, max_num_batched_tokens=target.max_num_batched_tokens)
    shape = StepShape.prefill(2000, 500, completes=False)
    both = with_drafter(cost, tables["model"]).step_s(n=2000, P=1, A=shape.A, K=shape.K) + tables["model"].chunk_s[2000]
    alone = cost.step_s(n=2000, P=1, A=shape.A, K=shape.K)
    assert both - alone == pytest.approx(step_time_s(d, shape), rel=1e-9)
    assert not tables["lookup"].chunk_s.any()
    heads = with_drafter(cost, tables["heads"])
    np.testing.assert_array_equal(heads.prefill_planes, cost.prefill_planes)
    for keys in (0, 100, 10**6):  # further knots change nothing
        alike = with_drafter(cost, tables["model"]).decode_attention_s(keys)
        assert alike == pytest.approx(cost.decode_attention_s(keys), rel=1e-12)


def test_another_slice_drafts_prompts_meanwhile_and_takes_no_memory(target):
    small = Deployment(load_model("llama-3-8b"), resolve_slice("h100-sxm:1"))
    drafter = model_drafter(small, same_slice=False)
    table = compile_speculation(target, compile_step_cost(target), drafter, chain_levels(2))
    assert not table.chunk_s.any()
    assert memory_with_drafter(target, drafter, 2) == memory_fit(target)


def test_memory_counts_weights_and_both_caches(target, drafters):
    alone = memory_fit(target)
    both = memory_with_drafter(target, drafters["model"], DEPTH)
    small = drafters["model"].deployment
    assert both.weights_bytes - alone.weights_bytes == pytest.approx(weights_bytes(small))
    assert both.kv_bytes_per_token == pytest.approx(alone.kv_bytes_per_token + small.kv_bytes_per_token)
    assert both.kv_blocks < alone.kv_blocks
    layer = drafter_weights_bytes(target, drafters["layer"], DEPTH)
    parameters = 2 * 8192**2 + 8192 * (8192 + 2048) + 8192 * 8192 + 3 * 8192 * 28672
    assert layer * 8 / 2 == pytest.approx(parameters, rel=1e-3)
    heads = drafter_weights_bytes(target, drafters["heads"], 3)
    assert heads * 8 / 2 == pytest.approx(3 * (8192**2 + 8192 * 128256), rel=1e-6)


def test_draft_models_with_windows_are_refused():
    windowed = Deployment(load_model("gemma-3-4b"), resolve_slice("h100-sxm:1"))
    with pytest.raises(UnpriceableError, match="window"):
        model_drafter(windowed)


def test_tables_that_contradict_themselves_are_refused(compiled):
    _, tables = compiled
    with pytest.raises(InputError, match="ascend from 1"):
        replace(tables["lookup"], queries=np.array([1, 3, 2, 4, 5]))
    with pytest.raises(InputError, match="level 0 drafts nothing"):
        replace(tables["lookup"], draft_s=tables["lookup"].draft_s + 1.0)
