"""What the ``[traffic]`` table of a scenario says, and the stream of requests it means."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from simulator.catalog.files import data_folder, find, parse, read_toml
from simulator.catalog.records import Record
from simulator.errors import InputError
from simulator.traffic.arrivals import Arrival, Closed, Constant, Gamma, Poisson, TraceTimes, times_within_s
from simulator.traffic.hash_ids import HASH_BLOCK_TOKENS
from simulator.traffic.lengths import Fraction, Length, LengthTable, Tokens
from simulator.traffic.readers import FormatName, Trace, read_trace
from simulator.traffic.sessions import Sessions, Turns, build_turns
from simulator.traffic.stream import BlockIds, Stream

MAX_REQUESTS = 100_000_000
"""Longest stream built: 4 GB of columns."""


class TraceFile(Record):
    """A trace and how to read it; ``trace = "file.csv"`` is short for ``trace = { file = "file.csv" }``."""

    file: str
    format: FormatName | None = None
    drop_invalid: bool = False
    hash_block_tokens: Annotated[int, Field(ge=1)] = HASH_BLOCK_TOKENS
    """Tokens per entry of the file's ``hash_ids``."""


class Traffic(Record):
    """What a mix and a scenario may both say about requests. Whatever is left out is None."""

    lengths: LengthTable | None = None
    prompt: Length | None = None
    output: Length | None = None
    cached_tokens: Annotated[int, Field(ge=0)] | None = None
    cached_fraction: Fraction | None = None
    max_tokens: Tokens | None = None
    arrival: Arrival | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> "Traffic":
        if self.cached_tokens is not None and self.cached_fraction is not None:
            raise ValueError("state cached_tokens or cached_fraction, not both")
        if self.lengths is not None and (self.prompt is not None or self.output is not None):
            raise ValueError("lengths is a table of prompt and output; leave prompt and output out")
        return self


class Origin(Record):
    """Where a mix comes from."""

    source: str
    citation: str = ""
    licence: str = ""
    kind: Literal["measured", "derived", "assumed"]
    derivation: str = ""
    retrieved: str = ""


class Mix(Traffic):
    """A file of ``workloads/traffic``: traffic with a name, where it comes from, and what it stands for."""

    schema_version: Literal[1]
    description: str
    origin: Origin

    @model_validator(mode="after")
    def _has_lengths(self) -> "Mix":
        if self.lengths is None and (self.prompt is None or self.output is None):
            raise ValueError("state lengths, or both prompt and output")
        return self


class TrafficSpec(Traffic):
    """The ``[traffic]`` table of a scenario.

    Lengths come from ``trace``, or else from ``lengths`` or ``prompt`` and ``output``, or else from ``mix``. A mix is a
    bundle of defaults: whatever the table states itself wins over it, field by field. A ``trace`` takes the place of the mix
    altogether, so that setting ``traffic.trace`` alone runs a real file in any scenario that leaves ``arrival`` to
    its mix.

    Attributes
    ----------
    mix
        name in ``workloads/traffic``, or a path to a TOML file like those.
    trace
        path to a trace, see :mod:`simulator.traffic.readers`. Requests are its rows in order.
    arrival
        the process; left out: the times of the trace, or what the mix says.
    cached_tokens, cached_fraction
        leading prompt tokens whose KV is there already, as a count or as a share of the prompt (rounded down). Never
        more than prompt − 1. Left out: what trace or mix say, else none.
    max_tokens
        a limit on the output. Longer outputs are cut to it, as an engine would, and a scheduler knows the limit instead of
        the output length. Left out: a scheduler knows each output length, as in runs that ignore end-of-sequence.
    n_requests, duration_s
        how long the stream is: a number of requests, or all arrivals before a time. One of the two, except that a
        trace without either is taken whole.
    sessions
        requests are turns of sessions that re-send their past; ``arrival`` is then that of the sessions, and the prompt law says
        what a turn adds.
    source
        where the lengths come from, in words for the results; :func:`resolve` fills it in.
    """

    mix: str | None = None
    trace: TraceFile | None = None
    n_requests: Annotated[int, Field(ge=1, le=MAX_REQUESTS)] | None = None
    duration_s: Annotated[float, Field(gt=0)] | None = None
    sessions: Sessions | None = None
    source: str | None = None

    @field_validator("trace", mode="before")
    @classmethod
    def _text_is_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> "TrafficSpec":
        own = self.lengths is not None or self.prompt is not None or self.output is not None
        if self.trace is not None and own:
            raise ValueError("trace has the lengths; leave lengths, prompt and output out")
        both = self.lengths is not None or (self.prompt is not None and self.output is not None)
        if self.trace is None and self.mix is None and not both:
            raise ValueError("state where lengths come from: mix, trace, or both prompt and output")
        if self.n_requests is not None and self.duration_s is not None:
            raise ValueError("state n_requests or duration_s, not both")
        if self.trace is None and self.n_requests is None and self.duration_s is None:
            raise ValueError("state how many requests: n_requests, or duration_s")
        if self.trace is None and isinstance(self.arrival, TraceTimes):
            raise ValueError('arrival: process = "trace" needs a trace')
        if self.trace is not None and self.sessions is not None:
            raise ValueError("trace has its own requests; leave sessions out")
        if self.sessions is not None and isinstance(self.arrival, Record) and not _has_clock(self.arrival):
            raise ValueError(f"sessions start at times of their own; {self.arrival.process} arrivals give them none")
        if self.duration_s is not None and isinstance(self.arrival, Record) and not _has_clock(self.arrival):
            raise ValueError(f"duration_s means nothing to {self.arrival.process} arrivals; state n_requests")
        return self


def _has_clock(arrival: Arrival) -> bool:
    """Whether arrival times are known before the simulation and go on."""
    return isinstance(arrival, Poisson | Gamma | Constant | TraceTimes)


def load_mix(name: str, *, base_folder: Path | None = None) -> Mix:
    """Read a mix by its catalogue name or, relative to ``base_folder``, by its path."""
    if base_folder is not None and (name.endswith(".toml") or "/" in name):
        name = str(base_folder / name)
    file = find("traffic mix", name, data_folder("workloads") / "traffic")
    return parse(Mix, read_toml(file), str(file))


def resolve(spec: TrafficSpec, *, base_folder: Path) -> TrafficSpec:
    """Return the same traffic with the mix's values written in and without its name; a trace stays a path."""
    if spec.mix is None or spec.trace is not None:
        return spec.model_copy(update={"mix": None})
    mix = load_mix(spec.mix, base_folder=base_folder)
    fields: dict[str, Any] = {name: getattr(spec, name) for name in TrafficSpec.model_fields if name != "mix"}
    if spec.cached_tokens is None and spec.cached_fraction is None:
        fields |= {"cached_tokens": mix.cached_tokens, "cached_fraction": mix.cached_fraction}
    for name in ("max_tokens", "arrival"):
        if fields[name] is None:
            fields[name] = getattr(mix, name)
    if spec.lengths is None:
        if mix.lengths is not None and (spec.prompt is not None) != (spec.output is not None):
            stated, other = ("prompt", "output") if spec.prompt is not None else ("output", "prompt")
            raise InputError(
                f"traffic.{stated}: mix {spec.mix!r} has prompt and output in one table; state traffic.{other} as well"
            )
        for name in ("prompt", "output"):
            if fields[name] is None:
                fields[name] = getattr(mix, name)
        if spec.prompt is None and spec.output is None:
            fields["lengths"] = mix.lengths
    fields["source"] = spec.source or f"mix {spec.mix}"
    if fields["arrival"] is None:
        raise InputError(f"traffic.arrival: required, because mix {spec.mix!r} states none")
    return parse(TrafficSpec, {name: value for name, value in fields.items() if value is not None}, "traffic")


def build_stream(spec: TrafficSpec, seed: int, *, base_folder: Path) -> Stream:
    """Requests of a scenario.

    Row i depends on the spec, ``seed`` and i alone: a longer stream begins with the shorter one, and another length law
    does not move the arrivals.

    Parameters
    ----------
    seed
        of the whole run; causes ``arrival``, ``think``, ``prompt`` and ``output`` are used here.
    base_folder
        folder that relative paths in the spec start from.

    Raises
    ------
    InputError
        If the spec lacks something, contradicts its mix or trace, or a file is broken.
    """
    plain = resolve(spec, base_folder=base_folder)
    notes: list[str] = []
    blocks: BlockIds | None = None
    if plain.trace is not None:
        trace = read_trace(
            base_folder / plain.trace.file,
            format_name=plain.trace.format,
            drop_invalid=plain.trace.drop_invalid,
            hash_block_tokens=plain.trace.hash_block_tokens,
        )
        notes += trace.notes
        arrival, arrival_s = _trace_arrivals(plain, trace, seed)
        n = len(arrival_s)
        prompt, output = trace.prompt_tokens[:n], trace.output_tokens[:n]
        cached = trace.cached_tokens[:n] if trace.cached_tokens is not None else np.zeros(n, dtype=np.int64)
        limit = trace.max_tokens[:n] if trace.max_tokens is not None else output
        blocks = trace.blocks.first(n) if trace.blocks is not None else None
        columns = ", ".join(trace.columns.values())
        source = f"trace {plain.trace.file} ({trace.format}: {columns})"
    else:
        if plain.arrival is None:
            raise InputError("traffic.arrival: required")
        arrival = plain.arrival
        if plain.sessions is not None:
            turns = _turns(plain, plain.sessions, arrival, seed)
            arrival_s, prompt, output, blocks = turns.arrival_s, turns.prompt_tokens, turns.output_tokens, turns.blocks
        else:
            arrival_s = _arrivals(plain, arrival, seed)
            prompt, output = sample_lengths(plain, seed, 0, len(arrival_s))
        n = len(arrival_s)
        cached, limit = np.zeros(n, dtype=np.int64), output
        source = plain.source or "lengths stated in the scenario"
    if n == 0:
        raise InputError(f"traffic.duration_s = {plain.duration_s:g}: no request arrives before that")
    n_short = 0 if plain.cached_tokens is None else int((prompt <= plain.cached_tokens).sum())
    n_cut = 0 if plain.max_tokens is None else int((output > plain.max_tokens).sum())
    notes += limit_notes(plain, n, n_short=n_short, n_cut=n_cut)
    output, cached, limit = with_limits(plain, prompt, output, cached, limit)
    return Stream(
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=cached,
        max_tokens=limit,
        concurrency=arrival.concurrency if isinstance(arrival, Closed) else 0,
        kind=arrival.process,
        source=f"{source}; arrivals: {arrivals_in_words(arrival)}",
        notes=tuple(notes),
        blocks=blocks,
    )


Column = NDArray[np.int64]


def with_limits(
    plain: TrafficSpec, prompt: Column, output: Column, cached: Column, limit: Column
) -> tuple[Column, Column, Column]:
    """Outputs, cached tokens and ``max_tokens`` of requests as the spec's own limits leave them. [tokens]"""
    if plain.cached_tokens is not None:
        cached = np.minimum(plain.cached_tokens, prompt - 1)
    elif plain.cached_fraction is not None:
        cached = np.minimum(np.floor(plain.cached_fraction * prompt).astype(np.int64), prompt - 1)
    if plain.max_tokens is not None:
        output = np.minimum(output, plain.max_tokens)
        limit = np.full(len(output), plain.max_tokens, dtype=np.int64)
    return output, cached, limit


def limit_notes(plain: TrafficSpec, n: int, *, n_short: int, n_cut: int) -> list[str]:
    """What a reader should know about :func:`with_limits`.

    Parameters
    ----------
    n, n_short, n_cut
        requests in all; prompts not longer than ``cached_tokens``; outputs longer than ``max_tokens``.
    """
    notes = []
    if plain.cached_tokens is not None and n_short:
        notes.append(f"{n_short} of {n} prompts are not longer than cached_tokens; all but their last token is cached")
    if plain.max_tokens is not None and n_cut:
        notes.append(f"{n_cut} of {n} outputs were cut to max_tokens = {plain.max_tokens}")
    return notes


def arrivals_in_words(arrival: Arrival) -> str:
    """The process and its parameters on one line.

    >>> arrivals_in_words(Poisson(rate_per_s=4))
    'poisson, rate_per_s = 4.0'
    """
    stated = arrival.model_dump(exclude_none=True, exclude={"process"})
    return ", ".join([arrival.process, *(f"{name} = {value}" for name, value in stated.items())])


def _arrivals(spec: TrafficSpec, arrival: Arrival, seed: int) -> NDArray[np.float64]:
    """Arrival (or think) times of a process, as many as the spec asks for. [s]"""
    if isinstance(arrival, TraceTimes):
        raise InputError('traffic.arrival: process = "trace" needs a trace')
    if spec.n_requests is not None:
        return arrival.times_s(seed, spec.n_requests)
    if spec.duration_s is None or not isinstance(arrival, Poisson | Gamma | Constant):
        raise InputError(f"traffic.n_requests: required for {arrival.process} arrivals")
    if arrival.rate_per_s * spec.duration_s > MAX_REQUESTS:
        raise InputError(
            f"traffic.duration_s = {spec.duration_s:g}: {arrival.rate_per_s:g} requests/s make more than {MAX_REQUESTS} requests"
        )
    return times_within_s(arrival, seed, spec.duration_s)


def _turns(spec: TrafficSpec, sessions: Sessions, arrival: Arrival, seed: int) -> Turns:
    """Turns of sessions that start by a process; outputs are cut before they are re-sent."""
    if not isinstance(arrival, Poisson | Gamma | Constant):
        raise InputError(f"traffic.sessions: {arrival.process} arrivals give sessions no times to start at")

    def lengths(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        prompt, output = sample_lengths(spec, seed, 0, n)
        return prompt, output if spec.max_tokens is None else np.minimum(output, spec.max_tokens)

    return build_turns(sessions, arrival, lengths, seed, n_requests=spec.n_requests, duration_s=spec.duration_s)


def _trace_arrivals(spec: TrafficSpec, trace: Trace, seed: int) -> tuple[Arrival, NDArray[np.float64]]:
    """The process that applies to a trace, and the times of as many of its rows as the spec asks for. [s]"""
    if spec.n_requests is not None and spec.n_requests > len(trace):
        raise InputError(f"traffic.n_requests = {spec.n_requests}: the trace {trace.file} has only {len(trace)} rows")
    arrival: Arrival = spec.arrival if spec.arrival is not None else TraceTimes()
    if isinstance(arrival, TraceTimes):
        if trace.arrival_s is None:
            raise InputError(f"traffic.arrival: required, because the trace {trace.file} has lengths but no times")
        times = trace.arrival_s[: spec.n_requests] / arrival.rate_scale
        if spec.duration_s is not None:
            times = times[: np.searchsorted(times, spec.duration_s, side="left")]
        return arrival, times
    if spec.n_requests is None and spec.duration_s is None:
        return arrival, arrival.times_s(seed, len(trace))
    times = _arrivals(spec, arrival, seed)
    if len(times) > len(trace):
        raise InputError(
            f"traffic.duration_s = {spec.duration_s:g}: {len(times)} requests arrive, but the trace {trace.file} has {len(trace)} rows"
        )
    return arrival, times


def sample_lengths(spec: TrafficSpec, seed: int, start: int, stop: int) -> tuple[Column, Column]:
    """Prompt and output lengths of requests ``start`` … ``stop`` − 1 of a spec without a trace. [tokens]"""
    if spec.lengths is not None:
        return spec.lengths.sample(seed, start, stop)
    if spec.prompt is None or spec.output is None:
        raise InputError("traffic.prompt and traffic.output: both required without mix, trace or lengths")
    return spec.prompt.sample(seed, "prompt", start, stop), spec.output.sample(seed, "output", start, stop)
