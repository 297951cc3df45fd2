"""Parameter intervals of runs: zero where nothing is uncertain, nested, apart from sampling, the same for any workers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from simulator.catalog.draws import Draws
from simulator.catalog.engines import FitErrors, LeftOut, load_engine
from simulator.catalog.files import parse
from simulator.errors import InputError
from simulator.results.summary import Summary
from simulator.run import Scenario, load_scenario, run_scenario
from simulator.run import intervals as module
from simulator.run.intervals import HEADLINES, parameter_draws
from simulator.run.resolve import resolve

SMALL = ("traffic.n_requests=400", "engine.max_num_batched_tokens=2048", "engine.max_num_seqs=128")
PROFILED = (*SMALL, "engine.profile=vllm", "traffic.arrival.rate_per_s=8")


def scenario(*overrides):
    return load_scenario("llama-3-8b-azure-chat", overrides or SMALL)


def errors(**changes):
    left_out = LeftOut(
        groups=5, rows=100, step_scale=0.1, step_tail=4, first_token_scale=0.2, first_token_tail=4, within_group=0.5
    )
    found = FitErrors(
        parameters=("host.step",),
        standard_errors=(2e-4,),
        correlation=((1.0,),),
        chips=("h100-sxm",),
        left_out={"dense": left_out},
    )
    return found.model_copy(update=changes)


@pytest.fixture
def profile_with(monkeypatch):
    """Give vLLM's profile other errors than its file has."""

    def change(found):
        spec = load_engine("vllm").model_copy(update={"errors": found})
        monkeypatch.setattr(module, "load_engine", lambda _: spec)

    return change


def widths(summary):
    return {
        path: math.log(f.high / f.low)
        for path, f in summary.intervals.figures.items()
        if f.low and f.high and f.value > 0
    }


@pytest.fixture(scope="module")
def plain():
    return run_scenario(scenario(), interval=80, interval_draws=16)


def test_a_run_without_one_has_none_and_is_otherwise_the_same(plain):
    alone = run_scenario(scenario()).summary
    assert alone.intervals is None
    assert plain.summary.model_copy(update={"intervals": None}) == alone


def test_every_headline_with_a_value_has_an_interval_around_its_median(plain):
    found = plain.summary.intervals
    assert (found.level, found.draws, found.sources) == (0.8, 16, ["kernels", "assumed"])
    assert set(found.figures) == set(module.headline_figures(plain.summary)) <= set(HEADLINES)
    assert len(found.figures) > 35
    for path, figure in found.figures.items():
        assert figure.low <= figure.median <= figure.high, path
        if figure.low < figure.high:
            assert sum(figure.shares.values()) == pytest.approx(1), path
    assert found.figures["latency.tpot_s.p50"].value == plain.summary.latency.tpot_s.p50.value


def test_levels_are_nested_and_more_draws_keep_the_run(plain):
    wider = run_scenario(scenario(), interval=95, interval_draws=16).summary.intervals
    narrow = run_scenario(scenario(), interval=50, interval_draws=16).summary.intervals
    for path, figure in plain.summary.intervals.figures.items():
        inner, outer = narrow.figures[path], wider.figures[path]
        assert outer.low <= figure.low <= inner.low <= inner.high <= figure.high <= outer.high, path


def test_the_result_does_not_depend_on_workers(plain):
    again = run_scenario(scenario(), interval=80, interval_draws=16, workers=3)
    assert again.summary.model_dump_json() == plain.summary.model_dump_json()


def test_a_result_folder_asks_for_its_intervals_again(plain):
    assert plain.result.scenario["run"]["interval"] == 80
    assert Summary.model_validate_json(plain.summary.model_dump_json()) == plain.summary


CERTAIN = (
    *(f"efficiency.{name}=0.7" for name in ("matmul", "hbm", "attention", "kv", "link")),
    *(f"efficiency.{name}_s=1e-6" for name in ("op_overhead", "collective_latency", "step_overhead", "row_overhead")),
    "prices.idle_power_fraction=0.25",
)


def test_exact_parameters_give_no_width(profile_with):
    profile_with(errors(standard_errors=(0.0,), left_out={}))
    found = run_scenario(scenario(*PROFILED, *CERTAIN), interval=80, interval_draws=16).summary.intervals
    assert found.sources == []
    for path, figure in found.figures.items():
        assert figure.low == figure.median == figure.high == figure.value, path
        assert figure.shares == {}


def test_wider_errors_give_wider_intervals(profile_with):
    found = []
    for factor in (0.5, 1.0, 2.0):
        left_out = (
            errors()
            .left_out["dense"]
            .model_copy(update={"step_scale": 0.1 * factor, "first_token_scale": 0.2 * factor})
        )
        profile_with(errors(left_out={"dense": left_out}))
        found.append(widths(run_scenario(scenario(*PROFILED), interval=80, interval_draws=16).summary))
    for path in ("latency.tpot_s.p50", "latency.ttft_s.p50", "latency.e2e_s.mean", "load.load"):
        assert found[0][path] < found[1][path] < found[2][path], path


def test_the_residual_moves_first_tokens_and_steps_and_says_so(profile_with):
    profile_with(errors())
    summary = run_scenario(scenario(*PROFILED), interval=80, interval_draws=16).summary
    found = summary.intervals
    assert found.sources == ["kernels", "profile", "assumed", "residual"]
    tpot, ttft = (found.figures[f"latency.{name}.p50"] for name in ("tpot_s", "ttft_s"))
    assert tpot.shares["residual"] > 0.3
    assert ttft.shares["residual"] > 0.5


def test_a_delayed_first_token_delays_nobody_else():
    resolved = resolve(scenario(*PROFILED))
    draw = replace(parameter_draws(resolved, Draws(1, 0, frozenset()))[0], first_token=1.5)
    run = run_scenario(scenario(*PROFILED))
    later = draw.delay(run.outcome)
    ttft, before = (o.column("first_token_s") - o.column("arrival_s") for o in (later, run.outcome))
    assert ttft == pytest.approx(1.5 * before)
    decoding, was = (o.column("finish_s") - o.column("first_token_s") for o in (later, run.outcome))
    assert decoding == pytest.approx(was)
    assert later.busy_s == run.outcome.busy_s


def test_close_to_capacity_draws_may_have_no_steady_state(profile_with):
    profile_with(errors())
    crowded = run_scenario(
        scenario(*PROFILED, "traffic.n_requests=3000", "traffic.arrival.rate_per_s=17"), interval=80, interval_draws=16
    )
    found = crowded.summary.intervals
    assert 0 < found.overloaded_fraction < 1
    if crowded.summary.latency is not None and found.overloaded_fraction > 0.15:
        assert found.figures["latency.ttft_s.p99"].high is None
        assert "no steady state" in found.figures["latency.ttft_s.p99"].reason
    assert found.figures["load.capacity_per_s"].high is not None


def test_ranks_and_stages_are_drawn_too():
    staged = scenario(*SMALL, "traffic.n_requests=100", "slice=h100-sxm:2", "sharding.pp=2", "sharding.tp=1")
    found = run_scenario(staged, interval=80, interval_draws=16).summary.intervals
    assert found.figures["chip_seconds_per_query.busy"].low < found.figures["chip_seconds_per_query.busy"].high


def test_a_drawn_workspace_moves_the_kv_cache_and_a_stated_one_does_not():
    own = errors(parameters=("memory.workspace",), standard_errors=(1e9,))
    spec = load_engine("vllm").model_copy(update={"errors": own})
    for overrides, moves in ((PROFILED, True), ((*PROFILED, "engine.workspace_bytes=5e9"), False)):
        resolved = resolve(scenario(*overrides))
        profiles = module.drawn_profiles(spec, resolved.profile, Draws(16, 0))
        draws = [module.ParameterDraw(resolved.deployment.eff, profile) for profile in profiles]
        blocks = {draw.apply(resolved).settings.num_kv_blocks for draw in draws}
        assert (len(blocks) > 1) == moves


@pytest.mark.parametrize("level", [0.0, 100.0, -1.0, math.nan])
def test_levels_outside_are_refused(level):
    with pytest.raises(InputError, match=r"interval = .* between 0 and 100"):
        run_scenario(scenario(), interval=level)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run.summary_only=true",), r"run\.summary_only keeps none"),
        (('efficiency={base="ideal"}',), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_again_is_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message):
        run_scenario(scenario(*SMALL, *overrides), interval=80, interval_draws=16)


def test_speculation_is_refused_because_acceptance_has_no_error():
    drafting = load_scenario(
        "llama-3-8b-azure-chat",
        (*SMALL, 'engine.speculation={method="ngram",acceptance_rate=0.5,num_speculative_tokens=2}'),
    )
    with pytest.raises(InputError, match=r"engine\.speculation: how far acceptance rates are off"):
        run_scenario(drafting, interval=80)


def test_draws_are_asked_for_with_a_level_only():
    with pytest.raises(InputError, match="interval_draws = 32: only with an interval"):
        run_scenario(scenario(), interval_draws=32)
    with pytest.raises(InputError, match="interval_draws"):
        run_scenario(scenario(), interval=80, interval_draws=3)


def test_two_scenarios_of_one_chip_share_their_kernels():
    one, other = (resolve(scenario(*SMALL, f"traffic.arrival.rate_per_s={rate}")) for rate in (5, 10))
    first, second = (parameter_draws(r, Draws(16, 3)) for r in (one, other))
    assert [d.efficiency for d in first] == [d.efficiency for d in second]
    assert np.isfinite([d.step for d in first]).all()


def disaggregated(*overrides):
    small = ("traffic.n_requests=300", "traffic.arrival.rate_per_s=4", "engine.profile=vllm")
    return load_scenario("llama-3-70b-disaggregated", (*small, *overrides))


def test_pools_share_their_draws_and_one_pool_is_the_plain_run(profile_with):
    """A pool by itself, on the way through a fleet: the same draws, so the same intervals."""
    profile_with(errors())
    one = {"name": "all", "role": "unified", "replicas": 2}
    stated = scenario(*PROFILED).as_toml() | {"pool": [one]}
    stated["run"] |= {"interval": 80.0, "interval_draws": 16}
    path = run_scenario(parse(Scenario, stated, "one pool")).summary.intervals
    alone = run_scenario(scenario(*PROFILED, "replicas=2"), interval=80, interval_draws=16).summary.intervals
    assert path.sources == alone.sources
    assert path.figures.keys() == alone.figures.keys()
    for name, figure in alone.figures.items():
        other = path.figures[name]
        assert [other.value, other.low, other.high] == pytest.approx([figure.value, figure.low, figure.high], rel=1e-9)


def test_two_roles_and_agents_have_intervals_that_do_not_depend_on_workers():
    ways = (
        disaggregated(),
        load_scenario("coding-agents", ["traffic.n_requests=40", "agents.count=4", "agents.start_s=1", "replicas=2"]),
    )
    for way in ways:
        one, other = (run_scenario(way, interval=80, interval_draws=16, workers=k).summary for k in (1, 3))
        assert one.model_dump_json() == other.model_dump_json()
        figures = one.intervals.figures
        for name in ("latency.ttft_s.p50", "latency.tpot_s.p50", "chip_seconds_per_query.busy"):
            assert figures[name].low < figures[name].value < figures[name].high, name
        assert figures["latency.tpot_s.p50"].shares["residual"] > 0.2


def test_where_prefill_gives_first_tokens_its_residual_moves_them(profile_with):
    profile_with(errors())
    wide = widths(run_scenario(disaggregated(), interval=80, interval_draws=16).summary)
    narrow = errors().left_out["dense"].model_copy(update={"first_token_scale": 0.01})
    profile_with(errors(left_out={"dense": narrow}))
    less = widths(run_scenario(disaggregated(), interval=80, interval_draws=16).summary)
    assert less["latency.ttft_s.p50"] < 0.8 * wide["latency.ttft_s.p50"]
    assert less["latency.tpot_s.p50"] == pytest.approx(wide["latency.tpot_s.p50"], rel=0.1)
