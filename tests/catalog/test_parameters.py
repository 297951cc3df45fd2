"""Counts against the published totals of the model reference table, to the last parameter."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.architecture import (
    Architecture,
    DenseFFN,
    GatedDeltaNet,
    LatentAttention,
    LayerGroup,
    Mamba2,
    MoEFFN,
    SoftmaxAttention,
    SparseIndexer,
)
from simulator.catalog.files import parse
from simulator.catalog.models import (
    SOURCES,
    load_model,
    model_aliases,
    model_names,
    read_model,
    unpriceable_features,
)
from simulator.catalog.parameters import count, sequence_kv_elements
from simulator.errors import InputError

# Section 3 of the reference table: total, active with and without the input embedding, KV bytes per token at 2 B.
COUNTS = [
    ("llama-1-7b", 6_738_415_616, 6_738_415_616, 6_607_343_616, 524_288),
    ("llama-1-13b", 13_015_864_320, 13_015_864_320, 12_852_024_320, 819_200),
    ("llama-1-33b", 32_528_943_616, 32_528_943_616, 32_315_951_616, 1_597_440),
    ("llama-1-65b", 65_285_660_672, 65_285_660_672, 65_023_516_672, 2_621_440),
    ("llama-2-7b", 6_738_415_616, 6_738_415_616, 6_607_343_616, 524_288),
    ("llama-2-13b", 13_015_864_320, 13_015_864_320, 12_852_024_320, 819_200),
    ("llama-2-70b", 68_976_648_192, 68_976_648_192, 68_714_504_192, 327_680),
    ("llama-3-8b", 8_030_261_248, 8_030_261_248, 7_504_924_672, 131_072),
    ("llama-3-70b", 70_553_706_496, 70_553_706_496, 69_503_033_344, 327_680),
    ("llama-3.1-405b", 405_853_388_800, 405_853_388_800, 403_752_042_496, 516_096),
    ("llama-3.2-1b", 1_235_814_400, 1_235_814_400, 1_235_814_400, 32_768),
    ("llama-3.2-3b", 3_212_749_824, 3_212_749_824, 3_212_749_824, 114_688),
    ("codellama-34b", 33_743_970_304, 33_743_970_304, 33_481_826_304, 196_608),
    ("mistral-7b-v0.1", 7_241_732_096, 7_241_732_096, 7_110_660_096, 131_072),
    ("mistral-7b-v0.3", 7_248_023_552, 7_248_023_552, 7_113_805_824, 131_072),
    ("mixtral-8x7b", 46_702_792_704, 12_879_925_248, 12_748_853_248, 131_072),
    ("mixtral-8x22b", 140_620_634_112, 39_152_031_744, 38_955_423_744, 229_376),
    ("mixtral-8x22b-instruct", 140_630_071_296, 39_161_468_928, 38_960_142_336, 229_376),
    ("qwen2.5-0.5b", 494_032_768, 494_032_768, 494_032_768, 12_288),
    ("qwen2.5-1.5b", 1_543_714_304, 1_543_714_304, 1_543_714_304, 28_672),
    ("qwen2.5-3b", 3_085_938_688, 3_085_938_688, 3_085_938_688, 36_864),
    ("qwen2.5-7b", 7_615_616_512, 7_615_616_512, 7_070_619_136, 57_344),
    ("qwen2.5-14b", 14_770_033_664, 14_770_033_664, 13_991_465_984, 196_608),
    ("qwen2.5-32b", 32_763_876_352, 32_763_876_352, 31_985_308_672, 262_144),
    ("qwen2.5-72b", 72_706_203_648, 72_706_203_648, 71_460_495_360, 327_680),
    ("qwen3-0.6b", 596_049_920, 596_049_920, 596_049_920, 114_688),
    ("qwen3-1.7b", 1_720_574_976, 1_720_574_976, 1_720_574_976, 114_688),
    ("qwen3-4b", 4_022_468_096, 4_022_468_096, 4_022_468_096, 147_456),
    ("qwen3-8b", 8_190_735_360, 8_190_735_360, 7_568_405_504, 147_456),
    ("qwen3-14b", 14_768_307_200, 14_768_307_200, 13_990_394_880, 163_840),
    ("qwen3-32b", 32_762_123_264, 32_762_123_264, 31_984_210_944, 262_144),
    ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704, 3_041_867_776, 98_304),
    ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520, 21_568_433_664, 192_512),
    ("gemma-2b", 2_506_172_416, 2_506_172_416, 2_506_172_416, 18_432),
    ("gemma-7b", 8_537_680_896, 8_537_680_896, 8_537_680_896, 458_752),
    ("gemma-2-2b", 2_614_341_888, 2_614_341_888, 2_614_341_888, 106_496),
    ("gemma-2-9b", 9_241_705_984, 9_241_705_984, 9_241_705_984, 344_064),
    ("gemma-2-27b", 27_227_128_320, 27_227_128_320, 27_227_128_320, 376_832),
    ("gemma-3-1b", 999_885_952, 999_885_952, 999_885_952, 26_624),
    ("gemma-3-4b", 3_880_263_168, 3_880_263_168, 3_880_263_168, 139_264),
    ("gemma-3-12b", 11_766_034_176, 11_766_034_176, 11_766_034_176, 393_216),
    ("gemma-3-27b", 27_009_346_304, 27_009_346_304, 27_009_346_304, 507_904),
    ("deepseek-v2", 235_741_434_880, 21_375_800_320, 20_851_512_320, 69_120),
    ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208, 2_451_435_008, 31_104),
    ("deepseek-v3", 671_026_419_200, 37_552_297_472, 36_625_618_432, 70_272),
    ("gpt-oss-20b", 20_914_757_184, 4_187_440_704, 3_608_307_264, 49_152),
    ("gpt-oss-120b", 116_829_156_672, 5_711_982_912, 5_132_849_472, 73_728),
    ("palm-8b", 8_632_012_800, 8_632_012_800, 8_632_012_800, 32_768),
    ("palm-62b", 62_495_662_080, 62_495_662_080, 62_495_662_080, 65_536),
    ("palm-540b", 540_356_474_880, 540_356_474_880, 540_356_474_880, 120_832),
    ("mt-nlg-530b", 529_600_819_200, 529_600_819_200, 529_600_819_200, 8_601_600),
    ("gpt-3-175b", 174_604_259_328, 174_604_259_328, 174_604_259_328, 4_718_592),
    ("llama-4-scout", 107_769_861_120, 17_172_894_720, 16_138_408_960, 196_608),
    ("llama-4-maverick", 400_711_848_960, 17_184_691_200, 16_150_205_440, 196_608),
    ("phi-3-mini-128k", 3_821_079_552, 3_821_079_552, 3_722_578_944, 393_216),
    ("phi-3-mini-4k", 3_821_079_552, 3_821_079_552, 3_722_578_944, 393_216),
    ("phi-3-medium", 13_960_238_080, 13_960_238_080, 13_796_070_400, 204_800),
    ("minimax-m2.5", 228_689_764_864, 11_030_553_088, 10_415_956_480, 253_952),
    ("qwen3.5-397b-a17b", 396_346_350_336, 17_349_040_896, 16_331_922_176, 30_720),
    ("qwen3-next-80b-a3b", 79_674_391_296, 3_874_929_408, 3_563_764_480, 24_576),
    ("kimi-k2.5", 1_026_408_232_448, 32_861_500_928, 31_687_095_808, 70_272),
    ("glm-5", 743_911_218_432, 41_784_728_832, 40_833_146_112, 89_856),
    ("gpt-j-6b", 6_050_882_784, 6_050_882_784, 5_844_444_384, 458_752),
    ("falcon-180b", 179_522_565_120, 179_522_565_120, 178_557_088_768, 163_840),
    ("nemotron-h-56b", 56_324_350_464, 56_324_350_464, 55_250_608_640, 40_960),
    ("nemotron-h-8b", 8_100_852_736, 8_100_852_736, 7_563_981_824, 16_384),
]


@pytest.mark.parametrize(("name", "total", "active", "active_without_embedding", "kv_bytes"), COUNTS)
def test_counts_of_the_reference_table_section_3(name, total, active, active_without_embedding, kv_bytes):
    counts = count(load_model(name))
    assert (counts.total, counts.active, counts.active_without_embedding) == (total, active, active_without_embedding)
    assert 2 * counts.kv_elements_per_token == kv_bytes


def test_every_model_of_the_catalogue_is_in_the_table():
    assert sorted(row[0] for row in COUNTS) == model_names()


# Section 3.1: models whose published total is exact to the last digit for the very parameters counted here.
EXACT = [
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-405b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b-v0.1",
    "mistral-7b-v0.3",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "mixtral-8x22b-instruct",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "gemma-2b",
    "gemma-7b",
    "gemma-2-2b",
    "gemma-2-9b",
    "gemma-2-27b",
    "gemma-3-1b",
    "deepseek-v2",
    "deepseek-v2-lite",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "phi-3-mini-4k",
    "phi-3-mini-128k",
    "phi-3-medium",
    "qwen3.5-397b-a17b",
    "kimi-k2.5",
    "gpt-j-6b",
    "falcon-180b",
]


@pytest.mark.parametrize("name", EXACT)
def test_published_total_is_met_to_the_last_digit(name):
    architecture = load_model(name)
    assert architecture.published_total is not None
    assert count(architecture).total == architecture.published_total


# Published checkpoint = main model + multi-token prediction + what the note of each model names.
CHECKPOINTS = [
    ("deepseek-v3", 11_610_068_224, 2 * 926_679_040 + 41_540_496, 684_531_386_000),
    ("glm-5", 9_952_920_576, 0, 753_864_139_008),
    ("qwen3-next-80b-a3b", 1_650_471_424, 0, 81_324_862_720),
    ("qwen3.5-397b-a17b", 6_595_568_128, 456_010_480, 403_397_928_944),
    ("kimi-k2.5", 0, 416_866_032 + 54_277_888, 1_026_879_376_368),
    ("minimax-m2.5", 0, 13_880_064, 228_703_644_928),
    ("gemma-3-4b", 0, 416_866_032 + 1152 * 2560 + 1152, 4_300_079_472),
    ("gemma-3-12b", 0, 416_866_032 + 1152 * 3840 + 1152, 12_187_325_040),
    ("gemma-3-27b", 0, 416_866_032 + 1152 * 5376 + 1152, 27_432_406_640),
    ("llama-4-scout", 0, 871_932_416, 108_641_793_536),
    ("llama-4-maverick", 0, 871_932_416, 401_583_781_376),
    ("qwen3-0.6b", 0, 151_936 * 1024, 751_632_384),
    ("qwen3-1.7b", 0, 151_936 * 2048, 2_031_739_904),
]


@pytest.mark.parametrize(("name", "mtp", "more", "checkpoint"), CHECKPOINTS)
def test_published_checkpoints_of_section_3_1(name, mtp, more, checkpoint):
    counts = count(load_model(name))
    assert counts.mtp == mtp
    assert counts.total + counts.mtp + more == checkpoint


def test_llama_3_70b_by_component():
    counts = count(load_model("llama-3-70b"))
    assert counts.attention == 12_079_595_520
    assert counts.ffn == 56_371_445_760
    assert counts.embedding == counts.head == 1_050_673_152
    assert counts.norms == 1_318_912
    assert counts.read_per_step == 69_503_033_344
    assert counts.matmul_flops_per_token == 2 * 69_503_033_344


def test_palm_540b_is_540_35_billion_without_norm_scales():
    counts = count(load_model("palm-540b"))
    assert counts.total - counts.norms == 540_354_281_472


def test_kimi_k2_5_routed_experts():
    assert count(load_model("kimi-k2.5")).routed_experts == 1_014_686_023_680


def test_deepseek_v3_score_corrections_are_in_the_routers():
    architecture = load_model("deepseek-v3")
    bare = tuple(
        g.model_copy(update={"ffn": g.ffn.model_copy(update={"score_correction_bias": False})})
        if isinstance(g.ffn, MoEFFN)
        else g
        for g in architecture.layers
    )
    without = architecture.model_copy(update={"layers": bare})
    main, stripped = count(architecture), count(without)
    # 59 layers of 256 biases each, the one of the MTP layer included (section 3.1)
    assert (main.router + main.mtp) - (stripped.router + stripped.mtp) == 15_104


# Section 3.2
STATES = [
    ("qwen3.5-397b-a17b", 188_743_680, 3_317_760),
    ("qwen3-next-80b-a3b", 75_497_472, 1_769_472),
    ("nemotron-h-56b", 905_969_664, 6_635_520),
    ("nemotron-h-8b", 100_663_296, 1_474_560),
]


@pytest.mark.parametrize(("name", "state_bytes", "conv_bytes"), STATES)
def test_recurrent_state_of_section_3_2(name, state_bytes, conv_bytes):
    counts = count(load_model(name))
    assert 4 * counts.state_elements_per_sequence == state_bytes
    assert 2 * counts.conv_elements_per_sequence == conv_bytes


SEQUENCES = [
    ("llama-3-70b", 8192, 2_684_354_560),
    ("llama-2-13b", 8192, 6_710_886_400),
    ("gpt-oss-120b", 131_072, 18 * 131_072 * 2048 + 18 * 128 * 2048),
    ("gpt-oss-120b", 128, 128 * 73_728),
    ("gemma-3-27b", 131_072, 10 * 131_072 * 8192 + 52 * 1024 * 8192),
    ("deepseek-v3", 1, 70_272),
    ("palm-540b", 1, 120_832),
]


@pytest.mark.parametrize(("name", "tokens", "kv_bytes"), SEQUENCES)
def test_sequence_kv_bytes_of_section_3_2(name, tokens, kv_bytes):
    assert 2 * sequence_kv_elements(load_model(name), tokens) == kv_bytes


def test_int8_kv_of_llama_3_70b_is_163840_bytes_per_token():
    assert count(load_model("llama-3-70b")).kv_elements_per_token == 163_840


def test_glm_5_index_keys_are_132_bytes_per_layer_in_fp8():
    glm = load_model("glm-5")
    # 128 FP8 values and a 4-byte scale per layer and token
    assert count(glm).index_elements_per_token + 4 * glm.n_layers == 10_296


@pytest.mark.parametrize("name", model_names())
def test_components_add_up_and_bound_each_other(name):
    c = count(load_model(name))
    assert c.total == c.embedding + c.head + c.positions + c.norms + c.attention + c.recurrent + c.ffn
    assert c.routed_experts + c.shared_experts + c.router <= c.ffn
    assert c.active_without_embedding <= c.active <= c.total
    assert c.read_per_step == c.total - c.embedding
    assert (c.active == c.total) == (c.routed_experts == 0)


@pytest.mark.parametrize("name", model_names())
def test_catalogue_files_name_themselves_and_a_known_source(name):
    architecture = load_model(name)
    assert architecture.name == name
    assert architecture.source in SOURCES
    assert architecture.locator
    assert (architecture.kind == "recalled") == (architecture.source == "recalled-config")
    assert architecture.published_total in (None, count(architecture).total)


def test_aliases_are_unique_and_shadow_no_model():
    aliases = [alias for name in model_names() for alias in load_model(name).aliases]
    assert len(aliases) == len(set(aliases)) == len(model_aliases())
    assert not set(aliases) & set(model_names())
    assert load_model("deepseek-r1") is load_model("deepseek-v3")


@pytest.mark.parametrize("name", model_names())
def test_every_architecture_of_the_catalogue_is_priced(name):
    assert unpriceable_features(load_model(name)) == []


def test_windows_of_several_sizes_are_named():
    gemma = load_model("gemma-3-27b")
    local, other = gemma.layers[0], gemma.layers[1]
    wider = other.model_copy(update={"mixer": other.mixer.model_copy(update={"window": 4096})})
    assert unpriceable_features(gemma.model_copy(update={"layers": (local, wider)})) == [
        "attention windows of several sizes"
    ]


sizes = st.integers(1, 64)
mixers = st.one_of(
    st.builds(
        lambda k, share, h, w, qkv, o, norm, sinks, gate: SoftmaxAttention(
            n_heads=k * share,
            n_kv_heads=k,
            head_dim=h,
            window=w,
            qkv_bias=qkv,
            o_bias=o,
            qk_norm=norm,
            sinks=sinks,
            gated_output=gate,
        ),
        *(sizes, sizes, sizes, st.none() | sizes, st.booleans(), st.booleans()),
        *(st.sampled_from(["none", "per_head", "full"]), st.booleans(), st.booleans()),
    ),
    st.builds(
        LatentAttention,
        n_heads=sizes,
        q_rank=st.none() | sizes,
        kv_rank=sizes,
        nope_dim=sizes,
        rope_dim=sizes,
        v_dim=sizes,
        indexer=st.none() | st.builds(SparseIndexer, n_heads=sizes, head_dim=sizes, top_k=sizes),
    ),
    st.builds(
        lambda k, share, dk, dv, conv: GatedDeltaNet(
            n_key_heads=k, n_value_heads=k * share, key_dim=dk, value_dim=dv, conv=conv
        ),
        *(sizes, sizes, sizes, sizes, sizes),
    ),
    st.builds(Mamba2, n_heads=sizes, head_dim=sizes, n_groups=sizes, state_dim=sizes, conv=sizes),
)
ffns = st.one_of(
    st.builds(DenseFFN, d_ff=sizes, gated=st.booleans(), bias=st.booleans()),
    st.builds(
        lambda top_k, others, d_ff, shared, bias: MoEFFN(
            n_experts=top_k + others, top_k=top_k, d_ff=d_ff, n_shared=shared, expert_bias=bias, router_bias=bias
        ),
        *(sizes, sizes, sizes, st.integers(0, 3), st.booleans()),
    ),
)
groups = st.builds(LayerGroup, count=st.integers(1, 5), mixer=mixers, ffn=ffns, n_norms=st.integers(0, 4))
architectures = st.builds(
    Architecture,
    name=st.just("drawn"),
    family=st.just("drawn"),
    d_model=sizes,
    vocab_size=sizes,
    tied_embeddings=st.booleans(),
    layers=st.lists(groups, min_size=1, max_size=4).map(tuple),
    norm=st.sampled_from(["rms", "layer"]),
    head_bias=st.booleans(),
    learned_positions=st.integers(0, 9),
    mtp_layers=st.integers(0, 2),
    source=st.just("drawn"),
    kind=st.just("assumed"),
)


@given(architectures)
def test_counts_are_additive_in_the_layers(architecture):
    twice = architecture.model_copy(update={"layers": architecture.layers * 2})
    one, two = asdict(count(architecture)), asdict(count(twice))
    per_layer = {"attention", "recurrent", "ffn", "routed_experts", "shared_experts", "router"}
    cache = {f"{name}_per_{of}" for name, of in [("kv_elements", "token"), ("index_elements", "token")]}
    cache |= {"state_elements_per_sequence", "conv_elements_per_sequence"}
    for name in per_layer | cache:
        assert two[name] == 2 * one[name]
    for name in ("embedding", "head", "positions", "mtp"):
        assert two[name] == one[name]


@given(architectures)
def test_grouping_of_equal_layers_changes_nothing(architecture):
    single = tuple(g.model_copy(update={"count": 1}) for g in architecture.layers for _ in range(g.count))
    assert count(architecture.model_copy(update={"layers": single})) == count(architecture)


@given(architectures, st.integers(0, 300))
def test_sequence_cache_grows_by_at_most_one_token_and_never_shrinks(architecture, tokens):
    now, then = (sequence_kv_elements(architecture, t) for t in (tokens, tokens + 1))
    assert 0 <= then - now <= count(architecture).kv_elements_per_token
    assert sequence_kv_elements(architecture, 1) == count(architecture).kv_elements_per_token


def test_tying_embeddings_saves_one_table_and_no_reading():
    architecture = load_model("llama-3-8b")
    tied = count(architecture.model_copy(update={"tied_embeddings": True}))
    untied = count(architecture)
    assert untied.total - tied.total == 128_256 * 4096
    assert untied.read_per_step == tied.read_per_step


LAYER = {
    "count": 1,
    "mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "ffn": {"kind": "dense", "d_ff": 16},
}
MODEL = {
    "name": "mine",
    "family": "mine",
    "d_model": 32,
    "vocab_size": 100,
    "tied_embeddings": False,
    "source": "me",
    "kind": "assumed",
    "layers": [LAYER],
}

BROKEN = [
    ({"mixer": {**LAYER["mixer"], "n_kv_heads": 3}}, "n_heads = 4 is not a multiple of n_kv_heads = 3"),
    ({"mixer": {**LAYER["mixer"], "n_heads": 0}}, "n_heads"),
    ({"mixer": {**LAYER["mixer"], "kind": "magic"}}, "'magic'"),
    ({"ffn": {"kind": "moe", "n_experts": 4, "top_k": 5, "d_ff": 8}}, "top_k = 5 is more than n_experts = 4"),
    ({"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 8, "shared_gate": True}}, "n_shared"),
    ({"mixer": None, "ffn": None}, "a layer needs a mixer, an ffn or both"),
    ({"count": -1}, "count"),
    ({"windw": 3}, "windw"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_architectures_are_refused_by_file_and_field(change, message):
    with pytest.raises(InputError, match=r"mine\.toml: layers") as caught:
        parse(Architecture, {**MODEL, "layers": [{**LAYER, **change}]}, "mine.toml")
    assert message in str(caught.value)


def test_a_users_own_toml_file_is_read(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nfamily = "mine"\nd_model = 32\nvocab_size = 100\ntied_embeddings = true\nsource = "me"\n'
        'kind = "assumed"\n[[layers]]\ncount = 2\nffn = { kind = "dense", d_ff = 16 }\n'
        'mixer = { kind = "attention", n_heads = 4, n_kv_heads = 2, head_dim = 8 }\n'
    )
    # by hand: attention 2·32·4·8 + 2·32·2·8 = 3072, feed-forward 3·32·16 = 1536, norms 2·32; head 3200, last norm 32
    assert count(load_model(str(file))).total == 2 * (3072 + 1536 + 64) + 3200 + 32
    assert read_model(str(file)).notes == ()


@pytest.mark.parametrize("path", ["no/such/model.toml", "nosuch.toml", "nosuch.json", "no/such"])
def test_a_missing_file_says_so(path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(path)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'llama-3-70b'"):
        load_model("llama3-70b")
