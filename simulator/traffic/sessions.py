"""Sessions: turns that re-send what was said before, and prompts that begin alike.

Session s and turn t of it are functions of (seed, s, t); a stream is the turns of all sessions in order of time, so a longer stream
begins with the shorter one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from simulator import randomness
from simulator.catalog.records import Record
from simulator.errors import InputError
from simulator.traffic.arrivals import Constant, Gamma, Poisson, times_within_s
from simulator.traffic.lengths import Fixed, Length
from simulator.traffic.stream import MAX_TOKENS_PER_REQUEST, BlockIds

MAX_BLOCK_IDS = 200_000_000
"""Most block ids of a stream: 1.6 GB."""

T = TypeVar("T", np.int64, np.float64)
Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]


class Sessions(Record):
    """``[traffic.sessions]``: requests are turns of sessions, each of which re-sends its whole past.

    The prompt of a turn is the shared prompt, the opening, all earlier turns' prompts and outputs, and what the turn adds, which
    is what ``prompt`` says. The arrival process is that of the sessions.
    """

    turns: Length = Fixed(tokens=1)
    """Turns of a session, by the same laws as lengths."""
    turn_gap_s: Annotated[float, Field(ge=0)] = 0.0
    """Mean time from a turn's arrival to that of the next. [s]"""
    turn_gap_cv: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Coefficient of variation of that time, gamma distributed: 0 is constant, 1 exponential."""
    opening: Length | None = None
    """What a session brings along before its first turn: documents, code, an agent's task. [tokens]"""
    shared_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_PER_REQUEST)] = 0
    """A prompt that sessions have in common, in front of everything. [tokens]"""
    shared_prompts: Annotated[int, Field(ge=1)] = 1
    """How many such prompts there are; each session has one of them, all equally likely."""
    max_context: Annotated[int, Field(ge=1)] | None = None
    """A session ends before a turn whose prompt and output would be longer. [tokens]"""
    block_tokens: Annotated[int, Field(ge=1)] = 16
    """Granularity at which a prefix cache may see what is alike. [tokens]"""

    @model_validator(mode="after")
    def _gap_law_exists(self) -> "Sessions":
        if 0 < self.turn_gap_cv < 0.01:
            raise ValueError(f"turn_gap_cv = {self.turn_gap_cv:g}: must be 0 (constant) or 0.01 … 100")
        return self


@dataclass(frozen=True)
class Turns:
    """[n] requests in order of time, and which of their blocks are alike."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    blocks: BlockIds


def build_turns(
    sessions: Sessions,
    process: Poisson | Gamma | Constant,
    lengths: Callable[[int], Lengths],
    seed: int,
    *,
    n_requests: int | None,
    duration_s: float | None,
) -> Turns:
    """Turns of as many sessions as it takes.

    Parameters
    ----------
    lengths
        what turns add and answer: the first n values of both, session by session.
    n_requests, duration_s
        the number of turns, or the time before which they arrive; exactly one is given.

    Raises
    ------
    InputError
        If the stream would have more than ``MAX_BLOCK_IDS`` blocks, or too few sessions go far enough.
    """
    if duration_s is not None:
        table = _table(sessions, times_within_s(process, seed, duration_s), lengths, seed)
        count = int(np.searchsorted(table.arrival_s, duration_s, side="left"))
        return _as_turns(sessions, table, count)
    wanted = n_requests or 0
    n_sessions = wanted // max(1, int(sessions.turns.sample(seed, "turns", 0, 64).mean())) + 16
    while True:
        starts = process.times_s(seed, n_sessions)
        table = _table(sessions, starts, lengths, seed)
        # No session yet to come has a turn before its own start.
        if len(table.arrival_s) >= wanted and table.arrival_s[wanted - 1] <= starts[-1]:
            return _as_turns(sessions, table, wanted)
        if n_sessions > 100 * wanted + 10_000:
            raise InputError(
                f"traffic.sessions: {n_sessions} sessions have only {len(table.arrival_s)} turns of the {wanted} wanted; "
                "max_context ends them too early"
            )
        n_sessions *= 2


@dataclass(frozen=True)
class _Table:
    """Turns in order of time."""

    arrival_s: NDArray[np.float64]
    session: NDArray[np.int64]
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    shared: NDArray[np.int64]
    """Which shared prompt."""


def _table(sessions: Sessions, starts_s: NDArray[np.float64], lengths: Callable[[int], Lengths], seed: int) -> _Table:
    n = len(starts_s)
    turns = sessions.turns.sample(seed, "turns", 0, n)
    first = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(turns)])
    total = int(first[-1])
    session = np.repeat(np.arange(n), turns)
    is_first = np.zeros(total, dtype=bool)
    is_first[first[:-1]] = True
    gap_s = np.where(is_first, 0.0, _gaps(sessions, seed, total))
    arrival_s = starts_s[session] + _within(gap_s, first[:-1], session)
    added, output = lengths(total)
    before = np.where(is_first, 0, np.concatenate([[0], output[:-1]])[:total]) + added
    prompt = _within(before, first[:-1], session) + sessions.shared_tokens
    if sessions.opening is not None:
        prompt += sessions.opening.sample(seed, "opening", 0, n)[session]
    shared = np.floor(randomness.uniform(seed, "shared", 0, n) * sessions.shared_prompts).astype(np.int64)
    keep = np.arange(total)
    if sessions.max_context is not None:
        keep = keep[(prompt + output)[keep] <= sessions.max_context]
    keep = keep[np.argsort(arrival_s[keep], kind="stable")]
    return _Table(arrival_s[keep], session[keep], prompt[keep], output[keep], shared[session[keep]])


def _gaps(sessions: Sessions, seed: int, n: int) -> NDArray[np.float64]:
    if sessions.turn_gap_s == 0 or sessions.turn_gap_cv == 0:
        return np.full(n, sessions.turn_gap_s)
    shape = sessions.turn_gap_cv**-2
    gaps = randomness.draw(seed, "turn_gap", 0, n, lambda rng, size: rng.standard_gamma(shape, size))
    return gaps * (sessions.turn_gap_s / shape)


def _within(values: NDArray[T], first: NDArray[np.int64], session: NDArray[np.int64]) -> NDArray[T]:
    """Running sums that start anew with each session."""
    sums = np.cumsum(values)
    found: NDArray[T] = sums - (sums[first] - values[first])[session]
    return found


def _as_turns(sessions: Sessions, table: _Table, n: int) -> Turns:
    """The first ``n`` turns, and which of their blocks are alike."""
    prompt, output = table.prompt[:n], table.output[:n]
    blocks = growing_blocks(
        table.session[:n],
        prompt,
        output,
        block_tokens=sessions.block_tokens,
        shared_tokens=sessions.shared_tokens,
        shared=table.shared[:n],
        field="traffic.sessions.block_tokens",
    )
    return Turns(table.arrival_s[:n], prompt, output, blocks)


def growing_blocks(
    session: NDArray[np.int64],
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    *,
    block_tokens: int,
    shared_tokens: int,
    shared: NDArray[np.int64],
    field: str,
) -> BlockIds:
    """Which blocks of requests are alike, where each re-sends all that its session has said.

    Parameters
    ----------
    session
        [n] which one, from 0.
    prompt, output
        [n] whole prompts, the past included. [tokens]
    shared_tokens, shared
        the part of every prompt, in front, that sessions have in common, and [n] which of several such parts. [tokens]
    field
        what the message calls ``block_tokens``.

    Raises
    ------
    InputError
        If there would be more than ``MAX_BLOCK_IDS`` blocks.
    """
    # Ids: those of the shared prompts first, then as many for each session as its longest turn needs.
    counts = (prompt + output - 1) // block_tokens
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    if int(offsets[-1]) > MAX_BLOCK_IDS:
        raise InputError(
            f"{field} = {block_tokens}: {offsets[-1]:,} blocks are more than {MAX_BLOCK_IDS:,}; use larger blocks"
        )
    n_shared = shared_tokens // block_tokens
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    longest = np.zeros(int(session.max(initial=-1)) + 2, dtype=np.int64)
    np.maximum.at(longest, session + 1, np.maximum(counts - n_shared, 0))
    own = (int(shared.max(initial=0)) + 1) * n_shared + np.cumsum(longest)[session] - n_shared
    ids = place + np.where(place < n_shared, np.repeat(shared * n_shared, counts), np.repeat(own, counts))
    return BlockIds(ids, offsets, block_tokens, covers_output=True)
