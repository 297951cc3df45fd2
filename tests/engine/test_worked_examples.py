"""Runs worked out by hand from docs/engine-rules.md."""

import numpy as np
import pytest

from simulator.engine.records import FINISHED, ITL_BINS, REJECTED, EngineSettings, itl_bin
from simulator.engine.reference import simulate_reference
from simulator.engine.reference_state import StepRecord
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import requests_of, step_cost


def itl_counts(*values_s):
    counts = np.zeros(ITL_BINS, dtype=int)
    for value_s in values_s:
        counts[itl_bin(value_s)] += 1
    return counts


# Three requests: chunked prefill, cached tokens, a full batch, an arrival at the very end of a step.
#
#   cost    dense n; head R/2; g slope 1/4, from S = 8 on 1/2; 1/4 per decoding sequence; planes A/8 and K/4 + P/2
#   engine  2 sequences, 4 tokens per step, 6 blocks of 2
#   rows    0: at 0, prompt 6, output 2;  1: at 0, prompt 2 of which 1 cached, output 3;  2: at 12.5, prompt 1, output 1
#
#   start  end   step                                    n B  S P  A K R  blocks  time
#   0      5.5   row 0 chunk 4 on 0 (the whole budget)   4 0  0 1 10 4 0  2,-,-   4 + 0   + max(1.25, 1.5)
#   5.5   12.5   row 0 chunk 2 on 4; row 1 chunk 1 on 1  3 0  0 2 13 8 2  3,1,-   3 + 1   + max(1.625, 3)
#  12.5   19     rows 0, 1 decode (keys 7 + 3);          2 2 10 0  0 0 2  4,2,-   2 + 1   + 2 + 2/2 + 2/4
#                row 2 waits: 2 sequences run
#  19     24     row 1 decodes (keys 4); row 2 chunk 1   2 1  4 1  1 1 2  -,2,1   2 + 1   + 1 + 1/4 + max(1/8, 3/4)
#
# Shares: step 1: 5.5 | step 2: 2 + .5 + .25·6 + .5 = 4.5, 1 + .5 + .25·2 + .5 = 2.5
#   step 3 (piece −2 + S/2): 1 + .5 + .5·7 − 2/2 + .25 = 4.25, 1 + .5 + .5·3 − 2/2 + .25 = 2.25
#   step 4 (piece 0 + S/4): 1 + .5 + .25·4 + .25 = 2.75, 1 + .5 + .25·1 + .5 = 2.25
# Waiting: row 1 from 0 to 5.5, row 2 from 12.5 to 19. Row 1's cached token is read once by a chunk, at 1/4 s per key.
THREE = {
    "cost": step_cost(
        range(5),
        [0, 0.5, 1],
        knots=[0, 8],
        slopes_s=[0.25, 0.5],
        decode_seq_s=0.25,
        planes=[[0.125, 0, 0], [0, 0.25, 0.5]],
    ),
    "settings": EngineSettings(max_num_seqs=2, max_num_batched_tokens=4, block_size=2, num_kv_blocks=6),
    "requests": requests_of([0, 0, 12.5], [6, 2, 1], [2, 3, 1], cached=[0, 1, 0]),
}


@pytest.mark.parametrize("name", NAMES)
def test_three_requests_by_hand(name):
    result = engine(name)(**THREE)
    assert result.status.tolist() == [FINISHED] * 3
    assert result.arrival_s.tolist() == [0, 0, 12.5]
    assert result.scheduled_s.tolist() == [0, 5.5, 19]
    assert result.first_token_s.tolist() == [12.5, 12.5, 24]
    assert result.finish_s.tolist() == [19, 24, 24]
    np.testing.assert_allclose(result.busy_s, [5.5 + 4.5 + 4.25, 2.5 + 2.25 + 2.75, 2.25], rtol=1e-12)
    np.testing.assert_allclose(result.busy_prefill_s, [5.5 + 4.5, 2.5, 2.25], rtol=1e-12)
    np.testing.assert_allclose(result.busy_cached_s, [0, 0.25, 0], rtol=1e-12)
    assert result.recompute_s.tolist() == [0, 0, 0]
    assert (result.idle_s, result.end_s, result.itl_max_s) == (0, 24, 6.5)
    assert result.steps_by_tokens.tolist() == [0, 0, 2, 1, 1]
    assert result.steps_by_rows.tolist() == [1, 0, 3]
    assert (result.itl_counts == itl_counts(6.5, 6.5, 5)).all()
    expected = {
        "steps": 4,
        "dense_tokens": 11,
        "decode_tokens": 3,
        "decode_keys": 14,
        "prefill_pairs": 24,
        "prefill_keys": 13,
        "window_decode_keys": 0,
        "window_prefill_pairs": 0,
        "window_prefill_keys": 0,
        "chunks": 4,
        "rows": 6,
        "preemptions": 0,
        "recomputed_tokens": 0,
        "decode_attention_s": 3.5 + 1.25,
        "prefill_attention_s": 1.5 + 3 + 0.75,
        "running_s": 5.5 * 1 + 7 * 2 + 6.5 * 2 + 5 * 2,
        "waiting_s": 5.5 + 6.5,
        "kv_blocks_s": 5.5 * 2 + 7 * 4 + 6.5 * 6 + 5 * 3,
        "max_running": 2,
        "max_waiting": 1,
        "max_kv_blocks": 6,
    }
    assert {key: result.totals[key] for key in expected} == expected
    others = set(result.totals) - set(expected) - {"segments"}
    assert not any(result.totals[key] for key in others)


@pytest.mark.parametrize("name", NAMES)
def test_three_requests_timeline(name):
    # Intervals of 8: [0, 8] holds step 1 and 2.5 of step 2; [8, 16] 4.5 of step 2 and 3.5 of step 3; [16, 24] the rest.
    timeline = engine(name)(**THREE, timeline_interval_s=8.0).timeline
    assert timeline["start_s"].tolist() == [0, 8, 16]
    np.testing.assert_allclose(timeline["running"], [10.5 / 8, 2, 2], rtol=1e-12)
    np.testing.assert_allclose(timeline["waiting"], [5.5 / 8, 3.5 / 8, 3 / 8], rtol=1e-12)
    np.testing.assert_allclose(timeline["kv_blocks"], [21 / 8, 39 / 8, 33 / 8], rtol=1e-12)
    np.testing.assert_allclose(timeline["busy_fraction"], [1, 1, 1], rtol=1e-12)


def test_three_requests_step_by_step():
    steps: list[StepRecord] = []
    simulate_reference(**THREE, on_step=steps.append)
    assert steps[2] == StepRecord(
        rank=0,
        start_s=12.5,
        end_s=19.0,
        n=2,
        B=2,
        S=10,
        P=0,
        A=0,
        K=0,
        R=2,
        SW=0,
        AW=0,
        KW=0,
        host_s=0.0,
        level=0,
        scheduled={0: 1, 1: 1},
        computed={0: 6, 1: 2},
        blocks={0: 4, 1: 2},
        free_blocks=0,
        admitted=(),
        preempted=(),
        waiting=(2,),
        loading=(),
        arrived=3,
        finished=0,
        rejected=0,
        left=0,
    )
    assert [step.running for step in steps] == [(0,), (0, 1), (0, 1), (1, 2)]


# Windows of 3 keys, no limit of memory: a sliding one sees 1 2 3 3 3 … keys at contexts 1 2 3 4 5 …, a chunked one 1 2 3 1 2 3 …
#
#   cost    dense n; g slope 1/4; 1/2 per windowed key and 1 per decoding sequence; planes A/8 + AW/4 and K/8 + P/4 + KW/2
#   engine  2 sequences, 4 tokens per step
#   rows    0: at 0, prompt 6, output 4;  1: at 0, prompt 2 of which 1 cached, output 3
#
#                                               sliding                       chunked
#   step                                        AW KW SW  time                AW KW SW  time
#   row 0 chunk 4 on 0 (A 10, K 4)               9  4     4 + max(3.5, 2.75)   7  4     4 + max(3, 2.75)
#   row 0 chunk 2 on 4; row 1 chunk 1 on 1       8  6     3 + max(3.625, 4.5)  7  5     3 + max(3.375, 4)
#     (A 13, K 8; row 0 sees keys 3 to 6, or 4 to 6; row 1 keys 1 and 2)
#   rows 0, 1 decode at contexts 7, 3                  6  2 + 2.5 + 3 + 2           4   2 + 2.5 + 2 + 2
#   rows 0, 1 decode at contexts 8, 4                  6  2 + 3 + 3 + 2             3   2 + 3 + 1.5 + 2
#   row 0 decodes at context 9                         3  1 + 2.25 + 1.5 + 1        3   1 + 2.25 + 1.5 + 1
#
# Shares, step by step: sliding 7.5 | 5, 2.5 | 5.25, 4.25 | 5.5, 4.5 | 5.75; chunked 7 | 4.5, 2.5 | 4.25, 4.25 | 5, 3.5 | 5.75
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("chunked", "ends_s", "busy_s", "busy_prefill_s", "totals"),
    [
        pytest.param(
            False, [7.5, 15, 24.5, 34.5, 40.25], [29, 11.25], [12.5, 2.5], [15, 17, 10, 20.25, 8], id="sliding"
        ),
        pytest.param(True, [7, 14, 22.5, 31, 36.75], [26.5, 10.25], [11.5, 2.5], [10, 14, 9, 17.75, 7], id="chunked"),
    ],
)
def test_windows_by_hand(name, chunked, ends_s, busy_s, busy_prefill_s, totals):
    cost = step_cost(
        range(5),
        [0] * 3,
        slopes_s=[0.25],
        decode_seq_s=1,
        planes=[[0.125, 0, 0, 0.25, 0], [0, 0.125, 0.25, 0, 0.5]],
        window=3,
        window_chunked=chunked,
        window_slope_s=0.5,
    )
    result = engine(name)(cost, EngineSettings(2, 4), requests_of([0, 0], [6, 2], [4, 3], cached=[0, 1]))
    assert result.scheduled_s.tolist() == [0, ends_s[0]]
    assert result.first_token_s.tolist() == [ends_s[1]] * 2
    assert result.finish_s.tolist() == [ends_s[4], ends_s[3]]
    np.testing.assert_allclose(result.busy_s, busy_s, rtol=1e-12)
    np.testing.assert_allclose(result.busy_prefill_s, busy_prefill_s, rtol=1e-12)
    np.testing.assert_allclose(result.busy_cached_s, [0, 0.125], rtol=1e-12)
    names = ("window_decode_keys", "window_prefill_pairs", "window_prefill_keys")
    assert [result.totals[key] for key in (*names, "decode_attention_s", "prefill_attention_s")] == totals


# Preemption: 5 blocks of 2, 8 tokens per step, a token takes 1 s and nothing else does.
# Rows 0 and 1: prompt 3, output 4; row 2: prompt 1, output 3; all at 0.
#
#   start  step
#    0     chunks 3, 3, 1 on blocks 2, 2, 1: none is free
#    7     three decodes; the new tokens fit the blocks
#   10     row 0 needs a third block: row 2, the last, is preempted. Row 1 needs one too and is itself the last:
#          preempted. Row 0 decodes alone; nobody is admitted in a step that preempted. Queue: 1, 2.
#   11     row 0 decodes. Row 1 knows 5 tokens and needs 3 blocks, 2 are free; row 2 would fit but must not overtake.
#   12     row 0 has finished. Rows 1 and 2 compute 5 and 3 tokens, 4 and 2 of them again.
#   20     row 2 has finished; row 1 decodes its last token
#   21     end
PREEMPTION = {
    "cost": step_cost(range(9), [0] * 4),
    "settings": EngineSettings(
        max_num_seqs=3, max_num_batched_tokens=8, block_size=2, num_kv_blocks=5, scheduler_reserve_full_isl=False
    ),
    "requests": requests_of([0, 0, 0], [3, 3, 1], [4, 4, 3]),
}


@pytest.mark.parametrize("name", NAMES)
def test_preemption_by_hand(name):
    result = engine(name)(**PREEMPTION)
    assert result.preemptions.tolist() == [0, 1, 1]
    assert result.scheduled_s.tolist() == [0, 0, 0]
    assert result.first_token_s.tolist() == [7, 7, 7]
    assert result.finish_s.tolist() == [12, 21, 20]
    assert (result.itl_counts == itl_counts(3, 1, 1, 3, 10, 1, 3, 10)).all()
    assert result.itl_max_s == 10
    assert result.totals["recomputed_tokens"] == 6
    assert result.totals["dense_tokens"] == 15 + 6
    assert result.totals["waiting_s"] == 2 + 2
    np.testing.assert_allclose(result.busy_s, [3 + 1 + 1 + 1, 3 + 1 + 5 + 1, 1 + 1 + 3], rtol=1e-12)
    np.testing.assert_allclose(result.recompute_s, [0, 4, 2], rtol=1e-12)


def test_preemption_step_by_step():
    steps: list[StepRecord] = []
    simulate_reference(**PREEMPTION, on_step=steps.append)
    assert [step.start_s for step in steps] == [0, 7, 10, 11, 12, 20]
    assert [step.preempted for step in steps] == [(), (), (2, 1), (), (), ()]
    assert [step.waiting for step in steps] == [(), (), (1, 2), (1, 2), (), ()]
    assert [step.admitted for step in steps] == [(0, 1, 2), (), (), (), (1, 2), ()]
    assert [step.free_blocks for step in steps] == [0, 0, 2, 2, 0, 2]


# Closed loop of two clients, one token in, one token out, 1 s per token. Think times 0 0 | 1 0 0 ½ 0 ¼ 0; row 5 is too long.
#
#   start  rows   what follows
#   0      0, 1   both finish at 2 and release row 2 (arrives at 2 + 1), then row 3 (at 2 + 0)
#   2      3      finishes at 3 and releases row 4 (at 3 + 0), which joins behind row 2
#   3      2, 4   both finish at 5 and release row 5 (at 5 + ½), then row 6 (at 5 + 0)
#   5      6      row 5 is rejected at 5.5, within the step, and releases row 7 (at 5.5 + ¼);
#                 row 6 finishes at 6 and releases row 8 (at 6 + 0)
#   6      7, 8   finish at 8
@pytest.mark.parametrize("name", NAMES)
def test_closed_loop_ties_by_hand(name):
    requests = requests_of([0, 0, 1, 0, 0, 0.5, 0, 0.25, 0], [1, 1, 1, 1, 1, 9, 1, 1, 1], [1] * 9, concurrency=2)
    settings = EngineSettings(max_num_seqs=2, max_num_batched_tokens=4, block_size=1, num_kv_blocks=4)
    result = engine(name)(step_cost(range(5), [0] * 3), settings, requests)
    assert result.status.tolist() == [FINISHED] * 5 + [REJECTED] + [FINISHED] * 3
    assert result.arrival_s.tolist() == [0, 0, 3, 2, 3, 5.5, 5, 5.75, 6]
    nan = np.nan
    np.testing.assert_array_equal(result.scheduled_s, [0, 0, 3, 2, 3, nan, 5, 6, 6])
    np.testing.assert_array_equal(result.finish_s, [2, 2, 5, 3, 5, nan, 6, 8, 8])
    assert (result.idle_s, result.end_s) == (0, 8)


# One request at a time on 4 blocks of 2 tokens; the last output token never enters the cache.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("prompt", "output", "max_tokens", "max_model_len", "status"),
    [
        pytest.param(5, 4, 4, 0, FINISHED, id="5 + 4 - 1 tokens fill the cache"),
        pytest.param(5, 5, 5, 0, REJECTED, id="one token too many for the cache"),
        pytest.param(5, 1, 5, 0, REJECTED, id="max_tokens decides, not the true output length"),
        pytest.param(5, 3, 3, 8, FINISHED, id="5 + 3 tokens are the longest allowed"),
        pytest.param(5, 4, 4, 8, REJECTED, id="one token longer than allowed"),
        pytest.param(5, 2, 4, 8, REJECTED, id="max_tokens decides about the length, too"),
    ],
)
def test_rejection_at_the_limit(name, prompt, output, max_tokens, max_model_len, status):
    settings = EngineSettings(1, 8, block_size=2, num_kv_blocks=4, max_model_len=max_model_len)
    requests = requests_of([0, 0], [prompt, 1], [output, 1], max_tokens=[max_tokens, 1])
    result = engine(name)(step_cost(range(9), [0, 0]), settings, requests)
    assert result.status.tolist() == [status, FINISHED]


# Two sequences of 3 and 5 keys meet a knot at S = 8, where g = 8 goes on with slope 3: shares are those of the piece to the
# right, -16 + 3 S: 3·3 - 16/2 and 3·5 - 16/2, after prefills of no attention time.
@pytest.mark.parametrize("name", NAMES)
def test_shares_on_a_knot_are_those_of_the_piece_to_its_right(name):
    cost = step_cost(range(9), [0, 0, 0], knots=[0, 8], slopes_s=[1, 3])
    result = engine(name)(cost, EngineSettings(2, 8), requests_of([0, 0], [2, 4], [2, 2]))
    np.testing.assert_allclose(result.busy_s, [2 + 1 + 1, 4 + 1 + 7], rtol=1e-12)
    assert result.end_s == 6 + 2 + 8


@pytest.mark.parametrize("name", NAMES)
def test_a_rejection_after_the_last_step_ends_the_run(name):
    settings = EngineSettings(max_num_seqs=2, max_num_batched_tokens=4, block_size=1, num_kv_blocks=4)
    result = engine(name)(step_cost(range(5), [0] * 3), settings, requests_of([1, 7], [1, 9], [1, 1]))
    assert result.status.tolist() == [FINISHED, REJECTED]
    assert (result.idle_s, result.end_s) == (1 + 5, 7)


@pytest.mark.parametrize("name", NAMES)
def test_no_requests(name):
    result = engine(name)(step_cost(range(5), [0] * 3), EngineSettings(2, 4), requests_of([], [], []))
    assert (result.end_s, result.idle_s, result.itl_max_s, len(result.status)) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_cost_too_short_for_the_settings_is_refused(name):
    with pytest.raises(InputError, match="max_num_batched_tokens = 8"):
        engine(name)(step_cost(range(5), [0] * 3), EngineSettings(2, 8), requests_of([0], [1], [1]))
