"""Multi-token-prediction modules beside their model: what they take of the memory, and of a decode step.

A module is one layer like the model's own (attention over all keys, experts if there are any), a [2D, D] projection of the last hidden
state and the last token's embedding, and three norms; embedding and output head are the model's [1]_. It keeps a cache of its
own, reads it, and makes one token for every sequence each time it runs; further tokens take further runs, of the next module or of
the last one again. What the drafts are worth, and what checking them costs, is not decided here.

.. [1] DeepSeek-V3, as counted in :mod:`simulator.catalog.parameters` (checkpoints' totals confirm the layers).
"""

from dataclasses import dataclass, replace

from simulator.catalog.architecture import LatentAttention, LayerGroup, MoEFFN, SoftmaxAttention
from simulator.errors import InputError
from simulator.roofline.analysis import StepReport
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernels import Matrix, matmul_op, matrix_bytes, memory_op
from simulator.roofline.memory import MemoryFit, weights_bytes
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
    matrix = _projection(d)
    shape = StepShape.decode(int(step.B), step.S / step.B, window=module.window, chunked=module.window_chunked)
    norms = memory_op(
        d,
        "norms of the inputs",
        2,
        1.0,
        weight_bytes=2 * d.architecture.d_model * d.precision.wide_bytes,
        activation_bytes=step.B * 4 * d.architecture.d_model * d.precision.wide_bytes,
    )
    project = matmul_op(d, "input projection", 1, matrix, step.B)
    run_s = step_time_s(module, shape) + float(norms.time_s) + float(project.time_s)
    own = weights_bytes(module) - weights_bytes(_without_layers(module))
    vectors = 2 * d.architecture.d_model * d.precision.wide_bytes
    weights = modules * (own + matrix_bytes(d.precision, matrix) + vectors)
    cache = modules * module.kv_bytes_per_token
    memory = replace(
        report.memory,
        weights_bytes=report.memory.weights_bytes + weights,
        kv_bytes_per_token=report.memory.kv_bytes_per_token + cache,
    )
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


def _without_layers(d: Deployment) -> Deployment:
    """What a module shares with its model: the embedding and the head."""
    return replace(d, architecture=d.architecture.model_copy(update={"layers": (), "final_norm": False}))


def _projection(d: Deployment) -> Matrix:
    return Matrix(2 * d.architecture.d_model, d.architecture.d_model / d.chips)
