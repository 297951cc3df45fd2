"""Hugging Face ``config.json`` -> :class:`Architecture`, refusing whatever could change the cost unseen.

Supported model types are the keys of :data:`MODEL_TYPES`. Fields that are not used are sorted by
:mod:`simulator.catalog.huggingface_fields`; a null field counts as absent. The readers follow what the
``transformers`` classes build from a configuration, their defaults included; a default that carries cost and had to be
filled in is reported as a note.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    LayerGroup,
    Mixer,
    MoEFFN,
    SoftmaxAttention,
)
from simulator.catalog.files import parse
from simulator.catalog.huggingface_fields import Fields
from simulator.catalog.huggingface_quantization import PrecisionHint, read_quantization
from simulator.errors import InputError, nearest


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a ``config.json`` says.

    Attributes
    ----------
    architecture
        The decoder; vision and audio towers are left out.
    precision
        How the checkpoint is quantized; None: it is not.
    dtype
        Dtype of the unquantized parameters, as written (``bfloat16``), or None.
    notes
        What the reader left out or filled in, for the user to see.
    """

    architecture: Architecture
    precision: PrecisionHint | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layer:
    mixer: Mixer | None
    ffn: FeedForward | None


@dataclass
class _Decoder:
    """What a reader returns: the layers in order and the few model-wide switches."""

    layers: list[_Layer]
    n_norms: int = 2
    norm: str = "rms"
    parallel: bool = False
    head_bias: bool = False
    mtp_layers: int = 0


@dataclass(frozen=True)
class _ModelType:
    """One supported ``model_type``: its reader and the defaults of its ``transformers`` class that carry cost."""

    read: Callable[[Fields], _Decoder]
    classes: tuple[str, ...]
    family: str
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _n_layers(c: Fields) -> int:
    """Number of layers; the bound keeps a garbled file from filling the memory."""
    n = c.integer("num_hidden_layers")
    if n > 10_000:
        raise c.error("num_hidden_layers", f"expected at most 10000, got {n}")
    return n


def _attention(c: Fields, **features: Any) -> SoftmaxAttention:
    """MHA, GQA or MQA; absent ``num_key_value_heads``: as many as heads; absent ``head_dim``: the width over the heads."""
    heads = c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", heads)
    head_dim = c.optional("head_dim")
    if head_dim is None:
        width = c.integer("hidden_size")
        if width % heads:
            raise c.error("num_attention_heads", f"{heads} does not divide hidden_size = {width}; give head_dim")
        head_dim = width // heads
    if heads % kv_heads:
        raise c.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads = {heads}")
    return SoftmaxAttention(n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, **features)


def _window(c: Fields) -> int | None:
    """``sliding_window``, or None where it is at least the context and so never cuts anything."""
    window = c.optional("sliding_window")
    context = c.optional("max_position_embeddings")
    if window is not None and context is not None and window >= context:
        c.notes.append(f"{c.prefix}sliding_window = {window} covers the whole context of {context}: full attention")
        return None
    return window


def _windowed(attention: SoftmaxAttention, window: int | None, kind: str = "sliding") -> SoftmaxAttention:
    return attention.model_copy(update={"window": window, "window_kind": kind}) if window is not None else attention


def _mixed(c: Fields, attention: SoftmaxAttention, local: Callable[[int], bool]) -> list[SoftmaxAttention]:
    """Sliding and full layers, by ``layer_types`` if given, else by the pattern of the model type."""
    n = _n_layers(c)
    types = c.layer_types(n, ("sliding_attention", "full_attention"))
    window = _window(c)
    is_local = [t == "sliding_attention" for t in types] if types is not None else [local(i) for i in range(n)]
    if any(is_local) and "sliding_window" not in c.data:
        raise c.error("sliding_window", "required by the sliding layers, but missing")
    return [_windowed(attention, window) if here else attention for here in is_local]


def _llama(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    ffn = DenseFFN(d_ff=c.integer("intermediate_size"), bias=c.flag("mlp_bias", default=False))
    layer = _Layer(_attention(c, qkv_bias=bias, o_bias=bias), ffn)
    return _Decoder([layer] * _n_layers(c))


def _dense(c: Fields) -> DenseFFN:
    return DenseFFN(d_ff=c.integer("intermediate_size"))


def _uniform(c: Fields, mixer: Mixer, ffn: FeedForward, **features: Any) -> _Decoder:
    return _Decoder([_Layer(mixer, ffn)] * _n_layers(c), **features)


def _mistral(c: Fields) -> _Decoder:
    return _uniform(c, _windowed(_attention(c), _window(c)), _dense(c))


def _mixtral(c: Fields) -> _Decoder:
    ffn = MoEFFN(
        n_experts=c.integer("num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        d_ff=c.integer("intermediate_size"),
    )
    return _uniform(c, _windowed(_attention(c), _window(c)), ffn)


def _qwen_attention(c: Fields, **features: Any) -> list[SoftmaxAttention]:
    """Windows count only with ``use_sliding_window``, from layer ``max_window_layers`` on."""
    attention = _attention(c, **features)
    n = _n_layers(c)
    if c.flag("use_sliding_window", default=False):
        first = c.integer("max_window_layers", minimum=0)
        return _mixed(c, attention, lambda i: i >= first)
    c.used |= {"sliding_window", "max_window_layers"}
    types = c.layer_types(n, ("full_attention", "sliding_attention"))
    if types is not None and "sliding_attention" in types:
        raise c.error("layer_types", "has sliding layers, but use_sliding_window is not true")
    return [attention] * n


def _qwen2(c: Fields) -> _Decoder:
    ffn = _dense(c)
    return _Decoder([_Layer(a, ffn) for a in _qwen_attention(c, qkv_bias=True)])


def _qwen3(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    ffn = _dense(c)
    return _Decoder([_Layer(a, ffn) for a in _qwen_attention(c, qkv_bias=bias, o_bias=bias, qk_norm="per_head")])


def _qwen_moe(c: Fields, attention: list[SoftmaxAttention] | list[Mixer], shared: int | None) -> _Decoder:
    """Experts on every ``decoder_sparse_step``-th layer outside ``mlp_only_layers``; the others are dense."""
    experts = MoEFFN(
        n_experts=c.integer("num_experts"),
        top_k=c.integer("num_experts_per_tok"),
        d_ff=c.integer("moe_intermediate_size"),
        n_shared=int(shared is not None),
        shared_d_ff=shared,
        shared_gate=shared is not None,
    )
    step = c.integer("decoder_sparse_step", 1)
    dense_layers = set(c.integers("mlp_only_layers") or [])
    sparse = [i not in dense_layers and (i + 1) % step == 0 for i in range(len(attention))]
    c.used.add("intermediate_size")
    dense = experts if all(sparse) else _dense(c)
    return _Decoder([_Layer(a, experts if s else dense) for a, s in zip(attention, sparse, strict=True)])


def _qwen2_moe(c: Fields) -> _Decoder:
    attention = _qwen_attention(c, qkv_bias=c.flag("qkv_bias", default=True))
    return _qwen_moe(c, attention, c.integer("shared_expert_intermediate_size"))


def _qwen3_moe(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    return _qwen_moe(c, _qwen_attention(c, qkv_bias=bias, o_bias=bias, qk_norm="per_head"), None)


def _qwen3_next(c: Fields) -> _Decoder:
    """Gated delta net with full attention (gated output) on every ``full_attention_interval``-th layer."""
    c.must_be("attention_bias", expected=False, reason="not counted for this model type")
    c.must_be("attn_output_gate", expected=True, reason="this model type gates the attention output")
    c.must_be("use_sliding_window", expected=False, reason="this model type has no window")
    full = _attention(c, qk_norm="per_head", gated_output=True)
    linear = GatedDeltaNet(
        n_key_heads=c.integer("linear_num_key_heads"),
        n_value_heads=c.integer("linear_num_value_heads"),
        key_dim=c.integer("linear_key_head_dim"),
        value_dim=c.integer("linear_value_head_dim"),
        conv=c.integer("linear_conv_kernel_dim"),
    )
    n = _n_layers(c)
    interval = c.integer("full_attention_interval", 4)
    types = c.layer_types(n, ("linear_attention", "full_attention"))
    is_full = [t == "full_attention" for t in types] if types else [(i + 1) % interval == 0 for i in range(n)]
    mixers: list[Mixer] = [full if f else linear for f in is_full]
    decoder = _qwen_moe(c, mixers, c.integer("shared_expert_intermediate_size"))
    decoder.mtp_layers = c.integer("mtp_num_hidden_layers", 0, minimum=0)
    return decoder


def _gemma(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    return _uniform(c, _attention(c, qkv_bias=bias, o_bias=bias), _dense(c))


def _gemma2(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    ffn = _dense(c)
    window = c.integer("sliding_window")
    if c.integer("sliding_window_size", window) != window:
        raise c.error("sliding_window_size", f"contradicts sliding_window = {window}")
    layers = _mixed(c, _attention(c, qkv_bias=bias, o_bias=bias), lambda i: i % 2 == 0)
    return _Decoder([_Layer(a, ffn) for a in layers], n_norms=4)


def _gemma3(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=False)
    ffn = _dense(c)
    pattern = c.integer(
        "_sliding_window_pattern" if "_sliding_window_pattern" in c.data else "sliding_window_pattern", 6
    )
    attention = _attention(c, qkv_bias=bias, o_bias=bias, qk_norm="per_head")
    return _Decoder([_Layer(a, ffn) for a in _mixed(c, attention, lambda i: (i + 1) % pattern != 0)], n_norms=4)


def _gpt_oss(c: Fields) -> _Decoder:
    bias = c.flag("attention_bias", default=True)
    top_k = c.integer("num_experts_per_tok")
    if c.integer("experts_per_token", top_k) != top_k:
        raise c.error("experts_per_token", f"contradicts num_experts_per_tok = {top_k}")
    ffn = MoEFFN(
        n_experts=c.integer("num_local_experts"),
        top_k=top_k,
        d_ff=c.integer("intermediate_size"),
        expert_bias=True,
        router_bias=True,
    )
    attention = _attention(c, qkv_bias=bias, o_bias=bias, sinks=True)
    return _Decoder([_Layer(a, ffn) for a in _mixed(c, attention, lambda i: i % 2 == 0)])


def _phi3(c: Fields) -> _Decoder:
    c.must_be("attention_bias", expected=False, reason="the phi3 projections have no bias")
    return _uniform(c, _windowed(_attention(c), _window(c)), _dense(c))


def _phi(c: Fields) -> _Decoder:
    """Every matrix has a bias, whatever ``attention_bias`` says: the class does not read it."""
    c.used.add("attention_bias")
    ffn = DenseFFN(d_ff=c.integer("intermediate_size"), gated=False, bias=True)
    attention = _attention(c, qkv_bias=True, o_bias=True)
    return _uniform(c, attention, ffn, n_norms=1, norm="layer", parallel=True, head_bias=True)


def _deepseek(c: Fields) -> _Decoder:
    """DeepSeek-V2 and V3: latent attention; experts from layer ``first_k_dense_replace`` on."""
    c.must_be("attention_bias", expected=False, reason="not counted for this model type")
    c.used |= {"num_key_value_heads", "head_dim", "qk_head_dim"}
    mixer = LatentAttention(
        n_heads=c.integer("num_attention_heads"),
        q_rank=c.optional("q_lora_rank"),
        kv_rank=c.integer("kv_lora_rank"),
        nope_dim=c.integer("qk_nope_head_dim"),
        rope_dim=c.integer("qk_rope_head_dim"),
        v_dim=c.integer("v_head_dim"),
    )
    method = c.text("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"))
    experts = MoEFFN(
        n_experts=c.integer("n_routed_experts"),
        top_k=c.integer("num_experts_per_tok"),
        d_ff=c.integer("moe_intermediate_size"),
        n_shared=c.integer("n_shared_experts", 0, minimum=0),
        score_correction_bias=method == "noaux_tc",
    )
    n = _n_layers(c)
    first = c.integer("first_k_dense_replace", 0, minimum=0)
    every = c.integer("moe_layer_freq", 1)
    sparse = [i >= first and i % every == 0 for i in range(n)]
    c.used.add("intermediate_size")
    dense = experts if all(sparse) else _dense(c)
    layers = [_Layer(mixer, experts if s else dense) for s in sparse]
    return _Decoder(layers, mtp_layers=c.integer("num_nextn_predict_layers", 0, minimum=0))


def _llama4(c: Fields) -> _Decoder:
    """Chunked attention except where there is no rotary position; one shared expert of the experts' width."""
    bias = c.flag("attention_bias", default=False)
    attention = _attention(c, qkv_bias=bias, o_bias=bias)
    local = _windowed(attention, c.integer("attention_chunk_size"), "chunked")
    n = _n_layers(c)
    types = c.layer_types(n, ("chunked_attention", "full_attention"))
    interval = c.integer("no_rope_layer_interval", 4)
    has_rope = c.integers("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    if len(has_rope) != n:
        raise c.error("no_rope_layers", f"expected {n} entries, got {len(has_rope)}")
    is_local = [t == "chunked_attention" for t in types] if types is not None else [bool(r) for r in has_rope]
    experts = MoEFFN(
        n_experts=c.integer("num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        d_ff=c.integer("intermediate_size"),
        n_shared=1,
    )
    step = c.integer("interleave_moe_layer_step", 1)
    moe_layers = c.integers("moe_layers")
    sparse = set(moe_layers if moe_layers is not None else range(step - 1, n, step))
    c.used.add("intermediate_size_mlp")
    dense = DenseFFN(d_ff=c.integer("intermediate_size_mlp")) if len(sparse) < n else None
    return _Decoder(
        [_Layer(local if here else attention, experts if i in sparse else dense) for i, here in enumerate(is_local)]
    )


_GEMMA3 = _ModelType(
    _gemma3,
    ("Gemma3ForCausalLM",),
    "gemma3",
    tied=True,
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
)
_DEEPSEEK_V3 = _ModelType(_deepseek, ("DeepseekV3ForCausalLM",), "deepseek", defaults={"topk_method": "noaux_tc"})

#: model_type -> how it is read
MODEL_TYPES: dict[str, _ModelType] = {
    "llama": _ModelType(_llama, ("LlamaForCausalLM",), "llama"),
    "llama4_text": _ModelType(
        _llama4, ("Llama4ForCausalLM",), "llama4", defaults={"head_dim": 128, "attention_chunk_size": 8192}
    ),
    "mistral": _ModelType(_mistral, ("MistralForCausalLM",), "mistral", defaults={"sliding_window": 4096}),
    "mixtral": _ModelType(_mixtral, ("MixtralForCausalLM",), "mixtral"),
    "qwen2": _ModelType(_qwen2, ("Qwen2ForCausalLM",), "qwen2"),
    "qwen2_moe": _ModelType(_qwen2_moe, ("Qwen2MoeForCausalLM",), "qwen2-moe"),
    "qwen3": _ModelType(_qwen3, ("Qwen3ForCausalLM",), "qwen3", defaults={"head_dim": 128}),
    "qwen3_moe": _ModelType(_qwen3_moe, ("Qwen3MoeForCausalLM",), "qwen3-moe"),
    "qwen3_next": _ModelType(_qwen3_next, ("Qwen3NextForCausalLM",), "qwen3-next", defaults={"head_dim": 256}),
    "qwen3_5_moe_text": _ModelType(_qwen3_next, ("Qwen3_5MoeForCausalLM",), "qwen3.5", defaults={"head_dim": 256}),
    "gemma": _ModelType(_gemma, ("GemmaForCausalLM",), "gemma", tied=True, defaults={"head_dim": 256}),
    "gemma2": _ModelType(
        _gemma2, ("Gemma2ForCausalLM",), "gemma2", tied=True, defaults={"head_dim": 256, "sliding_window": 4096}
    ),
    "gemma3_text": _GEMMA3,
    "deepseek_v2": _ModelType(
        _deepseek, ("DeepseekV2ForCausalLM",), "deepseek", defaults={"topk_method": "greedy", "q_lora_rank": 1536}
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, classes=("KimiK2ForCausalLM",)),
    "gpt_oss": _ModelType(
        _gpt_oss, ("GptOssForCausalLM",), "gpt-oss", defaults={"head_dim": 64, "sliding_window": 128}
    ),
    "phi": _ModelType(_phi, ("PhiForCausalLM",), "phi"),
    "phi3": _ModelType(_phi3, ("Phi3ForCausalLM",), "phi3"),
}


def _model_type(data: Mapping[str, Any], outer: Mapping[str, Any], where: str) -> str:
    """``model_type`` of the decoder, else the one its class in ``architectures`` belongs to."""
    found = data.get("model_type")
    if found is None:
        classes = data.get("architectures") or outer.get("architectures") or []
        if not isinstance(classes, list):
            raise InputError(f"{where}: architectures: expected a list of names, got {classes!r}")
        found = next((t for t, m in MODEL_TYPES.items() if any(c in m.classes for c in classes)), None)
        if found is None:
            raise InputError(
                f"{where}: neither model_type nor a supported class in architectures = {classes!r}; "
                f"supported model types: {', '.join(sorted(MODEL_TYPES))}"
            )
    if not isinstance(found, str) or found not in MODEL_TYPES:
        hint = nearest(str(found), MODEL_TYPES)
        supported = "" if hint.startswith("; known") else f"; supported: {', '.join(sorted(MODEL_TYPES))}"
        raise InputError(f"{where}: model_type = {found!r} is not supported{hint}{supported}")
    return found


def _read_json(path: Path) -> tuple[Any, str]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: does not exist")
    try:
        return json.loads(file.read_text(encoding="utf-8")), str(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None


def _groups(decoder: _Decoder) -> list[LayerGroup]:
    """Equal layers together, in the order each kind first appears."""
    return [
        LayerGroup(count=n, mixer=layer.mixer, ffn=layer.ffn, n_norms=decoder.n_norms)
        for layer, n in Counter(decoder.layers).items()
    ]


def read_huggingface(source: Path | str | Mapping[str, Any], name: str | None = None) -> HuggingFaceModel:
    """Read a ``config.json`` (a path, the folder that holds it, or its parsed content).

    ``name`` defaults to the name of the folder, or of the file if it is not called ``config.json``. A ``text_config``
    is read in place of its multimodal wrapper, and a note says that the other towers are left out.

    Raises
    ------
    InputError
        If the model type, a quantization method or a field is unknown and may carry cost, or a value is missing,
        negative, of the wrong type or contradictory; the message names file and field.
    """
    if isinstance(source, Mapping):
        data, where, default_name = source, "config.json", "config"
    else:
        path = Path(source)
        data, where = _read_json(path)
        file = Path(where)
        default_name = file.resolve().parent.name if file.name == "config.json" else file.stem
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a JSON object, got {type(data).__name__}")

    notes: list[str] = []
    inner, outer, prefix = data, {}, ""
    if isinstance(data.get("text_config"), Mapping):
        inner, prefix = data["text_config"], "text_config."
        outer = {k: v for k, v in data.items() if k != "text_config"}
        towers = [k.removesuffix("_config") for k in outer if k.endswith("_config") and k != "quantization_config"]
        if towers:
            notes.append(f"text model only: the {' and '.join(sorted(towers))} part is left out of every count")

    kind = MODEL_TYPES[_model_type(inner, outer, where)]
    c = Fields(inner, where, kind.defaults, prefix)
    wrapper = Fields(outer, where, {})
    wrapper.used |= {"model_type", "architectures"} | {k for k in outer if k.endswith("_config")}
    c.used |= {"model_type", "architectures", "quantization_config"}

    try:
        decoder = kind.read(c)
    except ValidationError as error:
        problems = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise InputError(f"{where}: {prefix}{problems}") from None
    tied = c.flag("tie_word_embeddings", default=wrapper.flag("tie_word_embeddings", default=kind.tied))
    dtype = c.text("torch_dtype") or c.text("dtype") or wrapper.text("torch_dtype") or wrapper.text("dtype")
    quantization = inner.get("quantization_config", outer.get("quantization_config"))
    precision = read_quantization(quantization, where) if quantization is not None else None
    fields = {
        "name": name or default_name,
        "family": kind.family,
        "d_model": c.integer("hidden_size"),
        "vocab_size": c.integer("vocab_size"),
        "tied_embeddings": tied,
        "layers": _groups(decoder),
        "norm": decoder.norm,
        "head_bias": decoder.head_bias,
        "parallel_attention_ffn": decoder.parallel,
        "context_length": c.optional("max_position_embeddings"),
        "mtp_layers": decoder.mtp_layers,
        "source": where,
        "kind": "datasheet",
    }
    c.check_leftovers()
    wrapper.check_leftovers(wrapper=True)
    return HuggingFaceModel(parse(Architecture, fields, where), precision, dtype, (*notes, *wrapper.notes, *c.notes))
