"""``[clients]``: who sends the requests, how long they wait, and what the scheduler may know of them."""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator, model_validator

from simulator.catalog.records import Record
from simulator.engine.scheduling import Retries, predict_output_tokens
from simulator.randomness import draw, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ClientOptions(Record):
    """Classes and tenants of the requests, timeouts, cancellations and retries. By default all are alike and patient."""

    priorities: list[Share] | None = None
    """Share of the requests in class 0 (served first), 1, …; they sum to 1."""
    tenants: list[Share] | None = None
    """Share of the requests of tenant 0, 1, …; they sum to 1."""
    deadlines_s: list[Positive] | None = None
    """Time from arrival to deadline, of each class or one for all; None: ``slo.ttft_s``. Read by ``engine.policy = "edf"``."""
    ttft_timeout_s: Positive | None = None
    """A client without a token after this time gives up."""
    timeout_s: Positive | None = None
    """A client whose request is not finished after this time gives up."""
    cancel_fraction: Share = 0.0
    """Share of the requests whose user would cancel them …"""
    cancel_mean_s: Positive | None = None
    """… after a time that is exponentially distributed with this mean."""
    max_attempts: PositiveInt = Retries.max_attempts
    """Attempts of a client whose attempts time out."""
    backoff_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Retries.backoff_s
    """Wait before the second attempt."""
    backoff_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Retries.backoff_factor
    """By which each further wait is longer."""

    @field_validator("priorities", "tenants")
    @classmethod
    def _sum_to_one(cls, shares: list[float] | None) -> list[float] | None:
        if shares is not None and abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"shares sum to {sum(shares):g}, not to 1")
        return shares

    @model_validator(mode="after")
    def _no_contradiction(self) -> "ClientOptions":
        classes = len(self.priorities or [1.0])
        if self.deadlines_s is not None and len(self.deadlines_s) not in {1, classes}:
            raise ValueError(
                f"{len(self.deadlines_s)} deadlines_s for {classes} priorities: give one for each, or one for all"
            )
        if (self.cancel_fraction > 0) != (self.cancel_mean_s is not None):
            raise ValueError("cancel_fraction and cancel_mean_s go together")
        if self.max_attempts > 1 and self.ttft_timeout_s is None and self.timeout_s is None:
            raise ValueError("max_attempts: only timeouts are tried again; state ttft_timeout_s or timeout_s")
        return self

    @property
    def may_leave(self) -> bool:
        """Whether any client gives up or cancels."""
        return self.ttft_timeout_s is not None or self.timeout_s is not None or self.cancel_mean_s is not None

    @property
    def retries(self) -> Retries:
        """As the engine takes them."""
        return Retries(self.max_attempts, self.backoff_s, self.backoff_factor)

    def columns(
        self, output_tokens: NDArray[np.int64], seed: int, *, prediction_sigma: float | None, ttft_s: float | None
    ) -> dict[str, NDArray[Any]]:
        """Columns of the engine's requests. Row i depends on the options, ``seed`` and i (and its output length) alone.

        Parameters
        ----------
        prediction_sigma
            σ of the output-length predictor's log-normal error; None: no predictions.
        ttft_s
            deadline where none is stated.
        """
        n = len(output_tokens)
        found: dict[str, NDArray[Any]] = {}
        if self.priorities is not None:
            found["priority"] = _classes(self.priorities, seed, "priority", n)
        if self.tenants is not None:
            found["tenant"] = _classes(self.tenants, seed, "tenant", n)
        if prediction_sigma is not None:
            found["predicted_tokens"] = predict_output_tokens(output_tokens, seed, prediction_sigma)
        deadlines_s = self.deadlines_s or ([ttft_s] if ttft_s is not None else None)
        if deadlines_s is not None:
            each = np.array(deadlines_s)
            found["deadline_s"] = each[found["priority"]] if len(each) > 1 else np.full(n, each[0])
        for name in ("ttft_timeout_s", "timeout_s"):
            if getattr(self, name) is not None:
                found[name] = np.full(n, getattr(self, name))
        if self.cancel_mean_s is not None:
            after_s = self.cancel_mean_s * draw(seed, "cancel_after", 0, n, lambda rng, k: rng.standard_exponential(k))
            cancels = uniform(seed, "cancel", 0, n) < self.cancel_fraction
            found["cancel_s"] = np.where(cancels, np.maximum(after_s, np.finfo(np.float64).tiny), np.inf)
        return found


def _classes(shares: list[float], seed: int, cause: str, n: int) -> NDArray[np.int64]:
    """[n] class of each request, drawn by its row."""
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, uniform(seed, cause, 0, n), side="right").astype(np.int64)
