"""Two binary heaps in plain arrays: integer keys, and (time, row) pairs. Both return the new size."""

from typing import Any

from simulator.engine.jit import inlined_entry

GROUP_BITS = 38
"""Micro-batches of group g number their steps from g << 38, so that keys of one group mean nothing to another."""


@inlined_entry
def push_key(heap: Any, size: int, key: int) -> int:
    """Add an integer key."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= key:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = key
    return size + 1


@inlined_entry
def pop_key(heap: Any, size: int) -> int:
    """Remove the smallest key (read it at index 0 first)."""
    size -= 1
    key = heap[size]
    i = 0
    child = 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = key
    return size


@inlined_entry
def push_arrival(times: Any, rows: Any, size: int, time: float, row: int) -> int:
    """Add an arrival; equal times are ordered by row."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if times[parent] < time or (times[parent] == time and rows[parent] <= row):
            break
        times[i] = times[parent]
        rows[i] = rows[parent]
        i = parent
    times[i] = time
    rows[i] = row
    return size + 1


@inlined_entry
def pop_arrival(times: Any, rows: Any, size: int) -> int:
    """Remove the earliest arrival (read it at index 0 first)."""
    size -= 1
    time = times[size]
    row = rows[size]
    i = 0
    child = 1
    while child < size:
        other = child + 1
        if other < size and (
            times[other] < times[child] or (times[other] == times[child] and rows[other] < rows[child])
        ):
            child = other
        if times[child] > time or (times[child] == time and rows[child] >= row):
            break
        times[i] = times[child]
        rows[i] = rows[child]
        i = child
        child = 2 * i + 1
    times[i] = time
    rows[i] = row
    return size
