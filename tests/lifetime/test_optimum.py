"""Lifetime optima: the optimality identity, limits, jumps, regret and demand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InfeasibleError, InputError
from simulator.lifetime.demand import (
    bass_adoption,
    elastic_optimum,
    lifetime_tokens,
    present_value,
    regret_table,
)
from simulator.lifetime.optimum import TokenDemand, identity_error, optimum, sardana_optimum, serve
from simulator.scaling.laws import law

# The first example of a process pays for importing scipy.
without_deadline = settings(deadline=None)
names = st.sampled_from(["hoffmann_tex", "sardana", "besiroglu", "muennighoff_c4"])
qualities = st.floats(20, 26).map(lambda x: 10.0**x)
demands = st.floats(8, 15).map(lambda x: 10.0**x)


@without_deadline
@given(names, qualities, demands, st.floats(0.1, 10))
def test_optimality_identity_holds_at_every_optimum(name, flops, tokens, price):
    coefficients = law(name)
    loss = coefficients.optimum(flops, extrapolate=True).loss
    demand = TokenDemand(tokens, tokens / 3, price, 2 * price)
    best = sardana_optimum(coefficients, loss, demand, train_cost_per_flop=1.7, extrapolate=True)
    assert identity_error(coefficients, best) == pytest.approx(0, abs=1e-7)
    assert best.point.loss == pytest.approx(loss, rel=1e-9)
    for factor in (0.97, 1.03):
        size = best.point.parameters * factor
        if size > coefficients.smallest_parameters(loss) * 1.0001:
            other = serve(
                coefficients,
                loss,
                size,
                lambda n: n * demand.cost_per_parameter,
                train_cost_per_flop=1.7,
                extrapolate=True,
            )
            assert other.total >= best.total


@given(names, qualities, demands)
@settings(max_examples=30, deadline=None)
def test_the_search_finds_the_root_of_the_formula(name, flops, tokens):
    coefficients = law(name)
    loss = coefficients.optimum(flops, extrapolate=True).loss
    formula = sardana_optimum(coefficients, loss, TokenDemand(tokens), extrapolate=True)
    searched = optimum(coefficients, loss, lambda n: 2 * n * tokens, extrapolate=True)
    assert searched.total == pytest.approx(formula.total, rel=1e-9)


@without_deadline
@given(names, qualities)
def test_no_demand_is_chinchilla_and_endless_demand_the_smallest_model(name, flops):
    coefficients = law(name)
    best = coefficients.optimum(flops, extrapolate=True)
    none = sardana_optimum(coefficients, best.loss, TokenDemand(0.0), extrapolate=True)
    assert none.point.parameters == pytest.approx(best.parameters, rel=1e-6)
    endless = sardana_optimum(coefficients, best.loss, TokenDemand(1e30), extrapolate=True)
    least = coefficients.smallest_parameters(best.loss)
    assert least < endless.point.parameters < 1.02 * least


def test_a_jump_in_serving_cost_is_not_averaged_over():
    coefficients = law("besiroglu")
    loss = coefficients.loss(70e9, 1.4e12, extrapolate=True)
    smooth = optimum(coefficients, loss, lambda n: 2 * n * 1e13, extrapolate=True)
    edge = 0.9 * smooth.point.parameters

    def stepped(parameters: float) -> float:
        return 2 * parameters * 1e13 * (1.0 if parameters < edge else 4.0)

    best = optimum(coefficients, loss, stepped, breaks=[edge], extrapolate=True)
    grid = np.geomspace(coefficients.smallest_parameters(loss) * 1.001, 2e11, 4000)
    brute = min(serve(coefficients, loss, n, stepped, extrapolate=True).total for n in grid)
    assert best.total <= brute
    assert best.point.parameters < edge


def test_sizes_that_cannot_be_served_are_not_chosen():
    coefficients = law("besiroglu")
    loss = coefficients.loss(70e9, 1.4e12, extrapolate=True)
    best = optimum(
        coefficients, loss, lambda n: math.inf if n > 3e10 else 2 * n * 1e10, breaks=[3e10], extrapolate=True
    )
    assert best.point.parameters < 3e10
    with pytest.raises(InfeasibleError, match="can be served"):
        optimum(coefficients, loss, lambda _: math.inf, extrapolate=True)


def test_regret_is_one_for_the_clairvoyant_and_linear_in_demand():
    coefficients = law("besiroglu")
    loss = coefficients.loss(70e9, 1.4e12, extrapolate=True)
    table = regret_table(coefficients, loss, [1e12, 3e12, 1e13], [1e12, 3e12, 1e13])
    assert np.diag(table.ratios) == pytest.approx(1)
    assert (table.ratios >= 1 - 1e-12).all()
    assert table.minimax == 1
    mean = 0.5 * 1e12 + 0.5 * 1e13  # E[cost] is the cost at E[demand]
    at_mean = [serve(coefficients, loss, n, lambda n: 2 * n * mean, extrapolate=True).total for n in table.parameters]
    assert table.expected([0.5, 0.0, 0.5]) == pytest.approx(at_mean)
    with pytest.raises(InputError, match="summing to 1"):
        table.expected([0.5, 0.5])


def test_elastic_demand_moves_the_optimum_down_and_is_a_fixed_point():
    coefficients = law("besiroglu")
    loss = coefficients.loss(70e9, 1.4e12, extrapolate=True)
    sizes = []
    for elasticity in (0.0, 0.5, 1.0, 2.0):
        best, tokens = elastic_optimum(coefficients, loss, 1e13, 70e9, elasticity, extrapolate=True)
        assert tokens == pytest.approx(1e13 * (best.point.parameters / 70e9) ** -elasticity)
        again = sardana_optimum(coefficients, loss, TokenDemand(tokens), extrapolate=True)
        assert again.point.parameters == pytest.approx(best.point.parameters, rel=1e-9)
        sizes.append(best.point.parameters)
    assert sizes == sorted(sizes, reverse=True)


@given(st.floats(0.1, 10), st.floats(-0.5, 0.5), st.floats(0, 0.5), st.floats(0, 2))
def test_lifetime_sums_are_their_integrals(years, growth, decline, elasticity):
    t = (np.arange(20000) + 0.5) * years / 20000
    rate = growth + elasticity * decline
    whole = lifetime_tokens(1.0, years, growth=growth, price_decline=decline, elasticity=elasticity)
    assert whole == pytest.approx(np.exp(rate * t).mean() * years, rel=1e-6)
    spend = np.exp((growth + (elasticity - 1) * decline - 0.07) * t).mean() * years
    value = present_value(1.0, years, discount=0.07, growth=growth, price_decline=decline, elasticity=elasticity)
    assert value == pytest.approx(spend, rel=1e-6)


def test_adoption_starts_at_nothing_and_peaks_where_bass_says():
    p, q = 0.03, 0.38
    assert bass_adoption(0.0, p, q) == 0
    t = np.linspace(0, 20, 20001)
    speed = np.diff([bass_adoption(x, p, q) for x in t])
    assert t[np.argmax(speed)] == pytest.approx(math.log(q / p) / (p + q), abs=2e-3)


def test_bad_demand_is_refused():
    with pytest.raises(InputError, match=r"demand.input_tokens = -1"):
        TokenDemand(-1)
    with pytest.raises(InputError, match=r"train_cost_per_flop = 0"):
        sardana_optimum(law("besiroglu"), 2.0, TokenDemand(1e12), train_cost_per_flop=0, extrapolate=True)
    with pytest.raises(InputError, match="Ask for extrapolation"):
        sardana_optimum(law("besiroglu"), 1.95, TokenDemand(1e12))
