"""Server settings of published benchmark recipes: what a table of runs does not record, read from the scripts that made them.

The files are in ``workloads/recipes``. A recipe names the launch script and commit it was read from, the runs it holds for,
and what it sets beyond the engine's defaults. Nothing here was fitted.
"""

from dataclasses import replace
from datetime import date
from functools import cache
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from simulator.calibration.measurements import Measurement
from simulator.catalog.files import data_folder, parse, read_toml
from simulator.catalog.records import Record
from simulator.errors import UnpriceableError
from simulator.roofline.precision import parse_precision


class Budget(Record):
    """Tokens of one step at most: ``tokens`` + ``per_prompt`` · longest prompt + … , but ``least`` at the least."""

    tokens: NonNegativeInt = 0
    per_prompt: NonNegativeInt = 0
    per_output: NonNegativeInt = 0
    per_client: NonNegativeInt = 0
    least: NonNegativeInt = 0

    def of(self, m: Measurement) -> int:
        """The budget of a run. [tokens]"""
        asked = (
            self.tokens
            + self.per_prompt * m.prompt_tokens
            + self.per_output * m.output_tokens
            + self.per_client * m.clients
        )
        return max(1, asked, self.least)


class Recipe(Record):
    """One launch script: the runs it holds for, and what it sets. What is left out is the engine's default."""

    script: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    repository: str = ""
    engine: str
    disaggregated: bool = False
    """Of runs with a prefill and a decode pool, instead of those with one pool."""
    models: tuple[str, ...] = ()
    """Empty: every model; so for the next four."""
    chips: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()
    """Longest prompt and output."""
    chips_below: PositiveInt | None = None
    """Chips of an engine that it is not for, and more."""
    clients_from: NonNegativeInt = 0
    clients_to: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    budget: Budget | None = None
    memory_fraction: float | None = Field(default=None, gt=0, le=1)
    kv_cache: Literal["fp8", "16 bit", ""] = ""
    expert_parallel: bool = False
    """Experts are spread over all chips of an engine even where the table says they are not."""
    poll_steps: NonNegativeInt = 0
    """Steps between two looks for new requests."""
    hold_steps: NonNegativeInt = 0
    """Steps for which a prompt is held back for company."""
    stream_interval: PositiveInt = 1
    """Steps of a decode pool between two answers to a client."""
    unclear: str = ""
    """A setting that the table lacks and that two recipes for the same runs differ in: the runs are predicted as recorded, not fitted to."""
    unrecorded: str = ""
    """A setting that the table lacks and the result depends on: the runs cannot be simulated."""
    note: str = ""

    def holds_for(self, m: Measurement) -> bool:
        """Whether the run was launched so."""
        return (
            m.engine == self.engine
            and (len(m.pools) > 1) == self.disaggregated
            and (not self.models or m.model in self.models)
            and (not self.chips or m.chip in self.chips)
            and (not self.formats or m.dtype in self.formats)
            and (not self.versions or m.engine_version in self.versions)
            and (not self.lengths or (m.prompt_tokens, m.output_tokens) in self.lengths)
            and (self.chips_below is None or m.chips < self.chips_below)
            and self.clients_from <= m.clients
            and (self.clients_to is None or m.clients <= self.clients_to)
        )


class RecipeFile(Record):
    """A file of ``workloads/recipes``."""

    schema_version: Literal[1]
    repository: str
    retrieved: date
    recipes: tuple[Recipe, ...]

    @model_validator(mode="after")
    def _pools_apart_take_one_setting(self) -> "RecipeFile":
        one_pool = {
            "max_num_seqs",
            "budget",
            "memory_fraction",
            "kv_cache",
            "expert_parallel",
            "poll_steps",
            "hold_steps",
        }
        for recipe in self.recipes:
            wrong = recipe.model_fields_set & (one_pool if recipe.disaggregated else {"stream_interval"})
            if wrong:
                raise ValueError(
                    f"{recipe.script}: {', '.join(sorted(wrong))} is not used {'with two pools' if recipe.disaggregated else 'with one pool'}"
                )
        return self

    @model_validator(mode="after")
    def _unrecorded_settings_are_explained(self) -> "RecipeFile":
        for recipe in self.recipes:
            if recipe.unrecorded and not recipe.note:
                raise ValueError(f"{recipe.script}: a recipe whose runs cannot be simulated needs a note that says why")
        return self


@cache
def published_recipes() -> tuple[Recipe, ...]:
    """The recipes of the InferenceX runs.

    Raises
    ------
    InputError
        If the file is malformed.
    """
    file = data_folder("workloads") / "recipes" / "inferencex.toml"
    return parse(RecipeFile, read_toml(file), str(file)).recipes


def launched(m: Measurement) -> Measurement:
    """A published run with the settings of its recipe; as it is, where none is known.

    Raises
    ------
    UnpriceableError
        If the result depends on a setting that the table does not record.
    """
    recipe = next((r for r in published_recipes() if r.holds_for(m)), None)
    if recipe is None:
        return m
    if recipe.unrecorded:
        raise UnpriceableError(f"{recipe.unrecorded} is not recorded: {recipe.note} ({recipe.script})")
    if recipe.disaggregated:
        return replace(m, stream_interval=recipe.stream_interval, unclear=recipe.unclear)
    pool = m.pools[0]
    pool = replace(
        pool,
        max_num_seqs=recipe.max_num_seqs,
        max_num_batched_tokens=recipe.budget.of(m) if recipe.budget else None,
        ep=pool.chips if recipe.expert_parallel else pool.ep,
    )
    return replace(
        m,
        pools=(pool,),
        precision=_with_cache(m.precision, recipe.kv_cache),
        memory_fraction=recipe.memory_fraction,
        poll_steps=recipe.poll_steps,
        hold_steps=recipe.hold_steps,
        unclear=recipe.unclear,
    )


def _with_cache(precision: str, kv_cache: str) -> str:
    """A precision word with another format of the KV cache.

    >>> _with_cache("fp8kv8g128", "16 bit"), _with_cache("wmxfp4afp8-experts", "fp8"), _with_cache("fp8kv8", "")
    ('fp8g128', 'wfp4afp8kvfp8g32-experts', 'fp8kv8')
    """
    if not kv_cache:
        return precision
    formats = parse_precision(precision)
    return replace(formats, kv="fp8" if kv_cache == "fp8" else formats.wide).name
