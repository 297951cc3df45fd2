"""Sessions: what their turns re-send, and which blocks are therefore alike."""

from pathlib import Path

import numpy as np
import pytest

from simulator.catalog.files import parse
from simulator.errors import InputError
from simulator.traffic import TrafficSpec, build_stream


def stream(seed=1, **fields):
    base = {
        "prompt": {"kind": "uniform", "min": 5, "max": 90},
        "output": {"kind": "uniform", "min": 1, "max": 60},
        "arrival": {"process": "poisson", "rate_per_s": 2},
        "sessions": {
            "turns": {"kind": "uniform", "min": 1, "max": 6},
            "turn_gap_s": 3.0,
            "shared_tokens": 70,
            "shared_prompts": 3,
        },
    }
    spec = TrafficSpec.model_validate(base | fields)
    return build_stream(spec, seed, base_folder=Path())


def rows(found):
    blocks = found.blocks
    return [blocks.ids[a:b].tolist() for a, b in zip(blocks.offsets[:-1], blocks.offsets[1:], strict=True)]


def test_every_turn_begins_with_the_whole_turn_before_it():
    found = stream(n_requests=400)
    longest = {}
    n_repeats = 0
    for ids, prompt, output in zip(rows(found), found.prompt_tokens, found.output_tokens, strict=True):
        assert len(ids) == (prompt + output - 1) // 16
        own = ids[70 // 16]
        if own in longest:
            before, length = longest[own]
            assert ids[: len(before)] == before
            assert prompt > length
            n_repeats += 1
        longest[own] = ids, prompt + output
    assert n_repeats > 200
    assert min(found.prompt_tokens) > 70


def test_sessions_share_a_prompt_and_nothing_else():
    found = stream(n_requests=400)
    shared = {tuple(ids[:4]) for ids in rows(found)}
    assert shared == {tuple(range(4 * g, 4 * g + 4)) for g in range(3)}
    before = {}
    for ids in rows(found):
        for earlier, later in zip([None, *ids], ids, strict=False):
            assert before.setdefault(later, earlier) == earlier  # an id stands for everything before it


@pytest.mark.parametrize("seed", range(3))
def test_a_longer_stream_begins_with_the_shorter_one(seed):
    few, many = stream(seed, n_requests=50), stream(seed, n_requests=300)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:50], err_msg=name)
    until = stream(seed, duration_s=float(many.arrival_s[120]))
    np.testing.assert_array_equal(until.arrival_s, many.arrival_s[: len(until)])
    assert many.arrival_s[len(until)] >= many.arrival_s[120]


def test_an_agent_resends_its_opening():
    agent = {"turns": 8, "turn_gap_s": 2.0, "turn_gap_cv": 0, "opening": 122_880, "block_tokens": 512}
    found = stream(
        n_requests=80, prompt=2048, output=128, sessions=agent, arrival={"process": "constant", "rate_per_s": 0.01}
    )
    turn = (found.prompt_tokens - 122_880 - 2048) // (2048 + 128)
    assert set(turn.tolist()) == set(range(8))
    assert np.allclose(found.arrival_s % 100, 2.0 * turn)


def test_max_context_ends_a_session():
    sessions = {"turns": 50, "turn_gap_s": 1.0, "max_context": 500}
    found = stream(n_requests=300, sessions=sessions)
    assert (found.prompt_tokens + found.output_tokens).max() <= 500
    assert (found.prompt_tokens + found.output_tokens).max() > 400


def test_what_sessions_cannot_have_is_refused():
    offline = {"prompt": 5, "output": 5, "n_requests": 5, "sessions": {}, "arrival": {"process": "offline"}}
    with pytest.raises(InputError, match="give them none"):
        parse(TrafficSpec, offline, "traffic")
    with pytest.raises(InputError, match="max_context ends them too early"):
        stream(n_requests=300, sessions={"turns": 2, "shared_tokens": 1000, "max_context": 500})
    with pytest.raises(InputError, match="use larger blocks"):
        stream(n_requests=3000, sessions={"opening": 2_000_000, "block_tokens": 1})
