"""Published parameter counts and cache sizes of the catalogue's models."""

from collections.abc import Callable
from functools import partial

from simulator.catalog.architecture import Architecture
from simulator.catalog.models import load_model
from simulator.catalog.parameters import ParameterCounts, count, sequence_kv_elements
from simulator.reproduction.rows import Ours, read_published
from simulator.reproduction.textbook import decoder, textbook
from simulator.roofline.ops import StepShape, step_ops

VISION_TOWER = {"gemma-3": 416_866_032, "llama-4": 871_932_416, "qwen3.5": 456_010_480}
"""Parameters of towers outside the text model, as published or by difference in the reference table."""
KIMI_PROJECTOR = 54_277_888
SEQUENCE = 4096


def parameters_ours() -> Ours:
    """Our side of ``data/parameters.csv``: rows ``MODEL.total`` and ``MODEL.active`` are counted, others are named below."""
    ours = _checkpoints() | _training_flops()
    for item in read_published("parameters"):
        model, _, what = item["id"].rpartition("/")
        if model:
            ours[item["id"]] = partial(_count, model, what)
    return ours


def kv_cache_ours() -> Ours:
    """Our side of ``data/kv-cache.csv``: rows ``MODEL/token`` are counted, others are named below."""
    ours = _spot_values()
    for item in read_published("kv-cache"):
        model, _, what = item["id"].rpartition("/")
        if what == "token" and model:
            ours[item["id"]] = partial(lambda name: 2 * _counts(name).kv_elements_per_token, model)
    return ours


def _count(model: str, what: str) -> float:
    return float(getattr(_counts(model), what))


def _counts(model: str) -> ParameterCounts:
    return count(load_model(model))


def _checkpoints() -> dict[str, Callable[[], float]]:
    """Totals that add something to the text model: prediction layers, repeated tables, vision towers."""

    def with_mtp(model: str, extra: int = 0) -> float:
        counts = _counts(model)
        return counts.total + counts.mtp + extra

    def gemma(model: str) -> float:
        width = load_model(model).d_model
        return _counts(model).total + VISION_TOWER["gemma-3"] + 1152 * width + 1152

    def deepseek() -> float:
        table = _counts("deepseek-v3").embedding
        return with_mtp("deepseek-v3", 2 * table)

    llama = _counts("llama-3-70b")
    palm = _counts("palm-540b")
    return {
        "deepseek-v3-mtp": lambda: _counts("deepseek-v3").mtp,
        "deepseek-v3-stored": deepseek,
        "qwen3-next-checkpoint": lambda: with_mtp("qwen3-next-80b-a3b"),
        "qwen3.5-checkpoint": lambda: with_mtp("qwen3.5-397b-a17b", VISION_TOWER["qwen3.5"]),
        "glm-5-checkpoint": lambda: with_mtp("glm-5"),
        "kimi-checkpoint": lambda: _counts("kimi-k2.5").total + VISION_TOWER["gemma-3"] + KIMI_PROJECTOR,
        "gemma-3-4b-vision": lambda: gemma("gemma-3-4b"),
        "gemma-3-12b-vision": lambda: gemma("gemma-3-12b"),
        "gemma-3-27b-vision": lambda: gemma("gemma-3-27b"),
        "llama-4-scout-vision": lambda: _counts("llama-4-scout").total + VISION_TOWER["llama-4"],
        "llama-4-maverick-vision": lambda: _counts("llama-4-maverick").total + VISION_TOWER["llama-4"],
        "qwen3-0.6b-stored": lambda: _counts("qwen3-0.6b").total + _counts("qwen3-0.6b").head,
        "qwen3-1.7b-stored": lambda: _counts("qwen3-1.7b").total + _counts("qwen3-1.7b").head,
        "llama-3-70b-attention": lambda: llama.attention,
        "llama-3-70b-ffn": lambda: llama.ffn,
        "llama-3-70b-norms": lambda: llama.norms,
        "palm-540b-no-norms": lambda: palm.total - palm.norms,
    }


def _training_flops() -> dict[str, Callable[[], float]]:
    """Forward and backward FLOPs of 4096 tokens, attention unmasked, as the DeepSeekMoE paper counts them."""
    dense = decoder(
        n_layers=30, d_model=4096, d_ff=11008, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=102400, n_norms=2
    )
    sized = partial(
        decoder, n_layers=28, d_model=2048, n_heads=16, n_kv_heads=16, head_dim=128, vocab_size=102400, n_norms=2
    )
    as_dense, mixture = sized(d_ff=8 * 1408), sized(d_ff=1408, experts=(66, 8))

    def written(n_layers: int, width: int, squares: int) -> float:
        """``squares``: matrix parameters of a layer in units of width²."""
        per_token = 6 * squares * n_layers * width**2 + 12 * n_layers * width * SEQUENCE + 6 * 102400 * width
        return per_token * SEQUENCE / 1e12

    def counted(arch: Architecture, priced: Architecture) -> float:
        step = StepShape(n=SEQUENCE, P=1, A=float(SEQUENCE**2), K=SEQUENCE, R=SEQUENCE)
        ops = step_ops(textbook(priced, "tpu-v5e:1"), step)
        attention = sum(float(op.flops) for op in ops if op.kind == "attention")
        return 3 * (count(arch).matmul_flops_per_token * SEQUENCE + attention) / 1e12

    return {
        "flops-dense-written": lambda: written(30, 4096, 12),
        "flops-moe-written": lambda: written(28, 2048, 20),
        "flops-dense": lambda: counted(dense, dense),
        "flops-moe": lambda: counted(mixture, as_dense),
    }


def _spot_values() -> dict[str, Callable[[], float]]:
    def sequence(model: str, tokens: int, element_bytes: float = 2) -> float:
        return element_bytes * sequence_kv_elements(load_model(model), tokens)

    def deepseek_as_mha() -> float:
        arch = load_model("deepseek-v3")
        mixers = [(group.count, group.mixer) for group in arch.layers]
        return sum(2 * n * m.n_heads * (m.nope_dim + m.rope_dim + m.v_dim) for n, m in mixers if m and m.kind == "mla")

    def state(model: str) -> float:
        return 4 * _counts(model).state_elements_per_sequence

    def conv(model: str) -> float:
        return 2 * _counts(model).conv_elements_per_sequence

    def tokens_of_state(model: str) -> float:
        return (state(model) + conv(model)) / (2 * _counts(model).kv_elements_per_token)

    ours: dict[str, Callable[[], float]] = {
        "llama-3-70b-int8": lambda: sequence("llama-3-70b", 1, 1),
        "llama-3-70b-8k": lambda: sequence("llama-3-70b", 8192),
        "llama-2-13b-8k": lambda: sequence("llama-2-13b", 8192),
        "deepseek-v3-as-mha": deepseek_as_mha,
        "gpt-oss-120b-128k": lambda: sequence("gpt-oss-120b", 131072) / 1e9,
        "gemma-3-27b-128k": lambda: sequence("gemma-3-27b", 131072) / 1e9,
        "glm-5-index": lambda: 78 * (_counts("glm-5").index_elements_per_token / 78 + 4),
        "glm-5-all": lambda: (
            2 * _counts("glm-5").kv_elements_per_token + _counts("glm-5").index_elements_per_token + 4 * 78
        ),
    }
    for model in ("qwen3.5-397b-a17b", "qwen3-next-80b-a3b", "nemotron-h-56b", "nemotron-h-8b"):
        ours |= {
            f"{model}-state": partial(state, model),
            f"{model}-conv": partial(conv, model),
            f"{model}-tokens": partial(tokens_of_state, model),
        }
    return ours
