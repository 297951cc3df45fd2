"""A prefix cache beside windows that give blocks back: W7 to W11 of docs/engine-kv-memory.md, by hand and against a plain block manager."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.block_runs import ADMITS, PUBLISHES
from simulator.engine.records import FINISHED, EngineResult
from simulator.engine.reference import Replica
from simulator.engine.refusals import LASTING, features_of
from simulator.roofline.kv_groups import KvGroups
from tests.engine.block_manager import Layers, Manager, ids_of_blocks
from tests.engine.engines import NAMES, engine
from tests.engine.mixtures import families, random_mixture, tight_mixture
from tests.engine.recording import Log, compiled_log, reference_logs
from tests.engine.strategies import Case, one_of, requests_of
from tests.engine.test_windows import case

BOTH = pytest.mark.parametrize("name", NAMES)
SEEDS = st.integers(0, 10**9)


def prompts(groups: KvGroups, rows, tokens, *, arrival_s=None, output=None, cached=None, **limits) -> Case:
    """Requests with these ids of their blocks of 2 tokens, one at a time unless they arrive otherwise, in steps of a second."""
    arrival_s = 100.0 * np.arange(len(rows)) if arrival_s is None else arrival_s
    requests = requests_of(arrival_s, tokens, [1] * len(rows) if output is None else output, cached)
    ids = np.array([block for row in rows for block in row], dtype=np.int64)
    hashes = BlockHashes(ids, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64), 2)
    return case(groups, replace(requests, hashes=hashes), prefix_cache="blocks", **limits)


# By hand. A block of place i of the windowed group is w[i], of the full group f[i], a blank one "-"; the front of the queue is on the left.

SLIDING = KvGroups(1, 1, 3)
"""⌈(3 − 1)/2⌉ = 1 block of 2 tokens is needed before a hit."""
LONG = [1, 2, 3, 4]
"""The first request, of 8 tokens in one chunk: 4 blocks of each group. At its end the window has left ⌊(8 + 1 − 3)/2⌋ = 3 places, then it
finishes. In 12 blocks: - - - - w2 w1 w0 w3 f3 f2 f1 f0."""


# A request of other 6 tokens takes the blanks, w2 and w1: w0 w3 f3 f2 f1 f0 and its own are left.
#   9 tokens, at most 4 places: w3 is all that is needed of the window, and there.
#   8 tokens, at most 3: w2 is not there for 3, nor w1 for 2; w0 is there for 1.
# One of 8 tokens takes w0 and w3 too: of 4 places in the full group none can be used.
@BOTH
@pytest.mark.parametrize(("other", "tokens", "hits"), [(6, 9, 4), (6, 8, 1), (6, 3, 1), (8, 9, 0), (8, 3, 0)])
def test_a_hit_needs_the_last_blocks_of_the_window_alone(name, other, tokens, hits):
    rows = [LONG, [5, 6, 7, 8][: other // 2], LONG]
    result = engine(name)(*prompts(SLIDING, rows, [8, other, tokens], num_kv_blocks=12))
    assert result.reused_tokens.tolist() == [0, 0, 2 * hits]


# In 13 blocks:                                        - - - - - w2 w1 w0 w3 f3 f2 f1 f0
# Its beginning, 5 tokens, finds 2 places and owns w1 (the window of token 5 begins in place 1), f0 and f1, and takes two blanks, for the token that has no
# id. Nothing it owns is left by its window at 5 tokens. When it is gone:  - - - w2 w0 w3 f3 f2 - w1 - f1 f0
# Another one of 5 tokens takes 6 blocks, and evicts w2, w0 and w3. It leaves v0, then v2 (blank), v1, g2 (blank), g1 and g0:
#                                                      f3 f2 - w1 - f1 f0 v0 - v1 - g1 g0
# The long one again, of 9 tokens: all 4 places are in the full group, but w3 and w2 are not: 2 hits. It takes 3 places of each group
# for tokens 5 to 9, and evicts f3, f2 and v0, as two blanks are among the first five that it does not own, and takes a third.
@BOTH
def test_a_hit_is_cut_where_the_window_s_blocks_were_evicted(name):
    rows = [LONG, LONG[:2], [5, 6], LONG]
    one = prompts(SLIDING, rows, [8, 5, 5, 9], num_kv_blocks=13)
    result = engine(name)(*one)
    assert result.reused_tokens.tolist() == [0, 4, 0, 4]
    assert result.totals["evicted_blocks"] == 3 + 3
    assert result.totals["kv_blocks_s"] == 8 + (3 + 2) + 6 + (3 + 6)


# Chunks of 4 tokens are left as a whole: after the long one the queue of 12 is  - - - - w3 w2 w1 w0 f3 f2 f1 f0.
# Another one of 8 tokens evicts all of the window's. What then is found of the first 4, 3 or 2 places:
#   4: token 9 begins a chunk, nothing is needed of it. 3: token 7 needs w2, which is gone; 2: token 5 begins a chunk.
CHUNKS = KvGroups(1, 1, 4, chunked=True)


@BOTH
@pytest.mark.parametrize(("tokens", "hits"), [(9, 4), (8, 2), (7, 2), (5, 2), (4, 0)])
def test_a_hit_where_a_chunk_begins_needs_nothing_of_it(name, tokens, hits):
    result = engine(name)(*prompts(CHUNKS, [LONG, [5, 6, 7, 8], LONG], [8, 8, tokens], num_kv_blocks=12))
    assert result.reused_tokens.tolist() == [0, 0, 2 * hits]


# Chunks of 3 tokens begin within blocks of 2: token 3 (from 0) in place 1. With 8 tokens the chunk of tokens 6 to 8 begins, 3 places are left: the
# queue is as with a sliding window, and another one of 8 tokens evicts all of the window's.
#   4 places: token 8 needs w3. 3: token 6 begins a chunk. 2: the chunk of token 4 began with 3, in place 1, which is gone. 1: that of token 2 began with 0.
@BOTH
@pytest.mark.parametrize(("tokens", "hits"), [(9, 3), (7, 3), (6, 0), (3, 0)])
def test_a_chunk_that_begins_within_a_block_needs_that_block(name, tokens, hits):
    groups = KvGroups(1, 1, 3, chunked=True)
    result = engine(name)(*prompts(groups, [LONG, [5, 6, 7, 8], LONG], [8, 8, tokens], num_kv_blocks=12))
    assert result.reused_tokens.tolist() == [0, 0, 2 * hits]


# Windowed layers alone, W = 3, 5 blocks. A: 6 tokens with ids, then three steps of one; B: the same and one more, two steps later.
#   step 0: A 0 → 6, 3 blocks; its window leaves ⌊4/2⌋ = 2 places:           queue - - w1 w0
#   step 1: A 6 → 7, w2 and a blank: 2 blocks                                       - w1 w0
#   step 2: A 7 → 8; B finds 3 places, owns w2 too and takes a blank: 3 blocks      w1 w0
#           A's window leaves ⌊6/2⌋ = 3 places, but w2 is B's still.
#   step 3: A 8 → 9 and evicts w1; B 7 → 8: A has places 3 and 4, B 2 and 3: 4 blocks. B's window leaves w2, and both finish: w0 w2 - - -
# C, as B: w2 can be found; it evicts w0 for its last token.
@BOTH
def test_a_block_that_one_window_has_left_is_kept_by_another(name):
    row = [1, 2, 3]
    limits = {"arrival_s": [0, 1.5, 100], "output": [4, 2, 1], "num_kv_blocks": 5, "scheduler_reserve_full_isl": False}
    result = engine(name)(*prompts(KvGroups(0, 1, 3), [row] * 3, [6, 7, 7], **limits))
    assert result.finish_s.tolist() == [4, 4, 101]
    assert result.reused_tokens.tolist() == [0, 6, 6]
    assert result.totals["kv_blocks_s"] == 3 + 2 + 3 + 4 + 2
    assert result.totals["max_kv_blocks"] == 4
    assert result.totals["evicted_blocks"] == 2


# Two windowed groups, v and w, alone. 8 tokens of which 2 places have ids: at their end 3 places are left, the third of them cannot be found.
# In 8 blocks the queue is then  - - v1 v0 w1 w0, and - - of the last place; in 9 there is a blank before it.
# A request without ids takes 1 or 2 places of both groups. Then 5 tokens find 2 places if v1 and w1 are there, 1 if v0 and w0 are.
#   8 blocks, 1 place: two blanks, 2 hits. 9 blocks, 2 places: three blanks and v1: 1 hit. 8 blocks, 2 places: two blanks, v1 and v0: none.
@BOTH
@pytest.mark.parametrize(
    ("blocks", "places", "evicted", "hits"), [(8, 1, 0, 2), (9, 1, 0, 2), (9, 2, 1, 1), (8, 2, 2, 0)]
)
def test_what_a_window_left_goes_last_first_and_group_after_group(name, blocks, places, evicted, hits):
    groups, rows, tokens = KvGroups(0, 2, 3), [[1, 2], [], [1, 2]], [8, 2 * places, 5]
    before = engine(name)(*prompts(groups, rows[:2], tokens[:2], num_kv_blocks=blocks))
    assert before.totals["evicted_blocks"] == evicted
    result = engine(name)(*prompts(groups, rows, tokens, num_kv_blocks=blocks))
    assert result.reused_tokens.tolist() == [0, 0, 2 * hits]


# Two of 4 tokens in one step of 8, in 4 blocks of one windowed group with W = 3: their windows leave a place of each, and they finish. The second has no
# ids, so its place comes first: - a0 a1 -. One more block is the blank; two are the blank and a0.
@BOTH
@pytest.mark.parametrize(("tokens", "evicted"), [(2, 0), (4, 1), (6, 2)])
def test_what_nobody_can_find_goes_before_what_others_of_the_step_published(name, tokens, evicted):
    limits = {"arrival_s": [0, 0, 100], "num_kv_blocks": 4}
    result = engine(name)(*prompts(KvGroups(0, 1, 3), [[1, 2], [], []], [4, 4, tokens], **limits))
    assert result.scheduled_s.tolist() == [0, 0, 100]
    assert result.totals["evicted_blocks"] == evicted


# Both with ids: a0 b0 a1 b1. One more block is a0: of 3 tokens as the first nothing is found, of 3 as the second one place.
@BOTH
@pytest.mark.parametrize(("row", "hits"), [([1], 0), ([3], 1)])
def test_of_a_step_the_first_scheduled_gives_back_first(name, row, hits):
    limits = {"arrival_s": [0, 0, 100, 200], "num_kv_blocks": 4}
    result = engine(name)(*prompts(KvGroups(0, 1, 3), [[1, 2], [3, 4], [], row], [4, 4, 2, 3], **limits))
    assert result.reused_tokens.tolist() == [0, 0, 0, 2 * hits]


# After the long one, - - - - w2 w1 w0 w3 f3 f2 f1 f0: one that begins with its first 2 places, and brings 8 tokens of its own. Its prefill starts at 8,
# where the window has left 3 places: of its hits it owns f0 and f1 alone, and takes w3, w4, f2, f3 and f4: the blanks and w2.
# When it is gone:  w1 w0 w3 f3 f2 and its own: w4 (a blank), w3' (a blank: 3 places have ids), f4, f3', f2', f1, f0.
# 3 tokens that are nobody's evict w1, w0, w3 and f3, and 5 tokens as the first find f0 and f1, but neither w1 nor w0.
@BOTH
def test_of_its_hits_a_request_owns_none_that_its_window_has_left(name):
    rows, tokens, cached = [LONG, [1, 2, 9], [], LONG[:2]], [8, 9, 3, 5], [0, 8, 0, 0]
    limits = {"cached": cached, "num_kv_blocks": 12}
    result = engine(name)(*prompts(SLIDING, rows[:2], tokens[:2], **(limits | {"cached": cached[:2]})))
    assert result.reused_tokens.tolist() == [0, 8]
    assert result.totals["cache_hit_tokens"] == 4
    assert result.totals["evicted_blocks"] == 1
    assert result.totals["kv_blocks_s"] == 8 + (2 + 5)
    assert engine(name)(*prompts(SLIDING, rows, tokens, **limits)).reused_tokens.tolist() == [0, 8, 0, 0]


# Windowed layers alone that are cut into chunks of 4: token 9 begins one, sees no token before it in any layer, and neither does what its output comes from. So nothing
# of a prompt of 9 tokens is needed but the last, also when nobody has computed it yet.
@BOTH
def test_chunks_alone_need_nothing_of_those_before(name):
    result = engine(name)(*prompts(KvGroups(0, 1, 4, chunked=True), [LONG, LONG], [9, 8], num_kv_blocks=12))
    assert result.reused_tokens.tolist() == [8, 4]


# Against the plain manager


def alone(seed: int, groups: KvGroups | None = None, *, endless: bool = False) -> Case:
    """Requests of one family of prompts, each served when those before it are gone, in few blocks or in more than they ever take."""
    rng = np.random.default_rng([seed, 7])

    def pick(low, high):
        return int(rng.integers(low, high, endpoint=True))

    if groups is None:
        window = one_of(pick, (pick(1, 8), pick(1, 20), pick(1, 60)))
        groups = KvGroups(pick(0, 2), pick(1, 4), window, chunked=bool(pick(0, 1)))
    count, size = pick(4, 16), one_of(pick, (1, 2, 3, 4, pick(1, 16)))
    longest_prompt = one_of(pick, (20, 60, 100))
    prompt = np.array([pick(1, longest_prompt) for _ in range(count)])
    if pick(0, 1):  # whole blocks, where a full hit computes one again
        prompt = np.maximum(prompt // size, 1) * size
    output = np.array([pick(1, one_of(pick, (1, 6, 20))) for _ in range(count)])
    cached = [pick(0, tokens - 1) if pick(0, 4) == 0 else 0 for tokens in prompt.tolist()]
    unit = one_of(pick, (size, 2 * size, *(u for u in (1, 2, 3) if size % u == 0)))
    hashes = families(pick, prompt, output, unit, covers_output=bool(pick(0, 1)))
    requests = replace(requests_of(1e4 * np.arange(count), prompt, output, cached), hashes=hashes)
    step_tokens = one_of(pick, (pick(1, 12), 128))
    most = int(groups.most_blocks(prompt + output - 1, size, step_tokens).max())
    taken = groups.count * int((-(-(prompt + output - 1) // size)).sum())
    limits = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": step_tokens,
        "block_size": size,
        "num_kv_blocks": taken if endless else most + pick(0, one_of(pick, (2, most))),
        "cache_outputs": bool(pick(0, 3)),
    }
    return case(groups, requests, prefix_cache="blocks", **limits)


def rows_of(one: Case) -> list[list]:
    return ids_of_blocks(one.requests, one.settings.block_size, outputs=one.settings.cache_outputs)


def assert_as_plain(one: Case, result: EngineResult, layers: Layers | KvGroups) -> Manager:
    """Requests served one at a time find what they find with the plain manager."""
    blocks = one.settings.num_kv_blocks
    manager = Manager(blocks, rows_of(one), one.settings.block_size, layers)
    columns = (one.requests.prompt_tokens, one.requests.output_tokens, one.requests.cached_tokens)
    lengths = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    step_tokens = one.settings.max_num_batched_tokens
    hits = [manager.serve(row, prompt, output, step_tokens, cached) for row, (prompt, output, cached) in lengths]
    assert len(manager.free) == blocks
    assert (result.status == FINISHED).all()
    tokens = one.settings.block_size * np.array(hits)
    np.testing.assert_array_equal(result.reused_tokens, np.maximum(tokens, one.requests.cached_tokens))
    assert result.totals["cache_hit_tokens"] == tokens.sum()
    assert result.totals["evicted_blocks"] == manager.evicted
    return manager


@BOTH
def test_one_at_a_time_the_hits_are_those_of_the_plain_manager(name):
    counts = Counter()
    for seed in range(250):
        one = alone(seed)
        result = engine(name)(*one)
        manager = assert_as_plain(one, result, one.settings.kv_groups)
        counts.update(evicted=manager.evicted > 0, hit=result.totals["cache_hit_tokens"] > 0)
    assert min(counts.values()) > 100


@BOTH
def test_with_blocks_for_all_nothing_is_evicted_and_the_hits_are_those_of_the_plain_manager(name):
    for seed in range(100):
        one = alone(seed, endless=True)
        assert assert_as_plain(one, engine(name)(*one), one.settings.kv_groups).evicted == 0


@BOTH
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, full=st.integers(0, 2), windowed=st.integers(1, 3), chunked=st.booleans())
def test_windows_that_nobody_fills_are_full_layers(name, seed, full, windowed, chunked):
    one = alone(seed, KvGroups(full, windowed, 1000, chunked=chunked))
    assert_as_plain(one, engine(name)(*one), Layers(full + windowed))


WITH_WINDOWS = ("prefix cache", "bounded windows")
NOT_LOGGED = {"ranks", "stages", "uneven experts", "swap"}
"""The compiled engine keeps a log of a plain replica alone, and nowhere what it brings back from the host."""


def logs_of(name: str, one: Case) -> tuple[EngineResult, list[Log]]:
    """Run an engine, and keep what the cache of each rank does."""
    if name == "reference":
        return reference_logs(one)
    result, log = compiled_log(one)
    return result, [log]


@BOTH
@pytest.mark.parametrize("drawn", [random_mixture, tight_mixture])
def test_under_load_the_hits_are_those_of_the_plain_manager_driven_by_the_log(name, drawn):
    counts = Counter()
    for seed in range({"reference": 120, "compiled": 400}[name]):
        one = drawn(seed, WITH_WINDOWS, LASTING)
        if name == "compiled" and NOT_LOGGED & features_of(*one):
            continue
        result, logs = logs_of(name, one)
        blocks, size = one.settings.num_kv_blocks, one.settings.block_size
        managers = [Manager(blocks, rows_of(one), size, one.settings.kv_groups) for _ in logs]
        try:
            found = sum(manager.follow(*log) for manager, log in zip(managers, logs, strict=True))
        except AssertionError as error:
            error.add_note(f"{drawn.__name__}({seed}, {WITH_WINDOWS}, LASTING)")
            raise
        evicted = sum(manager.evicted for manager in managers)
        assert all(len(manager.free) == blocks for manager in managers)
        assert result.totals["cache_hit_tokens"] == size * found
        assert result.totals["evicted_blocks"] == evicted
        counts.update(evicted=evicted > 0, hit=found > 0, preempted=result.totals["preemptions"] > 0)
    assert min(counts.values()) > 20


# W8 asks for nothing before a chunk or a window of one token. Where no layers are full, what nobody has ever computed is then found.
@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_no_hit_is_longer_than_that_of_an_endless_cache_of_full_layers(seed):  # I12
    one = random_mixture(seed, WITH_WINDOWS, LASTING)
    groups = one.settings.kv_groups
    assume(groups.full or (groups.window > 1 and not groups.chunked))
    rows, size = rows_of(one), one.settings.block_size
    for log in reference_logs(one)[1]:
        seen: set = set()
        for kind, row, amount, more in log.entries:
            if kind == PUBLISHES:
                seen.update(rows[row][:amount])
            if kind == ADMITS:
                assert seen.issuperset(rows[row][:amount])
                assert amount <= (more - 1) // size


# Whoever owns a block of a group owns one of each later group at the same place (the windowed ones are first), and gives it back later. So W8 might ask the first group
# of each kind alone, and a block of the window is never there without the full one of its place.
@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_what_a_group_has_the_later_ones_have_too(seed):
    replica = Replica(*tight_mixture(seed, WITH_WINDOWS, LASTING))
    for pool in (scheduler.pool for scheduler in replica.schedulers):

        def watched_lookup(row, longest, pool=pool, lookup=pool.lookup):
            has = [{block_id for group, block_id in pool.published if group == g} for g in range(pool.groups.count)]
            assert all(first <= later for first, later in pairwise(has))
            return lookup(row, longest)

        pool.lookup = watched_lookup
    replica.advance()
