"""Lifetime studies fed by the planner: every size was planned for, refusals are kept, and a limit moves the choice."""

import pytest

from simulator.errors import InfeasibleError
from simulator.lifetime.scenario import load_lifetime
from simulator.lifetime.serving import planned_server
from simulator.lifetime.study import serving_slope, study

SMALL = [
    "serving.sizes=3",
    "serving.smallest=3e9",
    "serving.largest=4e10",
    "serving.max_chips=1",
    "serving.n_requests=300",
    "quality.like={ parameters=2e9, tokens=1e11 }",
    "demand.queries=1e9",
]


@pytest.fixture(scope="module")
def found():
    return study(load_lifetime("llama-3-8b-15t", SMALL), workers=2)


def test_costs_are_those_of_the_plans(found):
    (optimum,) = found.optima
    scenario = load_lifetime("llama-3-8b-15t", SMALL)
    server = planned_server(scenario.serving, found.queries_per_s * 1.6487212707001282)
    assert len(optimum.sizes) >= 3
    for size in optimum.sizes[:2]:
        served = server.at(size.parameters)
        assert size.usd_per_query == served.usd_per_query
        assert size.deployment == served.deployment
    for size in optimum.sizes:
        assert size.total_usd == pytest.approx(size.training_usd + size.serving_usd)
        assert size.serving_usd == pytest.approx(size.usd_per_query * found.valued_queries * 1.6487212707001282)
        assert size.training_usd == pytest.approx(size.training_flops * found.training_usd_per_flop)
    assert optimum.best.total_usd == min(size.total_usd for size in optimum.sizes)


def test_sizes_that_fit_on_no_chip_are_listed(found):
    """80 GB hold no 40 billion parameters in 16 bits beside a cache."""
    (optimum,) = found.optima
    assert [r.parameters > 3.5e10 for r in optimum.refused] == [True] * len(optimum.refused)
    assert optimum.refused
    assert "h100-sxm" in optimum.refused[0].reason


def test_larger_models_take_more_chip_time(found):
    (optimum,) = found.optima
    times = [size.chip_s_per_query for size in optimum.sizes]
    assert times == sorted(times)
    assert serving_slope(optimum.sizes, optimum.sizes[0].parameters) is None or optimum.elasticity_of_serving > 0


def test_same_scenario_gives_the_same_study(found):
    assert study(load_lifetime("llama-3-8b-15t", SMALL)) == found


def test_limits_that_nothing_meets():
    with pytest.raises(InfeasibleError, match="can be served"):
        study(load_lifetime("llama-3-8b-15t", [*SMALL, "serving.slo_limits_s=[0.001]"]))
