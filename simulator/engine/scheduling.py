"""Settings of the scheduler, the host and the clients: docs/engine-scheduling.md says what each one does.

The defaults are those of a plain replica: first come first served, chunked prefill, a host that costs nothing and
clients that wait for ever.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, nearest
from simulator.randomness import normal

POLICIES = ("fcfs", "priority", "sjf", "edf", "fair")
FCFS, PRIORITY, SJF, EDF, FAIR = range(len(POLICIES))
BATCHINGS = ("chunked", "orca", "prefill_first", "static")
CHUNKED, ORCA, PREFILL_FIRST, STATIC = range(len(BATCHINGS))


@dataclass(frozen=True)
class Scheduling:
    """Who is served next, and how a step is put together.

    Attributes
    ----------
    policy
        ``fcfs``; ``priority`` (smallest class first); ``sjf`` (fewest predicted output tokens first); ``edf`` (earliest
        deadline first); ``fair`` (least-served tenant first). Rules Q1, Q2, Q4.
    preempt_lower
        with ``priority``: a waiting request may preempt running ones of a lower class (Q3).
    batching
        ``chunked`` (vLLM V1, Sarathi); ``orca`` (whole prompts beside decodes); ``prefill_first`` (vLLM V0: a step is
        prompts or decodes); ``static`` (a batch runs until all of it is finished). Rules B1 to B4.
    long_prefill_token_threshold
        tokens of one prompt in a step at most; 0: the budget alone limits them (B5).
    max_num_partial_prefills
        unfinished prompts at a time at most; 0: no limit (B6).
    watermark
        share of the KV blocks that an admission must leave free while somebody runs (B7).
    prompt_weight, output_weight
        what a computed prompt token and an emitted token add to a tenant's count (Q4).
    """

    policy: str = "fcfs"
    preempt_lower: bool = False
    batching: str = "chunked"
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0
    watermark: float = 0.0
    prompt_weight: int = 1
    output_weight: int = 2

    def __post_init__(self) -> None:
        """Check names, ranges, and that the settings do not contradict each other."""
        for name, known in (("policy", POLICIES), ("batching", BATCHINGS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"engine.{name} = {value!r}: unknown{nearest(str(value), known)}")
        for name in ("long_prefill_token_threshold", "max_num_partial_prefills", "prompt_weight", "output_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"engine.{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.watermark < 1:
            raise InputError(f"engine.watermark = {self.watermark}: must be at least 0 and less than 1")
        if self.preempt_lower and (self.policy != "priority" or self.batching == "static"):
            raise InputError(
                f"engine.preempt_lower with policy = {self.policy!r}, batching = {self.batching!r}: only priorities have "
                "lower classes, and a static batch is not interrupted"
            )
        if self.batching != "chunked" and (self.long_prefill_token_threshold or self.max_num_partial_prefills):
            raise InputError(
                f"engine.long_prefill_token_threshold and max_num_partial_prefills cut prompts into chunks; "
                f"batching = {self.batching!r} takes them whole"
            )


@dataclass(frozen=True)
class HostOverheads:
    """Time of the CPU around the device's steps (rules H1 to H3). All in seconds, 0 by default.

    Attributes
    ----------
    step_s, sequence_s, token_s
        host work of a step: per step, per scheduled request, per scheduled token.
    asynchronous
        host work of the next step runs during the present one: a step takes the longer of the two, not their sum.
    request_s
        between a request's arrival and the moment the scheduler sees it (HTTP, tokenisation).
    output_s
        between a token's emission and its arrival at the client (detokenisation, HTTP).
    """

    step_s: float = 0.0
    sequence_s: float = 0.0
    token_s: float = 0.0
    asynchronous: bool = False
    request_s: float = 0.0
    output_s: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("step_s", "sequence_s", "token_s", "request_s", "output_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"engine.host.{name} = {value}: must be finite and not negative")


@dataclass(frozen=True)
class Retries:
    """What a client does whose attempt timed out (rule L5).

    Attributes
    ----------
    max_attempts
        attempts in all; 1: no retry.
    backoff_s
        wait before the second attempt. [s]
    backoff_factor
        by which each further wait is longer than the one before.
    """

    max_attempts: int = 1
    backoff_s: float = 1.0
    backoff_factor: float = 2.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.max_attempts <= 1000:
            raise InputError(f"clients.max_attempts = {self.max_attempts}: must be 1 … 1000")
        if not 0 <= self.backoff_s < math.inf:
            raise InputError(f"clients.backoff_s = {self.backoff_s}: must be finite and not negative")
        if not 1 <= self.backoff_factor < math.inf:
            raise InputError(f"clients.backoff_factor = {self.backoff_factor}: must be finite and at least 1")

    def waits_s(self) -> NDArray[np.float64]:
        """[max_attempts] wait after each attempt that timed out; nothing comes after the last. [s]

        >>> Retries(max_attempts=4, backoff_s=0.5).waits_s()
        array([0.5, 1. , 2. , 4. ])
        """
        waits = np.full(self.max_attempts, self.backoff_factor)
        waits[0] = self.backoff_s
        return np.asarray(np.cumprod(waits))


def predict_output_tokens(
    output_tokens: NDArray[np.int64], seed: int, sigma: float, *, first_row: int = 0
) -> NDArray[np.float64]:
    """[n] output lengths as a predictor with a log-normal error sees them: output × exp(σ·z), z standard normal.

    Row i depends on (seed, i) alone. σ = 0 is an oracle. The median prediction is unbiased; the mean is exp(σ²/2) too long.

    Raises
    ------
    InputError
        if ``sigma`` is negative or not finite.

    >>> predict_output_tokens(np.array([7, 9]), seed=1, sigma=0.0)
    array([7., 9.])
    """
    if not 0 <= sigma < math.inf:
        raise InputError(f"engine.length_prediction_sigma = {sigma}: must be finite and not negative")
    z = normal(seed, "predicted_tokens", first_row, first_row + len(output_tokens))
    return np.asarray(output_tokens * np.exp(sigma * z))
