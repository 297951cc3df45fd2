"""Compilation of the engine: Numba with a disk cache that cannot go stale.

Numba's own cache looks only at the file a function is defined in, so an edit in an imported helper would keep
running old machine code. The cache folder here is therefore named by a hash of every compiled source and of the
numba and numpy versions; it lives in the user's cache directory, so site-packages may be read-only. Without Numba, or with
``NUMBA_DISABLE_JIT=1``, the same functions run as plain Python: slowly, with the same results.
"""

import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import platformdirs

from simulator.engine import by_address, known_calls, link_once

numba: Any
try:
    numba = import_module("numba")
except ImportError:
    numba = None

F = TypeVar("F", bound=Callable[..., object])

#: Every module whose functions are compiled; all of them enter the cache key.
COMPILED_SOURCES = (
    "batch.py",
    "block_hashes.py",
    "block_runs.py",
    "by_address.py",
    "clients.py",
    "core.py",
    "fcfs.py",
    "flight.py",
    "full_loop.py",
    "heaps.py",
    "jit.py",
    "known_calls.py",
    "kv_blocks.py",
    "kv_memory.py",
    "link_once.py",
    "many.py",
    "parts.py",
    "prefix_cache.py",
    "progressions.py",
    "queues.py",
    "ranks.py",
    "records.py",
    "rounds.py",
    "scheduling.py",
    "scheduler.py",
    "segments.py",
    "skip_ahead.py",
    "speculation.py",
    "stages.py",
    "swap.py",
    "tiers.py",
)


def source_digest(folder: Path) -> str:
    """Hash of the compiled sources in ``folder`` and of the compiler's versions."""
    digest = hashlib.sha256()
    for name in COMPILED_SOURCES:
        digest.update((folder / name).read_bytes())
    digest.update(f"{getattr(numba, '__version__', None)}/{np.__version__}".encode())
    return digest.hexdigest()[:16]


def _prepare_cache() -> Path | None:
    """Point Numba's cache at our folder; None if no writable place exists (then every process compiles anew)."""
    if numba is None or numba.config.DISABLE_JIT:
        return None
    here = Path(__file__).parent
    # Numba also compiles anew for another path or file time; with both in the name, :func:`is_warm` knows.
    stamps = [(here / name).stat().st_mtime_ns for name in COMPILED_SOURCES]
    place = hashlib.sha256(f"{here}/{stamps}".encode()).hexdigest()[:8]
    folder = platformdirs.user_cache_path("chipseconds") / f"engine-{source_digest(here)}-{place}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
    except OSError:
        return None
    return folder


CACHE_FOLDER = _prepare_cache()


def is_compiled_mode() -> bool:
    """Whether the engine runs as machine code at all."""
    return numba is not None and not numba.config.DISABLE_JIT


def is_warm(form: str = "plain") -> bool:
    """Whether the machine code of one of the engine's loops is on disk already, so that the next call starts at once.

    ``form``: one of those of :func:`simulator.engine.compiled.form_of`; each is compiled when it is first wanted.
    """
    return CACHE_FOLDER is not None and (CACHE_FOLDER / f"ready-{form}").exists()


def mark_warm(form: str) -> None:
    """Record that a loop has been compiled into the cache folder."""
    if CACHE_FOLDER is not None:
        (CACHE_FOLDER / f"ready-{form}").touch()


if is_compiled_mode():
    by_address.install()
    known_calls.install()
PIPELINES = link_once.pipelines() if is_compiled_mode() else None


def entry(function: F) -> F:
    """Compile ``function`` with Numba, or return it unchanged when there is none; for what Python calls.

    ``fastmath`` stays off: results must not depend on the compiler's freedom to reorder sums. ``error_model="numpy"``
    only drops the zero-division checks; the code guards its divisors.
    """
    return _compile(function, of_python=True)


def compiled(function: F) -> F:
    """As :func:`entry`, for what compiled functions alone call: it has no wrapper for Python, and is linked into its callers."""
    return _compile(function)


def compiled_once(function: F) -> F:
    """As :func:`compiled`, for what is seldom called: Numba would compile it again for each constant that a caller writes, which makes it faster."""
    dispatcher: Any = compiled(function)
    if is_compiled_mode():
        plain, unliteral = dispatcher.get_call_template, numba.types.unliteral

        def get_call_template(args: Any, kws: Any) -> Any:
            return plain([unliteral(arg) for arg in args], {name: unliteral(arg) for name, arg in kws.items()})

        dispatcher.get_call_template = get_call_template
    return cast("F", dispatcher)


def inlined(function: F) -> F:
    """As :func:`compiled`, for a helper that is called often: it becomes part of every function that calls it."""
    return _compile(function, forceinline=True)


def inlined_entry(function: F) -> F:
    """As :func:`inlined`, for a helper that Python calls too."""
    return _compile(function, of_python=True, forceinline=True)


def inlined_or_none(function: F) -> F:
    """As :func:`inlined`, for a helper of two arguments whose first may be None, and then so is what comes back.

    Within the function Numba would take both for possible, and compile all that gets the result once more for "a record or None".
    """

    def either(record: Any, index: Any) -> Any:
        return None if record is None else function(record, index)

    if is_compiled_mode():
        inner = inlined(function)

        def choose(record: Any, index: Any) -> Any:
            del index
            if isinstance(record, numba.types.NoneType):
                return lambda record, index: None  # noqa: ARG005 - Numba asks for the same names
            return lambda record, index: inner(record, index)  # noqa: PLW0108 - Numba asks for a function of Python

        options = _options(forceinline=True)
        import_module("numba.extending").overload(either, strict=False, jit_options=options)(choose)
    return cast("F", either)


OPTIONS = {"error_model": "numpy", "nogil": True, "_nrt": False}
"""The compiled code allocates nothing, and its caller holds every array; without ``_nrt``, two thirds of the time would go to counting references."""


def _options(*, of_python: bool = False, forceinline: bool = False) -> dict[str, Any]:
    options = {**OPTIONS, "no_cpython_wrapper": not of_python, "no_cfunc_wrapper": True}
    # Where nothing is said, Numba takes over the option of the function that made it compile this one.
    options["forceinline"] = forceinline
    if PIPELINES is not None:
        options["pipeline_class"] = PIPELINES.entry if of_python else PIPELINES.helper
    return options


def _compile(function: F, *, of_python: bool = False, forceinline: bool = False) -> F:
    if not is_compiled_mode():
        return function
    options = _options(of_python=of_python, forceinline=forceinline)
    if CACHE_FOLDER is None or (PIPELINES is not None and not of_python):
        return cast("F", numba.njit(**options)(function))
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE_FOLDER)
    try:
        return cast("F", numba.njit(cache=True, **options)(function))
    finally:
        numba.config.CACHE_DIR = before
