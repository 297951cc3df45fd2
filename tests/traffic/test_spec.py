from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.files import parse
from simulator.errors import InputError
from simulator.randomness import BLOCK
from simulator.traffic import TrafficSpec, build_stream, resolve

HERE = Path(__file__).parent
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
POISSON = {"process": "poisson", "rate_per_s": 4}


def build(data, seed=1, folder=HERE):
    return build_stream(parse(TrafficSpec, data, "s.toml"), seed, base_folder=folder)


def fails(data, folder=HERE):
    with pytest.raises(InputError) as error:
        build(data, folder=folder)
    return str(error.value)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


# --- randomness: a row depends on the spec, the seed and its index ----------------------------------------------------

arrivals = st.one_of(
    st.builds(lambda r: {"process": "poisson", "rate_per_s": r}, st.floats(0.01, 1000)),
    st.builds(
        lambda r, b: {"process": "gamma", "rate_per_s": r, "burstiness": b}, st.floats(0.01, 1000), st.floats(0.05, 9)
    ),
    st.builds(lambda r: {"process": "constant", "rate_per_s": r}, st.floats(0.01, 1000)),
    st.just({"process": "offline"}),
    st.builds(
        lambda c, t, v: {"process": "closed", "concurrency": c, "think_s": t, "think_cv": v},
        st.integers(1, 300),
        st.floats(0, 10),
        st.sampled_from([0, 0.0, 0.01, 1, 2.5]),
    ),
)
laws = st.one_of(
    st.integers(1, 9999),
    st.builds(lambda t, r: {"kind": "uniform_ratio", "tokens": t, "ratio": r}, st.integers(1, 9999), st.floats(0, 1)),
    st.builds(
        lambda t, r: {"kind": "uniform_range", "tokens": t, "range_ratio": r}, st.integers(1, 9999), st.floats(0, 0.99)
    ),
    st.builds(
        lambda m, s: {"kind": "lognormal", "median": m, "sigma": s, "max": 99999}, st.floats(1, 9999), st.floats(0, 3)
    ),
    st.just({"kind": "empirical", "probabilities": [0, 0.9, 1], "tokens": [1, 50, 900]}),
)
lengths = st.one_of(
    st.fixed_dictionaries({"prompt": laws, "output": laws}),
    st.sampled_from([{"mix": "azure-code"}, {"mix": "azure-conversation"}, {"mix": "random-8k-1k"}]),
)
cached = st.one_of(
    st.just({}),
    st.builds(lambda n: {"cached_tokens": n}, st.integers(0, 5000)),
    st.builds(lambda f: {"cached_fraction": f}, st.floats(0, 0.999)),
)
specs = st.builds(
    lambda length, arrival, cache, limit: length | {"arrival": arrival} | cache | limit,
    lengths,
    arrivals,
    cached,
    st.one_of(st.just({}), st.builds(lambda m: {"max_tokens": m}, st.integers(1, 9999))),
)


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 2**63), st.integers(1, 3 * BLOCK), st.integers(0, 2 * BLOCK))
def test_a_longer_stream_begins_with_the_shorter_one(data, seed, n, more):
    short = build(data | {"n_requests": n}, seed)
    long = build(data | {"n_requests": n + more}, seed)
    assert len(short) == n
    for name in COLUMNS:
        assert np.array_equal(getattr(short, name), getattr(long, name)[:n])


@settings(max_examples=40, deadline=None)
@given(specs, specs, st.integers(0, 99))
def test_one_cause_does_not_move_another(one, other, seed):
    """Arrivals stay when the length laws change, prompts stay when the output law does, and the other way round."""
    a = build(one | {"n_requests": 100}, seed)
    own = {key: one[key] for key in ("prompt", "output") if key in one}
    if own:
        swapped_output = build(one | {"n_requests": 100, "output": 77}, seed)
        assert np.array_equal(a.arrival_s, swapped_output.arrival_s)
        assert np.array_equal(a.prompt_tokens, swapped_output.prompt_tokens)
        swapped_prompt = build(one | {"n_requests": 100, "prompt": 77}, seed)
        if "max_tokens" not in one:
            assert np.array_equal(a.output_tokens, swapped_prompt.output_tokens)
    b = build(other | {"n_requests": 100, "arrival": one["arrival"]}, seed)
    assert np.array_equal(a.arrival_s, b.arrival_s)
    c = build(one | {"n_requests": 100, "arrival": other["arrival"]}, seed)
    assert np.array_equal(a.prompt_tokens, c.prompt_tokens)
    assert np.array_equal(a.output_tokens, c.output_tokens)


def test_seeds_and_causes_give_different_numbers():
    law = {"kind": "lognormal", "median": 1000, "sigma": 1, "max": 99999}
    data = {"prompt": law, "output": law, "arrival": POISSON, "n_requests": 5000}
    a, b = build(data, 1), build(data, 2)
    assert not np.array_equal(a.arrival_s, b.arrival_s)
    logs = [np.log(a.prompt_tokens), np.log(a.output_tokens), np.diff(a.arrival_s, prepend=0), np.log(b.prompt_tokens)]
    correlation = np.corrcoef(logs)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(5000)


@given(specs, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_resolving_writes_the_mix_out_and_changes_nothing(data, seed):
    spec = parse(TrafficSpec, data | {"n_requests": 50}, "s.toml")
    plain = resolve(spec, base_folder=HERE)
    assert plain.mix is None
    again = parse(TrafficSpec, plain.model_dump(exclude_none=True), "written")
    assert again == plain
    a, b = (build_stream(s, seed, base_folder=HERE) for s in (spec, again))
    assert same(a, b)
    assert (a.source, a.kind, a.notes) == (b.source, b.kind, b.notes)


# --- what the fields mean --------------------------------------------------------------------------------------------


def test_cached_tokens_as_count_and_as_share():
    base = {"prompt": {"kind": "uniform", "min": 1, "max": 100}, "output": 5, "arrival": POISSON, "n_requests": 1000}
    count = build(base | {"cached_tokens": 40})
    assert np.array_equal(count.cached_tokens, np.minimum(40, count.prompt_tokens - 1))
    n_short = (count.prompt_tokens <= 40).sum()
    assert count.notes == (
        f"{n_short} of 1000 prompts are not longer than cached_tokens; all but their last token is cached",
    )
    share = build(base | {"cached_fraction": 0.75})
    assert np.array_equal(share.cached_tokens, share.prompt_tokens * 3 // 4)
    assert not build(base).cached_tokens.any()


def test_max_tokens_cuts_outputs_and_is_what_the_scheduler_knows():
    base = {"prompt": 9, "output": {"kind": "uniform", "min": 1, "max": 100}, "arrival": POISSON, "n_requests": 1000}
    free, cut = build(base), build(base | {"max_tokens": 60})
    assert np.array_equal(free.max_tokens, free.output_tokens)
    assert np.array_equal(cut.output_tokens, np.minimum(free.output_tokens, 60))
    assert set(cut.max_tokens) == {60}
    assert cut.notes == (f"{(free.output_tokens > 60).sum()} of 1000 outputs were cut to max_tokens = 60",)


def test_web_agent_is_the_mix_of_the_napkin():
    stream = build({"mix": "web-agent", "arrival": {"process": "constant", "rate_per_s": 1}, "n_requests": 3})
    assert stream.prompt_tokens.tolist() == [131072] * 3
    assert stream.cached_tokens.tolist() == [122880] * 3
    assert stream.output_tokens.tolist() == [128] * 3


def test_what_the_scenario_states_wins_over_its_mix():
    mixed = build({"mix": "web-agent", "output": 7, "cached_fraction": 0.5, "arrival": POISSON, "n_requests": 2})
    assert mixed.output_tokens.tolist() == [7, 7]
    assert mixed.prompt_tokens.tolist() == [131072] * 2
    assert mixed.cached_tokens.tolist() == [65536] * 2
    code = build({"mix": "azure-code", "n_requests": 2})
    faster = build({"mix": "azure-code", "arrival": {"process": "poisson", "rate_per_s": 25.66}, "n_requests": 2})
    assert code.source == "mix azure-code; arrivals: poisson, rate_per_s = 2.566"
    assert faster.arrival_s * 10 == pytest.approx(code.arrival_s)


def test_a_closed_loop_carries_its_concurrency():
    stream = build(
        {"mix": "random-1k-1k", "arrival": {"process": "closed", "concurrency": 3, "think_s": 2}, "n_requests": 5}
    )
    assert (stream.concurrency, stream.kind) == (3, "closed")
    assert stream.arrival_s.tolist() == [0, 0, 0, 2, 2]


def test_a_duration_is_met():
    stream = build({"mix": "azure-code", "duration_s": 500})
    assert len(stream) == pytest.approx(500 * 2.566, rel=0.1)
    assert stream.arrival_s[-1] < 500


@pytest.fixture
def folder(tmp_path):
    rows = [f"{i * 0.5},{i + 2},{2 * i + 1}" for i in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["arrival,prompt,output", *rows]))
    (tmp_path / "lengths.csv").write_text("prompt,output\n3,4\n5,6\n")
    (tmp_path / "full.csv").write_text("arrival,prompt,output,cached_tokens,max_tokens\n0,30,4,16,40\n1,50,6,48,60\n")
    return tmp_path


def test_a_trace_alone_runs_as_it_is(folder):
    stream = build({"trace": "t.csv"}, folder=folder)
    assert stream.arrival_s.tolist() == [i * 0.5 for i in range(10)]
    assert stream.prompt_tokens.tolist() == list(range(2, 12))
    assert stream.source == "trace t.csv (plain: arrival, prompt, output); arrivals: trace, rate_scale = 1.0"
    full = build({"trace": {"file": "full.csv"}}, folder=folder)
    assert (full.cached_tokens.tolist(), full.max_tokens.tolist()) == ([16, 48], [40, 60])


def test_setting_a_trace_takes_the_place_of_the_mix(folder):
    """``--set traffic.trace=FILE`` on a scenario that names only a mix."""
    assert same(build({"mix": "azure-code", "trace": "t.csv"}, folder=folder), build({"trace": "t.csv"}, folder=folder))


def test_a_trace_can_be_sped_up_cut_or_given_other_arrivals(folder):
    scaled = build({"trace": "t.csv", "arrival": {"process": "trace", "rate_scale": 2}, "duration_s": 1}, folder=folder)
    assert scaled.arrival_s.tolist() == [0, 0.25, 0.5, 0.75]
    assert len(build({"trace": "t.csv", "n_requests": 3}, folder=folder)) == 3
    closed = build({"trace": "t.csv", "arrival": {"process": "closed", "concurrency": 2}}, folder=folder)
    assert len(closed) == 10
    drawn = build({"trace": "lengths.csv", "arrival": POISSON}, folder=folder)
    assert drawn.prompt_tokens.tolist() == [3, 5]
    assert same(drawn, build({"trace": "lengths.csv", "arrival": POISSON, "n_requests": 2}, folder=folder))


def test_a_mix_of_ones_own(folder):
    (folder / "mine.toml").write_text(
        'schema_version = 1\ndescription = "x"\nprompt = 3\noutput = 4\n[origin]\nsource = "me"\nkind = "assumed"\n'
    )
    for name in ("mine.toml", "./mine.toml", str(folder / "mine.toml")):
        assert build({"mix": name, "arrival": POISSON, "n_requests": 1}, folder=folder).prompt_tokens.tolist() == [3]


# --- errors ------------------------------------------------------------------------------------------------------

FIXED = {"prompt": 3, "output": 3, "n_requests": 3, "arrival": POISSON}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "state where lengths come from: mix, trace, or both prompt and output"),
        ({"prompt": 3, "n_requests": 1}, "state where lengths come from"),
        ({"mix": "azure-convo", "n_requests": 1}, "unknown traffic mix 'azure-convo'; did you mean "),
        ({"mix": "./none.toml", "n_requests": 1}, "none.toml' does not exist"),
        ({"mix": "web-agent", "n_requests": 1}, "traffic.arrival: required, because mix 'web-agent' states none"),
        ({"prompt": 3, "output": 3, "n_requests": 1}, "traffic.arrival: required"),
        ({"mix": "azure-code"}, "state how many requests: n_requests, or duration_s"),
        (FIXED | {"duration_s": 3}, "state n_requests or duration_s, not both"),
        (FIXED | {"n_requests": 0}, "n_requests = 0: Input should be greater than or equal to 1"),
        (FIXED | {"n_request": 3}, "unknown field 'n_request'; did you mean 'n_requests'?"),
        (FIXED | {"cached_tokens": 1, "cached_fraction": 0.5}, "state cached_tokens or cached_fraction, not both"),
        (FIXED | {"cached_fraction": 1.0}, "cached_fraction = 1.0: Input should be less than 1"),
        (FIXED | {"prompt": "long"}, "prompt = 'long': must be a whole number of tokens, or a table"),
        (FIXED | {"prompt": {"tokens": 3}}, "prompt: kind: required, but missing; known: fixed, uniform, "),
        (FIXED | {"prompt": {"kind": "lognorm"}}, "prompt: unknown kind 'lognorm'; did you mean 'lognormal'?"),
        (FIXED | {"arrival": "poisson"}, "arrival = 'poisson': must be a table such as { process = \"poisson\", … }"),
        (FIXED | {"arrival": {"process": "poison"}}, "arrival: unknown process 'poison'; did you mean 'poisson'?"),
        (
            FIXED | {"arrival": {"process": "poisson"}},
            "arrival: process = 'poisson': rate_per_s: required, but missing",
        ),
        (
            FIXED | {"arrival": POISSON | {"rate": 1}},
            "arrival: process = 'poisson': unknown field 'rate'; known: process, rate_per_s",
        ),
        (FIXED | {"arrival": POISSON | {"rate_per_s": 0}}, "rate_per_s = 0: Input should be greater than 0"),
        (FIXED | {"arrival": {"process": "gamma", "rate_per_s": 1}}, "state exactly one of burstiness"),
        (FIXED | {"arrival": {"process": "closed", "concurrency": 0}}, "concurrency = 0: Input should be greater"),
        (
            FIXED | {"arrival": {"process": "closed", "concurrency": 1, "think_cv": 1e-9}},
            "think_cv = 1e-09: must be 0 (constant)",
        ),
        (FIXED | {"arrival": {"process": "trace"}}, 'arrival: process = "trace" needs a trace'),
        (
            {"prompt": 3, "output": 3, "duration_s": 1, "arrival": {"process": "offline"}},
            "duration_s means nothing to offline arrivals; state n_requests",
        ),
        (
            {"mix": "azure-code", "duration_s": 1e12},
            "traffic.duration_s = 1e+12: 2.566 requests/s make more than 100000000",
        ),
        ({"mix": "azure-code", "duration_s": 1e-9}, "traffic.duration_s = 1e-09: no request arrives before that"),
        (
            {"mix": "azure-code", "prompt": 3, "n_requests": 1},
            "traffic.prompt: mix 'azure-code' has prompt and output in one",
        ),
        ({"trace": "t.csv", "prompt": 3}, "trace has the lengths; leave lengths, prompt and output out"),
        ({"trace": "t.csv", "n_requests": 11}, "traffic.n_requests = 11: the trace "),
        ({"trace": "t.csv", "arrival": POISSON, "duration_s": 100}, "requests arrive, but the trace "),
        ({"trace": "lengths.csv"}, "traffic.arrival: required, because the trace "),
        ({"trace": {"file": "t.csv", "formt": "azure"}}, "unknown field 'trace.formt'; did you mean 'format'?"),
        ({"trace": "none.csv"}, "none.csv' does not exist"),
    ],
)
def test_errors_say_what_is_wrong(folder, data, expected):
    assert expected in fails(data, folder)
