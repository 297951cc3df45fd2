"""Hugging Face configurations: real field sets resolve to the catalogue's counts; anything unclear is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.architecture import SoftmaxAttention
from simulator.catalog.huggingface import MODEL_TYPES, read_huggingface
from simulator.catalog.huggingface_fields import COST_FREE, NEUTRAL
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count, sequence_kv_elements
from simulator.errors import InputError

DATA = Path(__file__).parent / "data"
CONFIGS = sorted(path.stem for path in DATA.glob("*.json"))


def config(name: str, **changes: object) -> dict:
    return {**json.loads((DATA / f"{name}.json").read_text()), **changes}


def without(name: str, *fields: str) -> dict:
    return {k: v for k, v in config(name).items() if k not in fields}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_released_configuration_counts_as_the_catalogue_does(name):
    read, ours = read_huggingface(DATA / f"{name}.json").architecture, load_model(name)
    if name == "qwen3-next-80b-a3b":  # its configuration is silent about the MTP layer of the checkpoint
        ours = ours.model_copy(update={"mtp_layers": 0})
    assert count(read) == count(ours)
    assert read.n_layers == ours.n_layers
    for tokens in (100, 1000, 5000, 100_000):  # windows and chunks too
        assert sequence_kv_elements(read, tokens) == sequence_kv_elements(ours, tokens)


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_every_supported_model_type_is_tried(model_type):
    configs = [config(name) for name in CONFIGS]
    tried = {c.get("text_config", c)["model_type"] for c in configs} | {"phi", "qwen2_moe"}
    assert model_type in tried


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_every_supported_model_type_is_documented(model_type):
    assert f"`{model_type}`" in (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_qwen1_5_moe_a2_7b_total():
    # its card says 14.3 B in all and 2.7 B activated; the layer sizes are written out by hand below
    fields = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    counts = count(read_huggingface(fields).architecture)
    attention = 4 * 2048 * 2048 + 3 * 2048
    experts = 60 * 3 * 2048 * 1408 + 3 * 2048 * 5632 + 2048 + 60 * 2048
    assert counts.total == 24 * (attention + experts + 2 * 2048) + 2 * 151936 * 2048 + 2048
    assert round(counts.total / 1e9, 1) == 14.3
    assert round(counts.active / 1e9, 1) == 2.7


def test_phi_has_parallel_blocks_and_biases_everywhere():
    fields = {
        "model_type": "phi",
        "attention_bias": False,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    }
    read = read_huggingface(fields).architecture
    layer = 4 * 2560 * 2560 + 4 * 2560 + 2 * 2560 * 10240 + 10240 + 2560 + 2 * 2560
    assert count(read).total == 32 * layer + 2 * 51200 * 2560 + 51200 + 2 * 2560
    assert round(count(read).total / 1e9, 2) == 2.78  # phi-2, as published
    assert read.parallel_attention_ffn
    with pytest.raises(InputError, match="qk_layernorm"):
        read_huggingface({**fields, "qk_layernorm": True})


def test_multimodal_wrapper_notes_what_is_left_out():
    read = read_huggingface(DATA / "gemma-3-4b.json")
    assert read.notes[0] == "text model only: the vision part is left out of every count"
    assert any("num_attention_heads is absent: 8" in note for note in read.notes)
    assert read.dtype == "bfloat16"


def test_notes_are_empty_where_nothing_was_left_out():
    assert read_huggingface(DATA / "llama-3-70b.json").notes == ()
    assert read_huggingface(DATA / "mistral-7b-v0.3.json").notes == ()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("field", ["num_memory_layers", "second_sliding_window", "kv_rank", "ssm_state", "hidden_moe"])
def test_an_unknown_field_that_may_cost_is_refused_by_name(name, field):
    with pytest.raises(InputError, match=rf"config\.json: {field}: unknown field \(4\) whose name suggests cost"):
        read_huggingface(config(name, **{field: 4}))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_harmless_field_is_a_note(name):
    read = read_huggingface(config(name, licence="mine"))
    assert read.notes.count("licence = 'mine' is unknown and ignored") == 1
    assert count(read.architecture) == count(read_huggingface(config(name)).architecture)


def test_a_field_of_the_wrong_place_is_not_read_as_a_tower_field_in_the_decoder():
    inner = {**config("gemma-3-4b")["text_config"], "vision_layers": 3}
    with pytest.raises(InputError, match=r"text_config\.vision_layers: unknown field"):
        read_huggingface(config("gemma-3-4b", text_config=inner))


@pytest.mark.parametrize("field", sorted(COST_FREE))
def test_cost_free_fields_change_nothing(field):
    names = ["llama-3-70b", "deepseek-v3"]
    skipped = {"architectures", "torch_dtype", "dtype"}  # read: they must hold a name
    for name in names if field not in skipped else []:
        read = read_huggingface(config(name, **{field: 7}))
        assert count(read.architecture) == count(load_model(name))
        assert read.notes == ()


@pytest.mark.parametrize("field", sorted(set(NEUTRAL) - {"mlp_only_layers"}))
def test_neutral_fields_are_refused_at_any_other_value(field):
    for value in NEUTRAL[field]:
        assert read_huggingface(config("llama-3-70b", **{field: value})).notes == ()
    with pytest.raises(InputError, match=field):
        read_huggingface(config("llama-3-70b", **{field: "other"}))


def test_an_unknown_model_type_lists_the_supported_ones():
    with pytest.raises(InputError, match=r"model_type = 'rwkv' is not supported.*deepseek_v3, gemma") as caught:
        read_huggingface(config("llama-2-7b", model_type="rwkv"))
    assert "qwen3_moe" in str(caught.value)


def test_a_missing_model_type_is_found_by_its_class():
    assert read_huggingface(without("qwen3-32b", "model_type")).architecture.family == "qwen3"
    with pytest.raises(InputError, match="neither model_type nor a supported class"):
        read_huggingface(without("qwen3-32b", "model_type", "architectures"))


BAD_VALUES = [
    ("llama-3-70b", "hidden_size", "8192", "expected an integer of at least 1, got '8192'"),
    ("llama-3-70b", "hidden_size", -1, "expected an integer of at least 1, got -1"),
    ("llama-3-70b", "hidden_size", True, "got True"),
    ("llama-3-70b", "num_hidden_layers", 80.5, "got 80.5"),
    ("llama-3-70b", "num_hidden_layers", 10**12, "expected at most 10000"),
    ("llama-3-70b", "vocab_size", 0, "got 0"),
    ("llama-3-70b", "tie_word_embeddings", "no", "expected true or false, got 'no'"),
    ("llama-3-70b", "num_key_value_heads", 7, "7 does not divide num_attention_heads = 64"),
    ("llama-3-70b", "num_attention_heads", 72, "72 does not divide hidden_size = 8192"),
    ("llama-3-70b", "torch_dtype", 16, "expected text, got 16"),
    ("gpt-oss-20b", "layer_types", ["full_attention"], "expected a list of num_hidden_layers = 24"),
    ("gpt-oss-20b", "layer_types", ["full_attention"] * 23 + ["magic"], "'magic' is not supported"),
    ("gpt-oss-20b", "experts_per_token", 5, "contradicts num_experts_per_tok = 4"),
    ("gemma-2-9b", "sliding_window_size", 5, "contradicts sliding_window = 4096"),
    ("deepseek-v3", "topk_method", "magic", "'magic' is not supported"),
    ("deepseek-v3", "attention_bias", True, "true is not supported"),
    ("phi-3-mini-4k", "attention_bias", True, "true is not supported"),
    ("qwen3-30b-a3b", "mlp_only_layers", ["a"], "expected a list of integers"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_one_error_with_file_and_field(tmp_path, name, field, value, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(name, **{field: value})))
    with pytest.raises(InputError) as caught:
        read_huggingface(file)
    assert str(caught.value).startswith(f"{file}: {field}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


REQUIRED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_required_field_is_named(field):
    with pytest.raises(InputError, match=rf"config\.json: {field}: required, but missing"):
        read_huggingface(without("llama-3-70b", field))


def test_contradictory_experts_are_refused():
    with pytest.raises(InputError, match=r"config\.json: top_k = 9 is more than n_experts = 8"):
        read_huggingface(config("mixtral-8x7b", num_experts_per_tok=9))


@pytest.mark.parametrize("text", ["{", "[]", '"llama"', "\xff"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        read_huggingface(file)


def test_a_folder_names_the_model_and_a_missing_file_is_an_error(tmp_path):
    folder = tmp_path / "My-Llama"
    folder.mkdir()
    with pytest.raises(InputError, match="does not exist"):
        read_huggingface(folder)
    (folder / "config.json").write_text(json.dumps(config("llama-2-7b")))
    assert read_huggingface(folder).architecture.name == "My-Llama"
    assert load_model(str(folder)) == load_model(str(folder / "config.json"))
    assert read_huggingface(folder, name="x").architecture.name == "x"


def mixer_of(fields: dict) -> list[SoftmaxAttention]:
    return [g.mixer for g in read_huggingface(fields).architecture.layers for _ in range(g.count)]


def test_absent_kv_heads_mean_as_many_as_heads():
    assert mixer_of(without("llama-2-7b"))[0].n_kv_heads == 32
    assert mixer_of(config("llama-3-70b", num_key_value_heads=None))[0].n_kv_heads == 64


def test_explicit_head_dim_wins_over_the_quotient():
    assert mixer_of(config("llama-3.2-1b", head_dim=128))[0].head_dim == 128
    assert mixer_of(without("llama-3.2-1b", "head_dim"))[0].head_dim == 64


@pytest.mark.parametrize(("name", "tied"), [("llama-3-70b", False), ("gemma-2b", True), ("qwen3-4b", False)])
def test_absent_tie_word_embeddings_takes_the_model_types_default(name, tied):
    assert read_huggingface(without(name, "tie_word_embeddings")).architecture.tied_embeddings is tied


def test_tie_word_embeddings_of_the_wrapper_counts_unless_the_decoder_says_otherwise():
    assert not read_huggingface(config("gemma-3-4b", tie_word_embeddings=False)).architecture.tied_embeddings
    inner = {**config("gemma-3-4b")["text_config"], "tie_word_embeddings": True}
    both = config("gemma-3-4b", tie_word_embeddings=False, text_config=inner)
    assert read_huggingface(both).architecture.tied_embeddings


def test_mistral_without_a_window_field_has_the_class_default_and_says_so():
    read = read_huggingface(without("mistral-7b-v0.3", "sliding_window"))
    assert read.architecture.layers[0].mixer.window == 4096
    assert "sliding_window is absent: 4096, the default of this model type" in read.notes


def test_qwen_windows_count_only_when_switched_on():
    on = config("qwen2.5-7b", use_sliding_window=True, max_window_layers=20, sliding_window=4096)
    windows = [m.window for m in mixer_of(on)]
    assert windows == [None] * 20 + [4096] * 8
    assert {m.window for m in mixer_of(config("qwen2.5-7b"))} == {None}
    types = ["full_attention"] * 27 + ["sliding_attention"]
    with pytest.raises(InputError, match="layer_types: has sliding layers, but use_sliding_window is not true"):
        read_huggingface(config("qwen2.5-7b", layer_types=types))


def test_layer_types_override_the_pattern():
    types = ["full_attention"] * 20 + ["sliding_attention"] * 6
    by_kind = {
        g.mixer.window: g.count for g in read_huggingface(config("gemma-3-1b", layer_types=types)).architecture.layers
    }
    assert by_kind == {None: 20, 512: 6}
    pattern = read_huggingface(config("gemma-3-1b", sliding_window_pattern=2)).architecture.layers
    assert {g.mixer.window: g.count for g in pattern} == {None: 13, 512: 13}


def test_a_window_as_long_as_the_context_is_full_attention():
    read = read_huggingface(DATA / "phi-3-mini-128k.json")
    assert read.architecture.layers[0].mixer.window is None
    assert read.notes == ("sliding_window = 262144 covers the whole context of 131072: full attention",)


def test_llama_biases_are_counted():
    plain = count(load_model("llama-3-70b"))
    biased = count(read_huggingface(config("llama-3-70b", attention_bias=True, mlp_bias=True)).architecture)
    assert biased.attention - plain.attention == 80 * (8192 + 2 * 1024 + 8192)
    assert biased.ffn - plain.ffn == 80 * (2 * 28672 + 8192)


def test_mlp_only_layers_are_dense():
    read = read_huggingface(config("qwen3-30b-a3b", mlp_only_layers=[0, 5])).architecture
    assert {g.ffn.kind: g.count for g in read.layers} == {"dense": 2, "moe": 46}


@pytest.mark.parametrize("n", [1, 7])
def test_mtp_layers_of_deepseek_are_counted_apart(n):
    with_mtp = count(read_huggingface(config("deepseek-v3", num_nextn_predict_layers=n)).architecture)
    assert with_mtp.mtp == n * 11_610_068_224
    assert with_mtp.total == count(load_model("deepseek-v3")).total


@given(
    heads=st.integers(1, 8),
    share=st.integers(1, 8),
    width=st.integers(1, 64),
    layers=st.integers(1, 9),
    d_ff=st.integers(1, 99),
    vocab=st.integers(1, 99),
    tied=st.booleans(),
)
def test_any_llama_shape_counts_by_the_formula(heads, share, width, layers, d_ff, vocab, tied):
    fields = {
        "model_type": "llama",
        "hidden_size": heads * share * width,
        "num_attention_heads": heads * share,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": d_ff,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    D = heads * share * width
    layer = 2 * D * D + 2 * D * heads * width + 3 * D * d_ff + 2 * D
    assert count(read_huggingface(fields).architecture).total == layers * layer + (2 - tied) * vocab * D + D


QUANTIZATIONS = [
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, ("fp8", "fp8", None, (128, 128))),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, ("fp8", "fp8", None, ())),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, ("int4", None, None, (128,))),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, ("int8", None, None, ())),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, ("int4", None, None, (64,))),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, ("int4", None, None, (128,))),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, ("mxfp4", None, None, (32,))),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
                }
            },
        },
        ("int4", None, "fp8", (32,)),
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
                }
            },
        },
        ("fp8", "fp8", None, ()),
    ),
]


@pytest.mark.parametrize(("quantization", "expected"), QUANTIZATIONS)
def test_quantization_becomes_a_hint_and_changes_no_count(quantization, expected):
    read = read_huggingface(config("llama-3-70b", quantization_config=quantization))
    hint = read.precision
    assert (hint.weights, hint.activations, hint.kv, hint.group) == expected
    assert hint.method == quantization["quant_method"]
    kept = quantization.get("ignore") or quantization.get("modules_to_not_convert") or []
    assert hint.kept == tuple(kept)
    assert count(read.architecture) == count(load_model("llama-3-70b"))


BAD_QUANTIZATIONS = [
    ({"quant_method": "magic"}, "quant_method = 'magic' is not supported; known: awq, compressed-tensors"),
    ({}, "quant_method = None is not supported"),
    ([], "expected an object"),
    ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits: expected one of 2, 3, 4, 8, got 5"),
    ({"quant_method": "gptq", "bits": 4}, "group_size: required, but missing"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group size must be positive"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "two positive integers, got [128]"),
    ({"quant_method": "compressed-tensors"}, "config_groups: required, but missing"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"weights": {"num_bits": 3, "type": "int"}}},
        },
        "num_bits = 3 is not supported",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"weights": {"num_bits": 8, "type": "int"}},
                "b": {"weights": {"num_bits": 4, "type": "int"}},
            },
        },
        "2 different schemes",
    ),
]


@pytest.mark.parametrize(("quantization", "message"), BAD_QUANTIZATIONS)
def test_an_unclear_quantization_is_refused(quantization, message):
    with pytest.raises(InputError, match=r"config\.json: quantization_config") as caught:
        read_huggingface(config("llama-3-70b", quantization_config=quantization))
    assert message in str(caught.value)


def test_quantization_of_the_wrapper_is_found():
    read = read_huggingface(config("llama-4-scout", quantization_config={"quant_method": "fp8"}))
    assert read.precision.weights == "fp8"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_value_in_any_field_is_read_or_refused_with_an_input_error(name, data):
    fields = config(name)
    if "text_config" in fields and data.draw(st.booleans()):
        field = data.draw(st.sampled_from(sorted(fields["text_config"])))
        fields = {**fields, "text_config": {**fields["text_config"], field: data.draw(anything)}}
    elif "quantization_config" in fields and data.draw(st.booleans()):
        field = data.draw(st.sampled_from(sorted(fields["quantization_config"])))
        fields = {**fields, "quantization_config": {**fields["quantization_config"], field: data.draw(anything)}}
    else:
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(anything)
    try:
        counts = count(read_huggingface(fields).architecture)
    except InputError as error:
        assert str(error).startswith("config.json: ")  # noqa: PT017 - either outcome is legal, so raises() does not fit
    else:
        assert counts.total > 0


@given(quantization=st.dictionaries(st.sampled_from(["bits", "group_size", "config_groups", "ignore"]), anything))
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_any_quantization_is_read_or_refused_with_an_input_error(method, quantization):
    fields = config("llama-2-7b", quantization_config={**quantization, "quant_method": method})
    try:
        hint = read_huggingface(fields).precision
    except InputError as error:
        assert "quantization_config" in str(error)  # noqa: PT017 - as above
    else:
        assert hint.method == method
