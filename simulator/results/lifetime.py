"""What a lifetime study says, in one record."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from simulator.errors import InputError
from simulator.results.store import has_format, write_json_file
from simulator.results.summary import Assumption, Section

LIFETIME_FORMAT = "chipseconds-lifetime"
LIFETIME_SCHEMA_VERSION = 1


class Size(Section):
    """One model size that reaches the quality, trained and served over its life."""

    parameters: float
    tokens: float
    """Training tokens with which it reaches the loss."""
    training_flops: float
    training_usd: float
    serving_usd: float
    """Present value over the life, at the expected demand."""
    total_usd: float
    usd_per_query: float
    """Today; idle time, headroom and peak included where a fleet was planned."""
    chip_s_per_query: float | None = None
    """Provisioned; null for a formula."""
    chips: int | None = None
    """Of the fleet at the mean rate of the first year."""
    deployment: str = ""
    """Where it is served, in words."""
    extrapolated: list[str] = Field(default_factory=list)
    """What lies outside the runs behind the loss law."""


class Refusal(Section):
    """A size that no deployment serves."""

    parameters: float
    reason: str


class Choice(Section):
    """A size chosen for one reason, and what it costs under each forecast."""

    reason: str
    parameters: float
    tokens: float
    expected_usd: float | None
    """Under the forecasts' probabilities; null without any."""
    regret: list[float]
    """Cost ÷ cost of the best size, forecast by forecast."""
    worst_regret: float


class ForecastRow(Section):
    """One demand that may come true."""

    name: str
    times: float
    """The expected demand, times this."""
    probability: float | None
    parameters: float
    """Of the best size for it."""
    tokens: float
    total_usd: float


class Optimum(Section):
    """The optimum for one limit of the SLO."""

    slo_limit_s: float | None
    best: Size | None
    """Null where no size can be served within the limit."""
    chinchilla: Size | None
    """The compute-optimal size of the same loss; null where it cannot be served."""
    saving: float | None
    """1 − best ÷ chinchilla, in total cost."""
    identity: float | None
    """eps_N/eps_D ÷ (1 + η·K_serve/K_train) at the optimum: 1 inside a smooth piece, away from 1 where the cost jumps."""
    elasticity_of_serving: float | None
    """η = d ln S / d ln N near the optimum."""
    sizes: list[Size]
    refused: list[Refusal]
    forecasts: list[ForecastRow]
    choices: list[Choice]
    elastic: Size | None
    """The optimum when demand follows the cost of a query; null without an elasticity."""
    elastic_demand: float | None
    """Its demand, as a multiple of the expected one."""
    justified_demand: float | None
    """Multiple of the expected demand at which the model that sets the quality is itself the optimum; null where none does."""


class Lifetime(Section):
    """A lifetime study, whole."""

    format: Literal["chipseconds-lifetime"] = "chipseconds-lifetime"
    schema_version: Annotated[int, Field(ge=1)] = LIFETIME_SCHEMA_VERSION
    scenario: str
    description: str
    law: str
    law_source: str
    law_caution: str
    loss: float
    quality: str
    """What sets the loss, in words."""
    queries: float
    """Over the life, undiscounted."""
    valued_queries: float
    """Over the life, each weighted by its present price ÷ today's: serving cost ÷ today's cost of a query."""
    queries_per_s: float
    """Mean of the first year."""
    years: float
    training: str
    """Where it is trained, in words."""
    training_usd_per_flop: float
    serving: str
    optima: list[Optimum]
    warnings: list[str] = Field(default_factory=list)
    assumptions: list[Assumption] = Field(default_factory=list)
    sources: list[str] = Field(default_factory=list)
    resolved: dict[str, Any] = Field(default_factory=dict)
    """The scenario, every default stated."""


def write_lifetime(result: Lifetime, path: Path) -> None:
    """Write a lifetime study to a file, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written there.
    """
    write_json_file(result.model_dump(mode="json"), path)


def is_lifetime(path: Path) -> bool:
    """Whether a file was written by :func:`write_lifetime`, of whatever version."""
    return has_format(path, LIFETIME_FORMAT)


def read_lifetime(path: Path) -> Lifetime:
    """Read a record written by :func:`write_lifetime`.

    Raises
    ------
    InputError
        If the file is not one, is of another version, or is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not is_lifetime(path):
        raise InputError(f"{path}: not a lifetime study (format = {LIFETIME_FORMAT!r})")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema_version") != LIFETIME_SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {data.get('schema_version')}; this version reads {LIFETIME_SCHEMA_VERSION}: run it again"
        )
    try:
        return Lifetime.model_validate(data)
    except ValueError as error:
        raise InputError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
