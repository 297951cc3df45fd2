"""The ``hash_ids`` of a trace: lists of block ids, read and checked."""

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.traffic.sources import Source
from simulator.traffic.stream import BlockIds

HASH_BLOCK_TOKENS = 512
"""Tokens per id in Mooncake's traces."""


def read_block_ids(
    source: Source, index: int, rows: NDArray[np.int64], prompt_tokens: NDArray[np.int64], block_tokens: int
) -> BlockIds:
    """Block ids of the prompts in some rows of a table.

    Parameters
    ----------
    index
        of the column, which holds lists of whole numbers.
    rows, prompt_tokens
        [n] which rows of the table are wanted, rising, and how long their prompts are.
    block_tokens
        tokens per id; the last id of a row may be of a partly filled block.

    Raises
    ------
    InputError
        With the line of the first row whose cell is no such list, or has more ids than its prompt has blocks, or has an id
        that elsewhere follows another one: an id must stand for its block and everything before it.
    """
    listed = f"try_cast(c{index} AS BIGINT[])"
    told = source.query(f"len({listed}) AS n", [index])["n"]
    counts = np.ma.filled(np.ma.asarray(told, dtype=np.float64), -1).astype(np.int64)
    found = source.query(f"unnest({listed}) AS id", [index])["id"]
    ids = np.ma.filled(np.ma.asarray(found), -1).astype(np.int64)

    owner = np.repeat(np.arange(len(counts)), np.maximum(counts, 0))
    no_list = counts[rows] < 0
    no_list |= np.isin(rows, owner[ids < 0])
    _demand(source, index, rows, ~no_list, "must be a list of whole numbers, not negative")
    n_blocks = -(-prompt_tokens // block_tokens)
    too_many = f"more ids than the prompt has blocks of {block_tokens} tokens; state traffic.trace.hash_block_tokens"
    _demand(source, index, rows, counts[rows] <= n_blocks, too_many)

    wanted = np.zeros(len(counts), dtype=bool)
    wanted[rows] = True
    ids = ids[wanted[owner]]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts[rows])])
    parted = _first_parted(ids, offsets)
    if parted is not None:
        alone = np.arange(len(rows)) != np.searchsorted(offsets, parted, side="right") - 1
        rule = (
            f"id {ids[parted]} follows another id than elsewhere; it must stand for its block and everything before it"
        )
        _demand(source, index, rows, alone, rule)
    return BlockIds(ids, offsets, block_tokens, covers_output=False)


def _demand(source: Source, index: int, rows: NDArray[np.int64], good: NDArray[np.bool_], rule: str) -> None:
    if not good.all():
        where, _ = source.cell(int(rows[np.argmin(good)]), index)
        raise InputError(f"{where}: {source.header()[index]}: {rule}")


def _first_parted(ids: NDArray[np.int64], offsets: NDArray[np.int64]) -> int | None:
    """Place of an id that follows another id than where it stands elsewhere, if there is one."""
    before = np.concatenate([ids[:0], [-1], ids[:-1]])[: len(ids)]
    before[offsets[:-1][np.diff(offsets) > 0]] = -1
    order = np.argsort(ids, kind="stable")
    wrong = (np.diff(ids[order]) == 0) & (np.diff(before[order]) != 0)
    return int(order[1:][wrong].min()) if wrong.any() else None
