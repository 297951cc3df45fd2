"""What fits, by how much, and what is said when it does not."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InfeasibleError
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit, require_fit, smallest_slice
from simulator.roofline.precision import parse_precision

SEVENTY = load_model("llama-3-70b")


def deployment(spec, precision="bf16", **settings):
    return Deployment(SEVENTY, resolve_slice(spec), parse_precision(precision), **settings)


def test_a_model_too_large_is_refused_with_figures_and_the_smallest_slice_that_does():
    with pytest.raises(InfeasibleError) as caught:
        require_fit(deployment("tpu-v5e:2x4"))
    message = str(caught.value)
    for part in ("llama-3-70b in bf16", "tpu-v5e:2x4", "17.64 GB weights", "0.9 of 17.18 GB", "is tpu-v5e:4x4"):
        assert part in message
    assert caught.value.exit_code == 1
    assert memory_fit(deployment("tpu-v5e:2x4")).kv_tokens == 0


def test_the_smallest_slice_fits_and_the_next_smaller_does_not():
    for precision in ("bf16", "w8a16kv8", "w4a16kv8"):
        d = deployment("tpu-v5e:2x2", precision)
        best = smallest_slice(d)
        assert memory_fit(replace(d, slice=resolve_slice(best))).fits
        for spec in ("tpu-v5e:1x1", "tpu-v5e:2x2", "tpu-v5e:2x4", "tpu-v5e:4x4"):
            if spec == best:
                break
            assert not memory_fit(replace(d, slice=resolve_slice(spec))).fits


def test_no_slice_is_said_so():
    with pytest.raises(InfeasibleError, match="no slice of it does"):
        require_fit(Deployment(load_model("llama-3.1-405b"), resolve_slice("t4:1")))


def test_capacity_adds_up():
    fit = require_fit(deployment("h100-sxm:4", "w8a16kv8"))
    used = fit.weights_bytes + fit.activations_bytes + fit.workspace_bytes
    cache = (fit.kv_blocks + 1) * fit.block_size * fit.kv_bytes_per_token  # the null block included
    assert used + cache <= fit.usable_bytes < used + cache + fit.block_size * fit.kv_bytes_per_token
    assert fit.kv_tokens == fit.kv_blocks * 16


def test_copies_of_kv_heads_cost_capacity():
    eight, sixteen = (memory_fit(deployment(s, "w8a16kv8")) for s in ("tpu-v5e:2x4", "tpu-v5e:4x4"))
    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token
    even = memory_fit(deployment("tpu-v5e:4x4", "w8a16kv8", kv_layout="even"))
    # A little more than twice: the projections of the copied heads go too.
    assert 2 * sixteen.kv_tokens < even.kv_tokens < 2.03 * sixteen.kv_tokens


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 512), st.integers(1, 32768), st.sampled_from([1, 16, 32, 64]), st.floats(0.5, 1))
def test_more_of_anything_else_leaves_fewer_tokens(seqs, tokens, block, utilization):
    small = deployment(
        "h100-sxm:4",
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=block,
        gpu_memory_utilization=utilization,
    )
    fit = memory_fit(small)
    assert memory_fit(replace(small, max_num_seqs=2 * seqs)).kv_tokens <= fit.kv_tokens
    assert memory_fit(replace(small, max_num_batched_tokens=2 * tokens)).kv_tokens <= fit.kv_tokens
    assert memory_fit(replace(small, workspace_bytes=2e9)).kv_tokens <= fit.kv_tokens
    assert memory_fit(replace(small, gpu_memory_utilization=utilization * 0.9)).kv_tokens <= fit.kv_tokens
    assert fit.kv_tokens * fit.kv_bytes_per_token <= max(0, fit.kv_bytes)
