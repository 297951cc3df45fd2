"""A stream of requests as traffic hands it over, and the one place where request rows are checked."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

MAX_TOKENS_PER_REQUEST = 2**31 - 1
"""Longest prompt or output taken for a length; larger numbers are identifiers or damage."""


Numbers = NDArray[np.float64] | NDArray[np.int64]


def row_checks(
    *,
    arrival_s: NDArray[np.float64] | None,
    prompt_tokens: Numbers,
    output_tokens: Numbers,
    cached_tokens: Numbers | None = None,
    max_tokens: Numbers | None = None,
) -> list[tuple[str, NDArray[np.bool_], str]]:
    """What each row must satisfy by itself: (column, [n] where it does not, the rule).

    Token columns may be floats, as a file has them: a fraction, NaN or infinity is then a fault like any other.
    ``arrival_s`` None: not known.
    """
    checks = []
    if arrival_s is not None:
        bad = ~np.isfinite(arrival_s) | (arrival_s < 0)
        checks.append(("arrival_s", bad, "must be finite and not negative"))
    rule = f"must be a whole number of tokens, 1 … {MAX_TOKENS_PER_REQUEST}"
    checks.append(("prompt_tokens", ~_whole(prompt_tokens, 1), rule))
    checks.append(("output_tokens", ~_whole(output_tokens, 1), rule))
    if cached_tokens is not None:
        bad = ~_whole(cached_tokens, 0) | (cached_tokens >= prompt_tokens)
        rule = "must be a whole number of tokens, 0 … prompt_tokens − 1 (the last prompt token is always computed)"
        checks.append(("cached_tokens", bad, rule))
    if max_tokens is not None:
        bad = ~_whole(max_tokens, 1) | (max_tokens < output_tokens)
        checks.append(("max_tokens", bad, "must be a whole number of tokens, at least output_tokens"))
    return checks


def order_check(arrival_s: NDArray[np.float64]) -> tuple[str, NDArray[np.bool_], str]:
    """Where a row is earlier than the one before it, as :func:`row_checks` says it. Equal times are in order."""
    back = np.zeros(len(arrival_s), dtype=bool)
    back[1:] = arrival_s[1:] < arrival_s[:-1]
    return "arrival_s", back, "is earlier than the row before; sort the rows by time"


def first_fault(checks: list[tuple[str, NDArray[np.bool_], str]]) -> tuple[int, str, str] | None:
    """Row, column and rule of the first bad row; in one row the first check counts. None if all is well."""
    faults = [(int(np.argmax(bad)), column, rule) for column, bad, rule in checks if bad.any()]
    return min(faults, key=lambda fault: fault[0], default=None)


def _whole(values: Numbers, lowest: int) -> NDArray[np.bool_]:
    """Where a value is a whole number between ``lowest`` and the longest request; NaN is not."""
    inside = (values >= lowest) & (values <= MAX_TOKENS_PER_REQUEST)
    if values.dtype.kind == "f":
        inside &= values == np.floor(values)
    return np.asarray(inside)


@dataclass(frozen=True)
class BlockIds:
    """Which blocks of tokens of a stream's requests are alike: compressed rows of ids.

    An id stands for its block *and everything before it*: equal ids at one place mean equal prefixes up to there.

    Attributes
    ----------
    ids
        [m] not negative; row i is ``ids[offsets[i] : offsets[i + 1]]``, from the first block of the prompt on.
    offsets
        [n + 1] from 0 to m.
    block_tokens
        tokens per id.
    covers_output
        whether rows go on with the blocks that the output fills.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    block_tokens: int
    covers_output: bool

    def first(self, n: int) -> "BlockIds":
        """The first ``n`` rows."""
        offsets = self.offsets[: n + 1]
        return BlockIds(self.ids[: int(offsets[-1])], offsets, self.block_tokens, self.covers_output)


@dataclass(frozen=True)
class Stream:
    """Requests in arrival order, one row each, before an engine sees them.

    Attributes
    ----------
    arrival_s
        [n] open loop: times since the start, not decreasing; ties are served in row order. Closed loop: think times,
        the delay between the finish that makes room for row i and its arrival; 0 in the first ``concurrency`` rows,
        which arrive at time 0. [s]
    prompt_tokens, output_tokens
        [n] at least 1 each.
    cached_tokens
        [n] leading prompt tokens whose KV is already there, 0 … prompt_tokens − 1.
    max_tokens
        [n] the output length a scheduler may know, at least ``output_tokens``.
    concurrency
        0: open loop. Otherwise a closed loop of that many clients.
    kind
        name of the arrival process.
    source
        where lengths and arrivals come from, in words.
    notes
        what a reader of the results should know: columns left aside, rows dropped, outputs cut.
    blocks
        which prompts share a prefix; None: not known.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    concurrency: int = 0
    kind: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()
    blocks: BlockIds | None = None

    def __post_init__(self) -> None:
        """Check lengths, types, ranges and order; the message names the first bad row."""
        n = len(self.arrival_s)
        for name in ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens"):
            column = getattr(self, name)
            wanted = np.float64 if name == "arrival_s" else np.int64
            if column.dtype != wanted or column.shape != (n,):
                raise InputError(
                    f"stream.{name} is {column.dtype}{list(column.shape)}; must be {np.dtype(wanted)}[{n}], one row per request"
                )
        if self.blocks is not None and len(self.blocks.offsets) != n + 1:
            raise InputError(f"stream.blocks has {len(self.blocks.offsets) - 1} rows; must be {n}, one per request")
        if self.concurrency < 0:
            raise InputError(f"stream.concurrency = {self.concurrency}: must be 0 (open loop) or positive")
        checks = row_checks(
            arrival_s=self.arrival_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            max_tokens=self.max_tokens,
        )
        if not self.concurrency:
            checks.append(order_check(self.arrival_s))
        fault = first_fault(checks)
        if fault is not None:
            row, column, rule = fault
            raise InputError(f"stream.{column}[{row}] = {getattr(self, column)[row]}: {rule}")

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)
