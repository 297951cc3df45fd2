"""The rules of docs/engine-scheduling.md, one by one: worked examples on both engines."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.records import CANCELLED, FINISHED, REJECTED, TIMED_OUT, EngineSettings
from simulator.engine.scheduling import HostOverheads, Retries, Scheduling
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import requests_of, step_cost

#: A step of n tokens takes n seconds.
UNIT = step_cost(range(65), [0] * 9)


def run(name, requests, *, host=None, retries=None, seqs=1, budget=64, blocks=64, block_size=1, **scheduling):
    """Serve ``requests`` at one second per token."""
    engine_settings = EngineSettings(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        num_kv_blocks=blocks,
        scheduling=Scheduling(**scheduling),
        host=host or HostOverheads(),
        retries=retries or Retries(),
    )
    return engine(name)(UNIT, engine_settings, requests)


def with_columns(requests, **columns):
    return replace(requests, **{name: np.array(values) for name, values in columns.items()})


# One seat: row 0 runs from 0 to 4 (prompt 4, one token); rows 1 to 3 (prompts 3, 2, 1) arrive meanwhile and are served in
# the order of the policy, each for as many seconds as its prompt is long.
FOUR = requests_of([0, 1, 2, 3], [4, 3, 2, 1], [1, 1, 1, 1])
ORDERS = {
    "fcfs": ({}, [4, 7, 9, 10]),
    "priority": ({"priority": [0, 2, 1, 1]}, [4, 10, 6, 7]),
    "sjf": ({"predicted_tokens": [1.0, 5.0, 9.0, 2.0]}, [4, 8, 10, 5]),
    "edf": ({"deadline_s": [1.0, 9.0, 7.0, 9.0]}, [4, 9, 6, 10]),
    # counts at 4: tenant 0: 4 + 2 for its token; row 1, of tenant 1, found an empty queue and was lifted to tenant 0's
    # count of 6; rows 2 and 3 join tenants with somebody waiting or are lifted to 6. Ties go to the smaller tenant.
    "fair": ({"tenant": [0, 1, 0, 1]}, [4, 9, 6, 10]),
}


@pytest.mark.parametrize("policy", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_queue_is_served_in_the_order_of_the_policy(name, policy):  # Q1
    columns, finish_s = ORDERS[policy]
    assert run(name, with_columns(FOUR, **columns), policy=policy).finish_s.tolist() == finish_s


@pytest.mark.parametrize("name", NAMES)
def test_the_victim_is_the_one_served_last(name):  # Q2
    # Two seats, 6 blocks of 1 token. Row 0 (low class, prompt 2) and row 1 (high class, prompt 2) start together: step
    # 0-4, then decode at 2 s a step, owning 3 + 3 blocks; at 6 both want a seventh and eighth: row 0 goes, though it came
    # first and row 1 is the last of the running list. It had computed 3 tokens, recomputes them and its fourth.
    requests = with_columns(requests_of([0, 0], [2, 2], [4, 4]), priority=[1, 0])
    result = run(name, requests, policy="priority", seqs=2, blocks=6)
    assert result.preemptions.tolist() == [1, 0]
    assert result.totals["recomputed_tokens"] == 3
    assert result.finish_s.tolist() == [13, 8]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preempt", [False, True])
def test_a_higher_class_takes_the_seat_of_a_lower_one_if_it_may(name, preempt):  # Q3
    # Row 0 (class 1) decodes from 2 on, one token a second; row 1 (class 0, prompt 3, one token) arrives at 2.5.
    requests = with_columns(requests_of([0, 2.5], [2, 3], [6, 1]), priority=[1, 0])
    result = run(name, requests, policy="priority", preempt_lower=preempt)
    if preempt:  # at 3: row 1 until 6, then row 0 again: 2 + 2 tokens, and 3 more
        assert result.finish_s.tolist() == [13, 6]
        assert result.preemptions.tolist() == [1, 0]
    else:
        assert result.finish_s.tolist() == [7, 10]


@pytest.mark.parametrize("name", NAMES)
def test_one_tenants_flood_does_not_starve_another(name):  # Q4
    n = 60
    tenant = np.array([0] * 50 + [1] * 10)
    requests = with_columns(requests_of([0.0] * 50 + [10.0] * 10, [4] * n, [4] * n), tenant=tenant)
    fair = run(name, requests, policy="fair", seqs=2)
    fcfs = run(name, requests, seqs=2)
    last = tenant == 1
    assert fair.finish_s[last].max() < 0.5 * fcfs.finish_s[last].min()
    assert fair.end_s == fcfs.end_s  # work-conserving, and all requests are alike


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_tenant_saves_nothing_up(name):  # Q4, lift
    # Tenant 1 comes late: from then on the two are served in turn, not tenant 1 alone until its count has caught up.
    tenant = [0] * 20 + [1] * 5
    requests = with_columns(requests_of([0.0] * 20 + [50.5] * 5, [5] * 25, [1] * 25), tenant=tenant)
    result = run(name, requests, policy="fair")
    after = np.argsort(result.scheduled_s)[11:21]
    turns = [tenant[row] for row in after]
    assert turns[:8] in ([0, 1] * 4, [1, 0] * 4)


def test_whole_prompts_and_what_cannot_be_one():  # B2, B3, B4
    requests = requests_of([0, 0], [20, 4], [14, 3])
    for name in NAMES:
        for batching, status in (("orca", REJECTED), ("prefill_first", REJECTED), ("static", FINISHED), ("chunked", 0)):
            result = run(name, requests, seqs=2, budget=32, batching=batching)
            assert result.status.tolist() == [status, FINISHED]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_prompts_or_decodes(name):  # B3
    # Row 0: prompt 2, decodes from 2 on. Row 1 arrives at 2.5 with prompt 3: at 3 its prompt alone, until 6; the second
    # latency of row 0 is that step and the next: 3 + 2.
    requests = requests_of([0, 2.5], [2, 3], [4, 2])
    first = run(name, requests, seqs=2, batching="prefill_first")
    assert first.first_token_s.tolist() == [2, 6]
    assert first.finish_s.tolist() == [9, 8]
    assert first.itl_max_s == 5
    orca = run(name, requests, seqs=2, batching="orca")
    assert orca.first_token_s.tolist() == [2, 7]
    assert orca.itl_max_s == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_static_batch_ends_before_the_next_begins(name):  # B4
    requests = requests_of([0, 0, 0.5, 0.5], [2, 2, 2, 2], [2, 5, 1, 2])
    result = run(name, requests, seqs=2, batching="static")
    # 0-4 prompts, 4-6 both decode, 6-9 row 1 alone; then rows 2 and 3
    assert result.finish_s.tolist() == [6, 9, 13, 14]
    assert result.scheduled_s.tolist() == [0, 0, 9, 9]
    tight = run(
        name, requests, seqs=2, blocks=8, batching="static"
    )  # rows 0 and 1 would reserve 3 + 6, rows 1 and 2 reserve 6 + 2
    assert tight.preemptions.sum() == 0
    assert tight.scheduled_s.tolist() == [0, 3, 3, 11]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_shares_the_step(name):  # B5, B6
    requests = requests_of([0, 0], [12, 2], [1, 1])
    alone = run(name, requests, seqs=2, budget=8)
    shared = run(name, requests, seqs=2, budget=8, long_prefill_token_threshold=4)
    assert alone.first_token_s.tolist() == [14, 14]  # 8, then 4 + 2
    assert shared.first_token_s.tolist() == [14, 6]  # 4 + 2, 4, 4
    two_long = requests_of([0, 0], [8, 8], [1, 1])
    both = run(name, two_long, seqs=2, budget=8, long_prefill_token_threshold=4)
    one = run(name, two_long, seqs=2, budget=8, long_prefill_token_threshold=4, max_num_partial_prefills=1)
    assert both.first_token_s.tolist() == [16, 16]
    assert one.first_token_s.tolist() == [12, 16]  # 4; then its last 4 and the other's first 4


@pytest.mark.parametrize("name", NAMES)
def test_the_watermark_keeps_blocks_free(name):  # B7
    requests = requests_of([0, 0], [4, 4], [4, 4])
    assert run(name, requests, seqs=2, blocks=10).scheduled_s.tolist() == [0, 0]
    kept = run(name, requests, seqs=2, blocks=10, watermark=0.3)
    assert kept.scheduled_s.tolist() == [0, 7]
    assert kept.preemptions.sum() == 0


# One seat. Row 0 runs from 0 to 10. Row 1 arrives at 1 and would be served from 10 to 14.
QUEUED = requests_of([0, 1], [10, 4], [1, 1])


@pytest.mark.parametrize("name", NAMES)
def test_clients_leave_the_queue_at_their_time(name):  # L1, L3
    gone = run(name, with_columns(QUEUED, ttft_timeout_s=[np.inf, 5.0]))
    assert gone.status.tolist() == [FINISHED, TIMED_OUT]
    assert gone.end_s == 10
    assert gone.totals["waiting_s"] == 5
    assert gone.wasted_s.tolist() == [0, 0]
    in_time = run(name, with_columns(QUEUED, ttft_timeout_s=[np.inf, 13.0]))  # due at 14, when the token comes
    assert in_time.status.tolist() == [FINISHED, FINISHED]
    late = run(name, with_columns(QUEUED, timeout_s=[np.inf, 12.5]))  # rides until 14 and has wasted 4 s
    assert late.status.tolist() == [FINISHED, TIMED_OUT]
    assert (late.end_s, late.wasted_s.tolist()) == (14, [0, 4])
    assert late.totals["abandoned_tokens"] == 4
    cancelled = run(name, with_columns(QUEUED, cancel_s=[3.0, np.inf]))  # leaves when its step ends, at 10
    assert cancelled.status.tolist() == [CANCELLED, FINISHED]
    assert cancelled.scheduled_s[1] == 10


@pytest.mark.parametrize("name", NAMES)
def test_who_times_out_tries_again(name):  # L5
    requests = with_columns(QUEUED, timeout_s=[np.inf, 5.0])
    patient = run(name, requests, retries=Retries(max_attempts=3, backoff_s=2.0))
    # arrives at 1, gives up at 6, again at 8; served from 10, gives up at 13, rides until 14; again at 17, until 21
    assert patient.status.tolist() == [FINISHED, FINISHED]
    assert patient.attempts.tolist() == [1, 3]
    assert (patient.arrival_s[1], patient.scheduled_s[1], patient.finish_s[1]) == (1, 17, 21)
    assert patient.wasted_s[1] == 4
    assert patient.busy_s[1] == 8
    assert patient.idle_s == 3
    assert run(name, requests, retries=Retries(max_attempts=2, backoff_s=2.0)).status.tolist() == [FINISHED, TIMED_OUT]


@pytest.mark.parametrize("name", NAMES)
def test_host_work_adds_to_a_step_or_hides_behind_it(name):  # H1
    # steps of the device: prompt 4 s, then 1 s for each of two tokens; host 1 + 0.5·sequences + 0.25·tokens
    requests = requests_of([0], [4], [3])
    work = {"step_s": 1.0, "sequence_s": 0.5, "token_s": 0.25}
    sync = run(name, requests, host=HostOverheads(**work))
    assert sync.end_s == (4 + 2.5) + 2 * (1 + 1.75)
    assert sync.totals["host_s"] == 2.5 + 2 * 1.75
    hidden = run(name, requests, host=HostOverheads(**work, asynchronous=True))
    assert hidden.end_s == 4 + 2 * 1.75
    assert hidden.totals["host_s"] == 2 * 0.75
    assert hidden.busy_s.sum() == hidden.end_s


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_seen_late_and_tokens_arrive_late(name):  # H2, H3
    host = HostOverheads(request_s=0.5, output_s=0.25)
    result = run(name, requests_of([1], [4], [2]), host=host)
    assert (result.arrival_s[0], result.scheduled_s[0]) == (1, 1.5)
    assert (result.first_token_s[0], result.finish_s[0]) == (5.75, 6.75)
    assert (result.end_s, result.totals["waiting_s"]) == (6.5, 0)


BAD = (
    (lambda: Scheduling(policy="fifo"), "engine.policy = 'fifo': unknown"),
    (lambda: Scheduling(batching="chunk"), "did you mean 'chunked'"),
    (lambda: Scheduling(watermark=1.0), "engine.watermark"),
    (lambda: Scheduling(preempt_lower=True), "only priorities have lower classes"),
    (lambda: Scheduling(batching="orca", long_prefill_token_threshold=8), "takes them whole"),
    (lambda: HostOverheads(step_s=-1.0), "engine.host.step_s"),
    (lambda: Retries(max_attempts=0), "clients.max_attempts"),
)


@pytest.mark.parametrize(("make", "message"), BAD)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_the_settings_need_must_be_there(name):
    with pytest.raises(InputError, match=r"engine.policy = 'edf' needs requests.deadline_s"):
        run(name, FOUR, policy="edf")
    impatient = with_columns(FOUR, timeout_s=[1.0, 1.0, 0.25, 1.0])
    with pytest.raises(InputError, match=r"requests.timeout_s\[2\] = 0.25: must be longer than engine.host.request_s"):
        run(name, impatient, host=HostOverheads(request_s=0.5))
