"""Fixtures every room's tests may use."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from simulator.cli.main import main

ROOT = Path(__file__).resolve().parents[1]

# How many drawn cases an assumption leaves, and how fast they are drawn on a busy machine, is luck; a test that no case
# reaches still fails. Cases are the same in every run; ``pytest --hypothesis-profile=explore`` draws new ones.
_LENIENT = {"deadline": None, "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow]}
settings.register_profile("steady", derandomize=True, **_LENIENT)
settings.register_profile("explore", **_LENIENT)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of measured data and traces beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} is not here")
    return folder


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run ``chipseconds ARGS`` in this process; demands the exit code and that no traceback is shown."""

    def run(*args: str, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["chipseconds", *args])
        exit_code: str | int | None = 0
        try:
            main()
        except SystemExit as stop:
            exit_code = stop.code
        captured = capsys.readouterr()
        assert (exit_code or 0) == code, captured.err
        assert "Traceback" not in captured.err
        return Done(captured.out, captured.err)

    return run
