"""Arithmetic of training: FLOPs of a run, by several published counts, and the fraction of peak they stand for.

All counts are model FLOPs: a multiply-add is two, the backward pass twice the forward one, recomputation is not counted
unless a function says so.
"""

from dataclasses import dataclass

from simulator.catalog.architecture import Architecture
from simulator.catalog.parameters import count
from simulator.errors import InputError


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6ND: two FLOPs forward and four backward per parameter and token. [FLOP]

    ``parameters`` are those a token meets: the active ones of a mixture of experts.

    >>> f"{training_flops(174.6e9, 300e9):.4e}"
    '3.1428e+23'
    """
    return 6.0 * parameters * tokens


def attention_training_flops_per_token(n_layers: int, n_heads: int, head_dim: int, context: int) -> float:
    """Training FLOPs of attention scores and values per token, 12·L·H·Q·T: every token attends to all T. [FLOP]

    Causal kernels do half of it. A. Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    return 12.0 * n_layers * n_heads * head_dim * context


def run_flops(architecture: Architecture, tokens: float) -> float:
    """6ND of a catalogue model: its active parameters, one embedding lookup not counted as arithmetic. [FLOP]"""
    return training_flops(count(architecture).active, tokens)


def mfu(flops: float, chip_seconds: float, peak_flops_per_s: float) -> float:
    """Model FLOPs ÷ (chip time × peak). [1]

    >>> round(mfu(training_flops(6.74e9, 1e12), 82_432 * 3600, 312e12), 3)  # Llama-1 7B
    0.437
    """
    return flops / (chip_seconds * peak_flops_per_s)


def megatron_iteration_flops(
    batch: int, sequence: int, n_layers: int, d_model: int, vocabulary: int, *, recompute: bool = True
) -> float:
    """FLOPs of one iteration of a GPT: 96·B·s·l·h²·(1 + s/(6h) + V/(16·l·h)), full activation recomputation included. [FLOP]

    D. Narayanan et al. 2021, arXiv:2104.04473, eq. 3. Without recomputation three quarters of the layers' part; the head is never
    recomputed.

    >>> f"{megatron_iteration_flops(1536, 2048, 96, 12288, 51200):.5e}"
    '4.51097e+18'
    """
    layers = (
        (96 if recompute else 72) * batch * sequence * n_layers * float(d_model) ** 2 * (1 + sequence / (6 * d_model))
    )
    return layers + 6.0 * batch * sequence * d_model * vocabulary


def megatron_parameters(n_layers: int, d_model: int, vocabulary: int, sequence: int) -> float:
    """Parameters of a GPT: 12·l·h²·(1 + 13/(12h) + (V + s)/(12·l·h)); same source, eq. 2."""
    inner = 1 + 13 / (12 * d_model) + (vocabulary + sequence) / (12 * n_layers * d_model)
    return 12.0 * n_layers * float(d_model) ** 2 * inner


def recomputed_training_days(parameters: float, tokens: float, chips: int, achieved_flops_per_s: float) -> float:
    """Days of a run by 8·T·P/(n·X), X with recomputation counted; same source, eq. 4. [days]

    >>> round(recomputed_training_days(175e9, 300e9, 1024, 140e12), 1)
    33.9
    """
    return 8.0 * tokens * parameters / (chips * achieved_flops_per_s) / 86400


@dataclass(frozen=True)
class GptShape:
    """A plain decoder: ``n_heads`` heads of ``head_dim``, a feed-forward of two matrices."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    head_dim: int
    vocabulary: int = 32000

    def __post_init__(self) -> None:
        """Refuse empty shapes."""
        for name in ("n_layers", "d_model", "d_ff", "n_heads", "head_dim", "vocabulary"):
            if getattr(self, name) < 1:
                raise InputError(f"shape.{name} = {getattr(self, name)}: must be at least 1")


def hoffmann_sequence_flops(shape: GptShape, sequence: int, *, embeddings: bool = True) -> float:
    """Training FLOPs of one sequence, op by op, as Hoffmann et al. 2022 count them (appendix F). [FLOP]

    Their Table A4 of ratios to 6ND comes out only without ``embeddings`` (lookup and logits).
    """
    s, d, kh = float(sequence), shape.d_model, shape.n_heads * shape.head_dim
    attention = 6 * s * d * kh + 4 * s * s * kh + 3 * shape.n_heads * s * s + 2 * s * kh * d
    dense = 4 * s * d * shape.d_ff
    ends = 4 * s * shape.vocabulary * d if embeddings else 0.0
    return 3 * (shape.n_layers * (attention + dense) + ends)
