"""The compiled table is the op-by-op evaluation of the same step."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.architecture import Architecture, DenseFFN, LayerGroup, SoftmaxAttention
from simulator.catalog.chips import IDEAL, load_chip
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.roofline.analysis import report
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision


def mixed_groups():
    """Layer groups of very different attention, which turn memory-bound at different K/A."""
    groups = [
        LayerGroup(count=c, mixer=SoftmaxAttention(n_heads=h, n_kv_heads=k, head_dim=64), ffn=DenseFFN(d_ff=1024))
        for c, h, k in ((3, 64, 1), (2, 16, 16), (1, 32, 4))
    ]
    return Architecture(
        name="mixed", family="test", d_model=1024, vocab_size=1000, tied_embeddings=False, layers=tuple(groups),
        source="test", kind="assumed",
    )  # fmt: skip


DEPLOYMENTS = {
    "70b on v5e": Deployment(
        load_model("llama-3-70b"),
        resolve_slice("tpu-v5e:4x4"),
        parse_precision("w8a16kv8"),
        max_num_batched_tokens=2048,
    ),
    "70b on v5e, overlapped": Deployment(
        load_model("llama-3-70b"), resolve_slice("tpu-v5e:4x4"), overlap=0.7, max_num_batched_tokens=2048
    ),
    "8b on h100, fp8": Deployment(
        load_model("llama-3-8b"), resolve_slice("h100-sxm:1"), parse_precision("fp8kv8"), max_num_batched_tokens=2048
    ),
    "8b on two nodes, ideal": Deployment(
        load_model("llama-3-70b"), resolve_slice("h100-sxm:2x8"), efficiency=IDEAL, max_num_batched_tokens=2048
    ),
    "nothing but weights and keys": Deployment(
        load_model("llama-3-8b").model_copy(update={"final_norm": False}),
        resolve_slice("h100-sxm:1"),
        efficiency=IDEAL,
        activation_traffic=False,
        max_num_batched_tokens=2048,
    ),
    "mixed groups": Deployment(
        mixed_groups(),
        resolve_slice("h100-sxm:2"),
        efficiency=replace(load_chip("h100-sxm").efficiency, curves=None),
        max_num_batched_tokens=2048,
    ),
    "mixed groups, by curves": Deployment(mixed_groups(), resolve_slice("h100-sxm:2"), max_num_batched_tokens=2048),
    "experts on h200": Deployment(
        load_model("qwen3-235b-a22b"),
        resolve_slice("h200-sxm:4"),
        parse_precision("fp8kv8g128"),
        max_num_batched_tokens=2048,
    ),
    "70b on a100, int4": Deployment(
        load_model("llama-3-70b"), resolve_slice("a100-80-sxm:4"), parse_precision("int4"), max_num_batched_tokens=2048
    ),
}
COMPILED = {name: compile_step_cost(d) for name, d in DEPLOYMENTS.items()}


@st.composite
def steps(draw):
    step = StepShape()
    if draw(st.booleans()):
        step += StepShape.decode(draw(st.integers(1, 200)), draw(st.integers(1, 200_000)))
    for _ in range(draw(st.integers(0 if step.n else 1, 4))):
        step += StepShape.prefill(
            draw(st.integers(1, 400)), draw(st.integers(0, 100_000)), completes=draw(st.booleans())
        )
    return step


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(DEPLOYMENTS)), steps())
def test_table_equals_ops_to_rounding(name, step):
    d, cost = DEPLOYMENTS[name], COMPILED[name]
    table = cost.step_s(n=int(step.n), B=int(step.B), S=step.S, P=int(step.P), A=step.A, K=step.K, R=int(step.R))
    assert table == pytest.approx(step_time_s(d, step), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DEPLOYMENTS)), steps())
def test_flops_and_bytes_of_the_table_are_those_of_the_report(name, step):
    d, cost, answer = DEPLOYMENTS[name], COMPILED[name], report(DEPLOYMENTS[name], step)
    n, R = int(step.n), int(step.R)
    flops = cost.dense_flops[n] + cost.head_flops[R] + cost.attention_flops_per_pair * (step.S + step.A)
    assert flops == pytest.approx(answer.model_flops, rel=1e-12)
    moved = cost.dense_bytes[n] + cost.head_bytes[R] + cost.kv_bytes_per_token * (step.S + step.K)
    assert moved == pytest.approx(answer.required_bytes, rel=1e-12)
    assert answer.mfu == pytest.approx(flops / (cost.peak_flops_per_s * answer.time_s))
    assert answer.mbu == pytest.approx(moved / (cost.hbm_bandwidth_bytes_per_s * answer.time_s))
    assert cost.chips == d.chips


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_named_parts_sum_to_the_dense_time(name):
    cost = COMPILED[name]
    assert set(cost.dense_parts) == {"matmul", "elementwise", "collective", "overhead"}
    np.testing.assert_allclose(np.sum(list(cost.dense_parts.values()), axis=0), cost.dense_s, rtol=1e-14)
    assert all(part.shape == cost.dense_s.shape and (part >= 0).all() for part in cost.dense_parts.values())


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_tables_start_at_zero_and_never_fall(name):
    cost = COMPILED[name]
    for table in (cost.dense_s, cost.head_s, cost.dense_flops, cost.dense_bytes, cost.head_flops, cost.head_bytes):
        assert table[0] == 0
        assert (np.diff(table) >= -1e-15).all()
    assert cost.max_tokens == 2048
    assert cost.max_rows == 256


def test_groups_of_unlike_attention_need_a_plane_each_and_all_are_used():
    cost = COMPILED["mixed groups"]
    assert cost.prefill_planes.shape == (4, 5)
    largest = {
        int(np.argmax(cost.prefill_planes @ np.array([1.0, ratio, 0.0, 0.0, 0.0]))) for ratio in np.logspace(-4, 3, 400)
    }
    assert largest == {0, 1, 2, 3}
