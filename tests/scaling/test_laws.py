"""Loss laws: algebra of their optima, limits, and refusals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InfeasibleError, InputError
from simulator.scaling.laws import LAWS, LossLaw, law
from simulator.scaling.overtraining import overtraining_law
from simulator.scaling.repeated import RepeatedDataLaw

SETS = sorted(LAWS)
any_law = st.sampled_from(SETS).map(law)
budgets = st.floats(18, 26).map(lambda x: 10.0**x)


@given(any_law, budgets)
def test_optimum_uses_the_budget_and_is_a_minimum(coefficients, flops):
    best = coefficients.optimum(flops, extrapolate=True)
    assert best.flops == pytest.approx(flops, rel=1e-12)
    for factor in (0.9, 1.1):
        moved = coefficients.loss(best.parameters * factor, best.tokens / factor, extrapolate=True)
        assert moved > best.loss


@given(any_law, budgets)
def test_inverses_agree(coefficients, flops):
    best = coefficients.optimum(flops, extrapolate=True)
    for same in (
        coefficients.cheapest(best.loss, extrapolate=True),
        coefficients.optimum_for_parameters(best.parameters, extrapolate=True),
        coefficients.optimum_for_tokens(best.tokens, extrapolate=True),
    ):
        assert same.parameters == pytest.approx(best.parameters, rel=1e-6)
        assert same.tokens == pytest.approx(best.tokens, rel=1e-6)
    assert coefficients.tokens_for(best.parameters, best.loss) == pytest.approx(best.tokens, rel=1e-6)
    assert coefficients.parameters_for(best.tokens, best.loss) == pytest.approx(best.parameters, rel=1e-6)


@given(any_law, budgets)
def test_limits(coefficients, flops):
    loss = coefficients.optimum(flops, extrapolate=True).loss
    least = coefficients.smallest_parameters(loss)
    assert coefficients.loss(least, 1e40, extrapolate=True) <= loss * (1 + 1e-3)
    with pytest.raises(InfeasibleError, match="never reach"):
        coefficients.tokens_for(least * 0.99, loss)
    with pytest.raises(InfeasibleError, match="never reach"):
        coefficients.parameters_for(coefficients.fewest_tokens(loss) * 0.99, loss)


@given(st.floats(7, 12).map(lambda x: 10.0**x), st.floats(8, 14).map(lambda x: 10.0**x), any_law)
def test_loss_falls_with_size_and_data(parameters, tokens, coefficients):
    here = coefficients.loss(parameters, tokens, extrapolate=True)
    assert coefficients.loss(parameters * 2, tokens, extrapolate=True) < here
    assert coefficients.loss(parameters, tokens * 2, extrapolate=True) < here
    assert here > coefficients.E


def test_outside_the_fit_is_refused_and_marked():
    with pytest.raises(InputError, match=r"besiroglu: parameters = 7e\+10, fitted from 5.7e\+07 to 1.62e\+10"):
        law("besiroglu").loss(70e9, 1.4e12)
    assert law("besiroglu").point(70e9, 1.4e12, extrapolate=True).extrapolated
    assert law("besiroglu").point(1e9, 2e10).extrapolated == ()


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="did you mean 'besiroglu'"):
        law("besirogl")
    with pytest.raises(InputError, match="parameters = nan"):
        law("besiroglu").loss(math.nan, 1e12, extrapolate=True)
    with pytest.raises(InfeasibleError, match="not above E"):
        law("besiroglu").cheapest(1.8)
    with pytest.raises(InputError, match="alpha = 0"):
        LossLaw("mine", 1.0, 1.0, 1.0, 0.0, 0.3, "here")
    with pytest.raises(InputError, match="did you mean 'gadre_c4'"):
        overtraining_law("gadre_c5")


@given(st.floats(7, 10), st.floats(8, 11.5), st.floats(0, 2))
def test_repeats_help_less_than_fresh_data_and_never_harm(log_n, log_u, log_epochs):
    repeated = RepeatedDataLaw()
    parameters, unique = 10.0**log_n, 10.0**log_u
    tokens = unique * 10.0**log_epochs
    loss = repeated.loss(parameters, tokens, unique, extrapolate=True)
    assert loss <= repeated.loss(parameters, unique, unique, extrapolate=True) * (1 + 1e-12)
    assert repeated.effective_tokens(tokens, unique) <= tokens * (1 + 1e-12)
    optimal = repeated.effective_parameters(parameters, unique)
    if optimal == parameters:  # not above the optimal size: the base law holds for fresh data
        base = repeated.base.loss(parameters, unique, extrapolate=True)
        assert repeated.loss(parameters, unique, unique, extrapolate=True) == pytest.approx(base, rel=1e-12)
