"""Lifetime studies: the paper's worked examples through the whole path, oracles of the choice, and refusals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.parameters import count
from simulator.errors import InfeasibleError, InputError
from simulator.lifetime.optimum import TokenDemand, sardana_optimum
from simulator.lifetime.scenario import lifetime_names, load_lifetime, parse_lifetime
from simulator.lifetime.shapes import distinct_shapes, llama_3_shape, shape_rule
from simulator.lifetime.study import marginal_ratio, resolve_demand, size_range, study
from simulator.results.lifetime import read_lifetime, write_lifetime
from simulator.scaling.laws import law


def by_formula(*changes):
    return study(load_lifetime("sardana-23b", changes))


def only(found):
    (optimum,) = found.optima
    return optimum


def test_sardana_s_ten_billion_requests():
    """README of their repository: 20.5273e9 parameters, 3.30212e12 tokens, $1,425,060 against $1,605,532."""
    best = only(by_formula())
    assert best.best.parameters == pytest.approx(2.05273e10, rel=1e-4)
    assert best.best.tokens == pytest.approx(3.30212e12, rel=1e-4)
    assert best.best.total_usd == pytest.approx(1_425_060, rel=1e-4)
    assert best.chinchilla.total_usd == pytest.approx(1_605_532, rel=1e-4)
    assert best.best.parameters / best.chinchilla.parameters == pytest.approx(0.6023, abs=1e-4)


def test_sardana_s_7b_in_place_of_13b():
    """Section 4 of the paper: two trillion tokens of demand, the quality of 13B, 17 % saved."""
    best = only(study(load_lifetime("sardana-13b")))
    assert best.chinchilla.parameters == pytest.approx(13e9, rel=1e-6)
    assert best.best.parameters == pytest.approx(6.97e9, rel=1e-2)
    assert best.saving == pytest.approx(0.1745, abs=5e-4)


def test_identity_holds_at_every_formula_optimum():
    for queries in ("1e6", "1e10", "1e13"):
        assert only(by_formula(f"demand.queries={queries}")).identity == pytest.approx(1.0, abs=1e-9)


def test_no_demand_gives_the_compute_optimum_and_boundless_demand_the_smallest_size():
    the_law = law("sardana")
    idle = only(by_formula("demand.queries=1e-3")).best
    assert idle.parameters == pytest.approx(the_law.cheapest(1.947, extrapolate=True).parameters, rel=1e-4)
    smallest = the_law.smallest_parameters(1.947)
    sizes = [only(by_formula(f"demand.queries={q}")).best.parameters for q in ("1e10", "1e12", "1e14", "1e16")]
    assert sizes == sorted(sizes, reverse=True)
    low, _ = size_range(the_law, 1.947)
    assert all(smallest < size for size in sizes)
    assert smallest < low < sizes[0]


@settings(max_examples=15, deadline=None)
@given(st.floats(1e7, 1e13), st.floats(0.2, 5.0))
def test_expected_cost_is_linear_in_demand(queries, times):
    """A fixed size costs its training plus demand times the cost of a query, so the forecast's mean is all that matters."""
    first, second = (
        {s.parameters: s for s in only(by_formula(f"demand.queries={asked!r}")).sizes}
        for asked in (queries, queries * times)
    )
    both = sorted(first.keys() & second.keys())  # each also has its own optima
    assert len(both) > 100
    one, other = first[both[80]], second[both[80]]
    assert other.training_usd == one.training_usd
    assert other.serving_usd == pytest.approx(times * one.serving_usd, rel=1e-9)
    assert other.total_usd == pytest.approx(other.training_usd + other.serving_usd, rel=1e-12)


def test_regret_is_at_least_one_and_least_for_the_minimax_choice():
    optimum = only(by_formula("demand.spread=1.2"))
    for choice in optimum.choices:
        assert min(choice.regret) >= 1 - 1e-12
        assert choice.worst_regret == max(choice.regret)
    minimax = next(c for c in optimum.choices if c.reason == "least worst regret")
    assert minimax.worst_regret == min(c.worst_regret for c in optimum.choices)
    for row, choice in zip(optimum.forecasts, optimum.choices, strict=False):
        assert choice.regret[optimum.forecasts.index(row)] == pytest.approx(1.0)


def test_spread_raises_the_mean_and_so_shrinks_the_choice():
    """The mean of a log-normal demand is exp(sigma²/2) times its median."""
    sure, unsure = only(by_formula()), only(by_formula("demand.spread=1.0"))
    direct = only(by_formula(f"demand.queries={1e10 * math.exp(0.5)!r}"))
    assert unsure.best.parameters == pytest.approx(direct.best.parameters, rel=1e-9)
    assert unsure.best.parameters < sure.best.parameters


def test_probabilities_weigh_the_forecasts():
    found = only(
        by_formula('demand.forecasts=[{name="low",times=0.5,probability=0.75},{name="high",times=5,probability=0.25}]')
    )
    mean = only(by_formula(f"demand.queries={1e10 * (0.75 * 0.5 + 0.25 * 5)!r}"))
    assert found.best.parameters == pytest.approx(mean.best.parameters, rel=1e-9)
    expected = next(c for c in found.choices if c.reason == "least expected cost")
    assert expected.expected_usd == min(c.expected_usd for c in found.choices)


def test_elastic_demand_is_a_fixed_point():
    optimum = only(by_formula("demand.elasticity=1.5"))
    n = optimum.elastic.parameters
    again = only(by_formula(f"demand.queries={1e10 * optimum.elastic_demand!r}")).best.parameters
    assert again == pytest.approx(n, rel=1e-6)
    assert optimum.elastic_demand == pytest.approx((n / optimum.best.parameters) ** -1.5, rel=1e-6)


def test_justified_demand_makes_the_model_the_optimum():
    """What demand makes 8B on 15T tokens right? At that demand the study finds 8B."""
    changes = ["quality.law=besiroglu", "quality.like={ model='llama-3-8b', tokens=15e12 }"]
    scenario = load_lifetime("sardana-23b").as_toml()
    del scenario["quality"]["loss"]
    scenario["quality"] |= {"law": "besiroglu", "like": {"model": "llama-3-8b", "tokens": 15e12}}
    found = only(study(parse_lifetime(scenario, "here")))
    assert found.justified_demand > 1
    scenario["demand"]["queries"] = 1e10 * found.justified_demand
    right = only(study(parse_lifetime(scenario, "here")))
    assert right.justified_demand == pytest.approx(1.0, rel=1e-9)
    assert right.best.parameters == pytest.approx(8_030_261_248, rel=1e-4)
    assert right.best.tokens == pytest.approx(15e12, rel=1e-3)
    with pytest.raises(InputError, match="loss"):
        load_lifetime("sardana-23b", changes)


def test_discount_growth_and_price_decline():
    """§14: k = r − g − (ε − 1)·d, x = g + ε·d; worth of the queries and their number over the life."""
    options = load_lifetime(
        "sardana-23b",
        ["demand.years=4", "demand.growth=0.3", "demand.discount=0.1", "demand.price_decline=0.25"],
    ).demand
    found = resolve_demand(options)
    assert found.queries == pytest.approx(1e10)
    start = found.queries_per_s * 365.25 * 86400
    assert found.queries == pytest.approx(start * math.expm1(0.3 * 4) / 0.3)
    k = 0.1 - 0.3 + 0.25
    assert found.valued == pytest.approx(start * -math.expm1(-k * 4) / k)


def test_shapes_are_llama_s_own_and_near_what_was_asked():
    assert count(llama_3_shape(8_030_261_248)).total == 8_030_261_248
    assert llama_3_shape(70_553_706_496).layers[0].count == 80
    for wanted in (2e8, 1e9, 5e9, 2e10, 1e11, 1e12):
        made = llama_3_shape(wanted)
        assert count(made).total == pytest.approx(wanted, rel=0.05)
        assert 25 <= made.d_model / made.n_layers <= 300
    several = distinct_shapes(llama_3_shape, [8e9, 8.01e9, 1e9])
    assert [count(shape).total for _, shape in several] == [n for n, _ in several]
    assert len(several) == 2
    with pytest.raises(InputError, match="llama-3"):
        shape_rule("lama-3")
    with pytest.raises(InputError, match="parameters: from"):
        llama_3_shape(1e6)


def test_marginal_ratio_is_one_at_the_compute_optimum():
    the_law = law("besiroglu")
    best = the_law.cheapest(2.0, extrapolate=True)
    assert marginal_ratio(the_law, best.parameters, best.tokens) == pytest.approx(1.0)
    demand = TokenDemand(1e13)
    served = sardana_optimum(the_law, 2.0, demand, extrapolate=True).point
    assert marginal_ratio(the_law, served.parameters, served.tokens) == pytest.approx(1 + 1e13 / (3 * served.tokens))


def test_written_study_is_read_back(tmp_path):
    found = by_formula()
    write_lifetime(found, tmp_path / "a.json")
    assert read_lifetime(tmp_path / "a.json") == found
    write_lifetime(by_formula(), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(InputError, match="not a lifetime study"):
        read_lifetime(tmp_path / "c.json")


@pytest.mark.parametrize("name", lifetime_names())
def test_shipped_scenarios_are_whole(name):
    scenario = load_lifetime(name)
    assert scenario.name == name
    assert parse_lifetime(scenario.as_toml(), name) == scenario


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quality.law=bsiroglu", "besiroglu"),
        ("quality.extrapolate=false", "fitted from"),
        ("training.slice=h100-sxm:3", "h100-sxm"),
        ("training.mfu=1.5", "training.mfu"),
        ("demand.queries_per_s=3", "state queries"),
        ("serving.chip=a100", "a100"),
        ("serving.kind=guess", "formula"),
        ("demand.forecasts=[{name='a',times=1,probability=0.5}]", "summing to 1"),
    ],
)
def test_wrong_scenarios_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        study(load_lifetime("sardana-23b", [change]))


def test_loss_that_no_model_reaches():
    with pytest.raises(InfeasibleError, match="no model reaches it"):
        study(load_lifetime("sardana-23b", ["quality.loss=1.5"]))


def test_command_and_page(run_cli, tmp_path):
    out = tmp_path / "study.json"
    told = run_cli("lifetime", "sardana-23b", "--out", str(out), "--plot", str(tmp_path / "study.svg"))
    assert "20.5B parameters trained on 3.30T tokens cost least" in told.stdout
    run_cli("report", str(out), "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "20.5B" in page
    assert "cost of a choice" in page
    refused = run_cli("lifetime", "sardana-23b", "--out", str(tmp_path / "missing" / "s.json"), code=2)
    assert "a folder that exists" in refused.stderr
