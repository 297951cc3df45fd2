"""A stream of requests that is never whole in memory: built when it is read, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.traffic.arrivals import Arrival, Closed, TraceTimes
from simulator.traffic.spec import (
    MAX_REQUESTS,
    TrafficSpec,
    arrivals_in_words,
    build_stream,
    limit_notes,
    resolve,
    sample_lengths,
    with_limits,
)
from simulator.traffic.stream import Stream

BLOCK_ROWS = 1 << 18
"""Requests per block: some 30 MB, and a hundredth of a second of Python around each."""


#: Fields of a ``[traffic]`` table that make requests which know nothing of each other; others must be left out.
PLAIN_FIELDS = {
    "lengths",
    "prompt",
    "output",
    "cached_tokens",
    "cached_fraction",
    "max_tokens",
    "arrival",
    "mix",
    "trace",
    "n_requests",
    "duration_s",
    "source",
}


@dataclass(frozen=True)
class StreamBlocks:
    """The stream of a scenario, built block by block; reading it again gives the same requests.

    Row i is that of :func:`simulator.traffic.build_stream`, to the last bit, wherever blocks end. A trace is read whole (it
    comes from a file that fits) and handed on in blocks.

    Attributes
    ----------
    n
        requests in all.
    concurrency, source
        as in :class:`simulator.traffic.Stream`.
    """

    n: int
    concurrency: int
    source: str
    _spec: TrafficSpec
    _seed: int
    _arrival: Arrival
    _whole: Stream | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return self.n

    def edges(self, block_rows: int) -> Iterator[tuple[int, int]]:
        """First row and end of each block."""
        return pairwise([*range(0, self.n, block_rows), self.n])

    def arrivals_s(self, block_rows: int = BLOCK_ROWS) -> Iterator[NDArray[np.float64]]:
        """Arrival (or think) times, one array per block. [s]"""
        if self._whole is not None:
            for start, stop in self.edges(block_rows):
                yield self._whole.arrival_s[start:stop]
            return
        yield from _times_s(self._arrival, self._seed, self.edges(block_rows))

    def blocks(self, block_rows: int = BLOCK_ROWS) -> Iterator[Stream]:
        """Yield the requests as streams of ``block_rows`` rows, the last one shorter."""
        for (start, stop), arrival_s in zip(self.edges(block_rows), self.arrivals_s(block_rows), strict=True):
            if self._whole is not None:
                prompt, output, cached, limit = (
                    getattr(self._whole, name)[start:stop]
                    for name in ("prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
                )
            else:
                prompt, output = sample_lengths(self._spec, self._seed, start, stop)
                output, cached, limit = with_limits(self._spec, prompt, output, np.zeros_like(prompt), output)
            yield Stream(
                arrival_s=arrival_s,
                prompt_tokens=prompt,
                output_tokens=output,
                cached_tokens=cached,
                max_tokens=limit,
                concurrency=self.concurrency,
                kind=self._arrival.process,
            )

    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know, as in :class:`simulator.traffic.Stream`."""
        if self._whole is not None:
            return self._whole.notes
        if self._spec.cached_tokens is None and self._spec.max_tokens is None:
            return ()
        n_short = n_cut = 0
        for start, stop in self.edges(BLOCK_ROWS):
            prompt, output = sample_lengths(self._spec, self._seed, start, stop)
            if self._spec.cached_tokens is not None:
                n_short += int((prompt <= self._spec.cached_tokens).sum())
            if self._spec.max_tokens is not None:
                n_cut += int((output > self._spec.max_tokens).sum())
        return tuple(limit_notes(self._spec, self.n, n_short=n_short, n_cut=n_cut))


def stream_blocks(spec: TrafficSpec, seed: int, *, base_folder: Path) -> StreamBlocks:
    """Requests of a scenario, as :func:`simulator.traffic.build_stream` makes them, without holding them all.

    Raises
    ------
    InputError
        As :func:`simulator.traffic.build_stream` does, and for fields beyond :data:`PLAIN_FIELDS`.
    """
    plain = resolve(spec, base_folder=base_folder)
    for name, field in TrafficSpec.model_fields.items():
        if name not in PLAIN_FIELDS and getattr(plain, name) != field.get_default(call_default_factory=True):
            raise InputError(
                f"traffic.{name}: a stream in blocks has only {', '.join(sorted(PLAIN_FIELDS))}; "
                "keep the requests (summary_only = false)"
            )
    if plain.trace is not None:
        whole = build_stream(spec, seed, base_folder=base_folder)
        arrival = plain.arrival if plain.arrival is not None else TraceTimes()
        return StreamBlocks(len(whole), whole.concurrency, whole.source, plain, seed, arrival, whole)
    if plain.arrival is None:
        raise InputError("traffic.arrival: required")
    n = plain.n_requests if plain.n_requests is not None else _count_within(plain, plain.arrival, seed)
    if n == 0:
        raise InputError(f"traffic.duration_s = {plain.duration_s:g}: no request arrives before that")
    source = plain.source or "lengths stated in the scenario"
    return StreamBlocks(
        n,
        plain.arrival.concurrency if isinstance(plain.arrival, Closed) else 0,
        f"{source}; arrivals: {arrivals_in_words(plain.arrival)}",
        plain,
        seed,
        plain.arrival,
    )


def _times_s(arrival: Arrival, seed: int, edges: Iterator[tuple[int, int]]) -> Iterator[NDArray[np.float64]]:
    if isinstance(arrival, TraceTimes):
        raise InputError('traffic.arrival: process = "trace" needs a trace')
    carry = 0.0
    for start, stop in edges:
        times, carry = arrival.block_s(seed, start, stop, carry)
        yield times


def _count_within(spec: TrafficSpec, arrival: Arrival, seed: int) -> int:
    """Arrivals before ``spec.duration_s``."""
    duration_s = spec.duration_s or 0.0
    n = 0
    for times in _times_s(arrival, seed, pairwise(range(0, MAX_REQUESTS + 2 * BLOCK_ROWS, BLOCK_ROWS))):
        inside = int(np.searchsorted(times, duration_s, side="left"))
        n += inside
        if inside < len(times):
            break
    if n > MAX_REQUESTS:
        raise InputError(f"traffic.duration_s = {duration_s:g}: more than {MAX_REQUESTS} requests arrive before that")
    return n
