"""Drafts beside attention ranks and spread experts: op by op, in the limits, and alike to replicas of one part."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.roofline.compile import hidden_s, step_time_s, sum_over
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit, weights_bytes
from simulator.roofline.mtp import input_ops
from simulator.roofline.ops import StepShape, decode_attention_ops, dense_ops, head_ops
from simulator.roofline.pipeline import shard
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharded_cost import compile_sharded
from simulator.roofline.sharding import one_chip, parse_sharding
from simulator.roofline.speculation import (
    Drafter,
    chain_levels,
    compile_speculation,
    layer_drafter,
    medusa_ops,
    memory_with_drafter,
    model_drafter,
    pass_time_s,
    with_drafter,
)

DEPTH = 3
SHARDED = [
    ("qwen3-30b-a3b", "h100-sxm:4", "dp4ep4", "bf16"),
    ("qwen3-30b-a3b", "h100-sxm:4", "tp2dp2ep4", "bf16"),
    ("qwen3-30b-a3b", "h100-sxm:4", "tp4ep4", "bf16"),
    ("deepseek-v3", "h200-sxm:8", "dp8ep8", "fp8"),
    ("llama-3-8b", "h100-sxm:4", "tp4", "bf16"),
]


def laid(model, slice_, sharding, precision="bf16"):
    """A rank, the table of its replica, and the whole."""
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "decode_tokens": DEPTH + 1}
    whole = shard(
        load_model(model),
        resolve_slice(slice_),
        parse_sharding(sharding),
        precision=parse_precision(precision),
        **limits,
    )
    return whole.stages[0], compile_sharded(whole), whole


def small_model(rank, *, alone=False):
    """A dense draft model on the chips of a rank, or on one of them."""
    place = one_chip(rank.slice) if alone else rank.slice
    draft = replace(
        rank, architecture=load_model("qwen3-0.6b"), slice=place, tp=None, decode_tokens=1, expert_domains=()
    )
    return model_drafter(replace(draft, precision=parse_precision("bf16")))


@pytest.fixture(scope="module", params=SHARDED, ids=lambda param: "-".join(param[::2]))
def sharded(request):
    return laid(*request.param)


def test_a_layers_drafting_is_its_own_steps_op_by_op(sharded):
    """Its experts are spread as the target's are, and every rank drafts for as many sequences."""
    rank, cost, _ = sharded
    drafter = layer_drafter(rank)
    table = compile_speculation(rank, cost, drafter, chain_levels(DEPTH))
    module = drafter.deployment
    assert module.expert_domains == rank.expert_domains
    for batch, context in ((1, 700), (16, 3000), (64, 1200)):
        runs = [step_time_s(module, StepShape.decode(batch, context + depth)) for depth in range(DEPTH)]
        inputs = DEPTH * float(sum_over(op.time_s for op in input_ops(module, batch)))
        # Exact but for the drafts' own keys, priced as beyond the bend of the curve and as of a chip that they fill.
        assert table.drafting_s(DEPTH, B=batch, S=batch * context) == pytest.approx(sum(runs) + inputs, rel=2e-3)


def test_a_draft_models_steps_are_its_own_op_by_op(sharded):
    rank, cost, _ = sharded
    for alone in (False, True):
        drafter = small_model(rank, alone=alone)
        table = compile_speculation(rank, cost, drafter, chain_levels(DEPTH))
        assert drafter.deployment.chips == (1 if alone else rank.chips)
        for batch, context in ((1, 700), (32, 2048)):
            runs = sum(
                step_time_s(drafter.deployment, StepShape.decode(batch, context + depth)) for depth in range(DEPTH)
            )
            assert table.drafting_s(DEPTH, B=batch, S=batch * context) == pytest.approx(runs, rel=2e-3)


def test_heads_draft_op_by_op(sharded):
    rank, cost, _ = sharded
    table = compile_speculation(rank, cost, Drafter("heads"), chain_levels(DEPTH))
    for batch in (1, 40):
        ops = medusa_ops(rank, DEPTH, batch)
        assert table.drafting_s(DEPTH, B=batch, S=10**5) == pytest.approx(float(sum_over(op.time_s for op in ops)))


def test_verification_is_one_step_of_as_many_tokens_op_by_op(sharded):
    """Linear layers, exchange of experts and head see (γ + 1)·B tokens of each rank; attention reads each cache once."""
    rank, cost, _ = sharded
    table = compile_speculation(rank, cost, Drafter("lookup"), chain_levels(DEPTH))
    batch, context, queries = 16, 2048, DEPTH + 1
    tokens, S = batch * queries, batch * context
    dense, head = dense_ops(rank, tokens), head_ops(rank, tokens)
    linear_s = float(sum_over(op.time_s for op in (*dense, *head)) - hidden_s(rank, dense) - hidden_s(rank, head))
    keys = decode_attention_ops(rank, 0.0, 1.0, 0.0)
    bound_s = S * float(sum_over(np.maximum(queries * op.compute_s, op.memory_s) for op in keys))
    launches_s = float(sum_over(op.overhead_s for op in decode_attention_ops(rank, 1.0, 0.0, 0.0)))
    found = pass_time_s(cost, table, DEPTH, batch, context)
    assert found >= (linear_s + bound_s + launches_s) * (1 - 1e-9)
    # Above it: measured curves bend, each query sees those before it, and latents are expanded in dense ops or per sequence.
    assert found <= 1.25 * (linear_s + bound_s + launches_s)
    plain = pass_time_s(cost, table, 0, batch, context)
    assert plain == pytest.approx(step_time_s(rank, StepShape.decode(batch, context)), rel=1e-9)


def test_a_drafters_prompt_pass_is_its_own_prefill_op_by_op(sharded):
    rank, cost, _ = sharded
    shape = StepShape.prefill(1500, 300, completes=False)
    for drafter in (layer_drafter(rank), small_model(rank)):
        table = compile_speculation(rank, cost, drafter, chain_levels(DEPTH))
        figures = {"n": 1500, "P": 1, "A": shape.A, "K": shape.K}
        beside = with_drafter(cost, table).step_s(**figures) + table.chunk_s[1500] - cost.step_s(**figures)
        own = step_time_s(drafter.deployment, shape)
        if drafter.kind == "layer":
            own += float(sum_over(op.time_s for op in input_ops(drafter.deployment, 1500)))
        assert beside == pytest.approx(own, rel=1e-6)


def test_a_draft_that_costs_nothing_leaves_verification_alone(sharded):
    rank, cost, _ = sharded
    table = compile_speculation(rank, cost, Drafter("lookup"), chain_levels(DEPTH))
    assert not table.draft_s.any()
    assert not table.draft_value_s.any()
    assert not table.chunk_s.any()
    assert memory_with_drafter(rank, Drafter("lookup"), DEPTH) == memory_fit(rank)
    level_0 = with_drafter(cost, table)
    for name in ("dense_s", "head_s", "prefill_planes", "decode_value_s", "decode_slope_s"):
        np.testing.assert_array_equal(getattr(level_0, name), getattr(cost, name))


def test_tensor_parallelism_alone_is_priced_as_without_a_sharding():
    """To the last bit."""
    model, slice_ = load_model("llama-3-8b"), resolve_slice("h100-sxm:4")
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "decode_tokens": DEPTH + 1}
    plain = Deployment(model, slice_, tp=4, **limits)
    rank, cost, _ = laid("llama-3-8b", "h100-sxm:4", "tp4")
    for make in (layer_drafter, small_model, lambda _: Drafter("heads"), lambda _: Drafter("lookup", sequence_s=2e-5)):
        here, there = (compile_speculation(d, cost, make(d), chain_levels(DEPTH)) for d in (rank, plain))
        for one in fields(here):
            np.testing.assert_array_equal(getattr(here, one.name), getattr(there, one.name))
        assert memory_with_drafter(rank, make(rank), DEPTH) == memory_with_drafter(plain, make(plain), DEPTH)


def test_a_dense_draft_beside_a_rank_of_one_chip_is_that_on_a_slice_of_one_chip():
    rank, cost, _ = laid("qwen3-30b-a3b", "h100-sxm:4", "dp4ep4")
    alone = Deployment(
        load_model("qwen3-0.6b"), resolve_slice("h100-sxm:1"), max_num_seqs=64, max_num_batched_tokens=2048
    )
    here, there = (
        compile_speculation(rank, cost, drafter, chain_levels(DEPTH))
        for drafter in (small_model(rank), model_drafter(alone))
    )
    for one in fields(here):
        np.testing.assert_array_equal(getattr(here, one.name), getattr(there, one.name))


def test_memory_is_that_of_the_rank_with_its_drafter(sharded):
    rank, _, whole = sharded
    assert memory_fit(rank) == whole.memory
    drafter = small_model(rank)
    both = memory_with_drafter(rank, drafter, DEPTH)
    assert both.weights_bytes == pytest.approx(memory_fit(rank).weights_bytes + weights_bytes(drafter.deployment))
    assert both.kv_blocks < whole.memory.kv_blocks
    alone = memory_with_drafter(rank, small_model(rank, alone=True), DEPTH)
    # A chip that holds the whole draft has no more room than one that holds a share.
    assert alone.kv_blocks <= both.kv_blocks
    assert alone.weights_bytes >= both.weights_bytes


def test_spreading_experts_over_more_chips_takes_less_of_each():
    held = []
    for slice_, sharding in (("h100-sxm:2", "dp2ep2"), ("h100-sxm:4", "dp4ep4"), ("h100-sxm:8", "dp8ep8")):
        rank, _, _ = laid("qwen3-30b-a3b", slice_, sharding)
        more = memory_with_drafter(rank, layer_drafter(rank), DEPTH).weights_bytes - memory_fit(rank).weights_bytes
        held.append(more)
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.5 * held[0]


@pytest.fixture(scope="module")
def tables():
    rank, cost, _ = laid("qwen3-30b-a3b", "h100-sxm:4", "dp4ep4")
    return cost, [
        compile_speculation(rank, cost, drafter, chain_levels(DEPTH))
        for drafter in (layer_drafter(rank), small_model(rank), Drafter("heads"), Drafter("lookup", sequence_s=2e-5))
    ]


@settings(max_examples=80, deadline=None)
@given(batch=st.integers(1, 63), context=st.integers(1, 20_000), level=st.integers(0, DEPTH), which=st.integers(0, 3))
def test_more_drafts_sequences_and_keys_never_take_less(tables, batch, context, level, which):
    cost, found = tables
    table = found[which]
    here = pass_time_s(cost, table, level, batch, context)
    nearly = 1 - 1e-12
    assert pass_time_s(cost, table, level, batch + 1, context) >= here * nearly
    assert pass_time_s(cost, table, level, batch, context + 1) >= here * nearly
    if level < DEPTH:
        assert pass_time_s(cost, table, level + 1, batch, context) >= here * nearly
        drafting = [table.drafting_s(one, B=batch, S=batch * context) for one in (level, level + 1)]
        assert drafting[0] <= drafting[1]
