"""A stream built block by block is the stream built whole, to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.traffic import TrafficSpec, build_stream, stream_blocks

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
HERE = Path()
ARRIVALS = [
    {"process": "poisson", "rate_per_s": 3.7},
    {"process": "gamma", "rate_per_s": 3.7, "burstiness": 0.3},
    {"process": "constant", "rate_per_s": 3.7},
    {"process": "offline"},
    {"process": "closed", "concurrency": 700, "think_s": 2.0, "think_cv": 0.7},
    {"process": "closed", "concurrency": 3},
]
LENGTHS = {
    "prompt": {"kind": "lognormal", "mean": 900, "cv": 1.1, "max": 8000},
    "output": {"kind": "uniform", "min": 1, "max": 300},
}


def same(spec, block_rows):
    whole = build_stream(spec, 5, base_folder=HERE)
    found = stream_blocks(spec, 5, base_folder=HERE)
    blocks = list(found.blocks(block_rows))
    assert len(found) == len(whole) == sum(map(len, blocks))
    assert (found.concurrency, found.source, found.notes()) == (whole.concurrency, whole.source, whole.notes)
    assert {block.concurrency for block in blocks} == {whole.concurrency}
    for name in COLUMNS:
        joined = np.concatenate([getattr(block, name) for block in blocks])
        assert np.array_equal(joined, getattr(whole, name)), name
    assert np.array_equal(np.concatenate(list(found.arrivals_s(block_rows))), whole.arrival_s)


@pytest.mark.parametrize("arrival", ARRIVALS, ids=lambda a: a["process"])
@pytest.mark.parametrize("block_rows", [1000, 4096, 5001, 20_000])
def test_every_process_in_blocks(arrival, block_rows):
    limits = {"cached_tokens": 300, "max_tokens": 200}
    same(TrafficSpec.model_validate({**LENGTHS, "arrival": arrival, "n_requests": 10_001, **limits}), block_rows)


@pytest.mark.parametrize("arrival", ARRIVALS[:3], ids=lambda a: a["process"])
def test_a_duration_ends_at_the_same_request(arrival):
    same(TrafficSpec.model_validate({**LENGTHS, "arrival": arrival, "duration_s": 1500.0}), 777)


def test_a_mix_and_a_trace_in_blocks(tmp_path):
    same(TrafficSpec.model_validate({"mix": "azure-conversation", "arrival": ARRIVALS[0], "n_requests": 9000}), 4097)
    rows = "\n".join(f"{i * 0.25},{10 + i},{1 + i % 7}" for i in range(50))
    (tmp_path / "trace.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n")
    for extra in ({}, {"arrival": ARRIVALS[0]}, {"n_requests": 20, "max_tokens": 3}):
        same(TrafficSpec.model_validate({"trace": str(tmp_path / "trace.csv"), **extra}), 8)


def test_a_duration_without_arrivals_is_refused():
    spec = TrafficSpec.model_validate({**LENGTHS, "arrival": ARRIVALS[0], "duration_s": 1e-9})
    with pytest.raises(InputError, match="no request arrives"):
        stream_blocks(spec, 5, base_folder=HERE)


def test_a_field_that_blocks_do_not_know_is_refused(monkeypatch):
    monkeypatch.setattr("simulator.traffic.blocks.PLAIN_FIELDS", {"prompt", "output", "arrival"})
    spec = TrafficSpec.model_validate({**LENGTHS, "arrival": ARRIVALS[0], "n_requests": 5})
    with pytest.raises(InputError, match=r"traffic.n_requests: a stream in blocks"):
        stream_blocks(spec, 5, base_folder=HERE)
