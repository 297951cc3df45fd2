"""Tables of sharded deployments: a stage's or a rank's, priced as its ops are."""

import numpy as np
import pytest

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.ops import StepShape
from simulator.roofline.pipeline import sends_s, shard, sharded_report
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharded_cost import compile_sharded
from simulator.roofline.sharding import parse_sharding

STEP = StepShape(n=200, B=20, S=20_000, P=2, A=50_000, K=900, R=21)


def lay(model: str, slice_: str, sharding: str, **settings):
    settings = {"max_num_batched_tokens": 256, "max_num_seqs": 64} | settings
    return shard(load_model(model), resolve_slice(slice_), parse_sharding(sharding), **settings)


def time_s(cost, step: StepShape) -> float:
    return cost.step_s(**{name: int(value) for name, value in vars(step).items()})


@pytest.mark.parametrize("sharding", ["tp8pp2", "tp4pp4", "tp2pp8"])
def test_each_stage_costs_what_its_ops_do(sharding):
    d = lay("llama-3-70b", "h100-sxm:2x8", sharding)
    cost = compile_sharded(d)
    assert isinstance(cost, PipelineCost)
    for table, stage in zip(cost.stages, d.stages, strict=True):
        assert time_s(table, STEP) == pytest.approx(step_time_s(stage, STEP), rel=1e-9)
    for n in (1, 3, 64, 256):
        np.testing.assert_allclose(cost.send_s[:, n], sends_s(d, n), rtol=1e-9)
    assert cost.total.chips == 16
    assert (cost.send_s[:, 0] == 0).all()


def test_a_round_of_micro_batches_costs_what_the_report_says():
    d = lay("llama-3-70b", "h100-sxm:2x8", "tp8pp2")
    cost = compile_sharded(d)
    step = StepShape.decode(32, 4096)
    stages_s = [time_s(stage, step) for stage in cost.stages]
    report = sharded_report(d, decode=64, context=4096)
    assert max(sum(stages_s) + cost.send_s[:, 32].sum(), 2 * max(stages_s)) == pytest.approx(report.time_s, rel=1e-9)


def test_stages_do_the_work_of_the_whole():
    whole = compile_step_cost(lay("llama-3-70b", "h100-sxm:8", "tp8").stages[0])
    total = compile_sharded(lay("llama-3-70b", "h100-sxm:2x8", "tp8pp2")).total
    np.testing.assert_allclose(total.dense_flops, whole.dense_flops, rtol=1e-9)
    np.testing.assert_allclose(total.head_flops, whole.head_flops, rtol=1e-9)
    assert total.attention_flops_per_pair == pytest.approx(whole.attention_flops_per_pair, rel=1e-9)
    assert total.kv_bytes_per_token == pytest.approx(whole.kv_bytes_per_token, rel=1e-9)
    assert total.peak_flops_per_s == 2 * whole.peak_flops_per_s


def test_a_rank_costs_what_its_ops_do_with_all_ranks_experts():
    d = lay("deepseek-v3", "h200-sxm:2x8", "dp16ep16", precision=parse_precision("fp8"))
    cost = compile_sharded(d)
    assert (cost.ranks, cost.chips, cost.parts) == (16, 16, 16)
    assert time_s(cost, STEP) == pytest.approx(step_time_s(d.stages[0], STEP), rel=1e-9)
    assert 0 < cost.expert_s[64] < cost.dense_s[64]
    assert cost.peak_flops_per_s == 16 * d.stages[0].peak_flops_per_s


def test_models_without_experts_have_none():
    cost = compile_sharded(lay("llama-3-8b", "h100-sxm:8", "tp8"))
    assert len(cost.expert_s) == 0


def test_what_the_engines_do_not_run_is_refused():
    with pytest.raises(InputError, match="ranks that share experts inside 2 pipeline stages"):
        compile_sharded(lay("deepseek-v3", "h200-sxm:2x8", "dp8ep8pp2", precision=parse_precision("fp8")))
    with pytest.raises(InputError, match="context parallelism"):
        compile_sharded(lay("llama-3-8b", "h100-sxm:8", "cp8"))
