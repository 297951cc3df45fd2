"""Summary-only runs against runs that keep every request: counts equal, means equal, percentiles within 0.5 %."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.records import ITL_BINS_PER_OCTAVE, itl_bin
from simulator.engine.single import Engine
from simulator.results import read_result, write_result
from simulator.run import load_scenario, run_scenario
from simulator.run.histogram import BINS, BINS_PER_OCTAVE, LogHistogram, as_float, bins_of, fixed_sum, value_in_bin
from simulator.run.outcome import Outcome, split
from simulator.run.serving import as_requests
from simulator.run.statistics import BATCHES, distribution, quantile
from simulator.run.streaming import EqualReplicas, run_streaming
from simulator.run.summarise import summarise
from simulator.traffic import TrafficSpec, build_stream, stream_blocks

POISSON = {"process": "poisson", "rate_per_s": 20.0}
LENGTHS = {
    "prompt": {"kind": "uniform", "min": 1, "max": 60},
    "output": {"kind": "uniform", "min": 1, "max": 40},
}
TIGHT = {"num_kv_blocks": 40}
SITUATIONS = {
    "steady": ({"arrival": POISSON, "n_requests": 3000}, {}, 1),
    "three replicas": ({"arrival": {**POISSON, "rate_per_s": 55.0}, "n_requests": 3001}, {}, 3),
    "preemption": ({"arrival": {**POISSON, "rate_per_s": 60.0}, "n_requests": 3000}, TIGHT, 1),
    "overloaded": ({"arrival": {**POISSON, "rate_per_s": 200.0}, "n_requests": 2000}, {}, 1),
    "rejections": (
        {"arrival": {**POISSON, "rate_per_s": 60.0}, "n_requests": 2000, "cached_tokens": 5},
        {"max_model_len": 80},
        2,
    ),
    "closed loop": (
        {"arrival": {"process": "closed", "concurrency": 20, "think_s": 0.2, "think_cv": 1.0}, "n_requests": 2500},
        {},
        2,
    ),
    "closed loop with rejections": (
        {"arrival": {"process": "closed", "concurrency": 9}, "n_requests": 1500},
        {"max_model_len": 70},
        1,
    ),
    "offline": ({"arrival": {"process": "offline"}, "n_requests": 1500}, {}, 1),
}
HERE = Path()


def both(bench, name, block_rows):
    traffic, changes, replicas = SITUATIONS[name]
    spec = TrafficSpec.model_validate({**LENGTHS, **traffic})
    limits = replace(bench.settings, **changes)
    cost = bench.cost()
    facts = bench.facts(cost, limits)
    requests = as_requests(build_stream(spec, 3, base_folder=HERE))
    outcome = bench.outcome(requests, cost, limits, replicas)
    if not requests.concurrency and requests.arrival_s[-1] > 0:
        first, last = requests.arrival_s[0], requests.arrival_s[-1]
        window = first + 0.1 * (last - first), last - 0.05 * (last - first)
        parts = [Engine(cost, limits, part).itl_between(*window) for part in split(requests, replicas)]
        outcome = replace(outcome, itl_counts_measured=np.sum(parts, axis=0))
    at_once = bench.outcome(replace(requests, arrival_s=np.zeros(len(requests)), concurrency=0), cost, limits, replicas)
    whole = summarise(outcome, at_once, facts)
    blocks = stream_blocks(spec, 3, base_folder=HERE)
    said = []
    found = [
        run_streaming(EqualReplicas(cost, limits, replicas, workers, rows), blocks, facts, said.append)
        for rows, workers in ((block_rows, 1), (2 * block_rows + 1, 2))
    ]
    return whole, found


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_run_in_blocks_says_what_the_whole_run_says(bench, name):
    (whole, _, timeline), ((ours, our_timeline, _), (again, again_timeline, _)) = both(bench, name, 500)
    assert ours == again
    for column, values in our_timeline.items():
        assert np.array_equal(values, again_timeline[column], equal_nan=True), column
    assert ours.requests == whole.requests
    assert ours.status == whole.status
    figures, theirs = flat(ours.model_dump()), flat(whole.model_dump())
    assert figures.keys() == theirs.keys()
    closed = name.startswith("closed loop")
    for path, value in figures.items():
        if isinstance(value, str | bool) or value is None or path == "ledger.relative_error":
            continue
        expected, tolerance, slack = theirs[path], 1e-9, 1e-8
        if path.endswith((".low", ".high")):  # batches of arrival, with the rejected ones among them
            slack = 0.25 * abs(theirs[path.rpartition(".")[0] + ".value"])
        elif any(part in path for part in (".p50", ".p90", ".p95", ".p99", "per_user")):
            tolerance = 0.005
        elif path.startswith(("load.backlog", "occupancy.mean_")):  # read off the timeline
            tolerance = 0.05 if closed else 1e-6
        assert value == pytest.approx(expected, rel=tolerance, abs=slack), path
    if (
        not closed
    ):  # a closed loop's first interval is the shortest; an engine that knows the stream starts with another
        for column, values in timeline.items():
            assert np.allclose(our_timeline[column], values, rtol=1e-9, atol=1e-9, equal_nan=True), column


def flat(document, path=""):
    if isinstance(document, dict):
        return {k: v for name, item in document.items() for k, v in flat(item, f"{path}.{name}".strip(".")).items()}
    if isinstance(document, list):
        return {}
    return {path: document}


def test_the_situations_are_what_they_are_called(bench):
    preempting, rejecting = both(bench, "preemption", 500)[1][0][0], both(bench, "rejections", 500)[1][0][0]
    assert preempting.requests.preemptions > 100
    assert rejecting.requests.rejected > 50
    assert both(bench, "overloaded", 500)[1][0][0].status == "overloaded"


def test_a_stream_of_which_nothing_fits_gives_nothing(bench):
    spec = TrafficSpec.model_validate({"prompt": 100, "output": 9, "arrival": POISSON, "n_requests": 40})
    cost, limits = bench.cost(), replace(bench.settings, max_model_len=50)
    blocks = stream_blocks(spec, 3, base_folder=HERE)
    assert run_streaming(EqualReplicas(cost, limits, 1), blocks, bench.facts(cost, limits), lambda _: None) is None


@given(
    values=st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    p=st.floats(0.01, 0.999),
    order=st.randoms(use_true_random=False),
)
def test_histograms_merge_to_the_same_bits_and_quantiles_are_within_half_a_percent(values, cuts, p, order):
    array = np.array(values)
    batch = np.arange(len(array)) * BATCHES // len(array)
    whole = LogHistogram()
    whole.add(array, batch)
    merged = LogHistogram()
    shuffled = list(range(len(array)))
    order.shuffle(shuffled)
    edges = sorted({0, len(array), *(min(cut, len(array)) for cut in cuts)})
    for start, stop in pairwise(edges):
        part = LogHistogram()
        rows = np.array(shuffled[start:stop], dtype=np.int64)
        part.add(array[rows], batch[rows])
        merged.merge(part)
    assert np.array_equal(whole.counts, merged.counts)
    assert whole.sums == merged.sums
    assert whole.n == len(array)
    assert whole.total == pytest.approx(array.sum(), rel=1e-9, abs=len(array) * 2.0**-41)  # rounded to 2**-40 each
    assert whole.quantile(p) == pytest.approx(quantile(np.sort(array), p), rel=0.005)


@given(st.floats(1e-9, 1e7))
def test_bins_are_halves_of_those_of_the_inter_token_latencies(value):
    index = int(bins_of(np.array([value]))[0])
    assert index * ITL_BINS_PER_OCTAVE // BINS_PER_OCTAVE == itl_bin(value)
    if 0 < index < BINS - 1:
        assert value_in_bin(index, 0.0) <= value < value_in_bin(index, 1.0) <= value_in_bin(index, 0.0) * 1.004


@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_fixed_sums_do_not_depend_on_order(values):
    array = np.array(values)
    assert fixed_sum(array) == fixed_sum(array[::-1]) == sum(fixed_sum(array[i : i + 1]) for i in range(len(array)))
    # The fixed point rounds each value to 2^-40; the float sum itself rounds at the size of its parts.
    assert as_float(fixed_sum(array)) == pytest.approx(math.fsum(values), abs=1e-9, rel=1e-15)


def test_intervals_of_a_counted_sample_are_those_of_a_kept_one():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=20_000))
    sample = LogHistogram()
    sample.add(values, np.arange(len(values)) * BATCHES // len(values))
    ours, theirs = sample.distribution(scale=3.0), distribution(3 * values)
    for name in ("mean", "p50", "p90", "p99"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.value == pytest.approx(b.value, rel=0.005)
        assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=0.005)
    assert LogHistogram().distribution().p50.value is None
    zeros = LogHistogram()
    zeros.add(np.zeros(5), np.zeros(5, dtype=np.int64))
    assert zeros.quantile(0.5) == 0.0
    assert zeros.distribution().p50.reason == "a batch is empty"


def test_a_summary_only_result_is_written_read_and_run_again(tmp_path):
    scenario = load_scenario("llama-3-8b-azure-chat", ["traffic.n_requests=1500", "replicas=2"])
    kept, run = run_scenario(scenario), run_scenario(scenario, summary_only=True)
    write_result(run.result, tmp_path / "run")
    back = read_result(tmp_path / "run")
    assert len(back.requests["request"]) == 0
    assert len(back.timeline["start_s"]) == len(kept.result.timeline["start_s"])
    assert back.summary.requests == kept.summary.requests
    again = run_scenario(load_scenario(str(tmp_path / "run")))
    assert again.summary == run.summary
    replicas = split(as_requests(build_stream(scenario.traffic, 1, base_folder=HERE)), 2)
    assert isinstance(run.outcome, Outcome)
    assert sum(map(len, replicas)) == run.summary.requests.total
