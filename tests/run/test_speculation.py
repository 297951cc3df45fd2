"""Speculative decoding from a scenario to its summary."""

import json
from pathlib import Path

import numpy as np
import pytest

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InfeasibleError, InputError
from simulator.roofline.acceptance import tokens_per_pass
from simulator.roofline.deployment import Deployment
from simulator.roofline.pipeline import shard
from simulator.roofline.sharding import parse_sharding
from simulator.run import load_scenario, run_scenario
from simulator.run.explain import explain
from simulator.run.resolve import resolve
from simulator.run.serving import as_requests
from simulator.run.speculation import SpeculationOptions, survival_table, with_acceptance
from simulator.run.speculation_view import speculation_view
from simulator.traffic import build_stream

BASE = "llama-3-8b-azure-chat"
FEW = ["traffic.n_requests=1500", "traffic.arrival.rate_per_s=6"]


def scenario(text, *more):
    return load_scenario(BASE, [*FEW, f"engine.speculation={text}", *more])


@pytest.fixture(scope="module")
def runs():
    texts = {
        "eagle": '{method="eagle", num_speculative_tokens=3, acceptance_rate=0.75}',
        "spread": '{method="eagle", num_speculative_tokens=3, acceptance_rate=0.75, acceptance_spread=0.15}',
        "other": '{method="draft_model", model="qwen3-0.6b", slice="l4:1", num_speculative_tokens=2, acceptance_lengths=[3, 2, 1]}',
    }
    found = {name: run_scenario(scenario(text)) for name, text in texts.items()}
    return found | {"plain": run_scenario(load_scenario(BASE, FEW))}


def test_the_summary_says_what_speculation_did(runs):
    summary = runs["eagle"].summary
    found = summary.speculation
    assert found.method == "eagle"
    assert found.draft_tokens == 3
    assert found.drafts_per_pass == 3
    # The last pass of an output is cut: a little less than the formula.
    assert 0.96 * tokens_per_pass(0.75, 3) < found.tokens_per_pass < tokens_per_pass(0.75, 3)
    assert found.drafted_tokens - found.rejected_tokens == pytest.approx(found.accepted_fraction * found.drafted_tokens)
    assert 0 < found.wasted_share_of_busy < 0.5
    busy = summary.chip_seconds_per_query.busy
    assert found.wasted_chip_s_per_query == pytest.approx(found.wasted_share_of_busy * busy, rel=1e-6)
    assert summary.breakdown.fractions["draft"] == pytest.approx(
        found.draft_share_of_busy * summary.utilisation.busy_fraction, rel=1e-6
    )
    assert sum(summary.breakdown.fractions.values()) == pytest.approx(1)
    assert runs["plain"].summary.speculation is None


def test_tokens_come_sooner_and_in_bunches(runs):
    with_, without = runs["eagle"].summary.latency, runs["plain"].summary.latency
    assert with_.tpot_s.p50.value < 0.7 * without.tpot_s.p50.value
    assert without.itl_pass_s is None
    assert with_.itl_s.p50.value == 0  # most tokens come with another
    assert with_.itl_pass_s.p50.value > without.itl_s.p50.value  # a pass is longer than a plain step
    passes = with_.itl_pass_s.n / with_.itl_s.n
    assert passes == pytest.approx(1 / tokens_per_pass(0.75, 3), rel=0.05)
    assert with_.itl_pass_s.mean.value * passes == pytest.approx(with_.itl_s.mean.value, rel=1e-6)


def test_flops_of_drafts_are_no_model_flops(runs):
    with_, without = runs["eagle"].summary.utilisation, runs["plain"].summary.utilisation
    assert with_.speculative_flops > 0
    assert with_.model_flops == pytest.approx(without.model_flops, rel=0.01)


def test_a_drafter_on_its_own_slice_adds_its_chips(runs):
    other = runs["other"]
    assert other.summary.deployment.chips_per_replica == 2
    assert other.summary.ledger.chips == 2
    assert other.resolved.cost.peak_flops_per_s > runs["plain"].resolved.cost.peak_flops_per_s


def test_classes_are_drawn_by_request_and_do_not_move_the_traffic(runs):
    settings = scenario('{method="eagle", num_speculative_tokens=3, acceptance_rate=0.75, acceptance_spread=0.15}')
    requests = as_requests(build_stream(settings.traffic, 1, base_folder=Path.cwd()))
    dressed = with_acceptance(requests, settings.engine.speculation, 1)
    assert dressed.acceptance_class.mean() / 1024 == pytest.approx(0.75, abs=0.02)
    assert dressed.acceptance_class.std() / 1024 == pytest.approx(0.15, abs=0.02)
    np.testing.assert_array_equal(dressed.arrival_s, requests.arrival_s)
    again = with_acceptance(requests, settings.engine.speculation, 1)
    np.testing.assert_array_equal(again.acceptance_class, dressed.acceptance_class)
    # Convex in the rate: unequal requests get more per pass than equal ones of the same mean … weighted by passes, fewer.
    assert runs["spread"].summary.speculation.tokens_per_pass < tokens_per_pass(0.75, 3) * 1.05


def test_replicas_share_out_the_classes():
    text = '{method="eagle", num_speculative_tokens=3, acceptance_rate=0.6, acceptance_spread=0.2}'
    one = run_scenario(scenario(text, "replicas=3"))
    two = run_scenario(scenario(text, "replicas=3"), workers=2)
    np.testing.assert_array_equal(one.result.requests["finish_s"], two.result.requests["finish_s"])


def test_result_folders_keep_the_options():
    settings = scenario('{method="medusa", tree=[4, 6], acceptance_curve=[0.8, 0.6], drafts_by_batch=[[8, 0]]}')
    table = settings.as_toml()["engine"]["speculation"]
    assert table["tree"] == [4, 6]
    assert json.loads(json.dumps(table)) == table
    levels = resolve(settings).settings.speculation.level_by_batch
    assert levels[7] == 1
    assert not levels[8:].any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{method="eagle", num_speculative_tokens=3}', "exactly one of acceptance_rate"),
        ('{method="eagle", num_speculative_tokens=3, acceptance_rate=0.5, acceptance_curve=[0.5]}', "exactly one"),
        ('{method="eagle", acceptance_rate=0.5}', "num_speculative_tokens and tree"),
        ('{method="draft_model", num_speculative_tokens=3, acceptance_rate=0.5}', "model goes with"),
        ('{method="ngram", tree=[2, 2], acceptance_rate=0.5}', "chains, not trees"),
        ('{method="mtp", num_speculative_tokens=1, acceptance_rate=0.5}', "no multi-token-prediction modules"),
        ('{method="eagle", num_speculative_tokens=3, acceptance_curve=[0.9]}', "at least 3 entries"),
        (
            '{method="eagle", num_speculative_tokens=3, acceptance_rate=0.9, drafts_by_batch=[[8, 4]]}',
            "allowed are 0, 1",
        ),
        ('{method="eagle", num_speculative_tokens=3, acceptance_rate=0.9, acceptance_spread=0.4}', "below √"),
        ('{method="eagel", num_speculative_tokens=3, acceptance_rate=0.9}', "eagle"),
    ],
)
def test_contradictions_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        resolve(scenario(text))


def test_a_drafter_that_does_not_fit_is_refused_by_name():
    text = '{method="draft_model", model="llama-2-13b", num_speculative_tokens=3, acceptance_rate=0.7}'
    settings = load_scenario(BASE, ["slice=l4:1", "precision=w8a16kv8", f"engine.speculation={text}"])
    with pytest.raises(InfeasibleError, match="not with its drafter"):
        resolve(settings)


def test_survival_of_a_tree_is_whole_or_nothing():
    options = SpeculationOptions(method="medusa", tree=(3, 3), acceptance_rate=0.5)
    np.testing.assert_array_equal(survival_table(options), [[[0, 0], [0.5, 0.25]]])


def test_the_gain_collapses_with_the_batch_in_the_engine_as_in_the_cost_model():
    settings = scenario('{method="draft_model", model="qwen3-0.6b", num_speculative_tokens=3, acceptance_rate=0.8}')
    resolved = resolve(settings)
    view = speculation_view(resolved.deployment, settings.engine.speculation, context=1024, simulate_at=(1, 32, 128))
    assert view.largest > 128
    gains = [fixed for _, fixed, _ in view.simulated]
    assert gains[0] > 1.3 * gains[1] > 1.3 * gains[2]
    assert view.gains[-1, 255] < 1
    for clients, fixed, adaptive in view.simulated:
        assert fixed == pytest.approx(view.gains[-1, clients - 1], rel=0.03)
        assert adaptive >= fixed - 0.02
    assert view.best[0] == 3
    assert view.best[255] < 3


def test_attention_ranks_gain_in_the_engine_what_the_cost_model_says():
    options = SpeculationOptions(method="eagle", num_speculative_tokens=2, acceptance_rate=0.8)
    model, slice_ = load_model("qwen3-30b-a3b"), resolve_slice("h100-sxm:4")
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "decode_tokens": options.decode_tokens}
    ranks = shard(model, slice_, parse_sharding("dp4ep4"), **limits)
    view = speculation_view(ranks, options, context=1024, simulate_at=(1, 32))
    for clients, fixed, _ in view.simulated:
        assert fixed == pytest.approx(view.gains[-1, clients - 1], rel=0.06)
    # Tensor parallelism alone is the same said either way, to the last bit.
    dense, all_chips = load_model("llama-3-8b"), resolve_slice("h100-sxm:4")
    either = [
        speculation_view(shard(dense, all_chips, parse_sharding("tp4"), **limits), options, context=1024),
        speculation_view(Deployment(dense, all_chips, **limits), options, context=1024),
    ]
    assert (either[0].gains == either[1].gains).all()
    assert either[0].largest == either[1].largest
    with pytest.raises(InputError, match="leave pp out"):
        speculation_view(shard(dense, all_chips, parse_sharding("tp2pp2"), **limits), options, context=1024)


def test_tokens_that_come_together_are_counted_in_the_measured_window(runs):
    """Cut at the window's ends, where sequences are not yet settled: as many tokens as passes times tokens per pass."""
    run = runs["eagle"]
    counts = run.outcome.itl_counts_measured
    measured = counts.sum() / (counts.sum() - counts[0])
    assert measured == pytest.approx(run.summary.speculation.tokens_per_pass, rel=0.02)
    assert counts.sum() < run.outcome.itl_counts.sum()


def test_explain_and_summary_only_know_speculation_or_say_so():
    text = '{method="eagle", num_speculative_tokens=3, acceptance_rate=0.75, acceptance_spread=0.1}'
    settings = scenario(text, "traffic.n_requests=200")
    found = explain(settings, 50)
    assert found.e2e_s == pytest.approx(run_scenario(settings).result.requests["e2e_s"][50], rel=1e-12)
    with pytest.raises(InputError, match="speculation"):
        run_scenario(scenario(text, "run.summary_only=true"))
