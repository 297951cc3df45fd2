"""Engine profiles: what they add, what they may never do, and how they reach scenarios and files."""

import tomllib
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulator.catalog.chips import IDEAL, load_chip, sources
from simulator.catalog.engines import EngineProfile, engine_names, engine_profile, load_engine
from simulator.catalog.kernel_curves import GroupedCurve
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.engine_profile import PARTS, apply_profile, in_stages, kernel_cost, profile_kv_blocks
from simulator.roofline.memory import memory_fit
from simulator.roofline.precision import parse_precision
from simulator.run import load_scenario
from simulator.run.resolve import resolve

SLOWDOWNS = [f.name for f in fields(EngineProfile) if f.name.endswith("_slowdown")]


def deployment(model="mixtral-8x7b", spec="h100-sxm:2", **changes):
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    return Deployment(
        load_model(model), resolve_slice(spec), **({"precision": parse_precision("fp8kv8")} | limits | changes)
    )


@pytest.fixture(scope="module")
def kernels():
    return kernel_cost(deployment())


def test_every_shipped_profile_loads_with_provenance():
    assert engine_names() == ["sglang", "tensorrt-llm", "vllm"]
    for name in engine_names():
        spec = load_engine(name)
        assert spec.name == name
        assert set(SLOWDOWNS) <= {f"{p.removeprefix('slowdown.')}_slowdown" for p in spec.quantities()}
        assert {q.source for q in spec.quantities().values()} | {spec.scheduler.source} <= set(sources())
        assert engine_profile(name).memory_rule == spec.memory.rule


def test_a_profile_that_adds_nothing_changes_nothing(kernels):
    bare = replace(deployment().eff, step_overhead_s=0.0, row_overhead_s=0.0)
    plain = compile_step_cost(deployment(efficiency=bare))
    cost = apply_profile(kernels, EngineProfile())
    for name in ("dense_s", "head_s", "decode_value_s", "decode_slope_s", "decode_walk_s", "prefill_planes"):
        assert np.allclose(getattr(cost, name), getattr(plain, name), rtol=1e-12), name


def test_fixed_times_are_added_as_the_formula_says(kernels):
    profile = EngineProfile(step_s=1e-3, sequence_s=2e-6, token_s=4e-7, kernel_s=5e-6, eager_s=3e-6)
    plain, cost = apply_profile(kernels, EngineProfile()), apply_profile(kernels, profile)
    step = {"n": 110, "B": 10, "S": 5000, "P": 1, "A": 5050, "K": 100, "R": 11}
    added = 1e-3 + 10 * 2e-6 + 110 * 4e-7 + kernels.launches * (5e-6 + 3e-6)
    assert cost.step_s(**step) - plain.step_s(**step) == pytest.approx(added, rel=1e-9)
    assert cost.dense_s[0] == 0


def test_a_product_bound_by_compute_pays_no_bound_of_memory_besides():
    """Where a kernel's compute takes longer than its weights, which the datasheet says bound it, faster weights change nothing."""
    d = deployment("llama-3-70b", "rtx-pro-6000:1", precision=parse_precision("nvfp4kv8"))
    kernels = kernel_cost(d, kernels="trtllm")
    crossed = (kernels.dense["products"] > 0) & (kernels.dense_bound["weights"] > kernels.dense["weights"])
    assert crossed.sum() > 50
    plain, faster = (apply_profile(kernels, EngineProfile(weights_slowdown=w)).dense_s for w in (1.0, 0.93))
    assert (faster <= plain * (1 + 1e-12)).all()
    bound = sum(kernels.dense_bound.values())
    assert (faster >= bound * (1 - 1e-12)).all()


def test_a_pipeline_waits_for_the_stage_with_the_head(kernels):
    profile = EngineProfile(step_s=1e-3, weights_slowdown=1.1)
    one, four = apply_profile(kernels, profile), apply_profile(in_stages(kernels, 4), profile)
    assert four.head_s == pytest.approx(4 * one.head_s)
    assert four.dense_s[1:] - one.dense_s[1:] == pytest.approx(3e-3)
    assert four.decode_attention_s(1e5) == one.decode_attention_s(1e5)


def test_kernels_are_counted_by_layer_and_products_with_scales_of_their_own_twice():
    """Llama-3-8B: embedding, 65 norms, 7 in each of 32 layers, head and sampling; blocks of FP8 add 4 products' scales a layer."""
    plain, blocks = (
        kernel_cost(replace(deployment("llama-3-8b", "h100-sxm:1"), precision=parse_precision(word)))
        for word in ("bf16", "fp8g128")
    )
    assert plain.launches == 1 + 65 + 32 * 7 + 2
    assert blocks.launches - plain.launches == 4 * 32


def test_the_latency_of_a_collective_is_no_launch(kernels):
    """With launches taken as unseen, what is left of a small step on two chips still has every all-reduce's latency."""
    unseen = apply_profile(kernels, EngineProfile(launches_slowdown=0.0))
    both = [k for k in (kernels.dense["collective"][1], kernels.dense["launches"][1]) if k > 0]
    assert len(both) == 2
    assert unseen.dense_s[1] == pytest.approx(kernels.cost.dense_s[1] - kernels.dense["launches"][1])
    assert unseen.dense_s[1] > kernels.dense["collective"][1]


def test_an_engine_runs_its_own_kernels_where_they_were_measured():
    d = replace(deployment("llama-3-8b", "h100-sxm:1"), precision=parse_precision("bf16"))
    vllm, trtllm, other = (
        kernel_cost(d, kernels=name).cost.decode_attention_s(1e6) for name in ("vllm", "trtllm", "none")
    )
    assert vllm != trtllm
    assert other == vllm  # the first of the frameworks stands for a chip


def test_tensorrt_llm_on_a100_has_experts_of_h100_as_fractions():
    curves = load_chip("a100-80-sxm").efficiency.curves
    assert curves.of("trtllm").get(GroupedCurve, "moe", "bfloat16") == load_chip("h100-sxm").efficiency.curves.of(
        "trtllm"
    ).get(GroupedCurve, "moe", "bfloat16")
    assert curves.get(GroupedCurve, "moe", "bfloat16") != curves.of("trtllm").get(GroupedCurve, "moe", "bfloat16")


def test_popular_experts_leave_fewer_weights_to_read():
    even, skewed = (kernel_cost(deployment(), routing_skew=s).dense["experts"] for s in (0.0, 1.0))
    assert skewed[8] < even[8]
    assert skewed[1] == pytest.approx(even[1])


def test_parts_add_up_to_the_kernels(kernels):
    assert set(kernels.dense) == set(PARTS)
    assert np.allclose(sum(kernels.dense.values()), kernels.cost.dense_s, rtol=1e-9)
    assert np.allclose(sum(kernels.head.values()), kernels.cost.head_s, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.0, 3.0), min_size=len(SLOWDOWNS), max_size=len(SLOWDOWNS)))
@example([1.0, *(0.0 for _ in SLOWDOWNS[1:])])  # products bound by compute here, by memory there
def test_no_slowdown_pushes_a_time_under_its_bound(kernels, values):
    cost = apply_profile(kernels, EngineProfile(**dict(zip(SLOWDOWNS, values, strict=True))))
    bound = compile_step_cost(deployment(efficiency=IDEAL))
    slack = 1 - 1e-9
    assert (cost.dense_s >= slack * bound.dense_s).all()
    assert (cost.head_s >= slack * bound.head_s).all()
    for keys in (1.0, 1e3, 1e5):
        assert cost.decode_attention_s(keys) >= slack * bound.decode_attention_s(keys)
        assert cost.prefill_attention_s(keys * 100, keys, 1) >= slack * bound.prefill_attention_s(keys * 100, keys, 1)


@given(st.sampled_from(SLOWDOWNS), st.floats(1.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_slower_parts_never_make_a_step_faster(kernels, name, value):
    slow, plain = (apply_profile(kernels, p) for p in (EngineProfile(**{name: value}), EngineProfile()))
    assert (slow.dense_s >= plain.dense_s * (1 - 1e-12)).all()
    assert slow.decode_attention_s(1e4) >= plain.decode_attention_s(1e4) * (1 - 1e-12)


def test_each_memory_rule_takes_its_share_of_what_it_says():
    d = deployment("llama-3-8b", "h100-sxm:1")
    fit = memory_fit(d)
    block = fit.block_size * fit.kv_bytes_per_token
    running = fit.activations_bytes + 1e9

    def cache(rule):
        profile = EngineProfile(memory_rule=rule, memory_fraction=0.5, workspace_bytes=1e9)
        return (profile_kv_blocks(d, profile) + 1) * block

    assert cache("total") == pytest.approx(0.5 * fit.capacity_bytes - fit.weights_bytes - running, abs=block)
    assert cache("free") == pytest.approx(0.5 * (fit.capacity_bytes - fit.weights_bytes - running), abs=block)
    assert cache("static") == pytest.approx(0.5 * fit.capacity_bytes - fit.weights_bytes, abs=block)


def test_bad_profiles_are_refused():
    with pytest.raises(InputError, match="step_s = -1"):
        EngineProfile(step_s=-1)
    with pytest.raises(InputError, match="memory_fraction"):
        EngineProfile(memory_fraction=1.2)
    with pytest.raises(InputError, match="vllm"):
        load_engine("vlm")


def test_scenarios_take_a_profile_its_defaults_and_their_own_settings(tmp_path):
    plain = load_scenario("llama-3-8b-azure-chat")
    scenario = load_scenario("llama-3-8b-azure-chat", ["engine.profile=tensorrt-llm", "engine.max_num_seqs=100"])
    assert scenario.engine.max_num_seqs == 100
    profile = engine_profile("tensorrt-llm")
    assert scenario.engine.workspace_bytes == profile.workspace_bytes
    resolved = resolve(scenario)
    expected = replace(profile, memory_fraction=scenario.engine.gpu_memory_utilization)
    assert resolved.settings.num_kv_blocks == profile_kv_blocks(resolved.deployment, expected)
    assert not np.allclose(resolved.cost.dense_s[:100], resolve(plain).cost.dense_s[:100])
    own = tmp_path / "mine.toml"
    own.write_text(tomllib_text(load_engine("vllm")))
    assert load_scenario("llama-3-8b-azure-chat", [f"engine.profile={own}"]).engine.profile == str(own)


def tomllib_text(spec):
    from simulator.calibration.profiles import profile_text

    text = profile_text(spec, {}, command="test")
    assert tomllib.loads(text)["name"] == spec.name
    return text
