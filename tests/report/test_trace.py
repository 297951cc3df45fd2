"""A trace obeys the rules of the Trace Event Format, and says what the run did."""

import json
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from simulator.engine.compiled import new_engine
from simulator.engine.event_log import EventLog, record
from simulator.errors import InputError
from simulator.report.trace import WAITS, Track, Transfer, trace_document, write_trace
from simulator.run import load_scenario, run_scenario
from simulator.run.replay import all_carried, logs_of, replicas_of
from tests.engine.mixtures import random_mixture
from tests.engine.strategies import random_case

PHASES = {"X", "C", "b", "e", "i", "M"}
METADATA = {
    "process_name": "name",
    "thread_name": "name",
    "process_sort_index": "sort_index",
    "thread_sort_index": "sort_index",
}


def track(case, name="case"):
    """A replica that runs a case, and its log."""
    return Track(name, record(new_engine(*case)), np.arange(len(case.requests)), case.settings.num_kv_blocks)


def validate(document):
    """What a viewer demands of the JSON object form: known phases, their fields, numbers that are numbers, matched spans."""
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert isinstance(document["traceEvents"], list)
    assert document["displayTimeUnit"] in {"ms", "ns"}
    open_spans, last = defaultdict(list), defaultdict(float)
    slices, named = defaultdict(list), set()
    for event in document["traceEvents"]:
        phase = event["ph"]
        assert phase in PHASES
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if phase == "M":
            about = METADATA[event["name"]]
            assert isinstance(event["args"][about], int if about == "sort_index" else str)
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], float)
        assert event["ts"] >= 0
        if phase == "X":
            assert event["dur"] > 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
        elif phase == "C":
            assert event["args"]
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
        elif phase == "i":
            assert event["s"] in {"g", "p", "t"}
        else:
            key = event["cat"], event["id"]
            assert event["ts"] >= last[key]
            last[key] = event["ts"]
            if phase == "b":
                open_spans[key].append(event["name"])
            else:
                assert open_spans[key].pop() == event["name"]
    assert not any(open_spans.values())
    assert all(("thread_name", pid, tid) in named and ("process_name", pid, 0) in named for pid, tid in slices)
    for steps in slices.values():  # slices of one thread must not overlap; a thousandth of a microsecond is rounding
        for (start, length), (after, _) in pairwise(steps):
            assert start + length <= after + 2e-3
    assert slices


@pytest.mark.parametrize("seed", range(30))
def test_a_trace_is_valid_and_complete(seed):
    case = random_case(seed)
    one = track(case)
    log = one.log
    if not log.steps:
        pytest.skip("every request of this case is rejected")
    document = trace_document([one], name="case")
    validate(document)
    events = document["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert len(steps) == len(log.steps)
    assert sum(event["dur"] for event in steps) == pytest.approx(
        1e6 * sum(step.end_s - step.start_s for step in log.steps), rel=1e-6, abs=0.01
    )
    assert [event["args"]["n tokens"] for event in steps] == [step.tokens for step in log.steps]
    names = {event["name"] for event in events if event["ph"] == "b"}
    assert {span.phase.value for span in log.spans if span.end_s > span.start_s} <= names
    blocks = [event["args"] for event in events if event["name"] == "KV blocks"]
    assert all(counts["owned"] + counts["free"] == case.settings.num_kv_blocks for counts in blocks)
    assert sum(event["ph"] == "i" for event in events) == len(log.rejected)


@pytest.mark.parametrize("feature", ["stages", "ranks", "clients that leave", "tiers", "speculation"])
def test_a_trace_of_any_replica_is_valid(feature):
    """One thread for each rank or stage; what a rank waits and what a pipeline idles can be seen."""
    for seed in range(15):
        case = random_mixture(seed, (feature,))
        one = track(case)
        log = one.log
        if not log.steps:
            continue
        document = trace_document([one], name="case")
        validate(document)
        steps = [event for event in document["traceEvents"] if event["ph"] == "X"]
        worked = [event for event in steps if event["name"] != WAITS]
        length = {tid: sum(event["dur"] for event in steps if event["tid"] == tid) for tid in range(log.n_ranks)}
        if log.n_stages > 1:
            assert {event["tid"] for event in steps} == set(range(log.n_stages))
            expected = sum(left - entered for step in log.steps for entered, left in step.stages)
        else:
            expected = sum(step.worked_until_s - step.start_s for step in log.steps if step.tokens)
            # Ranks step together: each is at work, or waits for the slowest.
            assert length == pytest.approx(dict.fromkeys(length, length[0]), rel=1e-6, abs=0.1)
        assert sum(event["dur"] for event in worked) == pytest.approx(1e6 * expected, rel=1e-6, abs=0.1)
        counters = [event["args"] for event in document["traceEvents"] if event["name"] == "KV blocks"]
        assert {c["owned"] + c["free"] for c in counters} == {case.settings.num_kv_blocks * log.n_ranks}


def test_a_trace_of_a_fleet_shows_pools_and_links():
    scenario = load_scenario("llama-3-70b-disaggregated", ["traffic.n_requests=120"])
    run = run_scenario(scenario)
    replicas = replicas_of(run.served)
    logs = logs_of(replicas, 2.0, 6.0)
    tracks = [Track(one.name, log, one.rows, 1 << 30) for one, log in zip(replicas, logs, strict=True)]
    sent = all_carried(run.served, replicas, 2.0, 6.0)
    transfers = [Transfer(c.request, c.link, replicas[c.target].name, c.asked_s, c.sent_s, c.there_s) for c in sent]
    document = trace_document(tracks, name="fleet", transfers=transfers)
    validate(document)
    names = {event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"}
    assert names == {
        "prefill, replica 0",
        "prefill, replica 1",
        "decode, replica 2",
        "decode, replica 3",
        "KV caches on their way",
    }
    assert len(sent) > 10
    by_request = defaultdict(set)
    for event in document["traceEvents"]:
        if event["ph"] == "b" and event["name"].startswith(("request", "link")):
            by_request[event["id"]].add(event["pid"])
    assert sum(len(pids) == 3 for pids in by_request.values()) > 5  # a prefill replica, the links, a decode replica
    for one in sent:
        assert one.asked_s <= one.sent_s <= one.there_s


def test_replicas_are_processes_and_requests_keep_their_index(tmp_path):
    tracks = [track(random_case(seed))._replace(rows=2 * np.arange(100) + r) for r, seed in enumerate((3, 4))]
    document = trace_document(tracks, name="two", about=lambda index: {"index": index})
    validate(document)
    begun = [event for event in document["traceEvents"] if event["name"].startswith("request ") and event["ph"] == "b"]
    assert {event["pid"] for event in begun} == {0, 1}
    assert all(event["id"] % 2 == event["pid"] for event in begun)
    assert all(event["args"] == {"index": event["id"]} for event in begun)
    for name in ("one.json", "other.json"):
        write_trace(document, tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    with pytest.raises(InputError, match="--trace"):
        write_trace(document, tmp_path)


def test_an_empty_stretch_is_an_empty_trace():
    log = EventLog(5.0, 5.0, (), (), (), (), complete=True)
    document = trace_document([Track("nothing", log, np.zeros(0, dtype=np.int64), 1)], name="nothing")
    assert {event["ph"] for event in document["traceEvents"]} == {"M"}
