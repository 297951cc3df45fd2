"""What the benchmarks share: the median time of an action over repeats, after one that does not count."""

import statistics
import time
from collections.abc import Callable


def measure(what: str, action: Callable[[], object], repeats: int) -> None:
    """Print the median of ``repeats`` runs and their range."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{what:<58} {statistics.median(times):9.2f} ms   ({min(times):.2f} … {max(times):.2f})")
