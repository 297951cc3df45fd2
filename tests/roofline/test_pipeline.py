"""Pipelines: nothing is lost in splitting a model into stages, and batches flow through them as they must."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import weights_bytes
from simulator.roofline.pipeline import flow_s, require_sharded_fit, shard, sharded_report, split_layers
from simulator.roofline.sharding import parse_sharding

LLAMA = load_model("llama-3-70b")


def lay(spec, text, model=LLAMA, **settings):
    return shard(model, resolve_slice(spec), parse_sharding(text), **settings)


@given(st.integers(1, 12), st.integers(1, 16), st.floats(1e-3, 1e3))
def test_equal_stages_take_m_plus_pp_less_1(pp, m, time):
    # GPipe: a bubble of (pp − 1)/(m + pp − 1).
    total = flow_s([[time] * pp] * m, [0.0] * (pp - 1))
    assert total == pytest.approx((m + pp - 1) * time)
    assert 1 - m * pp * time / (pp * total) == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)


TIMES = st.integers(1, 5).flatmap(
    lambda pp: st.lists(st.lists(st.floats(0, 10), min_size=pp, max_size=pp), min_size=1, max_size=6)
)


@given(TIMES, st.floats(0, 3))
def test_flow_is_bound_by_every_stage_and_every_batch(times, send):
    sends = [send] * (len(times[0]) - 1)
    total = flow_s(times, sends)
    assert total >= max(sum(column) for column in zip(*times, strict=True)) - 1e-9
    assert total >= max(sum(row) for row in times) + sum(sends) - 1e-9
    assert total <= sum(map(sum, times)) + len(times) * sum(sends) + 1e-9


@given(st.integers(1, 80))
def test_every_layer_is_in_one_stage(pp):
    sizes = [sum(g.count for g in groups) for groups in split_layers(LLAMA, pp)]
    assert (sum(sizes), len(sizes)) == (80, pp)
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


def test_first_dense_layers_stay_first():
    stages = split_layers(load_model("deepseek-v3"), 8)
    assert [g.ffn.kind for g in stages[0]] == ["dense", "moe"]
    assert all(g.ffn.kind == "moe" for groups in stages[1:] for g in groups)


def test_interleaved_layers_need_a_stage_count_that_divides_each_kind():
    gemma = load_model("gemma-3-27b")
    counts = [g.count for g in gemma.layers]
    with pytest.raises(InputError, match="interleaves unlike layers"):
        split_layers(gemma, 4)
    halves = split_layers(gemma, 2)
    assert [g.count for g in halves[0]] == [c // 2 for c in counts]


@pytest.mark.parametrize(("prefill", "decode"), [(2048, None), (None, 64)])
def test_one_stage_and_one_replica_are_the_plain_report(prefill, decode):
    plain = step_report(Deployment(LLAMA, resolve_slice("h100-sxm:8")), prefill=prefill, decode=decode, context=4096)
    ours = sharded_report(lay("h100-sxm:8", "tp8"), prefill=prefill, decode=decode, context=4096)
    assert ours.time_s == ours.period_s == pytest.approx(plain.time_s)
    assert ours.tokens_per_s_per_chip == pytest.approx(plain.tokens_per_s_per_chip)
    assert ours.bubble == ours.send_s == 0


@pytest.mark.parametrize("model", ["llama-3-70b", "llama-3.2-1b"])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_weights_are_those_of_one_stage(model, pp):
    arch = load_model(model)
    whole = weights_bytes(Deployment(arch, resolve_slice("h100-sxm:1")))
    stages = lay("h100-sxm:8", f"pp{pp}dp{8 // pp}", arch).stages
    # A tied embedding is needed at both ends.
    again = arch.vocab_size * arch.d_model * 2 if arch.tied_embeddings else 0
    assert sum(map(weights_bytes, stages)) == pytest.approx(whole + again)


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize(("prefill", "decode"), [(2048, None), (None, 64)])
def test_work_is_that_of_one_stage(pp, prefill, decode):
    whole = step_report(Deployment(LLAMA, resolve_slice("h100-sxm:1")), prefill=prefill, decode=decode, context=4096)
    split = lay(f"h100-sxm:{pp}", f"pp{pp}")
    ours = sharded_report(split, prefill=prefill, decode=decode, context=4096, micro_batches=1)
    assert sum(r.model_flops for r in ours.stages) == pytest.approx(whole.model_flops)
    assert sum(r.required_bytes for r in ours.stages) == pytest.approx(whole.required_bytes)
    overheads = (pp - 1) * split.stages[0].eff.step_overhead_s
    assert ours.time_s == pytest.approx(whole.time_s + overheads + (pp - 1) * ours.send_s)


def test_micro_batches_of_decodes_fill_the_stages():
    d = lay("h100-sxm:2x8", "tp8pp2")
    full = sharded_report(d, decode=256, context=4096)
    one = sharded_report(d, decode=256, context=4096, micro_batches=1)
    assert full.micro_batches == 2
    assert full.stages[0].step.B == 128
    assert one.bubble == pytest.approx(0.5, abs=0.01)
    assert full.bubble < 0.05
    assert full.tokens_per_s > one.tokens_per_s
    # More batches than stages only queue for the slowest stage.
    four = sharded_report(d, decode=256, context=4096, micro_batches=4)
    assert four.time_s == pytest.approx(4 * max(r.time_s for r in four.stages))


def test_chunks_of_a_prompt_overlap_in_the_stages():
    d = lay("h100-sxm:2x8", "tp8pp2")
    whole = sharded_report(d, prefill=8192, micro_batches=1)
    cut = sharded_report(d, prefill=8192, micro_batches=8)
    assert cut.time_s < 0.75 * whole.time_s
    assert cut.bubble < whole.bubble == pytest.approx(0.5, abs=0.02)
    assert cut.time_s >= cut.period_s


def test_a_prompt_is_cut_as_small_as_a_step_demands():
    d = lay("h100-sxm:2x8", "tp8pp2", max_num_batched_tokens=2048)
    assert sharded_report(d, prefill=16384).micro_batches == 8
    assert sharded_report(d, prefill=16384, micro_batches=16).micro_batches == 16


def test_stages_in_a_node_send_faster_than_stages_in_two():
    near = sharded_report(lay("h100-sxm:8", "tp4pp2"), prefill=4096, micro_batches=1)
    far = sharded_report(lay("h100-sxm:2x8", "tp8pp2"), prefill=4096, micro_batches=1)
    size = 4096 * LLAMA.d_model * 2
    assert near.send_s < far.send_s
    assert far.send_s > size / 8 / 50e9


def test_send_by_hand():
    # 4096 x 8192 values of 2 bytes over 4 chips' 450 GB/s each, then gathered among the 4.
    near = sharded_report(lay("h100-sxm:8", "tp4pp2", efficiency=IDEAL), prefill=4096, micro_batches=1)
    size, level = 4096 * 8192 * 2, resolve_slice("h100-sxm:8").domains[0]
    W, hop = level.bandwidth_bytes_per_s, level.latency_s
    assert near.send_s == pytest.approx(size / 4 / W + hop + size * 3 / 4 / W + hop)


def test_replicas_multiply_throughput_and_leave_latency():
    one = sharded_report(lay("h100-sxm:4", "tp4"), decode=64, context=2048)
    two = sharded_report(lay("h100-sxm:8", "tp4dp2"), decode=128, context=2048)
    assert two.time_s == one.time_s
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    assert two.deployment.kv_tokens == 2 * one.deployment.kv_tokens


@given(st.integers(1, 600), st.sampled_from(["tp8pp2", "tp4pp4", "tp8dp2", "tp2pp8", "tp16"]), st.integers(1, 20))
def test_throughput_and_time_agree(batch, text, m):
    r = sharded_report(lay("h100-sxm:2x8", text), decode=batch, context=1000, micro_batches=m)
    assert r.tokens_per_s * r.time_s == pytest.approx(batch)
    assert 0 <= r.bubble < 1
    assert r.time_s >= sum(stage.roofline_s for stage in r.stages)


def test_the_tightest_stage_sets_the_capacity():
    d = lay("h100-sxm:2x8", "tp8pp2")
    assert d.memory.weights_bytes == max(map(weights_bytes, d.stages))
    # Half the layers on each chip: half the cache per token, about twice the tokens.
    assert d.memory.kv_bytes_per_token == d.stages[0].kv_bytes_per_token
    assert d.kv_tokens > 2 * lay("h100-sxm:8", "tp8").kv_tokens


def test_what_does_not_fit_is_said():
    with pytest.raises(InfeasibleError, match="as dp8 does not fit on h100-sxm:8"):
        require_sharded_fit(lay("h100-sxm:8", "dp8"))


def test_a_stage_is_no_replica():
    with pytest.raises(InputError, match="stage 1 of 2"):
        compile_step_cost(lay("h100-sxm:2x8", "tp8pp2").stages[0])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"prefill": 10, "decode": 10}, {"decode": 8}, {"decode": 0, "context": 5}, {"prefill": 10, "context": 5}],
)
def test_bad_questions_are_refused(arguments):
    with pytest.raises(InputError):
        sharded_report(lay("h100-sxm:8", "tp8"), **arguments)


def test_boundaries_between_nodes_are_the_slow_ones():
    d = lay("h100-sxm:2x8", "tp2pp8")
    inner, outer = d.links.pp
    assert (inner.size, outer.size) == (4, 2)
    slow = sharded_report(d, decode=8, context=100)
    fast = sharded_report(lay("h100-sxm:8", "tp2pp4"), decode=8, context=100)
    assert slow.send_s > fast.send_s
    assert list(itertools.accumulate(s.architecture.n_layers for s in d.stages))[-1] == 80
