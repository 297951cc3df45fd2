"""Fits: known coefficients come back, methods are what they say, and bad runs are refused."""

import math

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.randomness import normal
from simulator.scaling.fits import Runs, bootstrap, fit_loss_law, huber, huber_objective, residuals, theta_of
from simulator.scaling.laws import law
from simulator.scaling.overtraining import fit_overtraining


def made_up_runs(noise: float) -> Runs:
    truth = law("besiroglu")
    sizes, ratios = np.meshgrid(np.geomspace(1e8, 1e10, 8), np.geomspace(5, 200, 7))
    parameters, tokens = sizes.ravel(), (sizes * ratios).ravel()
    loss = truth.E + truth.A * parameters**-truth.alpha + truth.B * tokens**-truth.beta
    return Runs(parameters, tokens, loss * np.exp(noise * normal(3, "noise", 0, len(loss))))


@pytest.mark.parametrize("method", ["huber", "log_least_squares", "least_squares"])
def test_exact_runs_give_their_law(method):
    found = fit_loss_law(made_up_runs(0.0), method).law
    assert found.alpha == pytest.approx(0.3478, rel=1e-4)
    assert found.beta == pytest.approx(0.3658, rel=1e-4)
    assert pytest.approx(1.8172, rel=1e-5) == found.E


@pytest.mark.parametrize("method", ["huber_mle", "laplace", "student_t"])
def test_likelihood_fits_beat_the_truth_on_their_own_runs(method):
    runs = made_up_runs(0.004)
    found = fit_loss_law(runs, method)
    assert found.log_likelihood is not None
    spread = np.abs(residuals(theta_of(law("besiroglu")), runs)).mean()
    laplace_at_truth = -len(runs) * (math.log(2 * spread) + 1)
    assert found.log_likelihood > laplace_at_truth - 3
    assert found.aic == pytest.approx(2 * (7 if method == "student_t" else 6) - 2 * found.log_likelihood)


def test_a_fit_is_below_every_other_law_in_its_own_objective():
    runs = made_up_runs(0.004)
    found = fit_loss_law(runs)
    for name in ("besiroglu", "hoffmann_tex", "sardana"):
        assert found.objective <= huber_objective(law(name), runs)


def test_huber_is_quadratic_then_linear_and_smooth():
    delta = 0.1
    r = np.array([0.0, 0.05, 0.1, 0.1 + 1e-9, 1.0, -1.0])
    values = huber(r, delta)
    assert values[1] == pytest.approx(0.5 * 0.05**2)
    assert values[3] == pytest.approx(values[2], abs=1e-9)
    assert values[4] == values[5] == pytest.approx(delta * (1 - delta / 2))


def test_bootstrap_scatters_like_the_noise_and_repeats():
    runs = made_up_runs(0.004)
    best = fit_loss_law(runs, "log_least_squares")
    draws = bootstrap(runs, best, 40, seed=5)
    assert np.array_equal(draws, bootstrap(runs, best, 40, seed=5))
    assert draws[:, 3].mean() == pytest.approx(best.law.alpha, abs=4 * draws[:, 3].std() / math.sqrt(40) + 0.01)
    assert 0.001 < draws[:, 3].std() < 0.1
    half = bootstrap(made_up_runs(0.002), fit_loss_law(made_up_runs(0.002), "log_least_squares"), 40, seed=5)
    assert half[:, 3].std() == pytest.approx(draws[:, 3].std() / 2, rel=0.2)


@pytest.mark.slow
def test_bootstrap_errors_of_the_replication_besiroglu_2024():
    from simulator.reproduction.scaling import _epoch_runs

    runs = _epoch_runs("240")
    draws = bootstrap(runs, fit_loss_law(runs), 1000)
    errors = [np.exp(draws[:, i]).std() for i in range(3)] + [draws[:, 3].std(), draws[:, 4].std()]
    assert errors == pytest.approx([123.1, 1280, 0.0255, 0.0152, 0.0205], rel=0.1)


def test_bad_runs_are_refused():
    runs = made_up_runs(0.0)
    with pytest.raises(InputError, match=r"loss\[2\] = nan"):
        Runs(runs.parameters[:3], runs.tokens[:3], np.array([1.0, 2.0, math.nan]))
    with pytest.raises(InputError, match="at least six"):
        fit_loss_law(runs.take(np.arange(5)))
    with pytest.raises(InputError, match="did you mean 'huber'"):
        fit_loss_law(runs, "hubert")
    with pytest.raises(InputError, match="at least five"):
        fit_overtraining(np.ones(4), np.ones(4), np.ones(4))
