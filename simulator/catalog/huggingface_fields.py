"""Fields of a Hugging Face ``config.json``: read with errors, and those left over sorted by what they may cost.

A field the reader does not use falls in one of four classes: cost-free (below) is ignored in silence; neutral (below)
is ignored at the values listed and refused at any other; a name that suggests cost is an error, because skipping it
could price the model wrongly; everything else is reported as a note.
"""

import json
from collections.abc import Mapping
from typing import Any

from simulator.errors import InputError

_TOKENS = """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id image_token_id image_token_index video_token_id video_token_index audio_token_id
    audio_token_index boi_token_index eoi_token_index boi_token_id eoi_token_id vision_start_token_id
    vision_end_token_id vision_token_id bad_words_ids suppress_tokens begin_suppress_tokens tokenizer_class
    media_placeholder_token_id ignore_index
"""
_TRAINING = """
    attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob classifier_dropout
    initializer_range initializer_factor router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise
    output_router_logits router_z_loss_coef id2label label2id num_labels problem_type finetuning_task
    task_specific_params use_mtp_loss rescale_prenorm_residual
"""
_NUMERICS = """
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps hidden_act hidden_activation activation_function
    attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar swiglu_limit routed_scaling_factor
    norm_topk_prob scoring_func n_group topk_group attn_temperature_tuning floor_scale attn_scale use_qk_norm
    router_logit_softcapping
"""
_POSITIONS = """
    rope_theta rope_scaling rope_parameters rope_local_base_freq rope_interleave rope_type rotary_dim rotary_pct
    rotary_emb_base partial_rotary_factor original_max_position_embeddings initial_context_length
"""
_SOFTWARE = """
    architectures auto_map torch_dtype dtype transformers_version use_cache cache_implementation pretraining_tp ep_size
    _name_or_path _attn_implementation _attn_implementation_autoset attn_implementation _commit_hash model_name return_dict
    output_hidden_states output_attentions output_scores return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss
    prefix use_return_dict is_decoder unsloth_version unsloth_fixed mm_tokens_per_image
"""
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences remove_invalid_values exponential_decay_length_penalty
"""

#: field -> why it has no cost
COST_FREE: dict[str, str] = {
    name: reason
    for names, reason in (
        (_TOKENS, "token numbers"),
        (_TRAINING, "training and classification heads only"),
        (_NUMERICS, "numerics: elementwise work, no parameters"),
        (_POSITIONS, "rotary positions: elementwise work, no parameters"),
        (_SOFTWARE, "software"),
        (_GENERATION, "generation defaults"),
    )
    for name in names.split()
}

#: field -> the values at which it has no cost; any other value is refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
    "use_bidirectional_attention": (False,),
    "mlp_only_layers": ([],),
    "mtp_use_dedicated_embeddings": (False,),
    "qk_layernorm": (False,),
}

#: A field that is neither used nor listed above, and whose name contains one of these, is refused.
COST_WORDS = (
    *("window", "expert", "head", "layer", "rank", "rope", "quant", "mtp", "nextn", "state", "conv", "ssm", "vocab"),
    *("hidden", "inter", "moe", "mlp", "ffn", "dim", "size", "bias", "lora", "mamba", "sparse", "block", "index"),
    *("attn", "attention", "share", "norm", "kv", "group", "chunk", "position", "depth", "width", "embed", "tie"),
)

#: In a multimodal wrapper, fields that start so belong to the towers that are left out.
TOWER_PREFIXES = ("vision", "image", "audio", "video", "projector", "multimodal", "multi_modal", "mm_", "spatial_merge")


def suggests_cost(name: str) -> bool:
    """Tell whether an unknown field name may change what a forward pass costs.

    >>> suggests_cost("num_memory_heads"), suggests_cost("license")
    (True, False)
    """
    return any(word in name.lower() for word in COST_WORDS)


class Fields:
    """A JSON object that remembers which fields were read, and names file and field in every error."""

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any], prefix: str = "") -> None:
        self.data = {name: value for name, value in data.items() if value is not None}
        self.nulls = data.keys() - self.data.keys()
        self.where = where
        self.prefix = prefix
        self.defaults = defaults
        self.used: set[str] = set()
        self.notes: list[str] = []

    def error(self, name: str, problem: str) -> InputError:
        """The error to raise about one field."""
        return InputError(f"{self.where}: {self.prefix}{name}: {problem}")

    def _get(self, name: str) -> Any:
        self.used.add(name)
        if name not in self.data and name not in self.nulls and name in self.defaults:
            self.data[name] = self.defaults[name]
            self.notes.append(f"{self.prefix}{name} is absent: {self.defaults[name]}, the default of this model type")
        return self.data.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least ``minimum``; without a ``default`` it is required."""
        value = self._get(name)
        if value is None:
            if default is None:
                raise self.error(name, "required, but missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"expected an integer of at least {minimum}, got {value!r}")
        return value

    def optional(self, name: str) -> int | None:
        """A positive integer, or None if absent."""
        return self.integer(name) if self._get(name) is not None else None

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean."""
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {value!r}")
        return value

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, or None if absent."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise self.error(name, f"expected a list of integers, got {value!r}")
        return value

    def text(self, name: str, allowed: tuple[str, ...] | None = None) -> str | None:
        """Text, or None if absent; ``allowed`` names the known values."""
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"expected text, got {value!r}")
        if value is not None and allowed is not None and value not in allowed:
            raise self.error(name, f"{value!r} is not supported; known: {', '.join(allowed)}")
        return value

    def must_be(self, name: str, expected: bool, reason: str) -> None:
        """Refuse the value of a switch that the counts cannot express."""
        if self.flag(name, default=expected) is not expected:
            raise self.error(name, f"{json.dumps(not expected)} is not supported: {reason}")

    def layer_types(self, n_layers: int, allowed: tuple[str, ...]) -> list[str] | None:
        """One attention kind per layer, or None if absent."""
        value = self._get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n_layers:
            raise self.error("layer_types", f"expected a list of num_hidden_layers = {n_layers} names, got {value!r}")
        for item in value:
            if item not in allowed:
                raise self.error("layer_types", f"{item!r} is not supported; known: {', '.join(allowed)}")
        return [str(item) for item in value]

    def check_leftovers(self, *, wrapper: bool = False) -> None:
        """Sort the fields nobody read: ignore, note or refuse."""
        for name, value in self.data.items():
            if name in self.used or name in COST_FREE or (wrapper and name.startswith(TOWER_PREFIXES)):
                continue
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    raise self.error(name, f"{value!r} is not supported; only {NEUTRAL[name][0]!r} is")
                continue
            if suggests_cost(name):
                raise self.error(
                    name, f"unknown field ({value!r}) whose name suggests cost; this reader would price it wrongly"
                )
            self.notes.append(f"{self.prefix}{name} = {value!r} is unknown and ignored")
