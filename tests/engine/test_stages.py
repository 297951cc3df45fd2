"""Pipeline stages with micro-batches in flight, against limits and closed forms. How engines agree on them is in test_mixtures.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.grouped import StageEngine
from simulator.engine.records import EngineSettings
from simulator.engine.refusals import LASTING, MEMORY, Refusal
from simulator.errors import InputError
from simulator.roofline.pipeline import flow_s
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost
from tests.engine.comparing import TIMES, assert_counts_equal, assert_equal
from tests.engine.engines import engine
from tests.engine.mixtures import random_mixture, seeded_mixtures
from tests.engine.strategies import Case, real_case, requests_of, step_cost


def run(case: Case):
    return engine("compiled")(*case)


def equal_stages(cost: StepCost, shares, send_s: float = 0.0) -> PipelineCost:
    """Stages that are multiples of one table, all of the head in the last one."""
    stages = []
    for share in shares:
        times = (
            "dense_s",
            "decode_value_s",
            "decode_slope_s",
            "decode_walk_s",
            "decode_seq_s",
            "window_slope_s",
            "prefill_planes",
        )
        stages.append(replace(cost, **{name: getattr(cost, name) * share for name in times}, head_s=0 * cost.head_s))
    stages[-1] = replace(stages[-1], head_s=cost.head_s)
    send = np.full((len(stages) - 1, len(cost.dense_s)), send_s)
    return PipelineCost(tuple(stages), send)


@pytest.mark.parametrize("seed", range(8))
def test_one_stage_is_a_plain_replica(seed):
    cost, engine_settings, requests = real_case(seed)
    one = StageEngine(PipelineCost((cost,), np.zeros((0, len(cost.dense_s)))), engine_settings, requests)
    one.advance()
    plain, found = engine("compiled")(cost, engine_settings, requests), one.result()
    assert_counts_equal(found, replace(plain, totals=plain.totals | {"padding_s": 0.0, "imbalance_s": 0.0}))
    for name in TIMES:
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(6))
def test_time_is_conserved_and_every_part_of_it_accounted_for(seed):
    cost, engine_settings, requests = real_case(seed)
    pipeline = equal_stages(cost, (0.5, 0.3, 0.4), send_s=1e-4)
    found = run(Case(pipeline, engine_settings, requests))
    total = pipeline.total
    assert found.busy_s.sum() + found.idle_s == pytest.approx(found.end_s, rel=1e-12)
    tables_s = found.steps_by_tokens @ total.dense_s[: len(found.steps_by_tokens)]
    tables_s += found.steps_by_rows @ total.head_s[: len(found.steps_by_rows)]
    parts_s = tables_s / 3 + found.totals["decode_attention_s"] + found.totals["prefill_attention_s"]
    assert parts_s == pytest.approx(found.end_s - found.idle_s, rel=1e-12)
    done = found.status == 0
    latency_s = (found.finish_s - found.arrival_s)[done].sum()
    assert found.totals["running_s"] + found.totals["waiting_s"] == pytest.approx(latency_s, rel=1e-9)


@pytest.mark.parametrize("sequences", [1, 2, 3, 4])
@pytest.mark.parametrize("times_s", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (0.25, 0.25, 4.0)])
def test_a_steady_decode_takes_the_time_of_the_closed_form(sequences, times_s):
    """A round of m micro-batches: max(Σ stages + Σ sends, m · slowest), as ``roofline.pipeline`` has it."""
    tokens, send_s = 8, 0.125
    stages = [step_cost([0, *[time_s] * tokens], [0] * 5) for time_s in times_s]
    pipeline = PipelineCost(tuple(stages), np.full((2, tokens + 1), send_s))
    engine_settings = EngineSettings(max_num_seqs=4, max_num_batched_tokens=tokens, num_kv_blocks=999)
    # A prompt fills a micro-batch, so each request has one of its own as long as there are stages.
    requests = requests_of([0.0] * sequences, [tokens] * sequences, [60] * sequences)
    found = run(Case(pipeline, engine_settings, requests))
    micro_batches = min(sequences, 3)
    round_s = max(sum(times_s) + 2 * send_s, micro_batches * max(times_s))
    rounds = np.nonzero(found.itl_counts)[0]
    assert found.itl_counts.max() >= 0.8 * found.itl_counts.sum()
    last = np.argmax(found.finish_s)
    mean_s = (found.finish_s[last] - found.first_token_s[last]) / 59
    assert len(rounds) <= 12
    assert mean_s == pytest.approx(round_s, rel=0.06)


@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_a_prompt_flows_through_the_stages_as_the_closed_form_says(chunks):
    cost = step_cost([0, *[1.0 + n / 16 for n in range(1, 17)]], [0, 0.5], planes=((1 / 256, 1 / 64, 1 / 8),))
    pipeline = equal_stages(cost, (1.0, 0.5, 2.0), send_s=0.25)
    engine_settings = EngineSettings(max_num_seqs=1, max_num_batched_tokens=16, num_kv_blocks=999)
    found = run(Case(pipeline, engine_settings, requests_of([0.0], [16 * chunks], [1])))
    works = [
        {"n": 16, "P": 1, "A": 16 * 16 * k + 16 * 17 / 2, "K": 16 * (k + 1), "R": int(k == chunks - 1)}
        for k in range(chunks)
    ]
    times_s = [[stage.step_s(**work) for stage in pipeline.stages] for work in works]
    assert found.first_token_s[0] == flow_s(times_s, [0.25, 0.25])


ONE_BY_ONE = Refusal(
    ("stages",), ("batching", "uneven experts", *MEMORY), "micro-batches go through the scheduler one by one"
)


def long_mixture(seed, features):
    """A mixture whose outputs are so long, and some of whose arrivals so far apart, that micro-batches mostly decode."""
    case = random_mixture(seed, ("stages", *features), (*LASTING, ONE_BY_ONE))
    requests, settings = case.requests, case.settings
    output = requests.output_tokens * (7 + 11 * (np.arange(len(requests)) % 3))
    longer = {"output_tokens": output, "max_tokens": output + 1, "arrival_s": requests.arrival_s * (1 + 3 * (seed % 5))}
    longest = int((requests.prompt_tokens + output).max())
    more = max(longest, int(output.sum()) // (1 + seed % 4)) // settings.block_size
    settings = replace(settings, num_kv_blocks=settings.num_kv_blocks + more, max_model_len=0)
    return Case(case.cost, settings, replace(requests, **longer))


@pytest.mark.parametrize(
    "features", [(), ("policy",), ("host",), ("clients that leave",), ("watermark",), ("bounded windows",)], ids=str
)
def test_rounds_without_the_scheduler_are_those_with_it(features):
    """Engines agree exactly where micro-batches decode for long, though one does not go through them one by one."""
    steps = segments = 0
    for seed in range(16):
        case, interval_s = long_mixture(seed, features), (None, 1.0, 7.5)[seed % 3]
        assert_equal(case, interval_s)
        totals = run(case).totals
        steps, segments = steps + totals["steps"], segments + totals["segments"]
    assert segments < 0.75 * steps


def test_two_equal_stages_nearly_double_a_full_pipeline():
    cost, engine_settings, requests = real_case(1)
    settings_of = replace(engine_settings, num_kv_blocks=4 * engine_settings.num_kv_blocks)
    at_once = replace(requests, arrival_s=0 * requests.arrival_s)
    whole = engine("compiled")(cost, settings_of, at_once)
    halves = run(Case(equal_stages(cost, (0.5, 0.5)), settings_of, at_once))
    assert whole.end_s / 2 < halves.end_s < whole.end_s


@settings(max_examples=50, deadline=None)
@given(seeded_mixtures(("stages",), LASTING), st.data())
def test_the_total_is_the_sum_of_the_stages(case, data):
    names = {"B": 30, "S": 400, "P": 9, "A": 500, "K": 300, "SW": 200, "AW": 300, "KW": 200}
    total = case.cost.total
    work = {name: data.draw(st.integers(0, most)) for name, most in names.items()}
    work |= {"n": data.draw(st.integers(0, total.max_tokens)), "R": data.draw(st.integers(0, total.max_rows))}
    work["B"] = min(work["B"], total.max_rows)
    assert total.step_s(**work) == sum(stage.step_s(**work) for stage in case.cost.stages)


def test_what_pipelines_cannot_do_is_refused():
    cost, engine_settings, requests = real_case(0)
    pipeline = equal_stages(cost, (0.5, 0.5))
    with pytest.raises(InputError, match=r"engine.expert_skew.mean = 2"):
        StageEngine(pipeline, replace(engine_settings, expert_skew=ExpertSkew(2.0)), requests)
    with pytest.raises(InputError, match="sums 2 pipeline stages"):
        engine("compiled")(pipeline.total, engine_settings, requests)
    with pytest.raises(InputError, match="send_s"):
        PipelineCost(pipeline.stages, pipeline.send_s[:, :-1])
    with pytest.raises(InputError, match="as many tokens"):
        PipelineCost((cost, replace(cost, dense_s=cost.dense_s[:-1])), pipeline.send_s)
    with pytest.raises(InputError, match="ranks"):
        PipelineCost((cost, replace(cost, ranks=2)), pipeline.send_s)
