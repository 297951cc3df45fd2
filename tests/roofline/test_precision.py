"""The precision grammar, and bytes with scales counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.roofline.precision import BITS, Precision, parse_precision


@pytest.mark.parametrize(
    ("word", "weights", "activations", "kv"),
    [
        ("bf16", "bf16", "bf16", "bf16"),
        ("fp16", "fp16", "fp16", "fp16"),
        ("fp8", "fp8", "fp8", "bf16"),
        ("int8", "int8", "int8", "bf16"),
        ("int4", "int4", "bf16", "bf16"),
        ("fp4", "fp4", "bf16", "bf16"),
        ("bf16kv8", "bf16", "bf16", "int8"),
        ("fp16kvfp8", "fp16", "fp16", "fp8"),
        ("fp8kv8", "fp8", "fp8", "fp8"),
        ("int8kv8", "int8", "int8", "int8"),
        ("w8a16kv8", "int8", "bf16", "int8"),
        ("w4a16kv8", "int4", "bf16", "int8"),
        ("w8a8kv8", "int8", "int8", "int8"),
        ("w4a8kv4", "int4", "int8", "int4"),
        ("w4a16", "int4", "bf16", "bf16"),
        ("wfp8a16kvfp8", "fp8", "bf16", "fp8"),
        ("w4afp8kvfp8", "int4", "fp8", "fp8"),
        ("wfp4afp4kvfp8", "fp4", "fp4", "fp8"),
        ("fp32", "fp32", "fp32", "fp32"),
        ("fp32kvbf16", "fp32", "fp32", "bf16"),
        ("nvfp4kv8", "fp4", "fp4", "fp8"),
        ("mxfp4", "fp4", "bf16", "bf16"),
        ("wnvfp4a16", "fp4", "bf16", "bf16"),
        ("wmxfp4afp8kvfp8", "fp4", "fp8", "fp8"),
        (" W8A16KV8 ", "int8", "bf16", "int8"),
    ],
)
def test_words(word, weights, activations, kv):
    p = parse_precision(word)
    assert (p.weights, p.activations, p.kv) == (weights, activations, kv)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "kv8",
        "w8",
        "a16",
        "w8a16kv",
        "bf17",
        "int8w8a8",
        "w8a16kv8g",
        "w3a16",
        "fp8 kv8",
        "g32",
        "mxfp4g16",
        "bf16kvnvfp4",
    ],
)
def test_other_words_are_refused_with_the_grammar(word):
    with pytest.raises(InputError, match=r"precision = ") as caught:
        parse_precision(word)
    assert repr(word) in str(caught.value)


@given(*(st.sampled_from(sorted(BITS)) for _ in range(3)), st.sampled_from([None, 0, 32, 128]), st.booleans())
def test_the_name_of_a_precision_reads_back(weights, activations, kv, group, experts_only):
    p = Precision(weights, activations, kv, group, experts_only=experts_only)
    assert parse_precision(p.name) == p


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("bf16", 16),
        ("w4a16g0", 4.0),
        ("w4a16", 4.125),
        ("w4a16g32", 4.5),
        ("w4a16g64", 4.25),
        ("fp4", 4.5),
        ("fp4g32", 4.25),
        ("int8g0", 8.0),
        ("int8", 8 + 16 / 4096),
        ("fp8", 8 + 16 / 4096),
        ("fp32", 32),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("fp8g128", 8 + 32 / 128**2),
        ("int8g128", 8 + 16 / 128),
    ],
)
def test_bits_per_weight_count_the_scales(word, bits):
    n_in, n_out = 4096, 512
    assert parse_precision(word).matrix_bytes(n_in, n_out) * 8 / (n_in * n_out) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("word", "per_head"),
    [
        ("bf16", 2 * 256),
        ("bf16kv8", 2 * (128 + 2)),
        ("int4kv4", 2 * (64 + 2)),
        ("fp8kv8", 2 * 128),  # one scale per tensor
        ("bf16kvfp4", 2 * (64 + 8)),
        ("w8a16kv8g0", 2 * 128),
        ("w4a16kv4g0", 2 * 64),
    ],
)
def test_kv_bytes_per_head_and_token(word, per_head):
    assert parse_precision(word).kv_head_bytes(128) == per_head


def test_the_head_stays_16_bit_unless_asked():
    assert parse_precision("w4a16").matrix_bytes(1024, 1000, head=True) == 2 * 1024 * 1000
    assert parse_precision("w4a16g0", quantize_head=True).matrix_bytes(1024, 1000, head=True) == 1024 * 1000 / 2


def test_bad_fields_are_refused():
    with pytest.raises(InputError, match=r"precision\.weights = 'int7'; did you mean"):
        Precision(weights="int7")
    with pytest.raises(InputError, match=r"group_size = -1"):
        Precision(group_size=-1)


def test_blocks_are_counted_whole():
    # 576 columns make five blocks of 128, as in the latent projection of DeepSeek-V3's checkpoint.
    assert parse_precision("fp8g128").matrix_bytes(7168, 576) == 7168 * 576 + 56 * 5 * 4


def test_under_fp32_nothing_is_16_bit():
    p = parse_precision("fp32")
    assert p.wide == "fp32"
    assert p.kv_head_bytes(128) == 2 * 128 * 4
    assert p.matrix_bytes(1024, 1000, head=True) == 4 * 1024 * 1000
