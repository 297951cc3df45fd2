"""A fleet that may be chosen: replicas of one kind, or a prefill and a decode pool; and how several are searched at a time."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from simulator.planning.pools import Split
from simulator.planning.search import Found
from simulator.results.plan import Role

A = TypeVar("A")
B = TypeVar("B")

Choice = Found | Split


def parts_of(choice: Choice) -> tuple[tuple[Role, Found, float], ...]:
    """Pools of a choice: role, deployment, and the share of the queries that come there."""
    return choice.parts if isinstance(choice, Split) else (("unified", choice, 1.0),)


def unlike(found: Iterable[Choice], best: Choice) -> list[Choice]:
    """Of each slice, sharding, layout and precision only the first."""
    seen: set[object] = {best.place}
    kept: list[Choice] = []
    for one in found:
        if one.place not in seen:
            seen.add(one.place)
            kept.append(one)
    return kept


def in_threads(work: Callable[[A], B], items: Sequence[A], workers: int) -> list[B]:
    """Results in the order of the items, several made at a time."""
    if workers == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=min(workers, len(items))) as threads:
        return list(threads.map(work, items))
