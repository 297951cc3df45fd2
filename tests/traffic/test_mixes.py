"""The bundled mixes: that each is whole, and that the derived ones stand in for their traces."""

import tomllib

import numpy as np
import pytest

from simulator.catalog.files import data_folder, names_in
from simulator.traffic import load_mix, read_trace
from simulator.traffic.derive import length_table, mix_toml, rate_per_s

MIXES = data_folder("workloads") / "traffic"
DERIVED = {
    "azure-conversation": "AzureLLMInferenceTrace_conv.csv.gz",
    "azure-code": "AzureLLMInferenceTrace_code.csv.gz",
}


@pytest.mark.parametrize("name", names_in(MIXES))
def test_every_mix_is_valid_small_and_says_where_it_comes_from(name):
    mix = load_mix(name)
    assert mix.description
    assert mix.origin.source
    assert len((MIXES / f"{name}.toml").read_bytes()) <= 20_000


@pytest.fixture(scope="module", params=sorted(DERIVED))
def pair(request, shared):
    return load_mix(request.param), read_trace(shared / "data" / "traces" / DERIVED[request.param])


def test_the_table_is_what_the_trace_gives(pair):
    mix, trace = pair
    assert length_table(trace.prompt_tokens, trace.output_tokens) == mix.lengths
    assert mix.arrival.rate_per_s == pytest.approx(rate_per_s(trace), rel=1e-3)
    assert (mix.origin.licence, mix.origin.kind) == ("CC-BY-4.0", "derived")
    assert "Splitwise" in mix.origin.citation
    again = mix_toml(
        trace,
        description=mix.description,
        source=mix.origin.source,
        citation=mix.origin.citation,
        licence=mix.origin.licence,
    )
    assert tomllib.loads(again) == mix.model_dump(exclude_defaults=True, mode="json") | {
        "arrival": mix.arrival.model_dump(),
    }


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(a, b):
    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def test_resampled_lengths_have_the_marginals_of_the_trace(pair):
    mix, trace = pair
    prompt, output = mix.lengths.sample(11, 0, 2_000_000)  # the 99th percentile is then good to 0.4 %
    for drawn, real in ((prompt, trace.prompt_tokens), (output, trace.output_tokens)):
        assert drawn.mean() == pytest.approx(real.mean(), rel=0.01)
        for p in (50, 90, 99):
            assert np.percentile(drawn, p) == pytest.approx(np.percentile(real, p), rel=0.03)
        assert real.min() <= drawn.min()
        assert drawn.max() <= real.max()


def test_resampled_lengths_keep_what_prompt_and_output_have_to_do_with_each_other(pair):
    mix, trace = pair
    prompt, output = mix.lengths.sample(11, 0, 400_000)
    real = rank_correlation(trace.prompt_tokens, trace.output_tokens)
    assert rank_correlation(prompt, output) == pytest.approx(real, abs=0.01)
    assert (prompt * output).mean() == pytest.approx((trace.prompt_tokens * trace.output_tokens).mean(), rel=0.02)
    # Neither trace is monotone, so a correlation alone could be met by luck: mean output of each eighth by prompt.
    edges = np.quantile(trace.prompt_tokens, np.arange(1, 8) / 8)
    for k in range(8):
        drawn = output[np.digitize(prompt, edges) == k].mean()
        wanted = trace.output_tokens[np.digitize(trace.prompt_tokens, edges) == k].mean()
        assert drawn == pytest.approx(wanted, rel=0.05)


def test_independent_marginals_would_not_do(pair):
    """The check above can fail: shuffled outputs miss the mean output by prompt length."""
    _, trace = pair
    shuffled = np.random.default_rng(0).permutation(trace.output_tokens)
    edges = np.quantile(trace.prompt_tokens, np.arange(1, 8) / 8)
    part = np.digitize(trace.prompt_tokens, edges)
    off = [abs(shuffled[part == k].mean() / trace.output_tokens[part == k].mean() - 1) for k in range(8)]
    assert max(off) > 0.05
