"""A deployment: one model in one precision on one slice, with the settings that decide what a step costs."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

from simulator.catalog.architecture import Architecture, DenseFFN, SoftmaxAttention
from simulator.catalog.chips import Efficiency
from simulator.catalog.models import unpriceable_features
from simulator.catalog.slices import Slice
from simulator.errors import InputError, UnpriceableError
from simulator.roofline.precision import BITS, WIDER, Dtype, Precision

#: Context, NCCL buffers, captured graphs, compiled programs. Assumed; the sources quote 0.4 to 3.9 GB for GPUs.
WORKSPACE_BYTES = 1e9


@dataclass(frozen=True)
class Layer:
    """``count`` equal dense decoder layers, as the cost model reads them."""

    count: int
    attention: SoftmaxAttention
    ffn: DenseFFN
    n_norms: int


@dataclass(frozen=True)
class Deployment:
    """One replica, fully specified. Sizes and rates derived from it are per chip unless they say otherwise.

    Attributes
    ----------
    architecture, slice, precision
        what runs, where, in which formats.
    tp
        tensor-parallel degree; None: all chips of the slice. Must equal the chips of the slice, and divide the query
        heads and the feed-forward width. Above the number of KV heads, each chip keeps one (a copy).
    efficiency
        fractions and overheads; None: the chip's own defaults.
    max_num_seqs, max_num_batched_tokens, block_size, gpu_memory_utilization
        vLLM's settings of these names.
    workspace_bytes
        memory per chip for everything that is neither weights, KV cache nor activations. [bytes]
    overlap
        fraction of the collectives that may hide behind matrix products, 0 … 1: those of the layers and the embedding
        behind the layers' products, the exchange of logits behind the head's. Latencies of software never hide.
    kv_layout
        ``heads``: KV heads are spread over the chips, and copied when there are more chips than heads.
        ``even``: the cache is spread evenly whatever the number of heads, as by sharding over sequences or positions;
        the exchange this takes is *not* priced.
    activation_traffic
        True: inputs and outputs of every op and KV writes cross HBM. False: only weights and KV reads do, as in
        textbook rooflines.
    sequence_parallel
        True: norms and residuals are split over tokens between a reduce-scatter and an all-gather; False: every
        chip does them all after an all-reduce. The collective takes the same time. None: True on a torus.
    stage
        which of how many pipeline stages this is; the first holds the embedding, the last the final norm and the head.
        ``architecture`` has the stage's layers only (see :mod:`simulator.roofline.pipeline`).
    """

    architecture: Architecture
    slice: Slice
    precision: Precision = field(default_factory=Precision)
    tp: int | None = None
    efficiency: Efficiency | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    workspace_bytes: float = WORKSPACE_BYTES
    overlap: float = 0.0
    kv_layout: Literal["heads", "even"] = "heads"
    activation_traffic: bool = True
    sequence_parallel: bool | None = None
    stage: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """Refuse what cannot be priced, does not exist or contradicts itself."""
        unpriced = unpriceable_features(self.architecture)
        if unpriced:
            verb = "is" if len(unpriced) == 1 else "are"
            raise UnpriceableError(f"{self.architecture.name}: {' and '.join(unpriced)} {verb} not priced yet")
        self._check_sharding()
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"deployment.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"deployment.gpu_memory_utilization = {self.gpu_memory_utilization}: must be above 0 and at most 1"
            )
        if not 0 <= self.overlap <= 1:
            raise InputError(f"deployment.overlap = {self.overlap}: must be 0 … 1")
        if not 1 <= self.stage[0] <= self.stage[1]:
            raise InputError(f"deployment.stage = {self.stage}: must be (which, of how many), counted from 1")
        if not self.workspace_bytes >= 0:
            raise InputError(f"deployment.workspace_bytes = {self.workspace_bytes}: must not be negative")
        if self.kv_layout not in {"heads", "even"}:
            raise InputError(f"deployment.kv_layout = {self.kv_layout!r}: must be 'heads' or 'even'")
        if BITS[self.precision.weights] > BITS[self.precision.activations]:
            raise InputError(
                f"precision {self.precision.name}: weights ({self.precision.weights}) wider than activations "
                f"({self.precision.activations}) are computed by no engine; write w8a8 or w8a16 forms"
            )
        check_efficiency(self.eff)
        self.compute_dtype  # noqa: B018  # raises now if the chip computes in nothing wide enough
        self.attention_dtype  # noqa: B018  # as above

    def _check_sharding(self) -> None:
        tp, chips = self.chips, self.slice.n_chips
        if self.tp is not None and self.tp < 1:
            raise InputError(f"tp = {self.tp}: must be at least 1")
        if tp != chips:
            rule = (
                "several replicas belong in the scenario"
                if tp < chips and chips % tp == 0
                else "tensor parallelism spans the whole slice"
            )
            raise InputError(f"tp = {tp} on {self.slice.spec} ({chips} chips): tp must be {chips}; {rule}")
        for layer in self.layers:
            a, f = layer.attention, layer.ffn
            for what, size in (("query heads", a.n_heads), ("feed-forward columns", f.d_ff)):
                if size % tp:
                    allowed = [d for d in range(1, size + 1) if a.n_heads % d == 0 == f.d_ff % d and d <= 1024]
                    raise InputError(
                        f"tp = {tp}: {self.architecture.name} has {size} {what}, which {tp} does not divide; "
                        f"allowed: {', '.join(map(str, allowed))}"
                    )
            if self.kv_layout == "heads" and a.n_kv_heads % tp and tp % a.n_kv_heads:
                raise InputError(
                    f"tp = {tp}: neither divides the {a.n_kv_heads} KV heads of {self.architecture.name} nor is a "
                    "multiple of them; kv_layout = 'even' spreads the cache without regard to heads"
                )

    @property
    def chips(self) -> int:
        """Chips of the replica: the tensor-parallel degree."""
        return self.slice.n_chips if self.tp is None else self.tp

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding is here."""
        return self.stage[0] == 1

    @property
    def is_last_stage(self) -> bool:
        """Whether the final norm, the head and the sampler are here."""
        return self.stage[0] == self.stage[1]

    @cached_property
    def eff(self) -> Efficiency:
        """The efficiencies in force."""
        return self.slice.chip.efficiency if self.efficiency is None else self.efficiency

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The architecture's layer groups; all of them are dense decoders with full attention (checked)."""
        return tuple(
            Layer(g.count, g.mixer, g.ffn, g.n_norms)
            for g in self.architecture.layers
            if isinstance(g.mixer, SoftmaxAttention) and isinstance(g.ffn, DenseFFN)
        )

    def kv_heads_per_chip(self, layer: Layer) -> float:
        """KV heads one chip stores and reads; a fraction under ``kv_layout = "even"``."""
        share = layer.attention.n_kv_heads / self.chips
        return share if self.kv_layout == "even" else max(1.0, share)

    @property
    def kv_copies(self) -> float:
        """Copies of the KV cache over all chips (largest over the layers)."""
        return max(self.kv_heads_per_chip(x) * self.chips / x.attention.n_kv_heads for x in self.layers)

    @property
    def kv_bytes_per_token(self) -> float:
        """KV-cache bytes of one token on one chip, scales and copies included. [bytes]"""
        return sum(
            x.count * self.kv_heads_per_chip(x) * self.precision.kv_head_bytes(x.attention.head_dim)
            for x in self.layers
        )

    @property
    def splits_tokens(self) -> bool:
        """Whether norms and residuals are sharded over tokens."""
        if self.sequence_parallel is not None:
            return self.sequence_parallel
        return self.slice.domains[0].kind == "torus"

    @cached_property
    def compute_dtype(self) -> Dtype:
        """Format the linear layers' products run in on this chip."""
        return self._runs_in(self.precision.activations)

    @cached_property
    def head_dtype(self) -> Dtype:
        """Format the output head's products run in."""
        return self.compute_dtype if self.precision.quantize_head else self.attention_dtype

    @cached_property
    def attention_dtype(self) -> Dtype:
        """Format of the attention products: 16-bit whatever the cache is held in."""
        return self._runs_in(self.precision.wide)

    def _runs_in(self, dtype: Dtype) -> Dtype:
        chip = self.slice.chip
        for candidate in (dtype, *WIDER[dtype]):
            if chip.has_dtype(candidate):
                return candidate
        raise UnpriceableError(
            f"{chip.name} computes in none of {', '.join((dtype, *WIDER[dtype]))}, so "
            f"{self.precision.name} cannot run on it"
        )

    @property
    def peak_flops_per_s(self) -> float:
        """Datasheet rate of one chip in :attr:`compute_dtype`. [FLOP/s]"""
        return self.slice.chip.peak_flops_per_s(self.compute_dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know: fallbacks and copies."""
        found = []
        asked = {self.precision.activations: self.compute_dtype, self.precision.wide: self.attention_dtype}
        found += [
            f"{self.slice.chip.name} has no {want} units: {want} products run in {got}"
            for want, got in asked.items()
            if want != got
        ]
        if self.kv_copies > 1:
            found.append(
                f"{self.chips} chips share {self.layers[0].attention.n_kv_heads} KV heads: "
                f"the KV cache is held {self.kv_copies:g} times"
            )
        if self.kv_layout == "even" and any(self.chips > x.attention.n_kv_heads for x in self.layers):
            found.append("kv_layout = even: the exchange that an even KV layout needs is not priced")
        return tuple(found)


def check_efficiency(efficiency: Efficiency) -> None:
    """Refuse efficiencies that would push a time under its bound: fractions in (0, 1], overheads not negative."""
    for item in fields(efficiency):
        value = getattr(efficiency, item.name)
        if item.name.endswith("_s"):
            if not 0 <= value < float("inf"):
                raise InputError(f"efficiency.{item.name} = {value}: must be finite and not negative")
        elif not 0 < value <= 1:
            raise InputError(f"efficiency.{item.name} = {value}: must be above 0 and at most 1")
