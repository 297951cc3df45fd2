"""A trace obeys the rules of the Trace Event Format, and says what the run did."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from simulator.engine.compiled import Engine
from simulator.engine.event_log import EventLog, record
from simulator.errors import InputError
from simulator.report.trace import trace_document, write_trace
from tests.engine.strategies import random_case

PHASES = {"X", "C", "b", "e", "i", "M"}


def validate(document):
    """What a viewer demands of the JSON object form: known phases, their fields, numbers that are numbers, matched spans."""
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert isinstance(document["traceEvents"], list)
    assert document["displayTimeUnit"] in {"ms", "ns"}
    open_spans, last = defaultdict(list), defaultdict(float)
    slices = defaultdict(list)
    for event in document["traceEvents"]:
        phase = event["ph"]
        assert phase in PHASES
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if phase == "M":
            assert event["name"] in {"process_name", "thread_name"}
            assert isinstance(event["args"]["name"], str)
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
    for steps in slices.values():  # slices of one thread must not overlap; a thousandth of a microsecond is rounding
        for (start, length), (after, _) in pairwise(steps):
            assert start + length <= after + 2e-3
    assert slices


@pytest.mark.parametrize("seed", range(30))
def test_a_trace_is_valid_and_complete(seed):
    case = random_case(seed)
    log = record(Engine(*case))
    if not log.steps:
        pytest.skip("every request of this case is rejected")
    document = trace_document([log], name="case", num_kv_blocks=case.settings.num_kv_blocks)
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


def test_replicas_are_processes_and_requests_keep_their_index(tmp_path):
    logs = [record(Engine(*random_case(seed))) for seed in (3, 4)]
    document = trace_document(logs, name="two", num_kv_blocks=99, about=lambda index: {"index": index})
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
    log = EventLog(5.0, 5.0, (), (), (), complete=True)
    document = trace_document([log], name="nothing", num_kv_blocks=1)
    assert [event["ph"] for event in document["traceEvents"]] == ["M", "M"]
