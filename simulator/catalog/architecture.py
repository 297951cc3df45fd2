"""Decoder architectures: the record every model file and every Hugging Face config resolves to.

An architecture is a list of layer groups; a group is ``count`` equal layers, each with a mixer (attention or a
recurrent block) and a feed-forward block, either of which may be absent. The order of the groups is the order in
the network, except that interleaved patterns are written as one group per kind: order inside a pattern changes no
cost. Parameter counts follow the formulas of ``docs/models.md``.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from simulator.catalog.records import Kind, Record


class SoftmaxAttention(Record):
    """MHA, GQA or MQA, optionally windowed; ``n_heads`` queries share ``n_kv_heads`` keys and values."""

    kind: Literal["attention"] = "attention"
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    head_dim: PositiveInt
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "per_head", "full"] = "none"
    sinks: bool = False
    gated_output: bool = False
    window: PositiveInt | None = None
    """Keys a query may see, itself included; None is full attention."""
    window_kind: Literal["sliding", "chunked"] = "sliding"

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> "SoftmaxAttention":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}")
        return self


class SparseIndexer(Record):
    """DeepSeek sparse attention: ``n_heads`` index heads of ``head_dim`` score every key, the best ``top_k`` are attended."""

    n_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt


class LatentAttention(Record):
    """Multi-head latent attention (DeepSeek-V2): the cache holds ``kv_rank + rope_dim`` values per token."""

    kind: Literal["mla"] = "mla"
    n_heads: PositiveInt
    q_rank: PositiveInt | None = None
    """Width of the query compression; None: the queries are projected directly."""
    kv_rank: PositiveInt
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    v_dim: PositiveInt
    indexer: SparseIndexer | None = None


class GatedDeltaNet(Record):
    """Gated delta net (Qwen3-Next, Qwen3.5): constant state instead of a KV cache."""

    kind: Literal["gdn"] = "gdn"
    n_key_heads: PositiveInt
    n_value_heads: PositiveInt
    key_dim: PositiveInt
    value_dim: PositiveInt
    conv: PositiveInt
    """Taps of the short causal convolution over the Q, K and V projections."""

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> "GatedDeltaNet":
        if self.n_value_heads % self.n_key_heads:
            raise ValueError(
                f"n_value_heads = {self.n_value_heads} is not a multiple of n_key_heads = {self.n_key_heads}"
            )
        return self


class Mamba2(Record):
    """Mamba-2 block (Nemotron-H): constant state instead of a KV cache."""

    kind: Literal["mamba2"] = "mamba2"
    n_heads: PositiveInt
    head_dim: PositiveInt
    n_groups: PositiveInt
    state_dim: PositiveInt
    conv: PositiveInt
    """Taps of the short causal convolution (with bias) over x, B and C."""


Mixer = Annotated[SoftmaxAttention | LatentAttention | GatedDeltaNet | Mamba2, Field(discriminator="kind")]


class DenseFFN(Record):
    """Feed-forward block: three matrices when gated, two when plain."""

    kind: Literal["dense"] = "dense"
    d_ff: PositiveInt
    gated: bool = True
    bias: bool = False


class MoEFFN(Record):
    """Mixture of experts: ``top_k`` of ``n_experts`` routed experts plus ``n_shared`` shared ones per token."""

    kind: Literal["moe"] = "moe"
    n_experts: PositiveInt
    top_k: PositiveInt
    d_ff: PositiveInt
    gated: bool = True
    expert_bias: bool = False
    router_bias: bool = False
    score_correction_bias: bool = False
    n_shared: int = Field(default=0, ge=0)
    shared_d_ff: PositiveInt | None = None
    """Width of one shared expert; None: same as ``d_ff``."""
    shared_gate: bool = False

    @model_validator(mode="after")
    def _experts_are_consistent(self) -> "MoEFFN":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k = {self.top_k} is more than n_experts = {self.n_experts}")
        if not self.n_shared and (self.shared_gate or self.shared_d_ff):
            raise ValueError("shared_gate and shared_d_ff need n_shared of at least 1")
        return self


FeedForward = Annotated[DenseFFN | MoEFFN, Field(discriminator="kind")]


class LayerGroup(Record):
    """``count`` equal layers."""

    count: PositiveInt
    mixer: Mixer | None = None
    ffn: FeedForward | None = None
    n_norms: int = Field(default=2, ge=0)
    """Norms of width d_model per layer (QK norms are counted by the mixer)."""

    @model_validator(mode="after")
    def _not_empty(self) -> "LayerGroup":
        if self.mixer is None and self.ffn is None:
            raise ValueError("a layer needs a mixer, an ffn or both")
        return self


class Architecture(Record):
    """One decoder-only language model, as the cost model sees it."""

    schema_version: Literal[1] = 1
    name: str
    family: str
    d_model: PositiveInt
    vocab_size: PositiveInt
    tied_embeddings: bool
    layers: tuple[LayerGroup, ...] = Field(min_length=1)
    norm: Literal["rms", "layer"] = "rms"
    """``layer``: LayerNorm with bias, two vectors per norm."""
    final_norm: bool = True
    head_bias: bool = False
    learned_positions: int = Field(default=0, ge=0)
    parallel_attention_ffn: bool = False
    context_length: PositiveInt | None = None
    mtp_layers: int = Field(default=0, ge=0)
    """Multi-token-prediction layers shipped with the checkpoint, outside ``layers``."""
    aliases: tuple[str, ...] = ()
    """Other names of the same architecture (later releases of it)."""
    source: str
    """Key of the source list in ``docs/models.md``, or the file it was read from."""
    locator: str = ""
    kind: Kind
    """How the configuration is known; see the source list in ``docs/models.md``."""
    published_total: PositiveInt | None = None
    """Published parameter count of the main model, where it is known to the last digit."""
    published_kind: Kind | None = None
    note: str = ""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Architecture":
        if (self.published_total is None) != (self.published_kind is None):
            raise ValueError("published_total and published_kind come together")
        if self.mtp_layers and not any(g.mixer is not None and g.ffn is not None for g in self.layers):
            raise ValueError("mtp_layers needs a layer with a mixer and an ffn to be a copy of")
        return self

    @property
    def n_layers(self) -> int:
        """Number of layers of the main model."""
        return sum(group.count for group in self.layers)
