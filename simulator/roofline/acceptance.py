"""How many drafted tokens a target model accepts, and what that is worth: the arithmetic of speculative decoding.

A *pass* is one step of the target model over a sequence's last token and its drafts. Of γ drafts a prefix is accepted, and the
target adds one token of its own, so a pass gives 1 … γ + 1 tokens. All of it follows from the *survival* s_k, the probability that at
least k drafts are accepted: the mean is 1 + s_1 + … + s_γ.

.. [1] Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative decoding", ICML 2023, arXiv:2211.17192
   (formulas as in the project's reference table).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

Array = NDArray[np.float64]

BETA_CLASSES = 1025
"""Classes of requests when acceptance differs between them: their rates are rounded to 1/1024."""


def tokens_per_pass(acceptance: float, draft_tokens: int) -> float:
    """Mean tokens of one pass when each draft is accepted with the same probability, on its own.

    Notes: (1 − α^(γ+1)) / (1 − α), equation (1) of [1]_; γ + 1 for α = 1.

    >>> round(tokens_per_pass(0.8, 5), 4)
    3.6893

    .. [1] Leviathan et al. 2023, see the module.
    """
    return 1.0 + float(survival_of_rate(acceptance, draft_tokens).sum())


def walltime_factor(acceptance: float, draft_tokens: int, cost_ratio: float) -> float:
    """Speed-up where a pass takes as long as a plain step and each draft ``cost_ratio`` of it.

    Holds where verification is free, at batch 1 on a memory-bound model; the engine finds what is left of it in a batch.
    Notes: (1 − α^(γ+1)) / ((1 − α)(γc + 1)), theorem 3.8 of [1]_.

    >>> round(walltime_factor(0.8, 5, 0.0), 2)
    3.69

    .. [1] Leviathan et al. 2023, see the module.
    """
    return tokens_per_pass(acceptance, draft_tokens) / (draft_tokens * cost_ratio + 1)


def operations_factor(acceptance: float, draft_tokens: int, flops_ratio: float) -> float:
    """Factor by which speculation multiplies the arithmetic per token; ``flops_ratio`` is draft ÷ target per token.

    Notes: (1 − α)(γĉ + γ + 1) / (1 − α^(γ+1)), theorem 3.11 of [1]_ (number recalled).

    >>> round(operations_factor(0.8, 5, 0.0), 2)
    1.63

    .. [1] Leviathan et al. 2023, see the module.
    """
    return (draft_tokens * flops_ratio + draft_tokens + 1) / tokens_per_pass(acceptance, draft_tokens)


def best_draft_tokens(acceptance: float, cost_ratio: float, *, most: int = 64) -> int:
    """Draft length with the largest :func:`walltime_factor`, up to ``most``; 0 if drafting never pays (α ≤ c).

    >>> best_draft_tokens(0.8, 0.05), best_draft_tokens(0.6, 0.2), best_draft_tokens(0.3, 0.4)
    (8, 2, 0)
    """
    return max(range(most + 1), key=lambda length: walltime_factor(acceptance, length, cost_ratio))


def survival_of_rate(acceptance: float, draft_tokens: int) -> Array:
    """[γ] probabilities that at least 1 … γ drafts are accepted, each with probability ``acceptance``."""
    if not 0 <= acceptance <= 1:
        raise InputError(f"acceptance rate = {acceptance}: must be 0 … 1")
    return np.asarray(acceptance ** np.arange(1, draft_tokens + 1, dtype=np.float64))


def survival_of_curve(curve: Sequence[float], draft_tokens: int) -> Array:
    """[γ] survival from a curve: entry k is the probability that draft k is accepted if all before it were.

    >>> survival_of_curve([0.9, 0.5], 2)
    array([0.9 , 0.45])
    """
    if len(curve) < draft_tokens or not all(0 <= p <= 1 for p in curve):
        raise InputError(
            f"acceptance curve {list(curve)}: needs at least {draft_tokens} entries, one per draft position, each 0 … 1"
        )
    return np.asarray(np.cumprod(np.asarray(curve[:draft_tokens], dtype=np.float64)))


def survival_of_lengths(lengths: Sequence[float], draft_tokens: int) -> Array:
    """[γ] survival from a histogram: entry k counts the passes in which exactly k drafts were accepted.

    The histogram must have been taken with at least γ drafts; a longer one says what fewer drafts would have given.

    >>> survival_of_lengths([2, 1, 1], 2)
    array([0.5 , 0.25])
    """
    counts = np.asarray(lengths, dtype=np.float64)
    if len(counts) < draft_tokens + 1 or not (counts >= 0).all() or not 0 < counts.sum() < math.inf:
        raise InputError(
            f"acceptance lengths {list(lengths)}: needs counts for 0 … {draft_tokens} accepted drafts, "
            "none negative, not all zero"
        )
    return np.asarray(1 - np.cumsum(counts)[:draft_tokens] / counts.sum())


def beta_parameters(mean: float, spread: float) -> tuple[float, float]:
    """Parameters (a, b) of the Beta distribution with this mean and standard deviation.

    >>> [round(x, 6) for x in beta_parameters(0.5, 12**-0.5)]  # the uniform distribution
    [1.0, 1.0]
    """
    if not 0 < mean < 1 or not 0 < spread < math.sqrt(mean * (1 - mean)):
        raise InputError(
            f"acceptance rate {mean} with spread {spread}: the rate must be inside 0 … 1, the spread (a standard deviation "
            f"between requests) above 0 and below √(rate·(1 − rate))"
        )
    total = mean * (1 - mean) / spread**2 - 1
    return mean * total, (1 - mean) * total
