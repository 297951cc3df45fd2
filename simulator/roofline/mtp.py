"""Multi-token-prediction modules beside their model: what they take of the memory, and of a decode step.

A module is one layer like the model's own (attention over all keys, experts if there are any), a [2D, D] projection of the last hidden
state and the last token's embedding, and three norms; embedding and output head are the model's [1]_. It keeps a cache of its
own, reads it, and makes one token for every sequence each time it runs; further tokens take further runs, of the next module or of
the last one again. What the drafts are worth, and what checking them costs, is not decided here.

.. [1] DeepSeek-V3, as counted in :mod:`simulator.catalog.parameters` (checkpoints' totals confirm the layers).
"""

from dataclasses import dataclass, replace

import numpy as np

from simulator.catalog.architecture import LatentAttention, LayerGroup, MoEFFN, SoftmaxAttention
from simulator.errors import InputError
from simulator.roofline.analysis import StepReport
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernels import Matrix, Number, Op, matmul_op, matrix_bytes, memory_op
from simulator.roofline.memory import DrafterMemory, MemoryFit, memory_fit, weights_bytes
from simulator.roofline.ops import StepShape


@dataclass(frozen=True)
class MtpStep:
    """A decode step and the prediction modules run after it.

    Attributes
    ----------
    runs
        runs per step, one token for every sequence each.
    run_s
        time of one run. [s]
    step_s
        of the model's own step and all runs. [s]
    weights_bytes, kv_bytes_per_token
        that all modules add on one chip. [bytes]
    memory
        of one chip with them.
    """

    runs: int
    run_s: float
    step_s: float
    weights_bytes: float
    kv_bytes_per_token: float
    memory: MemoryFit


def mtp_step(report: StepReport, runs: int) -> MtpStep:
    """``runs`` runs of the prediction modules after a decode step.

    Raises
    ------
    InputError
        If the step is no decode step, or the model has no such modules.
    """
    d, step = report.deployment, report.step
    name, modules = d.architecture.name, d.architecture.mtp_layers
    if not modules:
        raise InputError(f"mtp = {runs}: {name} has no multi-token-prediction modules")
    if runs < 1:
        raise InputError(f"mtp = {runs}: at least one run")
    if not step.B or step.P:
        raise InputError("mtp: modules predict after a decode step; give decode and context")
    module = module_deployment(d)
    shape = StepShape.decode(int(step.B), step.S / step.B, window=module.window, chunked=module.window_chunked)
    run_s = step_time_s(module, shape) + sum(float(op.time_s) for op in input_ops(d, step.B))
    weights = modules * module_weights_bytes(d)
    cache = modules * module.kv_bytes_per_token
    kinds = (modules * module.kv_bytes(windowed=windowed) for windowed in (False, True))
    memory = memory_fit(d, DrafterMemory(weights, *kinds))
    return MtpStep(runs, run_s, report.time_s + runs * run_s, weights, cache, memory)


def module_deployment(d: Deployment) -> Deployment:
    """One module's layer with the model's embedding and head, on the model's chips; it has no step overhead of its own."""

    def rank(group: LayerGroup) -> tuple[bool, bool, bool]:
        m = group.mixer
        everything = isinstance(m, LatentAttention) or (isinstance(m, SoftmaxAttention) and m.window is None)
        return isinstance(m, SoftmaxAttention | LatentAttention), everything, isinstance(group.ffn, MoEFFN)

    group = max((g for g in d.architecture.layers if g.mixer is not None and g.ffn is not None), key=rank)
    layers = (group.model_copy(update={"count": 1}),)
    architecture = d.architecture.model_copy(update={"layers": layers, "mtp_layers": 0})
    return replace(d, architecture=architecture, efficiency=replace(d.eff, step_overhead_s=0.0, row_overhead_s=0.0))


def input_ops(d: Deployment, n: Number) -> list[Op]:
    """Norms and projection of a module's two inputs for ``n`` tokens."""
    width, wide, some = d.architecture.d_model, d.precision.wide_bytes, np.greater(n, 0) * 1.0
    norms = memory_op(
        d,
        "norms of the inputs",
        2,
        some,
        weight_bytes=some * (2 * width * wide),
        activation_bytes=n * (4 * width * wide),
    )
    return [norms, matmul_op(d, "input projection", 1, _projection(d), n)]


def module_weights_bytes(d: Deployment) -> float:
    """Weights of one module on one chip: its layer, projection and norms, without the model's embedding and head. [bytes]"""
    module = module_deployment(d)
    own = weights_bytes(module) - weights_bytes(_without_layers(module))
    return own + matrix_bytes(d.precision, _projection(d)) + 2 * d.architecture.d_model * d.precision.wide_bytes


def _without_layers(d: Deployment) -> Deployment:
    """What a module shares with its model: the embedding and the head."""
    return replace(d, architecture=d.architecture.model_copy(update={"layers": (), "final_norm": False}))


def _projection(d: Deployment) -> Matrix:
    return Matrix(2 * d.architecture.d_model, d.architecture.d_model / d.chips)
