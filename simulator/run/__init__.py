"""Room: a scenario → one result. Resolves, compiles, drives the engine, prices, measures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simulator.run.scenario import Scenario, load_scenario, scenario_names

if TYPE_CHECKING:
    from simulator.run.simulate import Run, run_scenario

__all__ = ["Run", "Scenario", "load_scenario", "run_scenario", "scenario_names"]


def __getattr__(name: str) -> Any:
    # Listing scenarios needs neither the cost model nor the engine.
    if name in {"Run", "run_scenario"}:
        return getattr(import_module("simulator.run.simulate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
