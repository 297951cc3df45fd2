"""Room: a rate of queries and targets → the cheapest fleet. Bounds prune, simulation decides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simulator.planning.options import PlanOptions

if TYPE_CHECKING:
    from simulator.planning.planner import plan
    from simulator.planning.question import targets_of
    from simulator.planning.rating import rate_within_targets

__all__ = ["PlanOptions", "plan", "rate_within_targets", "targets_of"]

_LATE = {
    "plan": "simulator.planning.planner",
    "targets_of": "simulator.planning.question",
    "rate_within_targets": "simulator.planning.rating",
}


def __getattr__(name: str) -> Any:
    # The engine behind these takes a while to import.
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
