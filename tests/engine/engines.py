"""The engines under test, by name."""

from collections.abc import Callable

import pytest

from simulator.engine.records import EngineResult
from simulator.engine.reference import simulate_reference

NAMES = ("reference", "compiled")


def engine(name: str) -> Callable[..., EngineResult]:
    """Return an engine's function; a test that asks for one that is not there is skipped."""
    if name == "reference":
        return simulate_reference
    return pytest.importorskip("simulator.engine.compiled", reason="no compiled engine here").simulate
