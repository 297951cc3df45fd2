"""The power laws of Kaplan et al. [1]_, with their critical batch size.

N counts parameters without embeddings, D tokens, L nats per token; compute is in PF-days, 8.64e19 FLOP. Each law has its own constants:
those of L(N, D) (Table 2) are not those of L(N) and L(D) (eqs. 1.1 and 1.2).

.. [1] J. Kaplan et al., "Scaling laws for neural language models", 2020, arXiv:2001.08361.
"""

from simulator.errors import InputError
from simulator.scaling.fitted import FittedRange

PF_DAY_FLOPS = 8.64e19
"""One PF-day. [FLOP]"""

FITTED = FittedRange(parameters=(768.0, 1.5e9), tokens=(2.2e7, 2.3e10))
"""Models and data sets of the paper's runs (recalled from its section 1.3)."""

ALPHA_N, N_C = 0.076, 8.8e13
ALPHA_D, D_C = 0.095, 5.4e13
ALPHA_C, C_C_PF_DAYS = 0.050, 3.1e8
ALPHA_N2, ALPHA_D2, N_C2, D_C2 = 0.076, 0.103, 6.4e13, 1.8e13
ALPHA_NS, ALPHA_S, N_CS, S_C = 0.077, 0.76, 6.5e13, 2.1e3
ALPHA_B, B_STAR = 0.21, 2.1e8
"""B_STAR is the body's figure; eq. 1.4 rounds it to 2e8."""
N_EXPONENT, D_EXPONENT = 0.73, 0.27


def loss_of_parameters(parameters: float, *, extrapolate: bool = False) -> float:
    """L(N) of models trained to convergence on enough data, eq. 1.1. [nats per token]

    >>> round(loss_of_parameters(1e9), 4)
    2.3756
    """
    FITTED.require("kaplan", {"parameters": parameters}, extrapolate=extrapolate)
    return float((N_C / parameters) ** ALPHA_N)


def loss_of_tokens(tokens: float, *, extrapolate: bool = False) -> float:
    """L(D) of large models stopped early, eq. 1.2. [nats per token]

    >>> round(loss_of_tokens(23e9), 4)
    2.0903
    """
    FITTED.require("kaplan", {"tokens": tokens}, extrapolate=extrapolate)
    return float((D_C / tokens) ** ALPHA_D)


def loss_of_compute(pf_days: float) -> float:
    """L(C_min), eq. 1.3, of optimally sized models at small batches. [nats per token]

    >>> round(loss_of_compute(1.0), 4)
    2.6581
    """
    _positive("pf_days", pf_days)
    return float((C_C_PF_DAYS / pf_days) ** ALPHA_C)


def loss(parameters: float, tokens: float, *, extrapolate: bool = False) -> float:
    """L(N, D), eq. 1.5 with the constants of Table 2. [nats per token]

    >>> round(loss(1e9, 23e9), 4)
    2.3673
    """
    FITTED.require("kaplan", {"parameters": parameters, "tokens": tokens}, extrapolate=extrapolate)
    return float(((N_C2 / parameters) ** (ALPHA_N2 / ALPHA_D2) + D_C2 / tokens) ** ALPHA_D2)


def loss_of_steps(parameters: float, min_steps: float, *, extrapolate: bool = False) -> float:
    """L(N, S_min), eq. 1.6: after the fewest steps, at very large batches. [nats per token]"""
    FITTED.require("kaplan", {"parameters": parameters}, extrapolate=extrapolate)
    _positive("min_steps", min_steps)
    return float((N_CS / parameters) ** ALPHA_NS + (S_C / min_steps) ** ALPHA_S)


def optimal_parameters(pf_days: float) -> float:
    """N of the best model for a compute budget: 1.3e9 · C^0.73.

    >>> optimal_parameters(1.0)
    1300000000.0
    """
    _positive("pf_days", pf_days)
    return 1.3e9 * float(pf_days**N_EXPONENT)


def critical_batch_tokens(loss_value: float) -> float:
    """B_crit: the batch at which training takes twice the fewest steps and twice the fewest tokens, eq. 1.4. [tokens]

    >>> round(critical_batch_tokens(3.0))
    1122570
    """
    _positive("loss", loss_value)
    return B_STAR / float(loss_value ** (1 / ALPHA_B))


def steps_at_batch(min_steps: float, batch_tokens: float, critical_tokens: float) -> float:
    """Steps at a finite batch: S = S_min·(1 + B_crit/B).

    >>> steps_at_batch(1000.0, 2e6, 2e6)
    2000.0
    """
    return min_steps * (1 + critical_tokens / batch_tokens)


def compute_at_batch(min_compute: float, batch_tokens: float, critical_tokens: float) -> float:
    """Compute at a finite batch, in the unit of ``min_compute``: C = C_min·(1 + B/B_crit)."""
    return min_compute * (1 + batch_tokens / critical_tokens)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"scaling law kaplan: {name} = {value}: must be positive and finite")
