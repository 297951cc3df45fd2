"""Our side of the table on speculative decoding: the formulas of Leviathan et al. 2023."""

from functools import partial

from simulator.reproduction.rows import Ours, read_published
from simulator.roofline.acceptance import best_draft_tokens, operations_factor, walltime_factor


def rows_ours() -> Ours:
    """Our side of ``data/speculation.csv``: an id says what is computed, and from which α, γ and c."""
    return {item["id"]: partial(_ours, *item["id"].split("/")) for item in read_published("speculation")}


def _ours(what: str, acceptance: str, *numbers: str) -> float:
    if what == "best":
        return float(best_draft_tokens(float(acceptance), float(numbers[0])))
    factor = {"ops": operations_factor, "speed": walltime_factor}[what]
    return factor(float(acceptance), int(numbers[0]), float(numbers[1]))
