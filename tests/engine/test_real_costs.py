"""Both engines on the tables of real deployments: windows, chunks, experts, latents, sparse attention, recurrent state."""

import numpy as np
import pytest

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.engine.records import EngineSettings, Requests
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit
from simulator.roofline.precision import parse_precision
from tests.engine.engines import engine

N = 30
PLACES = [
    ("gpt-oss-120b", "h100-sxm:2", "mxfp4-experts"),
    ("llama-4-scout", "h100-sxm:8", "fp8"),
    ("deepseek-v3", "h200-sxm:8", "fp8kv8"),
    ("glm-5", "b200:8", "nvfp4kv8"),
    ("qwen3-next-80b-a3b", "h100-sxm:4", "fp8"),
]


@pytest.mark.parametrize(("model", "slice_", "precision"), PLACES)
def test_engines_agree_on_every_kind_of_architecture(model, slice_, precision):
    d = Deployment(
        load_model(model),
        resolve_slice(slice_),
        parse_precision(precision),
        max_num_seqs=16,
        max_num_batched_tokens=2048,
    )
    assert memory_fit(d).kv_tokens > 100_000
    cost = compile_step_cost(d)
    rng = np.random.default_rng(7)
    prompts, outputs = rng.integers(10, 12_000, N), rng.integers(1, 100, N)
    arrival = np.cumsum(rng.exponential(0.05, N))
    requests = Requests(arrival, prompts, outputs, rng.integers(0, prompts), outputs)
    settings = EngineSettings(max_num_seqs=16, max_num_batched_tokens=2048, num_kv_blocks=2500)
    one, other = (engine(name)(cost, settings, requests) for name in ("reference", "compiled"))
    np.testing.assert_array_equal(one.steps_by_tokens, other.steps_by_tokens)
    np.testing.assert_allclose(one.finish_s - arrival, other.finish_s - arrival, rtol=1e-9)
    for result in (one, other):
        assert result.busy_s.sum() + result.idle_s == pytest.approx(result.end_s, rel=1e-9)
