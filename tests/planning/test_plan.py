"""Plans as their askers get them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from simulator.catalog.chips import chip_names
from simulator.catalog.models import load_model
from simulator.errors import InputError, UnpriceableError
from simulator.planning import PlanOptions, plan, targets_of
from simulator.planning.loads import Loads
from simulator.results.plan import Provisioning, Target, Targets, plan_json, read_plan, write_plan
from simulator.run.scenario import load_scenario

TRACE = Path(__file__).resolve().parents[3] / "shared/data/traces/AzureLLMInferenceTrace_code.csv.gz"
SCENARIO = load_scenario("llama-3-8b-azure-chat")
#: Small enough to be searched in a moment.
SMALL = PlanOptions(
    requests=300,
    batch_limits=(64,),
    token_budgets=(2048,),
    max_chips=2,
    shardings=("tp",),
    front=(0.7, 1.0, 2.0),
    look_elsewhere=False,
)


def small_plan(qps=100.0, chips=("h100-sxm",), targets=None, workers=1, model="llama-3-8b", **options):
    return plan(
        model,
        SCENARIO.traffic,
        targets or targets_of(SCENARIO.slo),
        qps,
        chips,
        options=SMALL.model_copy(update=options),
        template=SCENARIO,
        workers=workers,
    )


@pytest.fixture(scope="module")
def planned():
    return small_plan(qps=500.0, chips=("l40s", "h100-sxm"), peak_to_mean=2.0, spare_replicas=2, failed_fraction=0.01)


def test_the_waterfall_multiplies_to_the_fleet(planned):
    best, steps = planned.best, planned.waterfall
    assert [s.name for s in steps] == [
        "ideal roofline",
        "efficiency",
        "queueing headroom",
        "safety margin",
        "daily peak",
        "whole replicas",
        "redundancy",
    ]
    assert steps[0].chip_s_per_query * planned.total_factor == pytest.approx(best.chips / 500.0, rel=1e-12)
    assert steps[-1].chip_s_per_query == pytest.approx(best.chip_seconds_per_query, rel=1e-12)
    for before, after in pairwise(steps):
        assert after.chip_s_per_query == pytest.approx(before.chip_s_per_query * after.factor, rel=1e-12)
        assert after.factor >= 1 or after.name == "efficiency"
    factors = {s.name: s.factor for s in steps}
    assert factors["daily peak"] == 2
    assert factors["safety margin"] == pytest.approx(1 / 0.95)
    assert factors["efficiency"] > 1


def test_figures_of_the_fleet_agree(planned):
    best, pool = planned.best, planned.best.pools[0]
    assert best.chips == pool.replicas * pool.chips_per_replica == pool.chips
    assert best.usd_per_hour == pytest.approx(best.chips * best.usd_per_chip_hour)
    assert best.usd_per_query == pytest.approx(best.usd_per_hour / (500 * 3600))
    assert best.low_usd_per_hour <= best.usd_per_hour <= best.high_usd_per_hour
    peak = planned.provisioning.peak_qps
    assert (
        (pool.needed_replicas - 1) * pool.rate_per_s * 0.95
        < peak
        <= pool.needed_replicas * pool.rate_per_s * 0.95 * (1 + 1e-9)
    )
    assert planned.verification.rate_per_s == pytest.approx(peak / pool.needed_replicas)
    assert planned.verification.kept
    c = planned.consumption
    assert c.ideal_chip_s < c.busy_chip_s <= c.provisioned_chip_s == best.chip_seconds_per_query
    assert c.rate_per_s == pytest.approx(500 / pool.replicas)
    assert c.joules_per_query < c.facility_joules_per_query
    assert c.joules_per_query <= c.provisioned_chip_s * c.energy.peak_power_w
    assert {o.chip for o in planned.by_chip} == {"l40s", "h100-sxm"}
    costs = [o.fleet.usd_per_hour for o in planned.by_chip]
    assert costs == sorted(costs)
    assert costs[0] == best.usd_per_hour


def test_the_plan_can_be_simulated_again(planned):
    from simulator.catalog.files import parse
    from simulator.run.scenario import Scenario
    from simulator.run.simulate import run_scenario

    summary = run_scenario(parse(Scenario, planned.scenario, "plan")).summary
    assert summary.latency == planned.verification.latency
    assert summary.slo.met


def test_tighter_limits_never_cost_less_and_the_front_has_no_idle_points(planned):
    costs = [p.fleet.usd_per_hour for p in planned.front if p.fleet]
    assert costs == sorted(costs, reverse=True)
    kept = [p.fleet.usd_per_hour for p in planned.front if p.on_front]
    assert len(set(kept)) == len(kept)
    assert [p.scale for p in planned.front] == [0.7, 1.0, 2.0]
    assert planned.front[1].fleet.chips == planned.by_chip[0].fleet.chips


def test_more_queries_never_take_fewer_chips():
    chips = [small_plan(qps=q, front=()).best.chips for q in (1.0, 10.0, 40.0, 41.0, 200.0, 2000.0)]
    assert chips == sorted(chips)
    assert chips[0] == 1
    assert chips[-1] == pytest.approx(10 * chips[-2], rel=0.1)


def test_a_cheaper_chip_never_makes_the_plan_dearer():
    found = [
        small_plan(chips=("h100-sxm", "l40s"), front=(), usd_per_chip_hour={"h100-sxm": usd}).best
        for usd in (20.0, 5.0, 2.0, 0.5)
    ]
    costs = [f.usd_per_hour for f in found]
    assert costs == sorted(costs, reverse=True)
    assert found[0].pools[0].chip == "l40s"
    assert found[-1].pools[0].chip == "h100-sxm"


def test_the_plan_does_not_depend_on_workers():
    chips = ("h100-sxm", "l40s", "l4")
    assert plan_json(small_plan(chips=chips)) == plan_json(small_plan(chips=chips, workers=3))


def test_a_model_object_is_planned_as_its_name_is():
    architecture = load_model("llama-3-8b")
    by_name, by_object = small_plan(front=()), small_plan(front=(), model=architecture)
    assert by_name.best == by_object.best
    thinner = architecture.model_copy(
        update={
            "name": "half",
            "layers": tuple(g.model_copy(update={"count": g.count // 2}) for g in architecture.layers),
        }
    )
    half = small_plan(front=(), model=thinner)
    assert half.model == "half"
    assert half.best.chip_seconds_per_query < by_name.best.chip_seconds_per_query


def test_without_a_template_there_are_defaults():
    found = plan(
        "llama-3-8b", SCENARIO.traffic, Targets(), 10.0, ["h100-sxm"], options=SMALL.model_copy(update={"front": ()})
    )
    assert found.best.pools[0].binding == ["capacity"]
    assert found.best.pools[0].load == 1.0


def test_infeasible_targets_say_what_is_nearest():
    wanted = Targets(
        limits=(
            Target(metric="ttft_s", limit_s=1e-3, percentile=95),
            Target(metric="tpot_s", limit_s=0.1, percentile=95),
        )
    )
    found = small_plan(targets=wanted)
    assert not found.feasible
    assert found.waterfall == []
    (outcome,) = found.by_chip
    assert outcome.status == "infeasible"
    assert "times the limit" in outcome.reason
    assert found.idle_latency_s["ttft_s"] > 1e-3
    assert found.idle_latency_s["tpot_s"] < 0.1
    relaxed = [n for n in found.nearest if n.what.startswith("relax to TTFT")]
    assert len(relaxed) == 3
    for n in relaxed:
        assert n.targets.limits[1] == wanted.limits[1]
        (asked,) = small_plan(targets=n.targets, front=()).by_chip  # the best fleet may have grown when it was verified
        assert asked.fleet.chips == n.fleet.chips
    (without,) = [n for n in found.nearest if n.what == "no limit on TTFT"]
    assert without.targets.limits == wanted.limits[1:]
    chips = [n.fleet.chips for n in (*relaxed, without)]
    assert chips == sorted(chips, reverse=True)


def test_infeasible_targets_name_other_chips():
    wanted = Targets(limits=(Target(metric="tpot_s", limit_s=0.012, percentile=95),))
    found = small_plan(chips=("l4",), targets=wanted, look_elsewhere=True, batch_limits=(8,), max_chips=1)
    others = [n for n in found.nearest if n.what.endswith("as asked")]
    assert len(others) == 3
    assert all(n.fleet.pools[0].chip != "l4" for n in others)
    # the same three as from a plan of every chip, where nothing is left out for what other chips cost
    every = small_plan(chips=chip_names(), targets=wanted, batch_limits=(8,), max_chips=1, front=()).by_chip
    fleets = [o.fleet for o in every if o.fleet and o.fleet.usd_per_hour]
    assert [n.fleet for n in others] == sorted(fleets, key=lambda fleet: fleet.usd_per_hour)[:3]


def test_a_chip_without_a_price_is_counted_but_not_ranked_by_cost():
    found = small_plan(chips=("h100-nvl", "h100-sxm"), front=())
    by_chip = {o.chip: o for o in found.by_chip}
    assert found.best.pools[0].chip == "h100-sxm"
    assert by_chip["h100-nvl"].fleet.usd_per_hour is None
    assert "no price" in by_chip["h100-nvl"].reason
    with pytest.raises(UnpriceableError, match="h100-nvl"):
        small_plan(chips=("h100-nvl",))
    by_chips = small_plan(chips=("h100-nvl",), rank_by="chips")
    assert by_chips.best.usd_per_hour is None
    assert by_chips.best.chips > 0


def test_a_model_that_does_not_fit_has_no_plan():
    found = small_plan(model="llama-3-70b", chips=("l4",))
    assert found.best is None
    assert found.by_chip[0].status == "does_not_fit"
    assert found.nearest == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qps": 0.0}, "qps = 0.0"),
        ({"qps": float("nan")}, "qps = nan"),
        ({"chips": ()}, "name at least one"),
        ({"chips": ("h100-sxn",)}, "did you mean 'h100-sxm'"),
        ({"precisions": ("bf17",)}, "bf17"),
        ({"slices": ("l4:1",)}, "slice l4:1: its chip is not among those asked for"),
        ({"batch_limits": (64,), "token_budgets": (32,), "requests": 200}, None),
    ],
)
def test_malformed_questions_are_refused(changes, message):
    if message is None:  # the template's own budget covers the batch
        assert small_plan(**changes, front=()).feasible
        return
    with pytest.raises(InputError, match=message):
        small_plan(**changes)


def test_a_plan_is_written_and_read_back(planned, tmp_path):
    file = tmp_path / "plan.json"
    write_plan(planned, file)
    assert read_plan(file) == planned
    assert file.read_text(encoding="utf-8") == plan_json(planned)
    assert list(tmp_path.iterdir()) == [file]
    document = json.loads(file.read_text(encoding="utf-8"))
    for broken, message in (
        ({"format": "other"}, "not a plan"),
        ({"schema_version": 99}, "plan schema version 99"),
        ({"searched": 3}, "damaged plan: searched"),
    ):
        file.write_text(json.dumps(document | broken), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_plan(file)
    with pytest.raises(InputError, match="cannot be written"):
        write_plan(planned, tmp_path / "none" / "plan.json")


def test_a_scenario_is_judged_as_simulate_judges_it():
    targets = targets_of(SCENARIO.slo)
    assert targets.joint_fraction == 0.95
    assert [t.metric for t in targets.limits] == ["ttft_s", "tpot_s"]


@pytest.mark.skipif(not TRACE.is_file(), reason="no traces beside the checkout")
def test_a_trace_keeps_its_times_and_changes_its_rate():
    scenario = load_scenario(
        "llama-3-8b-azure-chat",
        [f"traffic.trace={TRACE}", "traffic.n_requests=500"],
    )
    load = Loads(scenario, 1, 100).first(100)
    assert len(load.requests) == 500
    span = load.requests.arrival_s[-1] - load.requests.arrival_s[0]
    assert load.rate_per_s == pytest.approx(499 / span)
    faster = load.at(2 * load.rate_per_s)
    assert faster.arrival_s == pytest.approx(load.requests.arrival_s / 2)
    assert replace(load).measured[0] > 0
    assert Provisioning(qps=1.0).peak_qps == 1.0
