"""A serving engine's profile applied to a deployment: its cost table and its KV blocks.

The cost model prices kernels; a profile adds what an engine makes of them. Parts of a step are slowed down by kind, never
below the roofline's bound, and fixed times are added, so

    step = Σ max(slowdown · part, bound) + step + sequence·B + token·n + (kernel + eager·P)·launches

Launches of kernels measured one by one (the part ``launches``) are one of the parts: in a captured graph they are not seen, and a time
for each kernel stands for them. The latency of a collective is its own and stays with it.
"""

from dataclasses import dataclass, replace
from math import floor

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.chips import IDEAL
from simulator.catalog.engines import EngineProfile
from simulator.roofline import calibrated
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.ops import Op, decode_attention_ops, dense_ops, head_ops
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]

PARTS = ("weights", "products", "experts", "elementwise", "collective", "launches")
"""Kinds of dense time that a profile slows down on their own."""
_HELD_TOGETHER = (("weights", "products"), ("experts",), ("elementwise",), ("collective",), ("launches",))
"""Kinds held above one bound: a product that its kernel's compute bounds is often one that the datasheet's memory bounds."""


@dataclass(frozen=True, eq=False)
class KernelCost:
    """A deployment's kernels without the host: what profiles are applied to.

    Attributes
    ----------
    cost
        table without time per step or row on the host.
    ideal
        the same at datasheet rates, for one token: the bound of attention.
    dense, dense_bound, head, head_bound
        [kind] -> time of the dense ops and the head, as tables over n and R. [s]
    launches
        kernels of one step, collectives apart.
    host_steps
        times that a host prepares a step before the table's is done: more than one in a pipeline.
    """

    cost: StepCost
    ideal: StepCost
    dense: dict[str, Array]
    dense_bound: dict[str, Array]
    head: dict[str, Array]
    head_bound: dict[str, Array]
    launches: int
    host_steps: int = 1


def kernel_cost(
    d: Deployment,
    *,
    kernels: str = "",
    routing_skew: float = 0.0,
    equal_ranks: bool = False,
    bounds_of: KernelCost | None = None,
) -> KernelCost:
    """Compile a deployment for profiles of one ``routing_skew`` whose engine has the kernels of a framework, where those were measured.

    ``equal_ranks`` as in :func:`~simulator.roofline.compile.compile_step_cost`. ``bounds_of`` is the same deployment and skew at other
    efficiencies, whose bounds are the same.
    """
    d = replace(d, routing_skew=routing_skew)
    curves = d.eff.curves.of(kernels) if d.eff.curves is not None else None
    bare = replace(d, efficiency=replace(d.eff, step_overhead_s=0.0, row_overhead_s=0.0, curves=curves))
    n, rows = (np.arange(m + 1, dtype=np.float64) for m in (d.max_num_batched_tokens, d.max_num_seqs))
    if bounds_of is not None:
        return replace(
            bounds_of,
            cost=compile_step_cost(bare, equal_ranks=equal_ranks),
            dense=_kinds(dense_ops(bare, n), n.shape),
            head=_kinds(head_ops(bare, rows), rows.shape),
        )
    bound = replace(d, efficiency=IDEAL)
    return KernelCost(
        cost=compile_step_cost(bare, equal_ranks=equal_ranks),
        ideal=compile_step_cost(replace(bound, max_num_batched_tokens=1, max_num_seqs=1), equal_ranks=equal_ranks),
        dense=_kinds(dense_ops(bare, n), n.shape),
        dense_bound=_kinds(dense_ops(bound, n), n.shape),
        head=_kinds(head_ops(bare, rows), rows.shape),
        head_bound=_kinds(head_ops(bound, rows), rows.shape),
        launches=_launches(bare),
    )


def in_stages(kernels: KernelCost, pp: int) -> KernelCost:
    """A whole model's kernels as a round of ``pp`` equal micro-batches takes them, in ``pp`` stages of as many layers each.

    The last stage has the output head besides, and every stage waits for it: a round takes ``pp`` times its time, all the layers'
    and ``pp`` heads'. So does the host, which prepares a step in every stage. Sends between stages are taken to hide behind
    the wait for the head. FLOPs and bytes stay those of one micro-batch.
    """
    return replace(
        kernels,
        cost=replace(kernels.cost, head_s=pp * kernels.cost.head_s),
        head={kind: pp * part for kind, part in kernels.head.items()},
        head_bound={kind: pp * part for kind, part in kernels.head_bound.items()},
        host_steps=pp,
    )


def _launches(d: Deployment) -> int:
    """Kernels that one decode step launches, collectives apart; inputs that get scales of their own are one more for each product."""
    ops = [*dense_ops(d, 1.0), *decode_attention_ops(d, 1.0, 1.0, 1.0), *head_ops(d, 1.0)]
    own = sum(op.count for op in ops if op.kind not in {"collective", "overhead"})
    if not calibrated.quantises_inputs(d.precision) or d.compute_dtype == d.attention_dtype:
        return own
    return own + sum(op.count for op in ops if op.kind == "matmul" and op.dtype == d.compute_dtype)


def _kinds(ops: list[Op], shape: tuple[int, ...]) -> dict[str, Array]:
    found = {part: np.zeros(shape) for part in PARTS}
    for op in ops:
        found["collective" if op.kind == "collective" else "launches"] += op.overhead_s
        if op.kind == "matmul" and op.name.startswith("experts"):
            found["experts"] += op.roofline_s
        elif op.kind == "matmul":
            streams = np.asarray(op.memory_s) >= np.asarray(op.compute_s)
            found["weights"] += np.where(streams, op.roofline_s, 0.0)
            found["products"] += np.where(streams, 0.0, op.roofline_s)
        elif op.kind in found:
            found[op.kind] += op.roofline_s
    return found


def apply_profile(kernels: KernelCost, profile: EngineProfile) -> StepCost:
    """The cost table of a deployment run by an engine. Nothing falls below the roofline's bound."""
    cost, ideal = kernels.cost, kernels.ideal
    n = np.arange(len(cost.dense_s), dtype=np.float64)
    rows = np.arange(len(cost.head_s), dtype=np.float64)
    fixed = profile.step_s * kernels.host_steps + profile.kernel_s * kernels.launches
    dense = _slowed(cost.dense_s, kernels.dense, kernels.dense_bound, profile)
    dense = dense + profile.token_s * n + fixed * (n > 0)
    head = _slowed(cost.head_s, kernels.head, kernels.head_bound, profile) + 0.0 * rows
    decode = profile.decode_attention_slowdown
    slope = np.maximum(decode * cost.decode_slope_s, ideal.decode_slope_s[-1])
    # g keeps its intercept of launches; its pieces are joined again after each has been held above its bound.
    launch_s = profile.launches_slowdown * cost.decode_value_s[0]
    value = launch_s + np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(cost.decode_knots))])
    planes = profile.prefill_attention_slowdown * cost.prefill_planes
    if profile.prefill_attention_slowdown < 1:
        # The largest of both sets of planes is never below either.
        planes = np.concatenate([planes, ideal.prefill_planes])
    planes = planes + np.array([0.0, 0.0, profile.eager_s * kernels.launches, 0.0, 0.0])
    return replace(
        cost,
        dense_s=dense,
        expert_s=np.minimum(cost.expert_s, dense) if len(cost.expert_s) else cost.expert_s,
        head_s=head,
        decode_value_s=value,
        decode_slope_s=slope,
        decode_walk_s=decode * cost.decode_walk_s,
        decode_seq_s=max(decode * cost.decode_seq_s, ideal.decode_seq_s) + profile.sequence_s,
        window_slope_s=max(decode * cost.window_slope_s, ideal.window_slope_s),
        prefill_planes=planes,
        dense_parts={**cost.dense_parts, "engine": dense - cost.dense_s},
    )


def _slowed(total: Array, parts: dict[str, Array], bounds: dict[str, Array], profile: EngineProfile) -> Array:
    found = total
    for names in _HELD_TOGETHER:
        slowdowns = [getattr(profile, f"{name}_slowdown") for name in names]
        if any(slowdown != 1 for slowdown in slowdowns):
            slower = sum((slowdown - 1) * parts[name] for slowdown, name in zip(slowdowns, names, strict=True))
            found = found + np.maximum(slower, sum(bounds[name] - parts[name] for name in names))
    return found


def profile_kv_blocks(d: Deployment, profile: EngineProfile) -> int:
    """KV blocks of a replica under the engine's rule for its share of memory; 0 if nothing is left."""
    return fit_kv_blocks(memory_fit(d), profile)


def fit_kv_blocks(fit: MemoryFit, profile: EngineProfile) -> int:
    """As :func:`profile_kv_blocks`, of a memory fit; the workspace is the profile's."""
    capacity, share = fit.capacity_bytes, profile.memory_fraction
    taken = fit.weights_bytes + fit.reserved_bytes
    running = fit.activations_bytes + profile.workspace_bytes
    match profile.memory_rule:
        case "total":
            left = share * capacity - taken - running
        case "free":
            left = share * (capacity - taken - running)
        case "static":
            left = min(share * capacity, capacity - running) - taken
    return max(0, floor(left / (fit.block_size * fit.kv_bytes_per_token)) - 1)
