"""Whole experts spread over chips: nothing is lost, exchanges by hand, and what it is good for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.architecture import MoEFFN
from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.collectives import all_to_all_s
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import weights_bytes
from simulator.roofline.ops import dense_ops
from simulator.roofline.pipeline import shard, sharded_report
from simulator.roofline.search import search
from simulator.roofline.sharding import parse_sharding

DEEPSEEK, MIXTRAL = load_model("deepseek-v3"), load_model("mixtral-8x7b")


def lay(spec, text, model=DEEPSEEK, **settings):
    return shard(model, resolve_slice(spec), parse_sharding(text), **settings)


def expert_bytes(model):
    """bf16 bytes of all routed experts."""
    return sum(
        g.count * g.ffn.n_experts * (3 if g.ffn.gated else 2) * g.ffn.d_ff * model.d_model * 2
        for g in model.layers
        if isinstance(g.ffn, MoEFFN)
    )


@pytest.mark.parametrize("model", [DEEPSEEK, MIXTRAL], ids=lambda m: m.name)
@pytest.mark.parametrize("text", ["dp8ep8", "tp2dp4ep8", "tp4dp2ep8", "tp8ep8"])
def test_experts_are_held_once_and_the_rest_once_per_rank(model, text):
    d = lay("h100-sxm:8", text, model)
    replicas = lay("h100-sxm:8", text.removesuffix("ep8"), model)
    ranks = d.sharding.dp
    held, plain = 8 * weights_bytes(d.stages[0]), 8 * weights_bytes(replicas.stages[0])
    assert plain - held == pytest.approx((ranks - 1) * expert_bytes(model))


@pytest.mark.parametrize("text", ["dp8ep8", "tp2dp4ep8", "tp8ep8"])
@pytest.mark.parametrize("n", [1, 64, 4096])
def test_model_flops_of_a_rank_are_those_of_its_tokens(text, n):
    alone = step_report(Deployment(DEEPSEEK, resolve_slice("h100-sxm:1")), prefill=n)
    rank = sharded_report(lay("h100-sxm:8", text), prefill=n).stages[0]
    assert rank.model_flops == pytest.approx(alone.model_flops)


def test_exchange_by_hand():
    # 64 tokens per rank, 8 ranks, 8 experts each of width 7168: bytes there in FP8, back in 16 bits, 58 layers.
    d = lay("h200-sxm:8", "dp8ep8", precision=_fp8(), efficiency=IDEAL)
    ops = {op.name: op for op in dense_ops(d.stages[0], 64.0)}
    domains = resolve_slice("h200-sxm:8").domains
    visits = 8 * 64 * 8 * 7168.0
    assert ops["all-to-all, dispatch"].time_s == pytest.approx(58 * all_to_all_s(visits, domains))
    assert ops["all-to-all, combine"].time_s == pytest.approx(58 * all_to_all_s(2 * visits, domains))
    # One chip takes in what came from the seven others.
    assert ops["all-to-all, combine"].comm_bytes == pytest.approx(58 * 2 * visits / 8 * 7 / 8)


def _fp8():
    from simulator.roofline.precision import parse_precision

    return parse_precision("fp8")


def test_two_nodes_pay_the_network_between_them():
    near, far = lay("h200-sxm:8", "dp8ep8"), lay("h200-sxm:2x8", "dp16ep16")
    times = []
    for d in (near, far):
        ops = {op.name: op for op in dense_ops(d.stages[0], 256.0)}
        times.append(ops["all-to-all, combine"].time_s)
    assert len(far.stages[0].expert_domains) == 2
    assert times[1] > 3 * times[0]


def test_attention_ranks_hold_each_latent_once():
    ranks, split = lay("h200-sxm:2x8", "dp16ep16", precision=_fp8()), lay("h200-sxm:2x8", "tp16", precision=_fp8())
    assert split.stages[0].kv_copies == 16
    assert ranks.stages[0].kv_copies == 1
    assert ranks.kv_tokens > 4 * split.kv_tokens


def test_few_tokens_still_load_an_expert_on_the_busiest_chip():
    d = lay("gb200:64", "dp64ep64")
    (op,) = [op for op in dense_ops(d.stages[0], 1.0) if op.name == "experts down"]
    one = 58 * 2048 * 7168 * 2
    assert op.weight_bytes > one  # 512 visits touch most of the 4 experts here
    small = lay("h100-sxm:8", "dp8ep8", MIXTRAL, efficiency=IDEAL)
    (op,) = [op for op in dense_ops(small.stages[0], 1.0 / 8) if op.name == "experts down"]
    expert = 32 * 14336 * 4096 * 2
    assert op.weight_bytes < expert
    assert op.roofline_s >= expert / small.stages[0].slice.chip.hbm_bandwidth_bytes_per_s * (1 - 1e-9)


@given(st.integers(1, 2000), st.sampled_from(["dp8ep8", "tp2dp4ep8", "tp4dp2ep8", "tp8ep8"]))
def test_touched_experts_lie_between_the_fewest_and_all(n, text):
    d = lay("h100-sxm:8", text, MIXTRAL)
    (op,) = [op for op in dense_ops(d.stages[0], float(n)) if op.name == "experts down"]
    every = expert_bytes(MIXTRAL) / 3 / 8
    tokens = n * d.sharding.dp
    assert every * 2 / 8 * (1 - 1e-9) <= op.weight_bytes <= every * min(1, 2 * tokens / 8) * (1 + 1e-9)
    report = sharded_report(d, prefill=n)
    assert report.time_s >= report.stages[0].roofline_s


def test_many_sequences_run_best_with_attention_ranks():
    found = search(DEEPSEEK, resolve_slice("h200-sxm:2x8"), objective="throughput", context=4096, precision=_fp8())
    best = found.best.deployment.sharding
    assert best.ep == best.tp * best.dp > 1
    assert best.dp > 1


def test_a_rank_is_no_replica():
    with pytest.raises(InputError, match="one of 8 ranks that share experts"):
        compile_step_cost(lay("h100-sxm:8", "dp8ep8").stages[0])
    alone = lay("h100-sxm:8", "tp8ep8", MIXTRAL, max_num_batched_tokens=64).stages[0]
    assert compile_step_cost(alone).dense_s[64] > 0


def test_stages_of_ranks():
    d = lay("h200-sxm:2x8", "dp8ep8pp2")
    assert [s.architecture.n_layers for s in d.stages] == [31, 30]
    assert all(len(s.expert_domains) == 1 for s in d.stages)
    assert sharded_report(d, decode=128, context=2048).stages[0].step.B == 8
