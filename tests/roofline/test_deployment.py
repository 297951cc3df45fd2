"""What a deployment refuses, what it derives, and what it tells."""

from dataclasses import replace

import pytest

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError, UnpriceableError
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape, step_ops
from simulator.roofline.precision import Precision, parse_precision

EIGHT = load_model("llama-3-8b")


def deployment(spec="h100-sxm:1", **settings):
    return Deployment(EIGHT, resolve_slice(spec), **settings)


def test_what_cannot_be_priced_is_refused_by_name():
    gemma = load_model("gemma-3-27b")
    local, other = gemma.layers
    wider = other.model_copy(update={"mixer": other.mixer.model_copy(update={"window": 4096})})
    odd = gemma.model_copy(update={"layers": (local, wider)})
    with pytest.raises(UnpriceableError, match=r"^gemma-3-27b: not priced yet: attention windows of several sizes$"):
        Deployment(odd, resolve_slice("h100-sxm:8"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2}, r"tp = 2 on h100-sxm:8 \(8 chips\): tp must be 8; several replicas belong in the scenario"),
        ({"tp": 16}, r"tp = 16 on h100-sxm:8 .* tensor parallelism spans the whole slice"),
        ({"tp": 0}, r"tp = 0: must be at least 1"),
        ({"overlap": 1.5}, r"overlap = 1\.5: must be 0 … 1"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization = 0: must be above 0"),
        ({"max_num_seqs": 0}, r"max_num_seqs = 0: must be at least 1"),
        ({"workspace_bytes": -1.0}, r"workspace_bytes = -1\.0: must not be negative"),
        ({"kv_layout": "odd"}, r"kv_layout = .odd.: must be .heads., .even. or .batch."),
        ({"efficiency": replace(IDEAL, matmul=1.01)}, r"efficiency\.matmul = 1\.01: must be above 0 and at most 1"),
        ({"efficiency": replace(IDEAL, kv=0.0)}, r"efficiency\.kv = 0\.0: must be above 0"),
        ({"efficiency": replace(IDEAL, op_overhead_s=-1e-6)}, r"efficiency\.op_overhead_s = -1e-06: .* not negative"),
        ({"precision": Precision("bf16", "int8")}, r"weights \(bf16\) wider than activations \(int8\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        deployment("h100-sxm:8", **settings)


def test_heads_that_do_not_divide_are_refused_with_what_would(architecture):
    with pytest.raises(InputError, match=r"has 12 query heads, which 8 does not divide; allowed: 1, 2, 3, 4, 6, 12$"):
        Deployment(architecture(H=12, K=12, F=1536), resolve_slice("h100-sxm:8"))
    with pytest.raises(InputError, match=r"has 1025 feed-forward columns, which 8 does not divide; allowed: 1$"):
        Deployment(architecture(F=1025), resolve_slice("h100-sxm:8"))


def test_kv_heads_that_neither_divide_nor_are_divided_are_refused(architecture):
    uneven = architecture(H=24, K=6, F=1536)
    with pytest.raises(InputError, match=r"tp = 4: neither divides the 6 KV heads"):
        Deployment(uneven, resolve_slice("h100-sxm:4"))
    assert Deployment(uneven, resolve_slice("h100-sxm:4"), kv_layout="even").kv_copies == pytest.approx(1)


@pytest.mark.parametrize(
    ("chip", "precision", "computes_in", "noted"),
    [
        ("h100-sxm:1", "fp8", "fp8", False),
        ("tpu-v5e:1x1", "fp8", "bf16", True),
        ("tpu-v6e:1x1", "int8", "int8", False),
        ("tpu-v6e:1x1", "w8a16", "bf16", False),
        ("a100-80-sxm:1", "fp8", "bf16", True),
        ("v100-32-sxm:1", "bf16", "fp16", True),
        ("h100-sxm:1", "w4a16", "bf16", False),
        ("h100-sxm:1", "wfp4afp4", "fp8", True),
    ],
)
def test_products_fall_to_the_next_format_the_chip_has(chip, precision, computes_in, noted):
    d = deployment(chip, precision=parse_precision(precision))
    assert d.compute_dtype == computes_in
    assert bool(d.notes) == noted
    # The weights stay in their format whatever the products run in.
    plain = deployment(chip, precision=replace(d.precision, activations="bf16"))
    loads = [{op.name: op.weight_bytes for op in step_ops(x, StepShape.decode(1, 1))} for x in (d, plain)]
    assert loads[0] == loads[1]


def test_defaults_are_the_chips_own():
    d = deployment("tpu-v6e:2x2")
    assert d.eff == d.slice.chip.efficiency
    assert d.chips == 4
    assert d.splits_tokens
    assert not deployment("h100-sxm:2").splits_tokens
    assert d.notes == ()
    assert deployment("tpu-v5e:2x2").notes == ("kernels of tpu-v5e are priced as measured on tpu-v6e",)
