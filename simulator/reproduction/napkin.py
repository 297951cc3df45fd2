"""The web agent on Llama-3-70B and TPU v5e: a published estimate, what it leaves out, and what a simulation says.

An agent re-sends 131,072 tokens of context, 8,192 of them new, gets 128 tokens back and acts once a second, 0.25 s of
which is overhead. The slide's arithmetic is kept as it stands, faults included; every other figure comes from the
catalogue, the roofline and the engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from simulator.catalog.architecture import Architecture
from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.roofline.collectives import all_gather_s, all_reduce_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.ops import StepShape, merge_ops, step_op_groups
from simulator.roofline.precision import parse_precision

CONTEXT, NEW, OUTPUT = 131_072, 8_192, 128
CACHED = CONTEXT - NEW
GOAL_S, AGENT_OVERHEAD_S = 1.0, 0.25
LEFT_S = GOAL_S - AGENT_OVERHEAD_S
QPS = 10_000


def as_written() -> dict[str, float]:
    """The slide's own arithmetic, step by step. The only literals in this module that stand for an answer's input."""
    L, D, H, V, K, E = 80, 8192, 64, 8, 128, 128_256
    F = 3.5 * D
    nparam = L * (3 * D * F + 2 * D * K * H + 2 * V * D * H) + E * D
    prefill_1 = 2 * NEW * nparam / 197e12
    prefill_16 = prefill_1 / 16
    budget = (0.75 - prefill_16) / OUTPUT
    kv = 2 * V * L * K * CONTEXT
    step = (kv + nparam) / 2 / 819e9 / 8
    chip_seconds = prefill_1 + budget * OUTPUT * 8
    return {
        "nparam": nparam / 1e9,
        "prefill_1": prefill_1,
        "prefill_chips": prefill_1 / 0.5,
        "prefill_16": prefill_16,
        "token_budget": budget * 1e3,
        "kv_elements": kv / 1e9,
        "decode_bytes": (kv + nparam) / 2 / 1e9,
        "full_step": step * 1e3,
        "acceptance": step / budget,
        "chip_seconds": chip_seconds,
        "chips": chip_seconds * QPS,
    }


def deployment(
    slice_spec: str, *, real: bool = False, max_num_seqs: int = 256, max_num_batched_tokens: int = NEW
) -> Deployment:
    """Llama-3-70B with int4 weights and cache.

    As the slide has it: no scales, the head quantised too, 100 % of peak, nothing but weights and KV crossing HBM. ``real``: scales
    counted, head in bf16, the chip family's efficiencies and overheads.
    """
    return Deployment(
        architecture=_model(),
        slice=resolve_slice(slice_spec),
        precision=parse_precision("w4a16kv4" if real else "w4a16kv4g0", quantize_head=not real),
        efficiency=None if real else IDEAL,
        activation_traffic=real,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


@cache
def _model() -> Architecture:
    return load_model("llama-3-70b")


def peak_flops_per_s() -> float:
    """Datasheet bf16 rate of one v5e. [FLOP/s]"""
    return resolve_slice("tpu-v5e:1").chip.peak_flops_per_s("bf16")


def linear_flops(tokens: int, *, rows: int = 1) -> float:
    """FLOPs of the matrix products for ``tokens`` tokens and ``rows`` rows of logits. [FLOP]"""
    shape = replace(StepShape.prefill(tokens), R=rows)
    return float(
        sum(op.flops for op in merge_ops(step_op_groups(deployment("tpu-v5e:1"), shape)) if op.kind == "matmul")
    )


def attention_flops(new: int, cached: int) -> float:
    """FLOPs of causal attention of ``new`` tokens on ``cached`` ones. [FLOP]"""
    shape = StepShape.prefill(new, cached)
    return float(
        sum(op.flops for op in merge_ops(step_op_groups(deployment("tpu-v5e:1"), shape)) if op.kind == "attention")
    )


def prefill_s(chips: int = 1) -> float:
    """Incremental prefill at 100 % of peak, no interconnect. [s]"""
    return (linear_flops(NEW) + attention_flops(NEW, CACHED)) / peak_flops_per_s() / chips


@dataclass(frozen=True)
class DecodeBytes:
    """HBM traffic of one decode step, all chips. [bytes]"""

    weights: float
    kv: float


@cache
def decode_bytes(batch: int = 1, context: float = CONTEXT, precision: str = "w4a16kv4g0") -> DecodeBytes:
    """Bytes of the layers' matrices, the output head and the KV cache read by one decode step."""
    d = replace(deployment("tpu-v5e:2x4"), precision=parse_precision(precision, quantize_head=True))
    ops = merge_ops(step_op_groups(d, StepShape.decode(batch, context)))
    return DecodeBytes(
        weights=d.chips * float(sum(op.weight_bytes for op in ops if op.kind == "matmul")),
        kv=d.chips * float(sum(op.kv_read_bytes for op in ops)),
    )


def decode_step_s(batch: int = 1, context: float = CONTEXT, bits: float = 4.0) -> float:
    """Decode step on 2x4 at 100 % of HBM bandwidth, no interconnect; ``bits`` per value with scales. [s]"""
    moved = decode_bytes(batch, context)
    return (moved.weights + moved.kv) * bits / 4 / (8 * resolve_slice("tpu-v5e:2x4").chip.hbm_bandwidth_bytes_per_s)


def accounted_chip_seconds(prefill_1_s: float, prefill_chips: int) -> float:
    """The slide's accounting: prefill, plus 8 chips for whatever time prefill leaves of 0.75 s. [s]"""
    return prefill_1_s + (LEFT_S - prefill_1_s / prefill_chips) * 8


def rows_ours() -> Mapping[str, Callable[[], float]]:
    """Our side of ``data/napkin.csv``."""
    written = as_written()
    counts = count(_model())
    price = resolve_slice("tpu-v5e:1").chip.default_price.usd_per_chip_hour
    kv_token = {"bf16": 2 * counts.kv_elements_per_token, "int4": counts.kv_elements_per_token / 2}
    activations = NEW * _model().d_model * 2.0
    wrapped = tuple(replace(d, wraps=(True,) * len(d.dims)) for d in resolve_slice("tpu-v5e:4x4").domains)

    def gather(*, nominal: bool = False, wraps: bool = False) -> float:
        links = wrapped if wraps else resolve_slice("tpu-v5e:4x4", nominal_links=nominal).domains
        return float(all_gather_s(activations, links))

    token = _model().d_model * 2.0
    ours: dict[str, Callable[[], float]] = {name: partial(float, value) for name, value in written.items()}
    ours |= {
        "total": lambda: counts.total,
        "bug1": lambda: counts.total - counts.embedding - counts.norms,
        "linear_flops": lambda: linear_flops(NEW),
        "linear_s": lambda: linear_flops(NEW) / peak_flops_per_s(),
        "linear_all_heads_flops": lambda: linear_flops(NEW, rows=NEW),
        "linear_all_heads_s": lambda: linear_flops(NEW, rows=NEW) / peak_flops_per_s(),
        "linear_2tn_flops": lambda: 2 * NEW * counts.total,
        "linear_2tn_s": lambda: 2 * NEW * counts.total / peak_flops_per_s(),
        "attention_flops": lambda: attention_flops(NEW, CACHED),
        "attention_s": lambda: attention_flops(NEW, CACHED) / peak_flops_per_s(),
        "attention_on_top_flops": lambda: attention_flops(NEW, CONTEXT),
        "attention_on_top_s": lambda: attention_flops(NEW, CONTEXT) / peak_flops_per_s(),
        "attention_rectangle_flops": lambda: _rectangle_flops(NEW, CONTEXT),
        "attention_rectangle_s": lambda: _rectangle_flops(NEW, CONTEXT) / peak_flops_per_s(),
        "attention_inside_flops": lambda: attention_flops(NEW, 0),
        "attention_inside_s": lambda: attention_flops(NEW, 0) / peak_flops_per_s(),
        "incremental_s": prefill_s,
        "incremental_chips": lambda: prefill_s() / 0.5,
        "incremental_chips_750": lambda: prefill_s() / LEFT_S,
        "prefill_4x4": lambda: prefill_s(16),
        "prefill_4x8": lambda: prefill_s(32),
        "left_4x8": lambda: LEFT_S - prefill_s(32),
        "budget_4x8": lambda: (LEFT_S - prefill_s(32)) / OUTPUT * 1e3,
        "prefill_8x8": lambda: prefill_s(64),
        "left_8x8": lambda: LEFT_S - prefill_s(64),
        "budget_8x8": lambda: (LEFT_S - prefill_s(64)) / OUTPUT * 1e3,
        "scratch_linear_s": lambda: linear_flops(CONTEXT) / peak_flops_per_s(),
        "scratch_attention_s": lambda: attention_flops(CONTEXT, 0) / peak_flops_per_s(),
        "scratch_s": lambda: (linear_flops(CONTEXT) + attention_flops(CONTEXT, 0)) / peak_flops_per_s(),
        "corrected_bytes": lambda: (decode_bytes().weights + decode_bytes().kv) / 1e9,
        "corrected_step": lambda: decode_step_s() * 1e3,
        "mean_context_step": lambda: decode_step_s(context=CONTEXT + (OUTPUT - 1) / 2) * 1e3,
        "scaled_step": lambda: decode_step_s(bits=4.5) * 1e3,
        "decode_flops": _decode_flops,
        "decode_flops_s": lambda: _decode_flops() / (8 * peak_flops_per_s()) * 1e3,
        "memory": lambda: (counts.total / 2 + decode_bytes().kv) / 1e9,
        "batch_8_step": lambda: decode_step_s(batch=8) * 1e3,
        "batch_8_token": lambda: decode_step_s(batch=8) / 8 * 1e3,
        "acceptance_8x8": lambda: decode_step_s() / ((LEFT_S - prefill_s(64)) / OUTPUT),
        "acceptance_4x8": lambda: decode_step_s() / ((LEFT_S - prefill_s(32)) / OUTPUT),
        "corrected_chip_seconds": lambda: accounted_chip_seconds(prefill_s(), 64),
        "corrected_chips": lambda: accounted_chip_seconds(prefill_s(), 64) * QPS,
        "charged_chip_seconds": lambda: prefill_s() + OUTPUT * decode_step_s() * 8,
        "cost": lambda: accounted_chip_seconds(prefill_s(), 64) / 3600 * price,
        "cost_written": lambda: written["chip_seconds"] / 3600 * price,
        "kv_moved_bf16": lambda: NEW * kv_token["bf16"] / 1e9,
        "kv_moved_int4": lambda: NEW * kv_token["int4"] / 1e9,
        "kv_restored_bf16": lambda: CACHED * kv_token["bf16"] / 1e9,
        "kv_restored_int4": lambda: CACHED * kv_token["int4"] / 1e9,
        "ici_corner": lambda: gather() * 1e3,
        "ici_prefill": lambda: 4 * _model().n_layers * gather(),
        "ici_prefill_nominal": lambda: 4 * _model().n_layers * gather(nominal=True),
        "ici_prefill_wrapped": lambda: 4 * _model().n_layers * gather(wraps=True),
        "ici_decode": lambda: (
            2 * _model().n_layers * float(all_reduce_s(token, resolve_slice("tpu-v5e:2x4").domains)) * 1e3
        ),
    }
    return ours


def _rectangle_flops(new: int, context: int) -> float:
    """Attention FLOPs if every new token attended to the whole context. [FLOP]"""
    per_pair = attention_flops(1, 0)
    return per_pair * new * context


def _decode_flops() -> float:
    d = deployment("tpu-v5e:2x4")
    return d.chips * float(sum(op.flops for op in merge_ops(step_op_groups(d, StepShape.decode(1, CONTEXT)))))
