"""Explanations add up, to the last bit, and name those that were there first."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import simulate
from simulator.engine.records import CANCELLED, FINISHED, TIMED_OUT
from simulator.engine.refusals import LASTING, NAMES, Refusal
from simulator.errors import InfeasibleError, InputError
from simulator.fleet.records import Pool
from simulator.run import load_scenario, run_scenario
from simulator.run.explain import LOADING, explain, explain_served, follow
from simulator.run.outcome import ConservationError
from simulator.run.replay import ReplicaRun, replicas_of
from simulator.run.serving import serve_scenario
from tests.engine.mixtures import random_mixture
from tests.engine.strategies import Case, dyadic_cases, real_case

NAME = "llama-3-8b-azure-chat"
ONLY_STAGES = (*LASTING, Refusal(("stages",), [name for name in NAMES if name != "stages"], "not drawn here"))


def run_of(case):
    """A fleet of one replica that has run a case."""
    requests = case.requests
    pool = Pool("replicas", "unified", case.cost, case.settings, 1)
    return ReplicaRun(pool, 0, np.arange(len(requests)), requests, simulate(*case))


def explained(case, row):
    run = run_of(case)
    result = run.result
    log = run.log(float(result.arrival_s[row]), float(result.finish_s[row]))
    return follow(run, row), result, log


@settings(max_examples=100, deadline=None)
@given(case=dyadic_cases(), pick=st.integers(0, 100))
def test_parts_sum_to_the_latency_exactly(case, pick):
    finished = np.flatnonzero(simulate(*case).status == FINISHED)
    if not len(finished):
        return
    row = int(finished[pick % len(finished)])
    found, result, log = explained(case, row)
    assert sum(part.time_s for part in found.parts) == found.e2e_s == result.finish_s[row] - result.arrival_s[row]
    queue = sum(part.time_s for part in found.parts if part.what.startswith("queue"))
    assert queue == found.scheduled_s - found.arrival_s
    again = sum(part.time_s for part in found.parts if part.what in {"preempted", "recompute"})
    assert (again > 0) == (found.preemptions > 0)
    own = sum(part.own_s or 0.0 for part in found.parts)
    assert own == pytest.approx(result.busy_s[row], rel=1e-12)
    for part in found.parts:
        assert part.with_chunks_s <= part.time_s
        # A request's share of a step is less than the step.
        assert part.own_s is None or part.own_s <= part.time_s * (1 + 1e-9)
    # The parts of the queue are the steps between arrival and admission.
    before = [step for step in log.steps if step.start_s < found.scheduled_s]
    assert sum(part.steps for part in found.parts if part.what.startswith("queue")) == len(before)


@pytest.mark.parametrize("seed", range(12))
def test_on_real_costs_the_parts_are_exact_rationals_rounded_once(seed):
    case = real_case(seed)
    result = simulate(*case)
    row = int(np.flatnonzero(result.status == FINISHED)[seed])
    found, _, log = explained(case, row)
    spans = [span for span in log.spans if span.row == row]
    exact = sum((Fraction(span.end_s) - Fraction(span.start_s) for span in spans), Fraction(0))
    assert exact == Fraction(spans[-1].end_s) - Fraction(spans[0].start_s)
    assert spans[0].start_s == found.arrival_s
    assert float(exact) == pytest.approx(found.e2e_s, rel=1e-12)
    assert sum(part.time_s for part in found.parts) == pytest.approx(found.e2e_s, rel=1e-14)


def test_the_queue_says_what_stood_in_the_way():
    base = ["traffic.n_requests=400", "traffic.arrival.rate_per_s=200"]
    causes = {
        "max_num_seqs running": ["engine.max_num_seqs=8"],
        "the next in line did not fit into the KV cache": ["engine.num_gpu_blocks_override=1200"],
        "max_num_batched_tokens spent": ["engine.max_num_batched_tokens=512"],
    }
    for cause, changes in causes.items():
        found = explain(load_scenario(NAME, [*base, *changes]), 300)
        worst = max(found.parts, key=lambda part: part.time_s if part.what.startswith("queue") else 0.0)
        assert worst.what == f"queue: {cause}"
        assert worst.time_s > 0.5 * sum(part.time_s for part in found.parts if part.what.startswith("queue"))


def test_who_was_ahead_is_who_was_there():
    scenario = load_scenario(NAME, ["traffic.n_requests=600", "replicas=2", "traffic.arrival.rate_per_s=60"])
    table = run_scenario(scenario).result.requests
    found = explain(scenario, 431)
    assert (found.request, found.replica) == (431, 1)
    for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        assert getattr(found, name) == pytest.approx(table[name][431], rel=1e-12)
    there = (table["replica"] == 1) & (table["arrival_s"] < found.arrival_s) & (table["finish_s"] > found.arrival_s)
    running = there & (table["scheduled_s"] < found.arrival_s)
    assert (found.running_ahead, found.waiting_ahead) == (running.sum(), (there & ~running).sum())
    assert found.overtaken_by == 0
    assert all(there[one.request] and one.request % 2 == 1 for one in found.ahead)
    longest = max(float(table["finish_s"][i]) for i in np.flatnonzero(there))
    assert found.ahead[0].left_s == pytest.approx(longest - found.arrival_s)


def test_requests_that_cannot_be_explained_are_refused():
    scenario = load_scenario(NAME, ["traffic.n_requests=50", "engine.max_model_len=200"])
    with pytest.raises(InputError, match="0 … 49"):
        explain(scenario, 50)
    rejected = int(np.flatnonzero(run_scenario(scenario).result.requests["status"] == 1)[0])
    with pytest.raises(InfeasibleError, match="rejected on arrival"):
        explain(scenario, rejected)


def test_a_closed_loops_request_is_found(bench):
    case = Case(bench.cost(), replace(bench.settings, max_num_seqs=3), bench.requests(n=60, concurrency=5))
    found, _, _ = explained(case, 40)
    assert sum(part.time_s for part in found.parts) == pytest.approx(found.e2e_s, rel=1e-12)
    assert found.running_ahead + found.waiting_ahead == 4


@pytest.mark.parametrize(
    "feature", ["stages", "ranks", "clients that leave", "host", "tiers", "swap", "batching", "speculation", "policy"]
)
def test_parts_of_any_mixture_sum_exactly(feature):
    """To the last token, or to the departure of a request whose client left; own shares sum to what it paid."""
    met = Counter()
    for seed in range(60):
        run = run_of(random_mixture(seed, (feature,)))
        result = run.result
        gone = np.flatnonzero(np.isin(result.status, (FINISHED, TIMED_OUT, CANCELLED)))
        for row in gone[[0, len(gone) // 2, -1]].tolist() if len(gone) else ():
            found = follow(run, row)
            assert sum(Fraction(part.time_s) for part in found.parts) == Fraction(found.e2e_s)  # dyadic times are exact
            assert found.arrival_s == result.arrival_s[row]
            if found.state == "finished":
                assert found.finish_s == result.finish_s[row]
            assert sum(part.own_s or 0.0 for part in found.parts) == pytest.approx(
                result.busy_s[row], rel=1e-9, abs=1e-12
            )
            for part in found.parts:
                assert 0 <= part.stalled_s <= part.time_s
                assert 0 <= part.with_chunks_s <= part.time_s
            met.update(part.what for part in found.parts)
            met.update(["stalled"] * (sum(part.stalled_s for part in found.parts) > 0))
            met[found.state] += 1
    wanted = {
        "stages": ("stalled", "prefill", "decode"),
        "ranks": ("stalled", "prefill", "decode"),
        "clients that leave": ("timed out", "cancelled", "between attempts", "its client had left, the step went on"),
        "host": ("host: the request", "host: the last token"),
        "tiers": (LOADING,),
        "swap": ("preempted", "recompute"),
        "batching": ("queue: the static batch went on",),
    }.get(feature, ("prefill", "decode"))
    assert all(met[what] for what in wanted), met


def test_in_a_pipeline_nobody_works_between_the_stages():
    """One request alone: it waits for its sends, and for nothing else."""
    for seed in range(200):
        case = random_mixture(seed, ("stages",), ONLY_STAGES)
        if not case.requests.concurrency:
            break
    alone = replace(case.requests.take(np.array([0])), arrival_s=np.zeros(1))
    run = run_of(Case(case.cost, case.settings, alone))
    found = follow(run, 0)
    worked = sum(part.time_s - part.stalled_s for part in found.parts)
    assert worked == pytest.approx(run.result.busy_s[0] * len(case.cost.stages))
    own = sum(part.own_s or 0.0 for part in found.parts)
    assert own == pytest.approx(run.result.busy_s[0])


DISAGGREGATED = ("llama-3-70b-disaggregated", ["traffic.n_requests=300"])
FLEETS = {
    "a router that looks": (
        NAME,
        ["traffic.n_requests=300", "replicas=3", "router=least-requests", "traffic.arrival.rate_per_s=45"],
    ),
    "prefill and decode pools": DISAGGREGATED,
    "a slow link": (DISAGGREGATED[0], [*DISAGGREGATED[1], "link.bandwidth_bytes_per_s=2e9", "link.per=fleet"]),
    "layer by layer": (DISAGGREGATED[0], [*DISAGGREGATED[1], "link.bandwidth_bytes_per_s=2e9", "link.layerwise=true"]),
    "the first token of the decode pool": (DISAGGREGATED[0], [*DISAGGREGATED[1], "link.first_token=decode"]),
    "agents with a store": ("web-agent-fleet", ["traffic.n_requests=60"]),
    "a closed loop whose router looks": (
        NAME,
        [
            "traffic.n_requests=120",
            "traffic.arrival={process='closed', concurrency=12}",
            "replicas=2",
            "router=least-requests",
        ],
    ),
}


@pytest.mark.parametrize("name", FLEETS)
def test_parts_of_a_way_through_a_fleet_sum_exactly(name):
    scenario = load_scenario(*FLEETS[name])
    run = run_scenario(scenario)
    table, served = run.result.requests, run.served
    done = np.flatnonzero(served.finished)
    met = Counter()
    for request in done[:: max(len(done) // 12, 1)].tolist():
        found = explain_served(served, request)
        exact = sum(Fraction(part.time_s) for part in found.parts)
        assert float(exact) == pytest.approx(found.e2e_s, rel=1e-15 * len(found.parts))
        assert found.e2e_s == pytest.approx(table["e2e_s"][request], rel=1e-9)
        assert found.first_token_s - found.arrival_s == pytest.approx(table["ttft_s"][request], rel=1e-9)
        assert found.stops[0].replica == table["prefill_replica"][request]
        assert found.stops[-1].replica == table["replica"][request]
        assert found.stops[0].router == scenario.router.policy
        sent = {part.what: part.time_s for part in found.parts if part.what.startswith("KV ")}
        if served.fleet.link is not None and len(found.stops) == 2:
            took = sum(time_s for what, time_s in sent.items() if what.startswith("KV link"))
            assert took == pytest.approx(served.transfer_s[request], rel=1e-6)
        if served.fleet.store is not None:
            took = sum(time_s for what, time_s in sent.items() if what.startswith("KV store"))
            assert took == pytest.approx(served.store_s[request], rel=1e-6, abs=1e-9)
        met.update(what for what, time_s in sent.items() if time_s > 0)
    if name == "a slow link":
        assert met["KV link: waiting for the link"] > 3
    if name == "agents with a store":
        assert met["KV store: sending and latency"]


def test_a_request_that_was_never_sent_has_no_parts():
    scenario = load_scenario("web-agent-fleet", ["traffic.n_requests=80", "agents.deadline_s=1"])
    served = serve_scenario(scenario).served
    absent = int(np.flatnonzero(~served.arrived)[0])
    with pytest.raises(InfeasibleError, match="never sent"):
        explain_served(served, absent)


RANKS = ["model=qwen3-30b-a3b", "slice=h100-sxm:4", "sharding.dp=4", "sharding.ep=4", "traffic.n_requests=150"]
ANY_REPLICA = {
    "uneven experts": [*RANKS, "deployment.expert_skew=1.5", "run.seed=7", "traffic.arrival.rate_per_s=30"],
    "ranks behind a router": [*RANKS, "replicas=2", "router=least-requests", "traffic.arrival.rate_per_s=60"],
    "ranks that speculate": [
        *RANKS,
        'engine.speculation={method="eagle", num_speculative_tokens=2, acceptance_rate=0.8}',
    ],
    "pipelines whose clients leave": [
        *("slice=l40s:2", "sharding.pp=2", "traffic.n_requests=150", "traffic.arrival.rate_per_s=30"),
        *(
            "replicas=2",
            "router=power-of-two",
            "clients.timeout_s=6",
            "clients.max_attempts=2",
            "clients.backoff_s=0.5",
        ),
    ],
}


@pytest.mark.parametrize("name", ANY_REPLICA)
def test_explanations_agree_with_the_result_of_any_replica(name):
    run = run_scenario(load_scenario(NAME, ANY_REPLICA[name]))
    table, chips = run.result.requests, run.summary.deployment.chips_per_replica
    for request in range(0, 150, 19):
        found = explain_served(run.served, request)
        assert sum(part.time_s for part in found.parts) == pytest.approx(found.e2e_s, rel=1e-14)
        if found.state == "finished":
            assert found.e2e_s == pytest.approx(table["e2e_s"][request], rel=1e-9)
        assert found.attempts == table["attempts"][request]
        own = sum(part.own_s or 0.0 for part in found.parts)
        assert own * chips == pytest.approx(table["chip_s_busy"][request], rel=1e-6)


def test_ranks_chosen_by_loads_that_a_router_saw_are_chosen_again():
    changes = [
        *RANKS,
        "replicas=2",
        "router=least-requests",
        "traffic.arrival.rate_per_s=60",
        "engine.rank_routing=least-loaded",
    ]
    served = serve_scenario(load_scenario(NAME, changes)).served
    for replica in replicas_of(served):
        log = replica.log()  # which refuses a replica that does something else
        assert len({step.rank for step in log.steps if step.tokens}) == 4


def test_a_replica_that_does_something_else_is_refused():
    run = run_of(real_case(3))
    late = replace(run.result, finish_s=run.result.finish_s * (1 + 1e-6))
    with pytest.raises(ConservationError, match="at other times"):
        replace(run, result=late).log()
