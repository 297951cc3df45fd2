"""The two tables of a result: columns, types, units and meanings, in one place.

The writer, the reader, the reference page ``docs/results.md`` and its test all read these definitions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

#: A table in memory: column name to values, all of one length.
Table = dict[str, NDArray[Any]]

#: Request states, as spelled in the ``status`` column; the codes of an engine result index this tuple.
REQUEST_STATES = ("finished", "rejected", "running", "waiting", "not_arrived", "timed_out", "cancelled")


@dataclass(frozen=True)
class Column:
    """One column: its name carries the unit."""

    name: str
    dtype: Literal["int64", "int32", "float64", "float64 or null", "state"]
    meaning: str

    @property
    def nullable(self) -> bool:
        """Whether the value may be missing: NaN in memory, null in a file."""
        return self.dtype == "float64 or null"


REQUEST_COLUMNS = (
    Column("request", "int64", "index of the request in the stream, from 0; the row order"),
    Column("replica", "int32", "replica that gave its last token, or was to; counted over all pools, −1: none"),
    Column("pool", "int32", "that replica's pool, in the order of the scenario; −1: none"),
    Column(
        "prefill_replica", "int32", "replica that computed its prompt: another one only where pools are disaggregated"
    ),
    Column("status", "state", "one of " + ", ".join(REQUEST_STATES)),
    Column("arrival_s", "float64 or null", "arrival; null if a closed loop ended before it arrived"),
    Column("scheduled_s", "float64 or null", "start of the first step it was part of"),
    Column("first_token_s", "float64 or null", "end of the step that gave its first token"),
    Column("finish_s", "float64 or null", "end of the step that gave its last token"),
    Column("queue_s", "float64 or null", "scheduled_s − arrival_s"),
    Column("load_s", "float64", "time waited for KV blocks from below HBM or from the fleet's store, part of queue_s"),
    Column(
        "transfer_s",
        "float64",
        "time from the end of its prefill until its KV cache was at the decode replica; 0 without",
    ),
    Column("ttft_s", "float64 or null", "time to first token: first_token_s − arrival_s"),
    Column("tpot_s", "float64 or null", "(e2e_s − ttft_s)/(output_tokens − 1); null for one-token outputs"),
    Column("e2e_s", "float64 or null", "end-to-end latency: finish_s − arrival_s"),
    Column("prompt_tokens", "int64", "prompt length, cached tokens included"),
    Column(
        "cached_tokens",
        "int64",
        "leading prompt tokens whose KV was already there, stated so or found in the prefix cache",
    ),
    Column("output_tokens", "int64", "output length"),
    Column("priority", "int64", "class, 0 is served first; 0 without classes"),
    Column("tenant", "int64", "who sent it; 0 without tenants"),
    Column("attempts", "int32", "attempts that reached the scheduler; times but arrival_s are those of the last"),
    Column("preemptions", "int32", "times it was preempted"),
    Column("chip_s_busy", "float64", "its share of the steps it rode in, times the replica's chips"),
    Column("chip_s_prefill", "float64", "the part of chip_s_busy spent in prefill chunks"),
    Column("chip_s_cached", "float64", "the part of chip_s_prefill spent reading cached tokens"),
    Column("chip_s_recompute", "float64", "the part of chip_s_busy spent computing tokens again after preemption"),
    Column("chip_s_swap", "float64", "the part of chip_s_busy by which copies of its KV blocks lengthened steps"),
    Column("chip_s_wasted", "float64", "the part of chip_s_busy spent on attempts that timed out or were cancelled"),
)

TIMELINE_COLUMNS = (
    Column("replica", "int32", "replica"),
    Column("start_s", "float64", "start of the interval; rows are ordered by replica, then start"),
    Column("interval_s", "float64", "its length; the last interval of a replica may be partly past the end"),
    Column("running", "float64", "running requests, mean over the interval"),
    Column("waiting", "float64", "waiting requests, mean over the interval"),
    Column("kv_fraction", "float64", "KV blocks in use ÷ KV blocks of the replica, mean over the interval"),
    Column("busy_fraction", "float64", "share of the interval with a step in progress"),
    Column("preemptions_per_s", "float64", "requests preempted in the interval ÷ its length"),
    Column("chips", "int64", "chips of the replica"),
    Column("power_w", "float64 or null", "mean power of the replica's chips, from the power model; null without one"),
)

_DTYPES = {
    "int64": np.int64,
    "int32": np.int32,
    "float64": np.float64,
    "float64 or null": np.float64,
    "state": np.int8,
}


def as_table(columns: tuple[Column, ...], values: Mapping[str, NDArray[np.generic]], *, what: str) -> Table:
    """Arrange ``values`` in the order and types of ``columns``.

    Raises
    ------
    InputError
        If a column is missing, unknown, of another length, or has NaN where the schema allows none.
    """
    names = [column.name for column in columns]
    if set(values) != set(names):
        missing, extra = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        raise InputError(f"table {what}: missing columns {missing}, unknown columns {extra}")
    table: Table = {}
    rows = len(values[names[0]])
    for column in columns:
        array = np.ascontiguousarray(values[column.name], dtype=_DTYPES[column.dtype])
        if len(array) != rows:
            raise InputError(f"table {what}: column {column.name} has {len(array)} rows, {names[0]} has {rows}")
        if column.dtype == "float64" and not column.nullable and np.isnan(array).any():
            raise InputError(f"table {what}: {column.name}[{int(np.argmax(np.isnan(array)))}] is not a number")
        table[column.name] = array
    return table
