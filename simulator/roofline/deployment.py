"""A deployment: one model in one precision on one slice, with the settings that decide what a step costs."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import gcd, prod
from typing import Literal

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    LayerGroup,
    Mamba2,
    Mixer,
    SoftmaxAttention,
)
from simulator.catalog.chips import IDEAL, Efficiency, quantity_si
from simulator.catalog.models import attention_windows, unpriceable_features
from simulator.catalog.slices import LinkDomain, Slice
from simulator.errors import InputError, UnpriceableError
from simulator.roofline.layouts import AxisSplit, parse_layout, split_axes
from simulator.roofline.layouts import FeedForward as Widths
from simulator.roofline.precision import BITS, WIDER, Dtype, Precision

#: Context, NCCL buffers, captured graphs, compiled programs. Assumed; the sources quote 0.4 to 3.9 GB for GPUs.
WORKSPACE_BYTES = 1e9

#: Two vector operations per weight, convert and scale, on units a 16th as fast as the matrix units. Assumed.
DEQUANTIZATION_FLOPS = 32.0


@dataclass(frozen=True, eq=False)
class Part:
    """Some layers of a model, such as those of a pipeline stage, in the numbers that memory and time are linear in.

    Parts are compared by identity, as :func:`part_of` makes equal ones only once.

    Attributes
    ----------
    mixers, ffns, pairs
        layers with each of the model's different mixers, feed-forward blocks, and pairs of the two, in the order of
        :func:`mixers_of`, :func:`ffns_of` and :func:`pairs_of`.
    norms, reductions
        norms of the model's width, the one before the head included; and all-reduces: one after each block, and one for
        both where attention and feed-forward are parallel.
    first, last
        whether the embedding, and whether the head belongs to it.
    """

    mixers: tuple[int, ...]
    ffns: tuple[int, ...]
    pairs: tuple[int, ...]
    norms: int
    reductions: int
    first: bool
    last: bool


@lru_cache(maxsize=4096)
def part_of(architecture: Architecture, layers: tuple[LayerGroup, ...], *, first: bool, last: bool) -> Part:
    """Count what ``layers``, which are among those of ``architecture``, are made of."""
    mixers, ffns = dict.fromkeys(mixers_of(architecture), 0), dict.fromkeys(ffns_of(architecture), 0)
    pairs = dict.fromkeys(pairs_of(architecture), 0)
    norms, reductions = int(architecture.final_norm and last), 0
    for group in layers:
        if group.mixer is not None:
            mixers[group.mixer] += group.count
        if group.ffn is not None:
            ffns[group.ffn] += group.count
        pairs[group.mixer, group.ffn] += group.count
        norms += group.count * group.n_norms
        blocks = (group.mixer is not None) + (group.ffn is not None)
        reductions += group.count * (1 if architecture.parallel_attention_ffn else blocks)
    counts = tuple(mixers.values()), tuple(ffns.values()), tuple(pairs.values())
    return Part(*counts, norms, reductions, first, last)


@lru_cache
def mixers_of(architecture: Architecture) -> tuple[Mixer, ...]:
    """The different mixers of the layers; windowed and full ones differ."""
    return tuple(dict.fromkeys(g.mixer for g in architecture.layers if g.mixer is not None))


@lru_cache
def ffns_of(architecture: Architecture) -> tuple[FeedForward, ...]:
    """The different feed-forward blocks of the layers."""
    return tuple(dict.fromkeys(g.ffn for g in architecture.layers if g.ffn is not None))


@lru_cache
def pairs_of(architecture: Architecture) -> tuple[tuple[Mixer | None, FeedForward | None], ...]:
    """The different pairs of mixer and feed-forward block that a layer has."""
    return tuple(dict.fromkeys((g.mixer, g.ffn) for g in architecture.layers))


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
        ``batch``: each sequence's cache is on one chip; queries and outputs of a decode change places in two all-to-alls
        per layer, a prefill gathers its keys, and the busiest chip sets the pace.
    layout
        where the weights of a layer are: ``1d``, split over heads and feed-forward columns; ``2d``, over d_model too;
        ``gathered``, put together before use while tokens are split. ``2d-x``, ``gathered-xy`` … name the axes of the
        torus that d_model is split over, or weights are gathered over (see :mod:`simulator.roofline.layouts`).
    looped_exchange
        how a two-dimensional layout exchanges: False, one collective over all axes of a group, and nothing hides but what
        ``overlap`` says; True, as the published code does (see :mod:`simulator.roofline.exchange`).
    activation_traffic
        True: inputs and outputs of every op and KV writes cross HBM. False: only weights and KV reads do, as in
        textbook rooflines, and unpacking weights is free.
    sequence_parallel
        True: norms and residuals are split over tokens between a reduce-scatter and an all-gather; False: every
        chip does them all after an all-reduce. The collective takes the same time. None: True on a torus.
    dequantization_flops
        what unpacking and scaling one weight costs a product in a wider format, in FLOPs of the matrix units' rate; paid
        for each weight read and again for each further 128 rows. Nothing at :data:`~simulator.catalog.chips.IDEAL`. [FLOP]
    expert_imbalance
        factor of at least 1 on the time of routed experts: the busiest against the mean. Routing is even at 1.
    routing_skew
        exponent of the popularity of experts by rank; 0: all alike. Popular experts are touched by many tokens, so fewer of the
        others' weights are read.
    stage
        which of how many pipeline stages this is; the first holds the embedding, the last the final norm and the head.
        ``architecture`` has the stage's layers only (see :mod:`simulator.roofline.pipeline`).
    expert_domains
        links of the chips over which whole routed experts are spread, innermost level first; none: every chip has a
        share of every expert. More chips than ``tp`` are further attention ranks, each with as many tokens as this
        one (see :mod:`simulator.roofline.sharding`).
    decode_tokens
        tokens, and logit rows, that a decoding sequence may have in a step: more than 1 with speculative decoding.
    context_domains
        links of the chips over which the tokens of a prompt are split, each of them with all the layers; steps are those of
        one of them.
    windowed_kv
        where the KV of windowed layers is: ``pooled``, in blocks of the common pool that are given back once the window has left them, as
        vLLM's hybrid KV cache manager does it; ``reserved``, in full windows set aside for ``max_num_seqs`` sequences, where that leaves more
        room; ``kept``, like that of all other layers, for good.
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
    kv_layout: Literal["heads", "even", "batch"] = "heads"
    layout: str = "1d"
    looped_exchange: bool = False
    activation_traffic: bool = True
    sequence_parallel: bool | None = None
    dequantization_flops: float = DEQUANTIZATION_FLOPS
    expert_imbalance: float = 1.0
    routing_skew: float = 0.0
    stage: tuple[int, int] = (1, 1)
    expert_domains: tuple[LinkDomain, ...] = ()
    context_domains: tuple[LinkDomain, ...] = ()
    decode_tokens: int = 1
    windowed_kv: Literal["pooled", "reserved", "kept"] = "pooled"

    def __post_init__(self) -> None:
        """Refuse what cannot be priced, does not exist or contradicts itself."""
        unpriced = unpriceable_features(self.architecture)
        if unpriced:
            raise UnpriceableError(f"{self.architecture.name}: not priced yet: {', '.join(unpriced)}")
        self._check_sharding()
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "decode_tokens"):
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
        if not 0 <= self.dequantization_flops < float("inf"):
            raise InputError(f"deployment.dequantization_flops = {self.dequantization_flops}: must not be negative")
        if not 0 <= self.routing_skew <= 2:
            raise InputError(f"deployment.routing_skew = {self.routing_skew}: must be 0 … 2")
        if not 1 <= self.expert_imbalance < float("inf"):
            raise InputError(f"deployment.expert_imbalance = {self.expert_imbalance}: must be finite and at least 1")
        if self.kv_layout not in {"heads", "even", "batch"}:
            raise InputError(f"deployment.kv_layout = {self.kv_layout!r}: must be 'heads', 'even' or 'batch'")
        if BITS[self.precision.weights] > BITS[self.precision.activations]:
            raise InputError(
                f"precision {self.precision.name}: weights ({self.precision.weights}) wider than activations "
                f"({self.precision.activations}) are computed by no engine; write w8a8 or w8a16 forms"
            )
        if self.windowed_kv not in {"pooled", "reserved", "kept"}:
            raise InputError(f"deployment.windowed_kv = {self.windowed_kv!r}: must be 'pooled', 'reserved' or 'kept'")
        whole = self.stage == (1, 1)  # a stage may have dense layers alone
        if self.precision.experts_only and whole and all(isinstance(ffn, DenseFFN) for _, ffn in self.ffns):
            raise InputError(f"precision {self.precision.name}: {self.architecture.name} has no routed experts")
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
            raise InputError(
                f"tp = {tp} on {self.slice.spec} ({chips} chip{'s' if chips > 1 else ''}): tp must be {chips}; {rule}"
            )
        if self.looped_exchange and self.model_chips == 1:
            raise InputError(
                f"deployment.looped_exchange with layout = {self.layout!r}: only 2d layouts exchange in loops"
            )
        if self.axis_split is not None:
            self._check_layout(self.axis_split)
            return
        if self.kv_layout == "batch":
            self._check_batch_attention()
        sizes = self._split_sizes()
        for what, size in sizes:
            if size % tp:
                common = gcd(*(size for _, size in sizes))
                allowed = [x for x in range(1, min(common, 1024) + 1) if common % x == 0]
                raise InputError(
                    f"tp = {tp}: {self.architecture.name} has {size} {what}, which {tp} does not divide; "
                    f"allowed: {', '.join(map(str, allowed))}"
                )
        for _, mixer in self.mixers:
            if isinstance(mixer, SoftmaxAttention) and self.kv_layout == "heads":
                heads = mixer.n_kv_heads
                if heads % tp and tp % heads:
                    raise InputError(
                        f"tp = {tp}: neither divides the {heads} KV heads of {self.architecture.name} nor is a "
                        "multiple of them; kv_layout = 'even' spreads the cache without regard to heads"
                    )
            if isinstance(mixer, Mamba2) and mixer.n_groups % tp and tp % mixer.n_groups:
                raise InputError(
                    f"tp = {tp}: neither divides the {mixer.n_groups} Mamba-2 groups of {self.architecture.name} nor "
                    "is a multiple of them"
                )

    def _check_layout(self, split: AxisSplit) -> None:
        """Refuse two-dimensional and gathered layouts that the model does not allow, or that nobody has described."""
        where = f"layout {split.layout} of {self.architecture.name} on {self.slice.spec}"
        if not all(isinstance(m, SoftmaxAttention) for _, m in self.mixers) or not all(
            isinstance(f, DenseFFN) for _, f in self.ffns
        ):
            raise InputError(
                f"{where}: priced for softmax attention and dense feed-forward blocks alone; use 1d, and ep for experts"
            )
        if self.context_domains:
            raise InputError(f"{where}: context parallelism splits the tokens already; use cp or the layout")
        if self.sequence_parallel is False:
            raise InputError(f"{where}: residuals are split over the chips; sequence_parallel = false contradicts that")
        if self.kv_layout == "batch":
            if split.layout.kind == "gathered":
                raise InputError(
                    f"{where}: sequences are split over axis {split.layout.axes} already; kv_layout = heads"
                )
            self._check_batch_attention()
        if self.architecture.d_model % self.chips:
            raise InputError(f"{where}: {self.chips} chips do not divide d_model = {self.architecture.d_model} evenly")
        heads = self.chips // split.gathered.size
        for what, size in self._split_sizes():
            ways = heads if what == "query heads" else split.columns.size
            if size % ways:
                raise InputError(f"{where}: {size} {what} are split over {ways} chips, which do not divide them")
        for _, mixer in self.mixers:
            kv = mixer.n_kv_heads if isinstance(mixer, SoftmaxAttention) else 1
            for ways in (heads, split.columns.size):
                if self.kv_layout == "heads" and kv % ways and ways % kv:
                    raise InputError(f"{where}: {kv} KV heads over {ways} chips; one must be a multiple of the other")

    def _check_batch_attention(self) -> None:
        where = f"kv_layout = 'batch' of {self.architecture.name} on {self.slice.spec}"
        if not all(isinstance(m, SoftmaxAttention) for _, m in self.mixers):
            raise InputError(f"{where}: sequences are spread over chips for softmax attention alone")
        if self.expert_domains or self.context_domains:
            raise InputError(f"{where}: attention ranks and context parallelism spread sequences in their own way")

    def _split_sizes(self) -> list[tuple[str, int]]:
        """What tensor parallelism divides, by name."""
        found: dict[tuple[str, int], None] = {}
        for _, mixer in self.mixers:
            match mixer:
                case SoftmaxAttention(n_heads=heads, head_dim=width) if self.kv_layout == "batch":
                    found["query columns", heads * width] = None
                case SoftmaxAttention() | LatentAttention():
                    found["query heads", mixer.n_heads] = None
                case GatedDeltaNet():
                    found["key heads", mixer.n_key_heads] = None
                case Mamba2():
                    found["Mamba-2 heads", mixer.n_heads] = None
        for _, ffn in self.ffns:
            if isinstance(ffn, DenseFFN):
                found["feed-forward columns", ffn.d_ff] = None
            else:
                if self.expert_chips == 1:
                    found["columns per expert", ffn.d_ff] = None
                if ffn.n_shared:
                    found["columns of shared experts", ffn.n_shared * (ffn.shared_d_ff or ffn.d_ff)] = None
        return list(found)

    @property
    def chips(self) -> int:
        """Chips of the replica: the tensor-parallel degree."""
        return self.slice.n_chips if self.tp is None else self.tp

    @cached_property
    def axis_split(self) -> AxisSplit | None:
        """The layout on the axes of the slice's torus; None for ``1d``."""
        layout = parse_layout(self.layout)
        if layout.kind == "1d":
            return None
        if len(self.slice.domains) > 1:
            raise InputError(
                f"layout {layout} on {self.slice.spec}: 2d and gathered layouts are laid on the axes of one torus, and it "
                "has several levels of links; use 1d"
            )
        blocks = [ffn for _, ffn in self.ffns if isinstance(ffn, DenseFFN)]
        widest = max(blocks, key=lambda ffn: ffn.d_ff, default=None)
        widths = None
        if widest is not None:
            widths = Widths(self.architecture.d_model, widest.d_ff, matrices=3 if widest.gated else 2)
        return split_axes(self.slice.domains[0], layout, widths, where=self.slice.spec)

    @cached_property
    def model_chips(self) -> int:
        """Chips over which d_model is split; 1 unless the layout is two-dimensional."""
        return 1 if self.axis_split is None else self.axis_split.model.size

    @cached_property
    def gathered_chips(self) -> int:
        """Chips that gather each other's weights and split the tokens; 1 unless the layout is gathered."""
        return 1 if self.axis_split is None else self.axis_split.gathered.size

    @cached_property
    def column_chips(self) -> int:
        """Chips over which heads and feed-forward columns are split in a product."""
        return self.chips // (self.model_chips * self.gathered_chips)

    @property
    def max_rows(self) -> int:
        """Logit rows of the largest step."""
        return min(self.max_num_seqs * self.decode_tokens, max(self.max_num_batched_tokens, self.max_num_seqs))

    @cached_property
    def expert_chips(self) -> int:
        """Chips over which whole experts are spread; 1: none are."""
        return prod(domain.size for domain in self.expert_domains)

    @property
    def expert_ranks(self) -> float:
        """Attention ranks, this one included, whose tokens meet in the experts."""
        return self.expert_chips / self.chips if self.expert_chips > 1 else 1.0

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
    def unpacking_flops(self) -> float:
        """:attr:`dequantization_flops` as charged: not in textbook rooflines, nor by the bare datasheet. [FLOP]"""
        return self.dequantization_flops if self.activation_traffic and self.eff != IDEAL else 0.0

    @cached_property
    def part(self) -> Part:
        """All of its layers."""
        arch = self.architecture
        return part_of(arch, arch.layers, first=self.is_first_stage, last=self.is_last_stage)

    @cached_property
    def mixers(self) -> tuple[tuple[int, Mixer], ...]:
        """The different mixers of the layers, each with its number."""
        return tuple(zip(self.part.mixers, mixers_of(self.architecture), strict=True))

    @cached_property
    def ffns(self) -> tuple[tuple[int, FeedForward], ...]:
        """The different feed-forward blocks of the layers, each with its number."""
        return tuple(zip(self.part.ffns, ffns_of(self.architecture), strict=True))

    @cached_property
    def pairs(self) -> tuple[tuple[int, tuple[Mixer | None, FeedForward | None]], ...]:
        """The different pairs of mixer and feed-forward block in the layers, each with its number."""
        return tuple(zip(self.part.pairs, pairs_of(self.architecture), strict=True))

    @property
    def reductions(self) -> int:
        """All-reduces of the layers."""
        return self.part.reductions

    @cached_property
    def window(self) -> int:
        """Keys that windowed layers see at most, or that sparse attention selects; 0: every layer sees all."""
        return next((window for window, _ in attention_windows(self.architecture)), 0)

    @cached_property
    def window_chunked(self) -> bool:
        """Whether windows are chunks of the context instead of sliding."""
        return any(chunked for _, chunked in attention_windows(self.architecture))

    def kv_heads_per_chip(self, attention: SoftmaxAttention) -> float:
        """KV heads one chip stores and reads; a fraction where the cache is spread without regard to heads."""
        share = attention.n_kv_heads / self.chips
        if self.kv_layout != "heads":
            return share
        return max(1.0 / self.gathered_chips, share)

    def projected_kv_heads(self, attention: SoftmaxAttention) -> float:
        """KV heads one chip computes the keys and values of, for its tokens."""
        share = attention.n_kv_heads / self.column_chips
        spread = self.kv_layout == "even" or (self.kv_layout == "batch" and self.axis_split is None)
        return share if spread else max(1.0, share)

    @property
    def gathers_keys(self) -> bool:
        """Whether a prefill collects keys that other chips hold."""
        return self.gathered_chips > 1 or (self.kv_layout == "batch" and self.chips > 1)

    def attended_kv_heads(self, attention: SoftmaxAttention) -> float:
        """KV heads that one chip's queries of a prefill attend to, where it gathers the keys."""
        return max(1.0, attention.n_kv_heads * self.gathered_chips / self.chips)

    def groups_per_chip(self, mamba: Mamba2) -> float:
        """Groups of B and C one chip computes; with more chips than groups each has a copy of one."""
        return max(1.0, mamba.n_groups / self.chips)

    @property
    def latent_share(self) -> float:
        """Part of each latent one chip stores: all of it, as every head attends to it, unless the layout is even."""
        return 1 / self.chips if self.kv_layout == "even" else 1.0

    @property
    def kv_copies(self) -> float:
        """Copies of the KV cache over all chips (largest over the layers)."""
        copies = [1.0]
        for _, mixer in self.mixers:
            if isinstance(mixer, SoftmaxAttention):
                copies.append(self.kv_heads_per_chip(mixer) * self.chips / mixer.n_kv_heads)
            elif isinstance(mixer, LatentAttention):
                copies.append(self.latent_share * self.chips)
        return max(copies)

    def kv_bytes(self, *, windowed: bool) -> float:
        """KV-cache bytes of one token on one chip in the layers whose cache a window bounds, or in all others. [bytes]"""
        return sum(count * self.layer_kv_bytes(mixer, windowed=windowed) for count, mixer in self.mixers)

    def layer_kv_bytes(self, mixer: Mixer, *, windowed: bool) -> float:
        """As :meth:`kv_bytes`, in one layer. [bytes]"""
        p = self.precision
        if isinstance(mixer, SoftmaxAttention) and (mixer.window is not None) == windowed:
            return self.kv_heads_per_chip(mixer) * p.kv_head_bytes(mixer.head_dim)
        if isinstance(mixer, LatentAttention) and not windowed:
            index = mixer.indexer
            latent = p.latent_bytes(mixer.kv_rank, mixer.rope_dim, sparse=index is not None)
            index_key = 0.0 if index is None else p.index_key_bytes(index.head_dim)
            return self.latent_share * (latent + index_key)
        return 0.0

    @property
    def kv_bytes_per_token(self) -> float:
        """KV-cache bytes of one token on one chip before any window is full, scales and copies included. [bytes]"""
        return self.kv_bytes(windowed=False) + self.kv_bytes(windowed=True)

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

    @cached_property
    def index_dtype(self) -> Dtype:
        """Format of a sparse indexer's products: its keys are FP8."""
        return self._runs_in("fp8")

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
        return self.rate_flops_per_s(self.compute_dtype)

    def rate_flops_per_s(self, dtype: Dtype) -> float:
        """Datasheet rate of one chip in ``dtype``, looked up once. [FLOP/s]"""
        if dtype not in self._rates:
            self._rates[dtype] = self.slice.chip.peak_flops_per_s(dtype)
        return self._rates[dtype]

    @cached_property
    def _rates(self) -> dict[str, float]:
        return {}

    @cached_property
    def hbm_bytes_per_s(self) -> float:
        """Datasheet HBM bandwidth of one chip. [bytes/s]"""
        return self.slice.chip.hbm_bandwidth_bytes_per_s

    @cached_property
    def hbm_capacity_bytes(self) -> float:
        """Memory of one chip. [bytes]"""
        return self.slice.chip.hbm_capacity_bytes

    @cached_property
    def on_chip_bytes(self) -> float:
        """On-die memory of one chip; 0 if its size is not known. [bytes]"""
        return quantity_si(self.slice.chip.memory.on_chip) or 0.0

    @cached_property
    def multiprocessors(self) -> float:
        """Multiprocessors of one chip, which fitted curves count tiles by."""
        return self.slice.chip.multiprocessor_count

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
        kv_heads = {x.n_kv_heads for _, x in self.mixers if isinstance(x, SoftmaxAttention)}
        if self.kv_copies > 1:
            what = f"share {min(kv_heads)} KV heads" if kv_heads else "each need the whole latents"
            found.append(f"{self.chips} chips {what}: the KV cache is held {self.kv_copies:g} times")
        if self.axis_split is not None and str(self.axis_split.layout) != self.layout:
            found.append(f"layout {self.layout}: laid as {self.axis_split.layout}")
        measured = None if self.eff.curves is None else self.eff.curves.chip
        if measured not in {None, self.slice.chip.name}:
            found.append(f"kernels of {self.slice.chip.name} are priced as measured on {measured}")
        if self.kv_layout == "even" and self.chips > min(kv_heads, default=1):
            found.append("kv_layout = even: the exchange that an even KV layout needs is not priced")
        return tuple(found)


def check_efficiency(efficiency: Efficiency) -> None:
    """Refuse efficiencies that would push a time under its bound: fractions in (0, 1], overheads not negative."""
    for name, value in efficiency.constants.items():
        if name.endswith("_s"):
            if not 0 <= value < float("inf"):
                raise InputError(f"efficiency.{name} = {value}: must be finite and not negative")
        elif not 0 < value <= 1:
            raise InputError(f"efficiency.{name} = {value}: must be above 0 and at most 1")
