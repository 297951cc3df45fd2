"""Multi-token-prediction modules: memory by count, and a step with some runs of them."""

import pytest

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment
from simulator.roofline.mtp import module_deployment, mtp_step
from simulator.roofline.precision import parse_precision

MODELS = ["deepseek-v3", "glm-5", "qwen3-next-80b-a3b", "qwen3.5-397b-a17b"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_parameter_count(name):
    d = Deployment(load_model(name), resolve_slice("h200-sxm:1"))
    found = mtp_step(step_report(d, decode=4, context=1000), 1)
    assert found.weights_bytes == pytest.approx(2 * count(d.architecture).mtp, rel=1e-6)


def test_a_run_reads_its_layer_and_the_head():
    d = Deployment(load_model("deepseek-v3"), resolve_slice("h200-sxm:8"))
    step = step_report(d, decode=1, context=1000)
    found = mtp_step(step, 1)
    model = count(d.architecture)
    # By hand: of the layer, 9 of 257 experts; attention, projection and head whole; a little more for small matrices and launches.
    layer = 9 * 3 * 7168 * 2048 + (model.mtp - 257 * 3 * 7168 * 2048) + 7168 * 129280
    at_best = 2 * layer / (8 * d.hbm_bytes_per_s)
    assert at_best < found.run_s < 4 * at_best


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_runs_follow_the_step_and_each_other(runs):
    d = Deployment(load_model("deepseek-v3"), resolve_slice("h200-sxm:8"), parse_precision("fp8"))
    step = step_report(d, decode=32, context=4096)
    found = mtp_step(step, runs)
    assert found.step_s == pytest.approx(step.time_s + runs * mtp_step(step, 1).run_s)
    assert found.run_s < step.time_s / 20  # one layer of 61, and the head
    assert found.memory.kv_tokens < step.memory.kv_tokens
    assert found.kv_bytes_per_token == pytest.approx(d.kv_bytes_per_token / 61)


def test_a_module_sees_every_key_even_beside_recurrent_layers():
    d = Deployment(load_model("qwen3-next-80b-a3b"), resolve_slice("h100-sxm:4"))
    assert module_deployment(d).kv_bytes_per_token > 0
    times = [mtp_step(step_report(d, decode=64, context=c), 1).run_s for c in (1000, 100_000)]
    assert times[1] > times[0]


@pytest.mark.parametrize(
    ("name", "question", "runs", "message"),
    [
        ("llama-3-8b", {"decode": 1, "context": 10}, 1, "no multi-token-prediction modules"),
        ("deepseek-v3", {"prefill": 10}, 1, "after a decode step"),
        ("deepseek-v3", {"decode": 1, "context": 10}, 0, "at least one run"),
    ],
)
def test_what_cannot_be_is_refused(name, question, runs, message):
    d = Deployment(load_model(name), resolve_slice("h200-sxm:8"))
    with pytest.raises(InputError, match=message):
        mtp_step(step_report(d, **question), runs)
