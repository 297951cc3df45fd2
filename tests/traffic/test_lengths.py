import math

import numpy as np
import pytest

from simulator.catalog.files import parse
from simulator.errors import InputError
from simulator.traffic.lengths import (
    Empirical,
    Fixed,
    LengthTable,
    Lognormal,
    Uniform,
    UniformRange,
    UniformRatio,
)

N = 200_000


def sample(law):
    return law.sample(7, "prompt", 0, N)


def test_fixed():
    assert set(sample(Fixed(tokens=9))) == {9}


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (Uniform(min=3, max=12), 3, 12),
        (UniformRatio(tokens=20, ratio=0.8), 16, 20),
        (UniformRatio(tokens=1, ratio=0.0), 1, 1),
        (UniformRange(tokens=10, range_ratio=0.25), 7, 13),
        (UniformRange(tokens=10, range_ratio=0.0), 10, 10),
    ],
)
def test_uniform_laws_give_each_whole_number_of_their_range_alike(law, low, high):
    values, counts = np.unique(sample(law), return_counts=True)
    assert values.tolist() == list(range(low, high + 1))
    expected = N / len(values)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < len(values) + 4 * math.sqrt(2 * len(values))


def test_inferencex_1k_has_0_9_of_its_nominal_length():
    assert sample(UniformRatio(tokens=1024, ratio=0.8)).mean() == pytest.approx(0.9 * 1024, rel=2e-3)


@pytest.mark.parametrize("centre", [{"mean": 800.0}, {"median": 800.0}])
@pytest.mark.parametrize("width", [{"sigma": 0.6}, {"cv": 0.9}])
def test_lognormal_moments(centre, width):
    values = sample(Lognormal(**centre, **width, max=1_000_000))
    cv = width.get("cv") or math.sqrt(math.expm1(0.6**2))
    mean = centre.get("mean") or 800 * math.sqrt(1 + cv**2)
    assert values.mean() == pytest.approx(mean, rel=0.01)
    assert values.std() / values.mean() == pytest.approx(cv, rel=0.03)
    assert np.median(values) == pytest.approx(mean / math.sqrt(1 + cv**2), rel=0.01)


def test_lognormal_is_clipped_to_its_range_and_its_logarithm_is_normal_inside():
    law = Lognormal(median=1000, sigma=1, min=100, max=5000)
    values = sample(law)
    assert values.min() == 100
    assert values.max() == 5000
    for bound, share in ((100, (values == 100).mean()), (5000, (values == 5000).mean())):
        expected = 0.5 * math.erfc(abs(math.log(bound / 1000)) / math.sqrt(2))
        assert share == pytest.approx(expected, rel=0.05)
    inside = np.sort(values)
    normal = [0.5 * math.erfc(-math.log((v + 0.5) / 1000) / math.sqrt(2)) for v in inside[:: N // 500]]
    assert np.abs(np.array(normal) - np.arange(0, N, N // 500) / N)[12:-30].max() < 1.95 / math.sqrt(N)


def test_empirical_meets_its_own_quantiles():
    law = Empirical(probabilities=(0, 0.5, 0.9, 1), tokens=(10, 100, 400, 2000))
    values = sample(law)
    # Halfway between knots, and at them, the share below is known; ± 4 standard errors and half a token of rounding.
    for tokens, share in ((55, 0.25), (100, 0.5), (250, 0.7), (400, 0.9), (1200, 0.95)):
        assert (values <= tokens).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / N) + 0.003)
    assert values.min() >= 10
    assert values.max() <= 2000


def test_a_length_table_keeps_the_classes_apart():
    table = LengthTable(
        prompt_probabilities=(0, 0.5, 1),
        prompt_tokens=(1, 100, 1000),
        output_probabilities=(0, 1),
        output_tokens=((1, 10), (500, 900)),
    )
    prompt, output = table.sample(1, 0, N)
    short = prompt < 100
    assert short.mean() == pytest.approx(0.5, abs=0.01)
    assert output[short].max() == 10
    assert output[prompt > 100].min() == 500
    assert output[prompt > 100].mean() == pytest.approx(700, rel=0.01)


def test_one_row_means_independence():
    table = LengthTable(
        prompt_probabilities=(0, 1), prompt_tokens=(1, 1000), output_probabilities=(0, 1), output_tokens=((1, 500),)
    )
    prompt, output = table.sample(1, 0, N)
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 4 / math.sqrt(N)


@pytest.mark.parametrize(
    ("law", "data", "message"),
    [
        (Uniform, {"min": 9, "max": 3}, "min = 9 is above max = 3"),
        (Lognormal, {"mean": 9, "median": 3, "sigma": 1, "max": 10}, "state exactly one of mean and median"),
        (Lognormal, {"mean": 9, "max": 10}, "state exactly one of sigma and cv"),
        (Lognormal, {"mean": 9, "sigma": 1}, "max: required, but missing"),
        (Lognormal, {"median": 90, "sigma": 1, "max": 10}, "the median, 90, lies outside min … max = 1 … 10"),
        (Empirical, {"probabilities": [0, 0.5, 0.5, 1], "tokens": [1, 2, 3, 4]}, "probabilities must rise from 0 to 1"),
        (Empirical, {"probabilities": [0, 0.5], "tokens": [1, 2]}, "probabilities must rise from 0 to 1"),
        (Empirical, {"probabilities": [0, 1], "tokens": [3, 2]}, "tokens must not fall"),
        (Empirical, {"probabilities": [0, 1], "tokens": [3]}, "2 probabilities and 1 tokens"),
        (UniformRange, {"tokens": 3, "range_ratio": 1.0}, "Input should be less than 1"),
    ],
)
def test_contradictory_laws_are_refused(law, data, message):
    with pytest.raises(InputError) as error:
        parse(law, data, "s.toml")
    assert message in str(error.value)
