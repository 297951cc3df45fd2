"""Our side of the table on speculative decoding: the formulas of Leviathan et al. 2023."""

from collections.abc import Callable
from functools import partial

from simulator.reproduction.rows import Ours, read_published
from simulator.roofline.acceptance import best_draft_tokens, operations_factor, walltime_factor


def rows_ours() -> Ours:
    """Our side of ``data/speculation.csv``: an id says what is computed, and from which α, γ and c."""
    ours: dict[str, Callable[[], float]] = {}
    for item in read_published("speculation"):
        what, *numbers = item["id"].split("/")
        first, *others = map(float, numbers)
        if what == "best":
            ours[item["id"]] = partial(_best, first, others[0])
        else:
            function = operations_factor if what == "ops" else walltime_factor
            ours[item["id"]] = partial(function, first, int(others[0]), others[1])
    return ours


def _best(acceptance: float, cost_ratio: float) -> float:
    return float(best_draft_tokens(acceptance, cost_ratio))
