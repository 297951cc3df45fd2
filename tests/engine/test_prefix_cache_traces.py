"""Mooncake's traces through the engines, with windowed layers and without, against a plain block manager that shares no code with it."""

import gzip
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import FINISHED, EngineResult, EngineSettings, Requests
from simulator.roofline.kv_groups import KvGroups
from tests.engine.block_manager import Manager, ids_of_blocks
from tests.engine.engines import engine
from tests.engine.recording import Log, compiled_log, reference_logs
from tests.engine.strategies import Case, step_cost

UNIT = 512
GROUPS = {"dense": KvGroups(), "gpt-oss": KvGroups(1, 1, 128), "gemma-3": KvGroups(1, 6, 1024)}
TRACES = {"conversation": 12031, "synthetic": 3993}
#: Blocks that an endless cache has in store when asked for them, of prompts less their last token: counted by a set of ids.
ENDLESS_HITS = {"conversation": 105592, "synthetic": 77740}


@cache
def read(shared, name: str) -> Requests:
    file = shared / "data" / "traces" / f"mooncake_{name}_trace.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    prompt, output = (np.array([row[key] for row in rows]) for key in ("input_length", "output_length"))
    offsets = np.concatenate([[0], np.cumsum([len(row["hash_ids"]) for row in rows])])
    ids = np.array([block for row in rows for block in row["hash_ids"]])
    arrival_s = np.array([row["timestamp"] for row in rows]) / 1000
    return Requests(arrival_s, prompt, output, 0 * prompt, output, hashes=BlockHashes(ids, offsets, UNIT))


def cost(groups: KvGroups, max_tokens: int = 8192, max_rows: int = 256):
    tokens = np.arange(max_tokens + 1)
    dense = np.where(tokens > 0, np.maximum(4.8e-3, tokens * 1.9e-5) + 1e-3, 0.0)
    planes = np.array([[2e-9, 0.0, 0.0, 1e-9, 0.0], [0.0, 4e-8, 0.0, 0.0, 2e-8]])
    window = {"window": groups.window, "window_chunked": groups.chunked} if groups.windowed else {}
    planes = planes if window else planes[:, :3]
    return step_cost(dense, 1e-6 * np.arange(max_rows + 1), slopes_s=(4e-8,), planes=planes, **window)


def replica(
    requests: Requests, n_blocks: int, model: str = "dense", *, max_num_seqs: int = 256, block_size: int = UNIT
) -> Case:
    groups = GROUPS[model]
    settings = EngineSettings(max_num_seqs, 8192, block_size, n_blocks, prefix_cache="blocks", kv_groups=groups)
    return Case(cost(groups), settings, requests)


def shortened(shared, name: str, count: int, longest_output: int) -> Requests:
    """The first requests, with few tokens of output: a reference engine takes its time for each, and a manager too."""
    requests = read(shared, name).take(slice(count))
    output = np.minimum(requests.output_tokens, longest_output)
    return replace(requests, output_tokens=output, max_tokens=output)


def assert_follows(case: Case, result: EngineResult, log: Log) -> Manager:
    """All is as a manager has it that is driven by the log."""
    blocks, size = case.settings.num_kv_blocks, case.settings.block_size
    manager = Manager(blocks, ids_of_blocks(case.requests, size), size, case.settings.kv_groups)
    assert manager.follow(*log) * size == result.totals["cache_hit_tokens"] > 0
    assert (result.status == FINISHED).all()
    assert manager.evicted == result.totals["evicted_blocks"]
    assert len(manager.free) == blocks
    assert result.preemptions.sum() == result.totals["preemptions"]
    return manager


@pytest.mark.parametrize(
    ("name", "trace", "model", "block_size", "n_blocks", "count", "longest_output"),
    [
        ("compiled", "conversation", "dense", 512, 4000, 20000, 10_000),
        ("compiled", "synthetic", "dense", 512, 4000, 20000, 10_000),
        ("compiled", "conversation", "gpt-oss", 512, 3000, 3000, 30),
        ("compiled", "conversation", "gpt-oss", 16, 20_000, 60, 30),
        ("compiled", "synthetic", "gemma-3", 512, 10_000, 3000, 30),
        ("compiled", "conversation", "gemma-3", 16, 40_000, 30, 30),
        ("reference", "conversation", "gpt-oss", 512, 1000, 200, 3),
        ("reference", "conversation", "gpt-oss", 16, 20_000, 30, 3),
        ("reference", "conversation", "gemma-3", 512, 5000, 200, 3),
        ("reference", "conversation", "gemma-3", 16, 40_000, 30, 3),
    ],
)
def test_one_at_a_time_the_hits_are_those_of_a_plain_manager(
    shared, name, trace, model, block_size, n_blocks, count, longest_output
):
    requests = shortened(shared, trace, count, longest_output)
    order = np.arange(len(requests)) * 1e4
    case = replica(replace(requests, arrival_s=order), n_blocks, model, max_num_seqs=1, block_size=block_size)
    result = engine(name)(*case)
    manager = Manager(n_blocks, ids_of_blocks(requests, block_size), block_size, GROUPS[model])
    lengths = zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True)
    reused = [block_size * manager.serve(row, *both, 8192) for row, both in enumerate(lengths)]
    assert len(requests) == min(TRACES[trace], count)
    np.testing.assert_array_equal(result.reused_tokens, reused)
    assert sum(reused) > 0
    assert result.totals["evicted_blocks"] == manager.evicted > 0


# With windows too: whoever is the first to compute a block has it in every group for a step at least.
@pytest.mark.parametrize(
    ("name", "model", "n_blocks"),
    [
        ("conversation", "dense", 1 << 20),
        ("synthetic", "dense", 1 << 20),
        ("conversation", "gpt-oss", 1 << 20),
        ("synthetic", "gemma-3", 1 << 20),
    ],
)
def test_an_endless_cache_hits_every_prefix_seen_before(shared, name, model, n_blocks):
    requests = read(shared, name)
    result = engine("compiled")(*replica(requests, n_blocks, model))
    seen: set[tuple[int, int]] = set()
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
    ("model", "block_size", "n_blocks", "count"),
    [
        ("dense", 512, 1200, 20000),
        ("dense", 512, 6000, 20000),
        ("dense", 32, 20000, 1500),
        ("gpt-oss", 512, 1200, 5000),
        ("gpt-oss", 32, 8000, 500),
        ("gemma-3", 512, 800, 3000),
        ("gemma-3", 32, 20000, 100),
    ],
)
def test_under_load_the_hits_are_those_of_a_manager_driven_by_the_log(shared, name, model, block_size, n_blocks, count):
    case = replica(read(shared, name).take(slice(count)), n_blocks, model, block_size=block_size)
    assert assert_follows(case, *compiled_log(case)).evicted > 10_000


@pytest.mark.parametrize(("model", "n_blocks"), [("gpt-oss", 300), ("gemma-3", 800)])
def test_under_load_the_reference_s_hits_are_those_of_a_manager_driven_by_its_log(shared, model, n_blocks):
    case = replica(shortened(shared, "conversation", 60, 100), n_blocks, model)
    case = case._replace(settings=replace(case.settings, scheduler_reserve_full_isl=False))
    result, (log,) = reference_logs(case)
    assert assert_follows(case, result, log).evicted > 1000
    assert result.totals["preemptions"] > 5
