"""Prompt and output lengths: what a scenario may say, and how request i gets its numbers.

Every length is a function of (seed, cause, request index) alone, see :mod:`simulator.randomness`. The causes are
``prompt`` and ``output``; a law uses one random value per request.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from simulator import randomness
from simulator.catalog.records import Record
from simulator.traffic.stream import MAX_TOKENS_PER_REQUEST
from simulator.traffic.tagged import tagged

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS_PER_REQUEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Fixed(Record):
    """Every request has ``tokens``. ``prompt = 1024`` is short for it."""

    kind: Literal["fixed"] = "fixed"
    tokens: Tokens

    def sample(self, seed: int, cause: str, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths of requests ``start`` … ``stop`` − 1. [tokens]"""
        del seed, cause
        return np.full(max(stop - start, 0), self.tokens, dtype=np.int64)


class _Uniform(Record, ABC):
    """Whole numbers, all equally likely, between two bounds that the subclass knows."""

    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest length, both included. [tokens]"""

    def sample(self, seed: int, cause: str, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths of requests ``start`` … ``stop`` − 1. [tokens]"""
        low, high = self.bounds()
        return low + np.floor(randomness.uniform(seed, cause, start, stop) * (high - low + 1)).astype(np.int64)


class Uniform(_Uniform):
    """Whole numbers ``min`` … ``max``, both included."""

    kind: Literal["uniform"] = "uniform"
    min: Tokens
    max: Tokens

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self

    def bounds(self) -> tuple[int, int]:
        """Smallest and largest length. [tokens]"""
        return self.min, self.max


class UniformRatio(_Uniform):
    """Whole numbers ⌊r·L⌋ … L: the load of InferenceX (formerly InferenceMAX), with r = 0.8.

    ``tokens`` is the longest length L and the mean is (1 + r)·L/2: "1k/1k" at r = 0.8 has 922 tokens on average. Older
    releases of vLLM's serving benchmark mean this by ``--random-range-ratio``; newer ones mean :class:`UniformRange`.

    >>> UniformRatio(tokens=1024, ratio=0.8).bounds()
    (819, 1024)
    """

    kind: Literal["uniform_ratio"] = "uniform_ratio"
    tokens: Tokens
    ratio: Annotated[float, Field(ge=0, le=1)]

    def bounds(self) -> tuple[int, int]:
        """Smallest and largest length. [tokens]"""
        return max(1, math.floor(self.tokens * self.ratio)), self.tokens


class UniformRange(_Uniform):
    """Whole numbers ⌊L(1 − ρ)⌋ … ⌈L(1 + ρ)⌉: ``--random-range-ratio`` ρ of today's vLLM serving benchmark.

    ``tokens`` is the mean length L. Special tokens, which that benchmark takes off a prompt, are not taken off here.

    >>> UniformRange(tokens=1024, range_ratio=0.8).bounds()
    (204, 1844)
    """

    kind: Literal["uniform_range"] = "uniform_range"
    tokens: Tokens
    range_ratio: Fraction

    def bounds(self) -> tuple[int, int]:
        """Smallest and largest length. [tokens]"""
        low, high = self.tokens * (1 - self.range_ratio), self.tokens * (1 + self.range_ratio)
        return max(1, math.floor(low)), math.ceil(high)


class Lognormal(Record):
    """exp(N(ln median, sigma²)), rounded to the nearest whole number, then clipped to ``min`` … ``max``.

    Give the centre as ``mean`` or ``median`` and the width as ``sigma`` or ``cv``: mean = median·exp(sigma²/2) and
    cv² = exp(sigma²) − 1. They describe the law before clipping; what lies outside is moved onto the bound, so a
    ``max`` within the law's body pulls the mean down. The range has to be stated because the law has no end.
    """

    kind: Literal["lognormal"] = "lognormal"
    mean: Annotated[float, Field(gt=0)] | None = None
    median: Annotated[float, Field(gt=0)] | None = None
    sigma: Annotated[float, Field(ge=0, le=5)] | None = None
    cv: Annotated[float, Field(ge=0, le=1000)] | None = None
    min: Tokens = 1
    max: Tokens

    @model_validator(mode="after")
    def _one_of_each(self) -> "Lognormal":
        if (self.mean is None) == (self.median is None):
            raise ValueError("state exactly one of mean and median")
        if (self.sigma is None) == (self.cv is None):
            raise ValueError("state exactly one of sigma and cv")
        if not self.min <= self.parameters()[0] <= self.max:
            raise ValueError(
                f"the median, {self.parameters()[0]:.6g}, lies outside min … max = {self.min} … {self.max}"
            )
        return self

    def parameters(self) -> tuple[float, float]:
        """Median [tokens] and sigma of the logarithm.

        >>> median, sigma = Lognormal(mean=1000, cv=1, max=8192).parameters()
        >>> round(median, 1), round(sigma, 4)
        (707.1, 0.8326)
        """
        sigma = self.sigma if self.sigma is not None else math.sqrt(math.log1p((self.cv or 0.0) ** 2))
        median = self.median if self.median is not None else (self.mean or 0.0) / math.exp(sigma**2 / 2)
        return median, sigma

    def sample(self, seed: int, cause: str, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths of requests ``start`` … ``stop`` − 1. [tokens]"""
        median, sigma = self.parameters()
        values = median * np.exp(sigma * randomness.normal(seed, cause, start, stop))
        return np.clip(np.rint(values), self.min, self.max).astype(np.int64)


def _check_quantiles(name: str, probabilities: tuple[float, ...], tokens: tuple[int, ...]) -> None:
    """Raise ValueError unless this is a quantile function: 0 … 1 rising, tokens not falling."""
    if len(probabilities) != len(tokens) or len(tokens) < 2:
        raise ValueError(
            f"{name}: {len(probabilities)} probabilities and {len(tokens)} tokens; need as many, at least 2"
        )
    if probabilities[0] != 0 or probabilities[-1] != 1 or bool(np.any(np.diff(probabilities) <= 0)):
        raise ValueError(f"{name}: probabilities must rise from 0 to 1")
    if bool(np.any(np.diff(tokens) < 0)):
        raise ValueError(f"{name}: tokens must not fall")


class Empirical(Record):
    """A quantile table: a share ``probabilities[j]`` of requests has at most ``tokens[j]``.

    Linear between the rows, rounded to the nearest whole number.
    """

    kind: Literal["empirical"] = "empirical"
    probabilities: tuple[float, ...]
    tokens: tuple[Tokens, ...]

    @model_validator(mode="after")
    def _is_quantile_function(self) -> "Empirical":
        _check_quantiles("empirical", self.probabilities, self.tokens)
        return self

    def sample(self, seed: int, cause: str, start: int, stop: int) -> NDArray[np.int64]:
        """Lengths of requests ``start`` … ``stop`` − 1. [tokens]"""
        u = randomness.uniform(seed, cause, start, stop)
        return np.rint(np.interp(u, self.probabilities, self.tokens)).astype(np.int64)


LENGTH_LAWS: dict[str, type[Record]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "uniform_ratio": UniformRatio,
    "uniform_range": UniformRange,
    "lognormal": Lognormal,
    "empirical": Empirical,
}


def _number_is_fixed(value: Any) -> Any:
    """Read ``prompt = 1024`` as a fixed length."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"kind": "fixed", "tokens": value}
    if not isinstance(value, dict | Record):
        raise ValueError('must be a whole number of tokens, or a table such as { kind = "fixed", tokens = 1024 }')  # noqa: TRY004 - pydantic reports only ValueError
    return value


#: One length law, as ``prompt`` and ``output`` of a scenario say it. The validator on the right runs first.
Length = Annotated[
    Fixed | Uniform | UniformRatio | UniformRange | Lognormal | Empirical,
    tagged("kind", LENGTH_LAWS),
    BeforeValidator(_number_is_fixed),
]


class LengthTable(Record):
    """Prompt and output lengths that belong together, as one table of quantiles.

    ``prompt_tokens`` are the quantiles of the prompt at ``prompt_probabilities``. Requests fall into as many equally
    large classes by prompt length as ``output_tokens`` has rows; row k holds the quantiles of the output at
    ``output_probabilities`` in the class of prompt probabilities [k/K, (k+1)/K). Linear between quantiles, rounded to
    the nearest whole number. With one row, prompt and output are independent.
    """

    prompt_probabilities: tuple[float, ...]
    prompt_tokens: tuple[Tokens, ...]
    output_probabilities: tuple[float, ...]
    output_tokens: tuple[tuple[Tokens, ...], ...]

    @model_validator(mode="after")
    def _are_quantile_functions(self) -> "LengthTable":
        _check_quantiles("prompt", self.prompt_probabilities, self.prompt_tokens)
        if not self.output_tokens:
            raise ValueError("output_tokens: needs at least one row")
        for k, row in enumerate(self.output_tokens):
            _check_quantiles(f"output_tokens[{k}]", self.output_probabilities, row)
        return self

    def sample(self, seed: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompt and output lengths of requests ``start`` … ``stop`` − 1. [tokens]"""
        u = randomness.uniform(seed, "prompt", start, stop)
        prompt = np.interp(u, self.prompt_probabilities, self.prompt_tokens)
        table = np.asarray(self.output_tokens, dtype=np.float64)
        row = np.floor(u * len(table)).astype(np.int64)
        grid = np.asarray(self.output_probabilities)
        v = randomness.uniform(seed, "output", start, stop)
        left = np.searchsorted(grid, v, side="right") - 1
        weight = (v - grid[left]) / (grid[left + 1] - grid[left])
        output = (1 - weight) * table[row, left] + weight * table[row, left + 1]
        return np.rint(prompt).astype(np.int64), np.rint(output).astype(np.int64)
