"""The engines under test, by name."""

from collections.abc import Callable

from simulator.engine.compiled import simulate
from simulator.engine.records import EngineResult
from simulator.engine.reference import simulate_reference

ENGINES: dict[str, Callable[..., EngineResult]] = {"reference": simulate_reference, "compiled": simulate}
NAMES = tuple(ENGINES)


def engine(name: str) -> Callable[..., EngineResult]:
    """Return an engine's function."""
    return ENGINES[name]
