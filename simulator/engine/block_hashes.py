"""Which blocks of a stream's prompts (and outputs) are alike: the input of the prefix cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

Ids = NDArray[np.int64]

DENSE_UP_TO = 4
"""Ids below this many times their number index an array as they are; sparser ones are renumbered."""


@dataclass(frozen=True)
class BlockHashes:
    """One id per block of tokens of each request, as compressed rows.

    An id stands for its block *and everything before it*: two requests with the same id at the same place share the
    whole prefix up to there. So the first difference is the last place where ids can be equal.

    Attributes
    ----------
    ids
        [m] not negative.
    offsets
        [n + 1] row i is ``ids[offsets[i] : offsets[i + 1]]``, from the first block of the prompt on. A row may stop early;
        the blocks after it are nobody else's.
    block_tokens
        tokens per id.
    covers_output
        whether rows go on with the blocks that the output fills. Otherwise whatever lies past the prompt, also its last
        block unless full, is left out.
    """

    ids: Ids
    offsets: Ids
    block_tokens: int
    covers_output: bool = False

    def __post_init__(self) -> None:
        """Check shapes and ranges."""
        if self.block_tokens < 1:
            raise InputError(f"requests.hashes.block_tokens = {self.block_tokens}: must be at least 1")
        ends = (int(self.offsets[0]), int(self.offsets[-1])) if len(self.offsets) else (0, -1)
        if ends != (0, len(self.ids)) or (np.diff(self.offsets) < 0).any():
            raise InputError(
                f"requests.hashes.offsets must rise from 0 to the number of ids, {len(self.ids)}; they go from {ends[0]} to {ends[1]}"
            )
        if len(self.ids) and int(self.ids.min()) < 0:
            place = int(np.argmin(self.ids))
            raise InputError(f"requests.hashes.ids[{place}] = {self.ids[place]}: must not be negative")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @classmethod
    def stacked(cls, parts: Sequence["BlockHashes"]) -> "BlockHashes":
        """Rows of several, one after the other; what is alike stays alike between them. All have one ``block_tokens``."""
        first = parts[0]
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        ids = np.concatenate([part.ids for part in parts])
        return cls(ids, _offsets(counts), first.block_tokens, first.covers_output)

    def rows(self, chosen: slice | Ids) -> "BlockHashes":
        """The same for some of the requests."""
        starts, counts = self.offsets[:-1][chosen], np.diff(self.offsets)[chosen]
        return BlockHashes(
            _gather(self.ids, starts, counts, 1), _offsets(counts), self.block_tokens, self.covers_output
        )

    def at_block_size(
        self, block_size: int, prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]
    ) -> "BlockHashes":
        """The same per KV block of ``block_size`` tokens: full blocks only, ids numbered from 0 without large gaps.

        Ids of larger units are split into one per block: two requests that part inside a unit then share none of its
        blocks. Of smaller units a block takes its last one's id, which stands for all before it.

        Raises
        ------
        InputError
            If neither of the two sizes is a multiple of the other.
        """
        unit, starts, counts = (
            self.block_tokens,
            self.offsets[:-1],
            self.counts_at(block_size, prompt_tokens, output_tokens),
        )
        if block_size <= unit:
            ids = _gather(self.ids, starts, counts, unit // block_size)
        else:
            group = block_size // unit
            total = _offsets(counts)
            place = np.arange(total[-1]) - np.repeat(total[:-1], counts)
            ids = self.ids[np.repeat(starts, counts) + (place + 1) * group - 1]
        return BlockHashes(_dense(ids), _offsets(counts), block_size, self.covers_output)

    def counts_at(self, block_size: int, prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> Ids:
        """[n] full KV blocks of ``block_size`` tokens that have an id, of each request.

        Raises
        ------
        InputError
            As :meth:`at_block_size`.
        """
        unit = self.block_tokens
        if max(unit, block_size) % min(unit, block_size):
            raise InputError(
                f"engine.block_size = {block_size}: block hashes of {unit} tokens can be cut into blocks of a divisor or a multiple of {unit}"
            )
        known = prompt_tokens + output_tokens - 1 if self.covers_output else prompt_tokens
        counts: Ids = np.minimum(np.diff(self.offsets) * unit // block_size, known // block_size)
        return counts

    def units(self, longest: int) -> tuple[Ids, Ids, Ids]:
        """The rows in *units* of up to ``longest`` ids that follow each other by number, and never follow any other.

        So every row that has an id of a unit has those before it in the unit right before it, whatever else is in the rows. Where rows part, one of them leaves
        the unit early.

        Returns
        -------
        units, offsets, lengths
            as ``ids`` and ``offsets``, with a number for each unit of a row, and how many of the unit's ids the row has.
        """
        ids, offsets = self.ids, self.offsets
        follows = np.zeros(len(ids), dtype=bool)
        if longest > 1:
            follows[1:] = np.diff(ids) == 1
            follows[offsets[:-1][offsets[:-1] < len(ids)]] = False
        heads = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
        heads[::longest] = True
        heads[ids[~follows]] = True
        starts = np.flatnonzero(heads[ids])
        numbers = np.cumsum(heads) - 1
        return numbers[ids[starts]], np.searchsorted(starts, offsets), np.diff(starts, append=len(ids))

    def renumbered(self) -> "BlockHashes":
        """The same with ids numbered from 0 without large gaps."""
        return BlockHashes(_dense(self.ids), self.offsets, self.block_tokens, self.covers_output)


def _dense(ids: Ids) -> Ids:
    """Ids as they are if they can index an array, else renumbered."""
    if len(ids) and int(ids.max()) >= DENSE_UP_TO * len(ids):
        ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    return np.ascontiguousarray(ids)


def _offsets(counts: Ids) -> Ids:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def _gather(ids: Ids, starts: Ids, counts: Ids, parts: int) -> Ids:
    """Rows that start at ``starts``, each id split into ``parts``, ``counts`` of the parts kept."""
    total = _offsets(counts)
    place = np.arange(total[-1]) - np.repeat(total[:-1], counts)
    found: Ids = ids[np.repeat(starts, counts) + place // parts]
    return found if parts == 1 else found * parts + place % parts
