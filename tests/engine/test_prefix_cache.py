"""The prefix cache: the compiled engine against the reference engine, block for block where both can see."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from tests.engine.engines import engine
from tests.engine.strategies import Case, Pick, dyadic_case, observe, one_of
from tests.engine.test_equivalence import TIMES, assert_counts_equal, assert_shares_close, assert_timelines_close

SEEDED_CASES = 300
CACHE_COUNTS = ("cache_queried_tokens", "cache_hit_tokens", "cache_hit_pairs", "evicted_blocks")


def families(pick: Pick, prompt, output, unit: int, *, covers_output: bool):
    """Rows of ids in which requests copy each other's beginnings: each leaves another's path somewhere."""
    rows, fresh = [], 0
    for p, o in zip(prompt, output, strict=True):
        length = (p + o - 1 if covers_output else p) // unit + pick(0, 1)
        other = one_of(pick, rows) if rows and pick(0, 4) else []
        row = other[: pick(0, len(other)) if pick(0, 1) else len(other)][:length]
        while len(row) < length:
            row = [*row, fresh]
            fresh += 1
        if pick(0, 5) == 0:
            row = row[: pick(0, len(row))]
        rows.append(row)
    counts = [len(row) for row in rows]
    ids = np.array([block for row in rows for block in row], dtype=np.int64)
    if pick(0, 1):
        ids = ids * 1_000_003
    return BlockHashes(ids, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), unit, covers_output)


def cache_case(pick: Pick) -> Case:
    """A dyadic case whose requests share prefixes; often the next turn repeats the whole of one before."""
    cost, engine_settings, requests = dyadic_case(pick)
    blocks = one_of(pick, (1, 2, 3, 4, pick(1, 16)))
    if blocks != engine_settings.block_size:
        tokens = engine_settings.num_kv_blocks * engine_settings.block_size
        engine_settings = replace(engine_settings, block_size=blocks, num_kv_blocks=max(1, -(-tokens // blocks)))
    prompt = requests.prompt_tokens.copy()
    if pick(0, 1):  # whole blocks, where a full hit computes one again
        prompt = np.maximum(prompt // blocks, 1) * blocks
    cached = np.minimum(requests.cached_tokens, prompt - 1) * pick(0, 1)
    unit = one_of(pick, (blocks, blocks, 2 * blocks, *(u for u in (1, 2, 3) if blocks % u == 0)))
    hashes = families(pick, prompt, requests.output_tokens, unit, covers_output=bool(pick(0, 1)))
    requests = replace(requests, prompt_tokens=prompt, cached_tokens=cached, hashes=hashes)
    engine_settings = replace(engine_settings, prefix_cache="blocks", cache_outputs=bool(pick(0, 3)))
    return Case(cost, engine_settings, requests)


def seeded(seed: int) -> Case:
    rng = np.random.default_rng([seed, 7])
    return cache_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def cache_cases(draw: st.DrawFn) -> Case:
    return cache_case(lambda low, high: draw(st.integers(low, high)))


def assert_same(case: Case, interval_s):
    ours = engine("compiled")(*case, timeline_interval_s=interval_s)
    theirs, steps, _ = observe(case, ours.timeline_interval_s)
    for name in ("reused_tokens",):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for name in CACHE_COUNTS:
        assert ours.totals[name] == theirs.totals[name], name
    assert_counts_equal(ours, theirs)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert_shares_close(ours, theirs, theirs.end_s)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps


@settings(max_examples=150, deadline=None)
@given(cache_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_same(case, None)


def test_engines_agree_exactly_on_seeded_cases():
    for seed in range(SEEDED_CASES):
        try:
            assert_same(seeded(seed), (None, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
