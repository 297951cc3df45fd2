"""How many chips a plan takes if the calibrated parameters are off: intervals of the planned fleet."""

import pytest

from simulator.errors import InputError
from simulator.planning import PlanOptions, plan, targets_of
from simulator.planning.intervals import chips_interval
from simulator.run import load_scenario


def planned(level, *, workers=1, kinds=("unified",), draws=32, profile="vllm", changes=()):
    own = [f"engine.profile={profile}"] if profile else []
    scenario = load_scenario("llama-3-8b-azure-chat", [*own, *changes])
    options = PlanOptions(
        shardings=("tp",),
        max_chips=1,
        requests=500,
        batch_limits=(64,),
        token_budgets=(2048,),
        front=(),
        runners_up=0,
        interval=level,
        interval_draws=draws,
        kinds=kinds,
    )
    return plan(
        scenario.model,
        scenario.traffic,
        targets_of(scenario.slo),
        300.0,
        ["h100-sxm"],
        options=options,
        template=scenario,
        workers=workers,
    )


@pytest.fixture(scope="module")
def wide():
    return planned(95.0)


def test_interval_holds_the_plan_and_has_a_width(wide):
    found = wide.chips_interval
    assert found.value == wide.best.chips
    assert found.low < found.value < found.high
    assert found.low <= found.median <= found.high
    assert wide.interval_percent == 95


def test_levels_are_nested(wide):
    narrow = planned(50.0).chips_interval
    assert wide.chips_interval.low <= narrow.low <= narrow.high <= wide.chips_interval.high


def test_workers_do_not_matter_and_nothing_is_drawn_unasked(wide):
    assert planned(95.0, workers=3) == wide
    unasked = planned(None)
    assert (unasked.chips_interval, unasked.interval_percent) == (None, None)
    assert unasked.best == wide.best


def test_arithmetic_of_draws():
    """Half the rate takes twice the chips; what the verifying run added stays in proportion; no rate, no bound."""

    def chips_at(rates):
        return sum(round(120 / rate) for rate in rates)

    same = chips_interval(66, [2.0], [[2.0]] * 20, 0.8, chips_at)
    assert (same.low, same.median, same.high) == (66, 66, 66)
    some = chips_interval(60, [2.0], [[1.0], [2.0], [4.0]] * 10, 0.95, chips_at)
    assert (some.low, some.high) == (30, 120)
    two = chips_interval(180, [2.0, 1.0], [[1.0, 1.0], [2.0, 1.0], [2.0, 0.5]] * 10, 0.95, chips_at)
    assert (two.low, two.high) == (180, 300)
    lost = chips_interval(60, [2.0, 2.0], [[2.0, 2.0]] * 10 + [[2.0, 0.0]] * 10, 0.8, chips_at)
    assert lost.high is None
    assert "10 of 20 draws" in lost.reason


def test_two_pools_have_an_interval():
    """Both are searched again in every draw: workers do not matter, levels are nested, and each side alone would be narrower."""
    wide, narrow = (planned(level, kinds=("disaggregated",), workers=2) for level in (95.0, 50.0))
    assert [pool.role for pool in wide.best.pools] == ["prefill", "decode"]
    found, inner = wide.chips_interval, narrow.chips_interval
    assert found.value == wide.best.chips
    assert found.low < found.value < found.high
    assert found.low <= inner.low <= inner.high <= found.high
    assert planned(50.0, kinds=("disaggregated",)) == narrow


def test_refusals():
    with pytest.raises(InputError, match="nothing to draw"):
        planned(80.0, profile=None, changes=("efficiency=ideal",))


def test_command(run_cli):
    told = run_cli(
        "plan", "llama-3-8b-azure-chat", "--qps", "100", "--set", "engine.profile=vllm", "--shardings", "tp", "--max-chips", "1",
        "--requests", "400", "--interval", "80", "--draws", "16", "-q",
    )  # fmt: skip
    assert "80 % of draws of the calibrated parameters: [" in told.stdout
    refused = run_cli("plan", "llama-3-8b-azure-chat", "--qps", "100", "--draws", "16", code=2)
    assert "only with --interval" in refused.stderr
