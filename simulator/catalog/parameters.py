"""Parameter and cache counts of an architecture: closed formulas, exact to the last parameter.

Symbols: D model width, N query heads, K KV heads, H head width, F feed-forward width, E experts, V vocabulary.
The formulas, with the published totals they were checked against, are in ``docs/models.md``; the checks are
``tests/catalog/test_parameters.py``.
"""

from dataclasses import dataclass

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    LayerGroup,
    Mamba2,
    Mixer,
    MoEFFN,
    SoftmaxAttention,
)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one architecture and the size of its cache. [elements]

    ``total = embedding + head + positions + norms + attention + recurrent + ffn``; the ``ffn`` fields marked
    "of which" are parts of ``ffn``. Multi-token-prediction layers (``mtp``) are counted apart from everything else.
    """

    total: int
    """The main model, every expert included."""
    active: int
    """Used by one token: as ``total`` with ``top_k`` of the routed experts; includes the input embedding table."""
    active_without_embedding: int
    """As ``active`` without the input embedding: what the matrix products of one token use."""
    read_per_step: int
    """Read from memory by a step whose tokens touch every expert: ``total`` without the input embedding."""
    embedding: int
    """The input embedding table; 0 when tied, because then it is the head that is counted."""
    head: int
    """The output matrix (with bias), tied or not."""
    positions: int
    """Learned position embeddings."""
    norms: int
    """Norms of width D, the final one included; norms inside a mixer belong to the mixer."""
    attention: int
    """Projections, biases, Q and K norms, sinks and sparse indexers of all attention layers."""
    recurrent: int
    """Gated-delta-net and Mamba-2 blocks."""
    ffn: int
    """All feed-forward blocks, experts and routers included."""
    routed_experts: int
    """Of which: the routed experts, all of them."""
    shared_experts: int
    """Of which: the shared experts and their gates."""
    router: int
    """Of which: the routers."""
    mtp: int
    """Multi-token-prediction layers; their embedding and head are those of the main model."""
    kv_elements_per_token: int
    """Keys and values (or latents) that one token adds to the cache, before any window is full."""
    index_elements_per_token: int
    """Index keys of sparse attention that one token adds to the cache."""
    state_elements_per_sequence: int
    """Recurrent state of one sequence, whatever its length (kept in FP32 by the engines)."""
    conv_elements_per_sequence: int
    """Inputs of the short convolutions kept for one sequence (in the dtype of the model)."""

    @property
    def matmul_flops_per_token(self) -> int:
        """Forward FLOPs of one token outside attention scores: 2 per parameter it uses. [FLOP]"""
        return 2 * self.active_without_embedding


def mixer_parameters(mixer: Mixer, d_model: int) -> int:
    """Parameters of one attention or recurrent block."""
    D = d_model
    match mixer:
        case SoftmaxAttention(n_heads=N, n_kv_heads=K, head_dim=H):
            q_and_gate = (2 if mixer.gated_output else 1) * D * N * H
            bias = (N * H + 2 * K * H if mixer.qkv_bias else 0) + (D if mixer.o_bias else 0)
            qk_norm = {"none": 0, "per_head": 2 * H, "full": N * H + K * H}[mixer.qk_norm]
            return q_and_gate + 2 * D * K * H + N * H * D + bias + qk_norm + (N if mixer.sinks else 0)
        case LatentAttention(n_heads=N, q_rank=q, kv_rank=kv, nope_dim=nope, rope_dim=rope, v_dim=v):
            query = D * q + q + q * N * (nope + rope) if q is not None else D * N * (nope + rope)
            latent = D * (kv + rope) + kv + kv * N * (nope + v)
            index = 0
            if mixer.indexer is not None:
                Hi, di = mixer.indexer.n_heads, mixer.indexer.head_dim
                index = (q if q is not None else D) * Hi * di + D * di + 2 * di + D * Hi
            return query + latent + N * v * D + index
        case GatedDeltaNet(n_value_heads=heads, value_dim=dv):
            keys, values = mixer.n_key_heads * mixer.key_dim, heads * dv
            projections = D * (2 * keys + 2 * values) + 2 * D * heads + values * D
            return projections + mixer.conv * (2 * keys + values) + 2 * heads + dv
        case Mamba2(n_heads=heads, n_groups=G, state_dim=S):
            inner = heads * mixer.head_dim
            projections = D * (2 * inner + 2 * G * S + heads) + inner * D
            return projections + (mixer.conv + 1) * (inner + 2 * G * S) + 3 * heads + inner


@dataclass(frozen=True)
class FFNParameters:
    """Parameters of one feed-forward block; a dense one is ``dense`` alone."""

    dense: int = 0
    expert: int = 0
    """One routed expert."""
    n_experts: int = 0
    top_k: int = 0
    shared: int = 0
    router: int = 0

    @property
    def total(self) -> int:
        """Every expert included."""
        return self.dense + self.n_experts * self.expert + self.shared + self.router

    @property
    def active(self) -> int:
        """What one token uses."""
        return self.dense + self.top_k * self.expert + self.shared + self.router


def ffn_parameters(ffn: FeedForward, d_model: int) -> FFNParameters:
    """Parameters of one feed-forward block, by part."""
    D = d_model
    inputs = 2 if ffn.gated else 1
    match ffn:
        case DenseFFN(d_ff=F):
            return FFNParameters(dense=(inputs + 1) * D * F + (inputs * F + D if ffn.bias else 0))
        case MoEFFN(d_ff=F, n_experts=E):
            shared = ffn.n_shared * (inputs + 1) * D * (ffn.shared_d_ff or F)
            return FFNParameters(
                expert=(inputs + 1) * D * F + (inputs * F + D if ffn.expert_bias else 0),
                n_experts=E,
                top_k=ffn.top_k,
                shared=shared + (D if ffn.shared_gate else 0),
                router=D * E + E * (ffn.router_bias + ffn.score_correction_bias),
            )


def kv_elements(mixer: Mixer | None, keys: int = 1) -> int:
    """Cache elements of ``keys`` consecutive tokens of one sequence in one layer; a window keeps its last tokens only.

    A chunked window is counted full: the most it holds, reached at the end of each chunk.

    >>> kv_elements(SoftmaxAttention(n_heads=64, n_kv_heads=8, head_dim=64, window=128), keys=131072)
    131072
    """
    match mixer:
        case SoftmaxAttention():
            kept = keys if mixer.window is None else min(keys, mixer.window)
            return 2 * mixer.n_kv_heads * mixer.head_dim * kept
        case LatentAttention():
            return (mixer.kv_rank + mixer.rope_dim) * keys
        case _:
            return 0


def sequence_kv_elements(architecture: Architecture, tokens: int) -> int:
    """Cache elements of one sequence of ``tokens`` tokens, windows applied, recurrent state and index keys left out.

    Examples
    --------
    Llama-3-70B keeps 8192 tokens in 2.68 GB at 2 bytes per element:

    >>> from simulator.catalog.models import load_model
    >>> 2 * sequence_kv_elements(load_model("llama-3-70b"), 8192)
    2684354560
    """
    return sum(group.count * kv_elements(group.mixer, tokens) for group in architecture.layers)


def _state_elements(mixer: Mixer | None) -> tuple[int, int]:
    """Recurrent state and convolution state of one layer and sequence."""
    match mixer:
        case GatedDeltaNet():
            keys, values = mixer.n_key_heads * mixer.key_dim, mixer.n_value_heads * mixer.value_dim
            return values * mixer.key_dim, (mixer.conv - 1) * (2 * keys + values)
        case Mamba2():
            inner = mixer.n_heads * mixer.head_dim
            return inner * mixer.state_dim, (mixer.conv - 1) * (inner + 2 * mixer.n_groups * mixer.state_dim)
        case _:
            return 0, 0


def _index_elements(mixer: Mixer | None) -> int:
    """Index keys of one layer and token."""
    return mixer.indexer.head_dim if isinstance(mixer, LatentAttention) and mixer.indexer is not None else 0


def _mtp_layer_parameters(architecture: Architecture) -> int:
    """One multi-token-prediction layer: a full-attention layer (with experts, if any), a [2D, D] projection, 3 norms."""

    def rank(group: LayerGroup) -> tuple[bool, bool]:
        return isinstance(group.mixer, SoftmaxAttention | LatentAttention), isinstance(group.ffn, MoEFFN)

    D = architecture.d_model
    group = max((g for g in architecture.layers if g.mixer is not None and g.ffn is not None), key=rank)
    mixer = mixer_parameters(group.mixer, D) if group.mixer is not None else 0
    ffn = ffn_parameters(group.ffn, D).total if group.ffn is not None else 0
    return mixer + ffn + 2 * D * D + (group.n_norms + 3) * _norm_parameters(architecture)


def _norm_parameters(architecture: Architecture) -> int:
    """One norm of the model's width."""
    return architecture.d_model * (2 if architecture.norm == "layer" else 1)


def count(architecture: Architecture) -> ParameterCounts:
    """Count the parameters, cache and state of an architecture.

    Examples
    --------
    >>> from simulator.catalog.models import load_model
    >>> counts = count(load_model("llama-3-70b"))
    >>> f"{counts.total:,} in all, {counts.read_per_step:,} read per decode step"
    '70,553,706,496 in all, 69,503,033,344 read per decode step'
    """
    D = architecture.d_model
    table = architecture.vocab_size * D
    embedding = 0 if architecture.tied_embeddings else table
    head = table + (architecture.vocab_size if architecture.head_bias else 0)
    positions = architecture.learned_positions * D

    n_norms = int(architecture.final_norm)
    attention = recurrent = ffn = ffn_active = routed = shared = router = kv = index = state = conv = 0
    for group in architecture.layers:
        n_norms += group.count * group.n_norms
        if group.mixer is not None:
            mixer = group.count * mixer_parameters(group.mixer, D)
            if isinstance(group.mixer, SoftmaxAttention | LatentAttention):
                attention += mixer
            else:
                recurrent += mixer
        if group.ffn is not None:
            block = ffn_parameters(group.ffn, D)
            ffn += group.count * block.total
            ffn_active += group.count * block.active
            routed += group.count * block.n_experts * block.expert
            shared += group.count * block.shared
            router += group.count * block.router
        kv += group.count * kv_elements(group.mixer)
        index += group.count * _index_elements(group.mixer)
        layer_state, layer_conv = _state_elements(group.mixer)
        state += group.count * layer_state
        conv += group.count * layer_conv

    norms = n_norms * _norm_parameters(architecture)
    total = embedding + head + positions + norms + attention + recurrent + ffn
    active = total - ffn + ffn_active
    return ParameterCounts(
        total=total,
        active=active,
        active_without_embedding=active - embedding,
        read_per_step=total - embedding,
        embedding=embedding,
        head=head,
        positions=positions,
        norms=norms,
        attention=attention,
        recurrent=recurrent,
        ffn=ffn,
        routed_experts=routed,
        shared_experts=shared,
        router=router,
        mtp=architecture.mtp_layers * _mtp_layer_parameters(architecture) if architecture.mtp_layers else 0,
        kv_elements_per_token=kv,
        index_elements_per_token=index,
        state_elements_per_sequence=state,
        conv_elements_per_sequence=conv,
    )
