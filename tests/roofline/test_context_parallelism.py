"""A long prompt split over chips: the work is shared, keys are gathered, decoding is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.collectives import all_gather_s
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.pipeline import shard, sharded_report
from simulator.roofline.search import search
from simulator.roofline.sharding import parse_sharding

LLAMA = load_model("llama-3-8b")


def lay(text, model=LLAMA, spec="h100-sxm:8", **settings):
    return shard(model, resolve_slice(spec), parse_sharding(text), **settings)


@pytest.mark.parametrize("text", ["cp8", "tp2cp4", "tp4cp2"])
@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-3-27b", "deepseek-v3"])
def test_the_parts_do_the_work_of_the_whole(text, model):
    model = load_model(model)
    whole = step_report(Deployment(model, resolve_slice("h100-sxm:1")), prefill=32768)
    part = sharded_report(lay(text, model, max_num_batched_tokens=32768), prefill=32768).stages[0]
    cp = parse_sharding(text).cp
    rows = (cp - 1) * 2 * model.d_model * model.vocab_size  # every part is priced with the one row of logits
    assert cp * part.model_flops - rows == pytest.approx(whole.model_flops)


def test_gather_by_hand():
    # 32 layers of 8 heads of 128 keys and values, 2 bytes; four chips each with a quarter of 65,536 tokens.
    report = sharded_report(lay("cp4dp2", efficiency=IDEAL, max_num_batched_tokens=65536), prefill=65536)
    (gather,) = [row for row in report.stages[0].ops if row.op.name == "all-gather, keys"]
    domain = resolve_slice("h100-sxm:4").domains
    layer = 65536 * 2 * 8 * 128 * 2.0
    assert gather.time_s == pytest.approx(32 * all_gather_s(layer, domain))
    assert gather.op.comm_bytes == pytest.approx(32 * layer * 3 / 4)


def test_long_prompts_gain_most():
    gains = []
    for tokens in (2048, 131072):
        alone = sharded_report(lay("dp8"), prefill=tokens).time_s
        gains.append(alone / sharded_report(lay("cp8"), prefill=tokens).time_s)
    assert 1 < gains[0] < gains[1] < 8


@given(st.integers(8, 100_000), st.integers(0, 100_000), st.sampled_from(["cp8", "tp2cp4", "cp2dp4"]))
def test_never_below_the_bound_nor_slower_with_more_cached(tokens, past, text):
    d = lay(text)
    report = sharded_report(d, prefill=tokens, context=tokens + past)
    assert report.time_s >= report.stages[0].roofline_s
    assert report.time_s >= sharded_report(d, prefill=tokens).time_s * (1 - 1e-12)


def test_the_cache_and_the_activations_are_split_too():
    d = lay("cp8", max_num_batched_tokens=65536)
    assert d.kv_tokens == 8 * d.memory.kv_tokens
    assert d.memory.activations_bytes == lay("dp8", max_num_batched_tokens=8192).memory.activations_bytes


def test_search_tries_it_for_prompts_alone():
    slice_ = resolve_slice("h100-sxm:8")
    tried = {str(t.sharding) for t in search(LLAMA, slice_, prefill=131072, max_num_batched_tokens=131072).tried}
    assert {"cp8", "tp2cp4", "tp2cp2dp2"} <= tried
    assert not any(t.sharding.cp > 1 for t in search(LLAMA, slice_, decode=8, context=1000).tried)


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("cp2pp4", "llama-3-8b", "inside a pipeline"),
        ("cp2dp4ep4", "mixtral-8x7b", "of attention ranks"),
        ("cp8", "nemotron-h-8b", "recurrent layers"),
    ],
)
def test_rules(text, model, message):
    with pytest.raises(InputError, match=message):
        lay(text, load_model(model))


def test_no_decoding():
    with pytest.raises(InputError, match="cp splits the tokens of a prompt"):
        sharded_report(lay("cp8"), decode=8, context=100)
    with pytest.raises(InputError, match="splits no fewer"):
        sharded_report(lay("cp8"), prefill=7)
    with pytest.raises(InputError, match="cannot decode"):
        compile_step_cost(lay("cp8").stages[0])
