"""What a chip's memory holds: weights, activations, workspace, and the KV cache in what is left."""

from dataclasses import dataclass, replace

from simulator.catalog.architecture import MoEFFN
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError, InfeasibleError
from simulator.roofline.blocks import ffn_matrices, head_matrix, mixer_matrices, state_bytes
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernels import matrix_bytes
from simulator.roofline.ops import vector_parameters


@dataclass(frozen=True)
class MemoryFit:
    """Memory of one chip of a deployment.

    Attributes
    ----------
    capacity_bytes
        HBM of the chip. [bytes]
    usable_bytes
        ``gpu_memory_utilization`` of it: vLLM's budget for everything. [bytes]
    weights_bytes, activations_bytes, workspace_bytes
        what is taken before the KV cache. [bytes]
    kv_bytes_per_token
        that a token in a block takes on one chip, scales and copies included. [bytes]
    block_size
        tokens per KV block.
    reserved_bytes
        what ``max_num_seqs`` sequences keep besides their blocks: recurrent state, and full windows. [bytes]
    """

    capacity_bytes: float
    usable_bytes: float
    weights_bytes: float
    activations_bytes: float
    workspace_bytes: float
    kv_bytes_per_token: float
    block_size: int
    reserved_bytes: float = 0.0

    @property
    def kv_bytes(self) -> float:
        """What is left for the KV cache; negative if even the rest does not fit. [bytes]"""
        taken = self.weights_bytes + self.activations_bytes + self.workspace_bytes + self.reserved_bytes
        return self.usable_bytes - taken

    @property
    def kv_blocks(self) -> int:
        """Blocks a replica may hand out: the whole blocks that fit, less the null block vLLM keeps."""
        return max(0, int(self.kv_bytes // (self.block_size * self.kv_bytes_per_token)) - 1)

    @property
    def kv_tokens(self) -> int:
        """Tokens those blocks hold."""
        return self.kv_blocks * self.block_size

    @property
    def fits(self) -> bool:
        """Whether at least one block is left."""
        return self.kv_blocks > 0


def weights_bytes(d: Deployment) -> float:
    """Stored weights of one chip: layers with every expert, norms, embedding (once if tied), head, positions, scales. [bytes]"""
    p, arch = d.precision, d.architecture
    total = vector_parameters(d)[0] * p.wide_bytes
    if d.is_last_stage:
        total += matrix_bytes(p, head_matrix(d))
    if d.is_first_stage:
        if not (arch.tied_embeddings and d.is_last_stage):
            total += p.matrix_bytes(arch.d_model, arch.vocab_size / d.chips, head=True)
        total += arch.learned_positions * arch.d_model * p.wide_bytes / d.chips
    for count, mixer in d.mixers:
        total += count * sum(matrix_bytes(p, m) / m.gathered for m in mixer_matrices(d, mixer).values())
    for count, ffn in d.ffns:
        total += count * sum(each * matrix_bytes(p, m) / m.gathered for each, m in ffn_matrices(d, ffn).values())
    return total


def activations_bytes(d: Deployment) -> float:
    """Peak activations of a step of ``max_num_batched_tokens`` on one chip. [bytes]

    The residual stream and one normed copy, the widest pair of neighbouring tensors inside a layer (of experts: all
    that a token visits), and the logits of ``max_rows`` rows, 16-bit and FP32. An estimate: engines measure
    theirs in a profiling run.
    """
    wide = d.precision.wide_bytes
    pairs = [0.0]
    for _, mixer in d.mixers:
        *inner, out = mixer_matrices(d, mixer).values()
        pairs.append(max(m.n_out for m in inner) + out.n_in)
    for _, ffn in d.ffns:
        visits: float = ffn.top_k if isinstance(ffn, MoEFFN) else 1
        if isinstance(ffn, MoEFFN) and d.expert_chips > 1:  # a chip has a share of the visits to whole experts
            visits /= d.chips
        up, down, *_ = (m for name, (_, m) in ffn_matrices(d, ffn).items() if name.endswith((" up", " down")))
        pairs.append(visits * (up.n_out + down.n_in))
    tokens = d.max_num_batched_tokens * (2 * d.architecture.d_model + max(pairs)) * wide
    return tokens + d.max_rows * d.architecture.vocab_size * (wide + 4) * d.is_last_stage


def memory_fit(d: Deployment) -> MemoryFit:
    """How a deployment fills the memory of each of its chips, whether it fits or not.

    The cache of windowed layers is held in one of two ways, whichever leaves room for more tokens: full windows of
    ``max_num_seqs`` sequences set aside, and blocks for the other layers alone; or blocks for all layers alike, as
    engines do that keep one table of blocks. Models with windowed layers alone always do the latter.
    """
    capacity = d.slice.chip.hbm_capacity_bytes
    paged = MemoryFit(
        capacity_bytes=capacity,
        usable_bytes=capacity * d.gpu_memory_utilization,
        weights_bytes=weights_bytes(d),
        activations_bytes=activations_bytes(d),
        workspace_bytes=d.workspace_bytes,
        kv_bytes_per_token=d.kv_bytes_per_token,
        block_size=d.block_size,
        reserved_bytes=d.max_num_seqs * sequence_state_bytes(d),
    )
    full = d.kv_bytes(windowed=False)
    if not full or full == d.kv_bytes_per_token:
        return paged
    windows = d.max_num_seqs * d.window * d.kv_bytes(windowed=True)
    set_aside = replace(paged, kv_bytes_per_token=full, reserved_bytes=paged.reserved_bytes + windows)
    return max(paged, set_aside, key=lambda fit: fit.kv_blocks)


def sequence_state_bytes(d: Deployment) -> float:
    """Recurrent state of one sequence on one chip, whatever its length. [bytes]"""
    return sum(count * state_bytes(d, mixer) for count, mixer in d.mixers)


def smallest_slice(d: Deployment) -> str | None:
    """The smallest slice of the same chip, in one scale-up domain, that this deployment would fit on; None: there is none."""
    name = d.slice.spec.rpartition(":")[0]
    for spec in legal_slices(name):
        try:
            other = replace(d, slice=replace(resolve_slice(spec), chip=d.slice.chip), tp=None)
        except ChipsecondsError:  # a tensor-parallel degree this model does not have
            continue
        if memory_fit(other).fits:
            return spec
    return None


def require_fit(d: Deployment) -> MemoryFit:
    """As :func:`memory_fit`, for a deployment that must fit.

    Raises
    ------
    InfeasibleError
        If it does not; the message has the figures and the smallest slice of that chip that would do.
    """
    fit = memory_fit(d)
    if fit.fits:
        return fit
    gb = {
        "weights": fit.weights_bytes,
        f"activations at {d.max_num_batched_tokens} tokens": fit.activations_bytes,
        "workspace": fit.workspace_bytes,
    }
    if fit.reserved_bytes:
        gb[f"state and windows of {d.max_num_seqs} sequences"] = fit.reserved_bytes
    parts = " + ".join(f"{value / 1e9:.2f} GB {what}" for what, value in gb.items())
    better = smallest_slice(d)
    hint = (
        f"the smallest {better.rpartition(':')[0]} slice that holds it is {better}" if better else "no slice of it does"
    )
    raise InfeasibleError(
        f"{d.architecture.name} in {d.precision.name} does not fit on {d.slice.spec}: each chip needs {parts}, and has "
        f"{fit.usable_bytes / 1e9:.2f} GB ({d.gpu_memory_utilization:g} of {fit.capacity_bytes / 1e9:.2f} GB); {hint}"
    )
