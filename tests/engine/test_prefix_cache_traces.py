"""Mooncake's traces through the compiled engine, against a plain block manager that shares no code with it."""

import gzip
import json
from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import FINISHED, EngineSettings, Requests
from tests.engine.block_manager import Manager, ids_of_blocks
from tests.engine.strategies import step_cost

UNIT = 512
TRACES = {"conversation": 12031, "synthetic": 3993}
#: Blocks that an endless cache has in store when asked for them, of prompts less their last token: counted by a set of ids.
ENDLESS_HITS = {"conversation": 105592, "synthetic": 77740}


def read(shared, name: str) -> Requests:
    file = shared / "data" / "traces" / f"mooncake_{name}_trace.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    prompt, output = (np.array([row[key] for row in rows]) for key in ("input_length", "output_length"))
    offsets = np.concatenate([[0], np.cumsum([len(row["hash_ids"]) for row in rows])])
    ids = np.array([block for row in rows for block in row["hash_ids"]])
    arrival_s = np.array([row["timestamp"] for row in rows]) / 1000
    return Requests(arrival_s, prompt, output, 0 * prompt, output, hashes=BlockHashes(ids, offsets, UNIT))


def cost(max_tokens: int = 8192, max_rows: int = 256):
    tokens = np.arange(max_tokens + 1)
    dense = np.where(tokens > 0, np.maximum(4.8e-3, tokens * 1.9e-5) + 1e-3, 0.0)
    return step_cost(
        dense, 1e-6 * np.arange(max_rows + 1), slopes_s=(4e-8,), planes=((2e-9, 0.0, 0.0), (0.0, 4e-8, 0.0))
    )


def run(requests: Requests, n_blocks: int, *, max_num_seqs: int = 256, block_size: int = UNIT):
    pytest.importorskip("simulator.engine.compiled", reason="no compiled engine here")
    from simulator.engine.single import Engine

    settings = EngineSettings(max_num_seqs, 8192, block_size, n_blocks, prefix_cache="blocks")
    engine = Engine(cost(), settings, requests, log_size=600_000)
    engine.advance()
    result = engine.result()
    assert (result.status == FINISHED).all()
    return result, engine.cache_log


@pytest.mark.parametrize("name", TRACES)
def test_one_at_a_time_the_hits_are_those_of_a_plain_manager(shared, name):
    requests = read(shared, name)
    n_blocks = 4000
    order = np.arange(len(requests)) * 1e4
    result, _ = run(replace(requests, arrival_s=order.astype(float)), n_blocks, max_num_seqs=1)
    manager = Manager(n_blocks, ids_of_blocks(requests, UNIT), UNIT)
    lengths = zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True)
    reused = [UNIT * manager.serve(row, *both, 8192) for row, both in enumerate(lengths)]
    assert len(requests) == TRACES[name]
    np.testing.assert_array_equal(result.reused_tokens, reused)
    assert result.totals["evicted_blocks"] == manager.evicted > 0


@pytest.mark.parametrize("name", TRACES)
def test_an_endless_cache_hits_every_prefix_seen_before(shared, name):
    requests = read(shared, name)
    result, _ = run(requests, 1 << 20)
    seen: set[int] = set()
    hits = []
    for ids, prompt in zip(ids_of_blocks(requests, UNIT), requests.prompt_tokens.tolist(), strict=True):
        known = [block in seen for block in ids[: (prompt - 1) // UNIT]]
        hits.append(known.index(False) if False in known else len(known))
        seen.update(ids)
    assert sum(hits) == ENDLESS_HITS[name]
    np.testing.assert_array_equal(result.reused_tokens, UNIT * np.array(hits))
    assert result.totals["evicted_blocks"] == 0


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize(
    ("block_size", "n_blocks", "count"), [(512, 1200, 20000), (512, 6000, 20000), (32, 20000, 1500)]
)
def test_under_load_the_hits_are_those_of_a_manager_driven_by_the_log(shared, name, block_size, n_blocks, count):
    requests = read(shared, name)
    requests = requests.take(slice(count))
    result, log = run(requests, n_blocks, block_size=block_size)
    assert result.totals["evicted_blocks"] > 10_000
    manager = Manager(n_blocks, ids_of_blocks(requests, block_size), block_size)
    hit_blocks = manager.follow(log.tolist(), repeat(0))
    assert hit_blocks * block_size == result.totals["cache_hit_tokens"] > 0
    assert manager.evicted == result.totals["evicted_blocks"]
    assert len(manager.free) == n_blocks
    assert result.preemptions.sum() == result.totals["preemptions"]
