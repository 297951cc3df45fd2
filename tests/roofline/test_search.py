"""``--shard auto``: everything legal is tried, and the best is best."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.pipeline import shard, sharded_report
from simulator.roofline.precision import parse_precision
from simulator.roofline.search import largest_batch, search, shardings

LLAMA, NODES = load_model("llama-3-70b"), resolve_slice("h100-sxm:2x8")


@given(st.integers(1, 256))
def test_every_split_of_the_chips_is_tried_once(chips):
    found = shardings(chips)
    assert len(set(found)) == len(found)
    assert all(s.chips == chips for s in found)
    triples = [
        (a, b) for a in range(1, chips + 1) if chips % a == 0 for b in range(1, chips // a + 1) if chips // a % b == 0
    ]
    assert len(found) == len(triples)


@pytest.mark.parametrize("question", [{"decode": 64}, {"prefill": 4096}])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_nothing_legal_beats_the_best(objective, question):
    found = search(LLAMA, NODES, objective=objective, context=8192, **question)
    assert len(found.tried) == (25 if "prefill" in question else 15)
    for tried in found.tried:
        if tried.report is None:
            assert tried.reason
            continue
        again = sharded_report(shard(LLAMA, NODES, tried.sharding), context=8192, **question)
        assert again.time_s == tried.report.time_s
        if objective == "latency":
            assert found.best.time_s <= again.time_s
        else:
            assert found.best.tokens_per_s_per_chip >= again.tokens_per_s_per_chip


@pytest.mark.parametrize("question", [{"decode": 64}, {"prefill": 4096}])
def test_layouts_of_a_torus_are_tried_too(question):
    grid = resolve_slice("tpu-v5e:4x4")
    settings = {"precision": parse_precision("w8a16kv8")}
    found = search(LLAMA, grid, context=8192, **question, **settings)
    kinds = {(t.layout.partition("-")[0], t.kv_layout) for t in found.tried if t.sharding.tp == 16}
    stationary = {("1d", "heads"), ("2d", "heads"), ("gathered", "heads")}
    assert kinds == stationary | ({("1d", "batch"), ("2d", "batch")} if "decode" in question else set())
    assert len({t.name for t in found.tried}) == len(found.tried)
    for tried in found.tried:
        if tried.report is not None:
            how = {"layout": tried.layout, "kv_layout": tried.kv_layout}
            again = sharded_report(shard(LLAMA, grid, tried.sharding, **how, **settings), context=8192, **question)
            assert found.best.time_s <= again.time_s == tried.report.time_s
    fixed = search(LLAMA, grid, context=8192, layout="1d", kv_layout="heads", **question, **settings)
    assert {(t.layout, t.kv_layout) for t in fixed.tried} == {("1d", "heads")}


def test_axes_are_chosen_for_the_steps_tokens():
    pod = resolve_slice("tpu-v4:2x2x4")
    layouts = {
        n: next(t.layout for t in search(LLAMA, pod, prefill=n).tried if t.sharding.tp == 16 and "gath" in t.layout)
        for n in (64, 262144)
    }
    assert layouts == {64: "gathered-x", 262144: "gathered-xyz"}


def test_one_prompt_is_fastest_without_replicas_and_many_run_best_with_them():
    fast = search(LLAMA, NODES, objective="latency", prefill=8192).best
    wide = search(LLAMA, NODES, objective="throughput", prefill=8192).best
    assert fast.deployment.sharding.replicas == 1
    assert wide.deployment.sharding.replicas > 1


def test_throughput_fills_the_memory():
    found = search(LLAMA, NODES, objective="throughput", context=8192, max_num_seqs=1024)
    for tried in found.tried:
        if tried.report is None:
            continue
        d = tried.report.deployment
        batch = tried.report.replica_tokens * d.sharding.replicas
        assert batch == largest_batch(d, 8192)
        assert batch * 8192 <= d.kv_tokens < (batch + d.sharding.replicas) * 8192


def test_reasons_are_rules_or_memory():
    reasons = {
        str(t.sharding): t.reason for t in search(load_model("qwen2.5-14b"), NODES, decode=8, context=4096).tried
    }
    assert "40 query heads, which 16 does not divide" in reasons["tp16"]
    reasons = {str(t.sharding): t.reason for t in search(LLAMA, NODES, decode=64, context=8192).tried}
    assert "before any KV cache" in reasons["dp16"]
    assert "the KV cache of a replica holds" in reasons["tp2dp8"]


def test_nothing_fits():
    found = search(load_model("llama-3.1-405b"), resolve_slice("l4:8"), decode=1, context=100)
    with pytest.raises(InfeasibleError, match="no sharding does it: tp8: needs"):
        found.best  # noqa: B018  # the property raises


@pytest.mark.parametrize("question", [{}, {"context": 100}, {"decode": 4, "prefill": 4, "context": 4}, {"decode": 4}])
def test_bad_questions_are_refused(question):
    with pytest.raises(InputError):
        search(LLAMA, NODES, **question)
    with pytest.raises(InputError, match="must be one of latency, throughput"):
        search(LLAMA, NODES, objective="cost", prefill=10)


ASK = ["roofline", "--model", "llama-3-70b", "--slice", "h100-sxm:2x8", "--context", "8192"]


def test_command_prints_what_was_tried(run_cli):
    out = run_cli(*ASK, "--shard", "auto", "--decode", "64").stdout
    assert "tried, best latency first" in out
    assert "tp2dp8" in out
    assert "per output token" in out


def test_command_as_json_agrees_with_the_plain_one(run_cli):
    one = json.loads(
        run_cli(
            "roofline", "--model", "llama-3-8b", "--slice", "h100-sxm:4", "--decode", "8", "--context", "999", "--json"
        ).stdout
    )
    two = json.loads(
        run_cli(
            "roofline",
            "--model",
            "llama-3-8b",
            "--slice",
            "h100-sxm:4",
            "--decode",
            "8",
            "--context",
            "999",
            "--shard",
            "tp4",
            "--json",
        ).stdout
    )
    assert two["time_s"] == pytest.approx(one["step_time_s"])
    assert two["stages"][0]["ops_per_chip"] == one["ops_per_chip"]
    found = json.loads(run_cli(*ASK, "--shard", "auto", "--decode", "64", "--json").stdout)
    assert found["best"]["sharding"] == found["tried"][0]["sharding"]
    assert math.isclose(found["best"]["time_s"], found["tried"][0]["time_s"])


def test_pp_alone_gives_the_rest_to_tp(run_cli):
    document = json.loads(run_cli(*ASK, "--pp", "2", "--decode", "64", "--json").stdout)
    assert document["sharding"] == "tp8pp2"
    assert [s["layers"] for s in document["stages"]] == [40, 40]
    assert "bubble" in run_cli(*ASK, "--pp", "2", "--prefill", "8192", "--micro-batches", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "tp8pp2", "--tp", "8"], "write them as one"),
        (["--shard", "auto", "--pp", "2"], "auto chooses it"),
        (["--shard", "tp8pp2", "--objective", "latency"], "only --shard auto"),
        (["--shard", "tp8"], "every chip must be used"),
        (["--pp", "3"], "must divide the 16 chips"),
        (["--pp", "2", "--plot", "x.png"], "--plot"),
    ],
)
def test_contradictions_are_refused(run_cli, arguments, message):
    assert message in run_cli(*ASK, "--decode", "8", *arguments, code=2).stderr


def test_what_does_not_fit_ends_with_1(run_cli):
    assert "does not fit" in run_cli(*ASK, "--decode", "8", "--shard", "dp16", code=1).stderr
