"""What a summary says against independent arithmetic on the same requests, and the laws every run must obey."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.records import FINISHED
from simulator.run.consumption import ideal_chip_seconds, total_work, useful_pairs
from simulator.run.options import RunOptions, SloOptions
from simulator.run.outcome import ConservationError, Outcome, check_conservation, fleet_mean, step_time_s
from simulator.run.window import measured_window

TIGHT = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 4, "num_kv_blocks": 40}


def test_latencies_are_those_of_the_measured_requests(bench):
    requests = bench.requests()
    summary, table, _ = bench.summary(requests)
    assert summary.status == "ok"
    first, last = requests.arrival_s[0], requests.arrival_s[-1]
    inside = (requests.arrival_s >= first + 0.1 * (last - first)) & (requests.arrival_s <= last - 0.05 * (last - first))
    ttft = table["first_token_s"] - requests.arrival_s
    assert summary.latency.ttft_s.n == inside.sum() == summary.requests.measured
    assert summary.latency.ttft_s.mean.value == pytest.approx(ttft[inside].mean(), rel=1e-12)
    ordered = np.sort(ttft[inside])
    assert summary.latency.ttft_s.p90.value == ordered[int(np.ceil(0.9 * len(ordered))) - 1]
    outputs = requests.output_tokens
    ones = inside & (outputs == 1)
    assert ones.any()
    assert summary.latency.one_token_outputs == ones.sum()
    assert summary.latency.tpot_s.n == (inside & (outputs > 1)).sum()
    many = inside & (outputs > 1)
    tpot = (table["finish_s"] - table["first_token_s"])[many] / (outputs[many] - 1)
    assert summary.latency.tpot_s.mean.value == pytest.approx(tpot.mean(), rel=1e-12)
    assert np.isnan(table["tpot_s"][outputs == 1]).all()
    assert summary.latency.itl_s.n == (outputs - 1).sum()
    assert summary.latency.ttft_s.p99.low is None
    assert "2000" in summary.latency.ttft_s.p99.reason


def test_goodput_counts_requests_that_meet_every_limit(bench):
    requests = bench.requests()
    _, table, _ = bench.summary(requests)
    limits = SloOptions(
        ttft_s=float(np.median(table["ttft_s"])), tpot_s=float(np.nanmedian(table["tpot_s"])), percentile=60
    )
    summary, table, _ = bench.summary(requests, slo=limits)
    rows = (table["arrival_s"] >= summary.window.start_s) & (table["arrival_s"] <= summary.window.stop_s)
    good = (table["ttft_s"] <= limits.ttft_s) & ~(table["tpot_s"] > limits.tpot_s)
    length = summary.window.stop_s - summary.window.start_s
    assert summary.slo.goodput_per_s == pytest.approx((good & rows).sum() / length)
    assert summary.slo.met_fraction.value == pytest.approx((good & rows).sum() / rows.sum())
    assert 0.2 < summary.slo.met_fraction.value < 0.6
    assert not summary.slo.met
    assert summary.status == "slo_missed"


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(1, 200),
    seed=st.integers(0, 9),
    replicas=st.integers(1, 3),
    cached=st.sampled_from([0, 7]),
    tight=st.booleans(),
    concurrency=st.sampled_from([0, 0, 6]),
)
def test_chip_time_and_requests_are_conserved(bench, rate, seed, replicas, cached, tight, concurrency):
    options = replace(bench.settings, **TIGHT) if tight else bench.settings
    requests = bench.requests(rate, 120, seed, cached=cached, concurrency=concurrency)
    summary, table, timeline = bench.summary(requests, settings=options, replicas=replicas)
    ledger, counts = summary.ledger, summary.requests
    assert ledger.busy_chip_s + ledger.idle_chip_s == pytest.approx(ledger.chips * ledger.time_s, rel=1e-9)
    assert counts.arrived == counts.finished + counts.running + counts.waiting + counts.rejected
    assert sum(summary.breakdown.fractions.values()) == pytest.approx(1, rel=1e-9)
    per_query = summary.chip_seconds_per_query
    assert per_query.provisioned * counts.finished == pytest.approx(ledger.chip_s, rel=1e-12)
    assert per_query.busy * counts.finished == pytest.approx(ledger.busy_chip_s, rel=1e-12)
    assert per_query.prefill + per_query.decode == pytest.approx(per_query.busy)
    assert per_query.cached <= per_query.prefill <= per_query.busy <= per_query.provisioned * (1 + 1e-9)
    assert 0 < summary.utilisation.mfu <= summary.utilisation.mfu_busy <= 1
    paid = summary.prices.allocation.per_query_usd * counts.finished
    assert paid == pytest.approx(ledger.chip_s * 3.6 / 3600, rel=1e-9)
    for r in range(replicas):
        rows = timeline["replica"] == r
        busy = float((timeline["busy_fraction"] * timeline["interval_s"])[rows].sum()) * 2
        assert busy == pytest.approx(table["chip_s_busy"][r::replicas].sum(), rel=1e-6)


def test_model_flops_leave_recomputation_out(bench):
    cost = bench.cost()
    tight = replace(bench.settings, **TIGHT)
    requests = bench.requests(60.0, 300)
    roomy, crowded = bench.outcome(requests, cost), bench.outcome(requests, cost, tight)
    assert roomy.total("preemptions") == 0
    assert crowded.total("preemptions") > 20
    free, thrashing = total_work(roomy, cost), total_work(crowded, cost)
    assert free.recomputed_flops == 0
    assert thrashing.recomputed_flops > 0
    assert thrashing.flops > free.flops
    assert thrashing.flops - thrashing.recomputed_flops == pytest.approx(free.flops, rel=1e-12)
    pairs = roomy.total("decode_keys") + roomy.total("prefill_pairs")
    assert useful_pairs(roomy, cost) == (pairs, 0)
    # By hand: every token but a request's last is computed once, token i attends to i keys, each output has a row.
    p, o = requests.prompt_tokens, requests.output_tokens
    n = p + o - 1
    by_hand = 1e9 * n.sum() + 1e5 * (n * (n + 1) // 2).sum() + 1e8 * o.sum()
    assert free.flops == pytest.approx(by_hand, rel=1e-12)


def test_bytes_are_steps_times_weights_plus_keys(bench):
    cost = bench.cost()
    outcome = bench.outcome(bench.requests(), cost)
    steps = outcome.total("steps")
    keys = outcome.total("decode_keys") + outcome.total("prefill_keys")
    with_rows = steps - int(outcome.steps_by_rows[0])
    expected = 1e9 * steps + 1e3 * outcome.total("dense_tokens") + 1e8 * with_rows + 1e4 * keys
    assert total_work(outcome, cost).hbm_bytes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("prompt", "cached", "output"), [(30, 0, 10), (200, 0, 1), (200, 130, 5), (65, 1, 2)])
def test_ideal_is_prefill_alone_plus_a_shared_decode_step_per_token(bench, prompt, cached, output):
    cost, batch = bench.cost(), 8.0
    found = ideal_chip_seconds(
        np.array([prompt]), np.array([cached]), np.array([output]), cost=cost, settings=bench.settings, mean_batch=batch
    )
    time, past = 0.0, cached
    while past < prompt:
        c = min(64, prompt - past)
        done = past + c == prompt
        time += cost.step_s(n=c, P=1, A=c * past + c * (c + 1) / 2, K=past + c, R=int(done))
        past += c
    step = cost.step_s(n=8, B=8, S=8 * (prompt + output / 2), R=8)
    assert found[0] == pytest.approx(cost.chips * (time + output * step / batch), rel=1e-12)


def test_ideal_falls_with_the_batch_it_shares(bench):
    sizes = (np.array([40]), np.array([0]), np.array([30]))
    by_batch = [
        ideal_chip_seconds(*sizes, cost=bench.cost(), settings=bench.settings, mean_batch=b)[0]
        for b in (0.5, 1.0, 1.5, 2.0, 8.0)
    ]
    assert by_batch[0] == by_batch[1]
    assert by_batch[1:] == sorted(by_batch[1:], reverse=True)


def test_an_overloaded_run_gives_load_instead_of_percentiles(bench):
    steady, _, _ = bench.summary(bench.requests(20.0, 800))
    assert steady.load.load < 1
    crowd = bench.requests(3 * steady.load.capacity_per_s, 800)
    summary, _, _ = bench.summary(crowd)
    assert summary.status == "overloaded"
    assert summary.latency is None
    assert summary.slo is None
    assert summary.load.load == pytest.approx(3, rel=0.15)
    assert summary.load.headroom_fraction < 0
    assert summary.load.backlog_growing
    assert summary.load.backlog_end > summary.load.backlog_start + 10


def test_a_backlog_that_grows_below_load_one_is_noticed(bench):
    # The rate doubles on the way: the mean is below capacity, the end is not.
    requests = bench.requests(20.0, 2000)
    capacity = bench.summary(requests)[0].load.capacity_per_s
    gaps = np.diff(requests.arrival_s, prepend=0.0) * 20.0 / capacity
    gaps *= np.where(np.arange(2000) < 1000, 1 / 0.5, 1 / 1.35)
    summary, _, _ = bench.summary(replace(requests, arrival_s=np.cumsum(gaps)))
    assert summary.load.load < 1
    assert summary.load.backlog_growing
    assert summary.status == "overloaded"
    assert any("backlog grows" in w for w in summary.warnings)


def test_a_closed_loop_has_no_load_and_an_offline_batch_no_steady_state(bench):
    closed, _, _ = bench.summary(bench.requests(concurrency=8))
    assert closed.load.load is None
    assert closed.status == "ok"
    assert closed.occupancy.mean_running == pytest.approx(8, rel=0.05)
    batch, _, _ = bench.summary(bench.requests(rate=None))
    assert batch.status in {"ok", "slo_missed"}
    assert batch.latency.ttft_s.mean.low is None
    assert batch.requests.measured == batch.requests.finished
    assert batch.throughput.requests_per_s == pytest.approx(batch.load.capacity_per_s)
    assert any("at once" in w for w in batch.warnings)


def test_rejected_requests_make_a_result_partial_and_miss_the_slo(bench):
    requests = bench.requests(20.0, 300)
    limit = int(np.quantile(requests.prompt_tokens + requests.max_tokens, 0.7))
    summary, table, _ = bench.summary(requests, settings=replace(bench.settings, max_model_len=limit))
    assert summary.status == "partial"
    assert summary.requests.rejected == (requests.prompt_tokens + requests.max_tokens > limit).sum()
    assert summary.slo.met_fraction.value < 0.8
    assert any("rejected" in w for w in summary.warnings)
    assert np.isnan(table["e2e_s"][table["status"] != FINISHED]).all()


def test_littles_law_links_occupancy_throughput_and_latency(bench):
    requests = bench.requests(30.0, 4000)
    summary, _, _ = bench.summary(requests, replicas=2)
    in_system = 2 * (summary.occupancy.mean_running + summary.occupancy.mean_waiting)
    assert in_system == pytest.approx(summary.throughput.requests_per_s * summary.latency.e2e_s.mean.value, rel=0.03)


def test_windows_follow_the_stated_cuts(bench):
    outcome = bench.outcome(bench.requests(), bench.cost())
    whole = measured_window(outcome, warm_up_fraction=0.0, drain_fraction=0.0)
    assert len(whole.rows) == 600
    cut = measured_window(outcome, warm_up_fraction=0.5, drain_fraction=0.25)
    assert cut.length_s == pytest.approx(0.25 * whole.length_s)
    with pytest.raises(ValueError, match="nothing to measure"):
        RunOptions(warm_up_fraction=0.6, drain_fraction=0.4)


def test_timeline_means_integrate_to_the_totals(bench):
    outcome = bench.outcome(bench.requests(), bench.cost(), replicas=2)
    mean = fleet_mean(outcome.replicas, "running", np.array([0.0, outcome.end_s]))[0]
    assert mean * outcome.end_s == pytest.approx(outcome.total("running_s"), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, idle_s=r.idle_s + 1e-6), "busy"),
        (lambda r: replace(r, busy_s=r.busy_s * (1 + 1e-8)), "busy"),
        (lambda r: replace(r, first_token_s=r.scheduled_s), "out of order"),
        (lambda r: replace(r, totals=r.totals | {"dense_tokens": r.totals["dense_tokens"] + 1}), "tokens"),
        (lambda r: replace(r, totals=r.totals | {"rows": r.totals["rows"] - 1}), "logit rows"),
        (lambda r: replace(r, totals=r.totals | {"decode_attention_s": 0.0}), "step parts"),
        (lambda r: replace(r, busy_prefill_s=r.busy_s * 2), "exceeds the whole"),
        (lambda r: replace(r, status=np.append(r.status[:-1], 7).astype(np.int8)), "states count"),
    ],
)
def test_a_broken_law_stops_the_run(bench, change, message):
    cost = bench.cost()
    outcome = bench.outcome(bench.requests(), cost)
    check_conservation(outcome, cost)
    broken = Outcome(outcome.requests, (change(outcome.replicas[0]),), outcome.chips_per_replica)
    with pytest.raises(ConservationError, match=message):
        check_conservation(broken, cost)


def test_step_parts_have_the_names_of_the_cost_table(bench):
    cost = bench.cost()
    parts = step_time_s(bench.outcome(bench.requests(), cost), cost)
    assert set(parts) == {"launch", "matmul", "head", "attention_prefill", "attention_decode"}
    assert all(v > 0 for v in parts.values())


def test_energy_lies_between_idle_and_peak_power(bench):
    quiet, _, _ = bench.summary(bench.requests(2.0, 300))
    busy, _, _ = bench.summary(bench.requests(60.0, 300))
    assert 210 < quiet.energy.mean_power_w_per_chip < busy.energy.mean_power_w_per_chip < 700
    assert quiet.energy.joules_per_query > busy.energy.joules_per_query
    silent, _, timeline = bench.summary(bench.requests(), power=None)
    assert silent.energy is None
    assert np.isnan(timeline["power_w"]).all()


def test_without_a_price_there_are_no_prices(bench):
    summary, _, _ = bench.summary(bench.requests(), price=None)
    assert summary.prices is None


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_a_handful_of_requests_is_not_called_overloaded(bench, n):
    # All of them fit in one batch, so the run at t = 0 measures a latency, not a capacity.
    summary, _, _ = bench.summary(bench.requests(40.0, n))
    assert summary.status == "ok"
    assert n == 1 or summary.load.capacity_understated
    assert n == 1 or any("understated" in w for w in summary.warnings)


@pytest.mark.parametrize("chunked", [False, True])
def test_windowed_layers_are_counted_by_what_they_see(bench, chunked):
    window = 37
    full = bench.cost()
    cost = replace(
        full,
        window=window,
        window_chunked=chunked,
        window_slope_s=1e-7,
        window_flops_per_pair=3e4,
        window_kv_bytes_per_token=7e3,
    )
    outcome = bench.outcome(bench.requests(20.0, 60), cost)
    requests = outcome.requests

    def seen(context):
        return (context - 1) % window + 1 if chunked else min(context, window)

    pairs = [
        sum(seen(t) for t in range(1, p + o))
        for p, o in zip(requests.prompt_tokens, requests.output_tokens, strict=True)
    ]
    assert useful_pairs(outcome, cost)[1] == sum(pairs)
    assert outcome.total("window_decode_keys") + outcome.total("window_prefill_pairs") == sum(pairs)
    more = total_work(outcome, cost)
    less = total_work(outcome, replace(cost, window_flops_per_pair=0.0, window_kv_bytes_per_token=0.0))
    assert more.flops - less.flops == pytest.approx(3e4 * sum(pairs), rel=1e-9)
    read = outcome.total("window_decode_keys") + outcome.total("window_prefill_keys")
    assert more.hbm_bytes - less.hbm_bytes == pytest.approx(7e3 * read, rel=1e-9)
