"""What a chip's memory holds: weights, activations, workspace, and the KV cache in what is left."""

from dataclasses import dataclass, field, replace
from math import ceil

from simulator.catalog.architecture import FeedForward, Mixer, MoEFFN
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError, InfeasibleError
from simulator.roofline.blocks import (
    ffn_matrices,
    head_matrix,
    mixer_matrices,
    mixer_vectors,
    norm_parameters,
    state_bytes,
)
from simulator.roofline.deployment import Deployment, Part
from simulator.roofline.kernels import matrix_bytes
from simulator.roofline.kv_groups import KvGroups


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
        that a token in a block takes on one chip, scales and copies included; where layers lie in ``groups``, those of one group. [bytes]
    block_size
        tokens per KV block.
    reserved_bytes
        what ``max_num_seqs`` sequences keep besides their blocks: recurrent state, and full windows. [bytes]
    groups
        how many blocks the tokens of a sequence take.
    """

    capacity_bytes: float
    usable_bytes: float
    weights_bytes: float
    activations_bytes: float
    workspace_bytes: float
    kv_bytes_per_token: float
    block_size: int
    reserved_bytes: float = 0.0
    groups: KvGroups = field(default_factory=KvGroups)

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
        """Tokens those blocks hold before any window is full."""
        return self.kv_blocks // self.groups.count * self.block_size

    @property
    def fits(self) -> bool:
        """Whether at least one block is left."""
        return self.kv_blocks >= self.groups.count


@dataclass(frozen=True)
class BlockMemory:
    """What one mixer or feed-forward block holds on one chip.

    Attributes
    ----------
    weights_bytes
        its matrices and other parameters, scales included. [bytes]
    widest
        values per token in the widest pair of neighbouring tensors inside; of experts, in all that a token visits.
    kv_bytes, windowed_kv_bytes
        cache of one token, where all keys are kept and where a window bounds it. [bytes]
    state_bytes
        recurrent state of one sequence. [bytes]
    """

    weights_bytes: float
    widest: float
    kv_bytes: float = 0.0
    windowed_kv_bytes: float = 0.0
    state_bytes: float = 0.0


def mixer_memory(d: Deployment, mixer: Mixer) -> BlockMemory:
    """What one layer's mixer holds on one chip."""
    p = d.precision
    *inner, out = matrices = list(mixer_matrices(d, mixer).values())
    return BlockMemory(
        sum(matrix_bytes(p, m) / m.gathered for m in matrices) + mixer_vectors(d, mixer)[0] * p.wide_bytes,
        max(m.n_out for m in inner) + out.n_in,
        d.layer_kv_bytes(mixer, windowed=False),
        d.layer_kv_bytes(mixer, windowed=True),
        state_bytes(d, mixer),
    )


def ffn_memory(d: Deployment, ffn: FeedForward) -> BlockMemory:
    """What one layer's feed-forward block holds on one chip, every expert included."""
    matrices = ffn_matrices(d, ffn)
    visits: float = ffn.top_k if isinstance(ffn, MoEFFN) else 1
    if isinstance(ffn, MoEFFN) and d.expert_chips > 1:  # a chip has a share of the visits to whole experts
        visits /= d.chips
    up, down, *_ = (m for name, (_, m) in matrices.items() if name.endswith((" up", " down")))
    weights = sum(count * matrix_bytes(d.precision, m) / m.gathered for count, m in matrices.values())
    return BlockMemory(weights, visits * (up.n_out + down.n_in))


@dataclass(frozen=True)
class DrafterMemory:
    """What a drafter takes on one chip of its target's slice: weights, cache of one token by kind of layer, and state of all sequences. [bytes]"""

    weights_bytes: float = 0.0
    kv_bytes: float = 0.0
    windowed_kv_bytes: float = 0.0
    state_bytes: float = 0.0


class Memory:
    """What the chips of any part of a deployment hold: sums over its blocks, each of which is looked at once.

    ``like`` is of a deployment that differs in nothing but where its experts are.
    """

    def __init__(self, d: Deployment, *, like: "Memory | None" = None) -> None:
        p, arch = d.precision, d.architecture
        self._d = d
        self.mixers: list[BlockMemory] = like.mixers if like else [mixer_memory(d, mixer) for _, mixer in d.mixers]
        self._blocks = [*self.mixers, *(ffn_memory(d, ffn) for _, ffn in d.ffns)]
        self._norm_bytes = norm_parameters(arch) * p.wide_bytes
        self._head_bytes = matrix_bytes(p, head_matrix(d))
        self._embedding_bytes = p.matrix_bytes(arch.d_model, arch.vocab_size / d.chips, head=True)
        self._position_bytes = arch.learned_positions * arch.d_model * p.wide_bytes / d.chips

    def weights_bytes(self, part: Part) -> float:
        """Stored weights: layers with every expert, norms, embedding (once if tied), head, positions, scales. [bytes]"""
        total = part.norms * self._norm_bytes
        if part.last:
            total += self._head_bytes
        if part.first:
            if not (self._d.architecture.tied_embeddings and part.last):
                total += self._embedding_bytes
            total += self._position_bytes
        return total + sum(count * block.weights_bytes for count, block in self._held(part))

    def activations_bytes(self, part: Part) -> float:
        """Peak activations of a step of ``max_num_batched_tokens``. [bytes]

        The residual stream and one normed copy, the widest pair of neighbouring tensors inside a layer, and the logits of
        ``max_rows`` rows, 16-bit and FP32. An estimate: engines measure theirs in a profiling run.
        """
        d, wide = self._d, self._d.precision.wide_bytes
        widest = max((block.widest for _, block in self._held(part)), default=0.0)
        tokens = d.max_num_batched_tokens * (2 * d.architecture.d_model + widest) * wide
        return tokens + d.max_rows * d.architecture.vocab_size * (wide + 4) * part.last

    def fit(self, part: Part, drafter: DrafterMemory | None = None) -> MemoryFit:
        """How a part fills the memory of each of its chips, with a drafter beside it, whether it fits or not.

        The cache of windowed layers is where ``Deployment.windowed_kv`` says; ``reserved`` only where there are layers of both kinds and it leaves
        room for more tokens than to keep all blocks alike.
        """
        d, drafter = self._d, drafter or DrafterMemory()
        full, windowed, state = drafter.kv_bytes, drafter.windowed_kv_bytes, drafter.state_bytes
        for count, block in self._held(part):
            full += count * block.kv_bytes
            windowed += count * block.windowed_kv_bytes
            state += count * block.state_bytes
        paged = MemoryFit(
            capacity_bytes=d.hbm_capacity_bytes,
            usable_bytes=d.hbm_capacity_bytes * d.gpu_memory_utilization,
            weights_bytes=self.weights_bytes(part) + drafter.weights_bytes,
            activations_bytes=self.activations_bytes(part),
            workspace_bytes=d.workspace_bytes,
            kv_bytes_per_token=full + windowed,
            block_size=d.block_size,
            reserved_bytes=d.max_num_seqs * state,
        )
        if windowed and d.windowed_kv == "pooled":
            groups, page = self._groups(part, drafter)
            return replace(paged, kv_bytes_per_token=page, groups=groups)
        if not full or not windowed or d.windowed_kv == "kept":
            return paged
        windows = d.max_num_seqs * d.window * windowed
        set_aside = replace(paged, kv_bytes_per_token=full, reserved_bytes=paged.reserved_bytes + windows)
        return max(paged, set_aside, key=lambda fit: fit.kv_blocks)

    def _groups(self, part: Part, drafter: DrafterMemory) -> tuple[KvGroups, float]:
        """Groups of layers with common blocks, and what a token in a block of one of them takes on one chip of a part. [bytes]

        As vLLM forms them: of as many layers as there are of the rarer kind, or of the other where it has less than half as many more. The
        last group of a kind may have fewer; its blocks are as large. A pipeline has one set of groups, of the whole model's layers, dealt out in
        turn, so that each stage has its share of every group; as stages have all kinds in the same proportion, those of a stage's layers are the same. A
        drafter's layers are among them, counted in the model's own by the bytes they take.
        """
        kinds = []
        for windowed in (False, True):
            name = "windowed_kv_bytes" if windowed else "kv_bytes"
            each = [
                (count, getattr(block, name)) for count, block in zip(part.mixers, self.mixers, strict=True) if count
            ]
            kinds.append([(count, bytes_) for count, bytes_ in each if bytes_])
        largest = max(bytes_ for kind in kinds for _, bytes_ in kind)
        for kind, drafted in zip(kinds, (drafter.kv_bytes, drafter.windowed_kv_bytes), strict=True):
            if drafted:
                of_layer = max((bytes_ for _, bytes_ in kind), default=largest)
                kind.append((ceil(drafted / of_layer), of_layer))
        layers = [sum(count for count, _ in kind) for kind in kinds]
        few, many = min(n for n in layers if n), max(layers)
        size = many if many < 1.5 * few else few
        full, windowed_groups = (-(-n // size) for n in layers)
        page = max(
            -(-n // groups) * max(bytes_ for _, bytes_ in kind)
            for kind, n, groups in zip(kinds, layers, (full, windowed_groups), strict=True)
            if n
        )
        return KvGroups(full, windowed_groups, self._d.window, self._d.window_chunked), page

    def _held(self, part: Part) -> list[tuple[int, BlockMemory]]:
        """Blocks of a part, each with its number."""
        return [held for held in zip((*part.mixers, *part.ffns), self._blocks, strict=True) if held[0]]


def memory_fit(d: Deployment, drafter: DrafterMemory | None = None) -> MemoryFit:
    """How a deployment fills the memory of each of its chips, whether it fits or not (:meth:`Memory.fit`)."""
    return Memory(d).fit(d.part, drafter)


def weights_bytes(d: Deployment) -> float:
    """Stored weights of one chip (:meth:`Memory.weights_bytes`). [bytes]"""
    return Memory(d).weights_bytes(d.part)


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
