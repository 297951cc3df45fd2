"""Training arithmetic: identities and refusals; published runs are rows of the reproduction tables."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.training.cost import TrainingSetup, training_cost
from simulator.training.flops import megatron_iteration_flops, mfu, run_flops, training_flops
from simulator.training.memory import pipeline_idle_share, pipeline_overhead, zero_bytes_per_chip


def test_a_run_takes_its_flops_at_its_mfu():
    setup = TrainingSetup(resolve_slice("h100-sxm:8x8"), mfu=0.4, overhead=1.25)
    cost = training_cost(8e9, 15e12, setup)
    assert cost.flops == training_flops(8e9, 15e12)
    assert mfu(cost.flops, cost.chip_s, setup.slice.chip.peak_flops_per_s("bf16")) == pytest.approx(0.4 / 1.25)
    assert cost.wall_s * 64 == pytest.approx(cost.chip_s)
    assert cost.chip_hours == pytest.approx(cost.chip_s / 3600)


def test_experts_train_at_their_active_parameters():
    model = load_model("deepseek-v3")
    assert run_flops(model, 1e12) == 6e12 * count(model).active < 6e12 * count(model).total


@given(st.floats(1e6, 1e13), st.integers(1, 4096))
def test_zero_stages_hold_less_and_conserve_the_whole(parameters, chips):
    stages = [zero_bytes_per_chip(parameters, chips, stage) for stage in (0, 1, 2, 3)]
    assert all(a >= b for a, b in pairwise(stages))
    assert stages[3] * chips == pytest.approx(16 * parameters)
    assert zero_bytes_per_chip(parameters, 1, 2) == pytest.approx(stages[0])


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 8))
def test_pipeline_bubbles(stages, micro_batches, chunks):
    idle = pipeline_idle_share(stages, micro_batches, interleaved=chunks)
    assert 0 <= idle < 1
    assert pipeline_overhead(stages, micro_batches, interleaved=chunks) == pytest.approx(idle / (1 - idle))
    assert pipeline_idle_share(stages, micro_batches + 1, interleaved=chunks) <= idle


def test_recomputation_adds_a_forward_pass_of_the_layers():
    with_it = megatron_iteration_flops(8, 2048, 24, 2048, 1)
    without = megatron_iteration_flops(8, 2048, 24, 2048, 1, recompute=False)
    assert with_it / without == pytest.approx(4 / 3, rel=1e-4)


def test_bad_setups_are_refused():
    chips = resolve_slice("h100-sxm:8")
    with pytest.raises(InputError, match=r"training.mfu = 1.2"):
        TrainingSetup(chips, mfu=1.2)
    with pytest.raises(InputError, match=r"training.overhead = 0.5"):
        TrainingSetup(chips, overhead=0.5)
    with pytest.raises(InputError, match=r"training.tokens = 0"):
        training_cost(1e9, 0, TrainingSetup(chips))
    with pytest.raises(InputError, match="fp8"):
        training_cost(1e9, 1e9, TrainingSetup(resolve_slice("tpu-v4:2x2x1"), dtype="fp8"))
    with pytest.raises(InputError, match="chips = 0"):
        zero_bytes_per_chip(1e9, 0, 1)
