"""Kernels of a decoder in numpy, and how they are timed: the back-end of ``calibrate device`` that runs everywhere.

A back-end knows one device: what the system says about it (:class:`Device`), the kernels a decoder needs, and how long one
takes. Arrays are its own. Kernels write where they are told to wherever the library can: fresh memory costs page faults that a server's
buffers do not have.
"""

import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from simulator.errors import InputError

Call = Callable[[int], object]
"""A kernel ready to run; the number of the call picks the operands, so that repeated calls do not find them in a cache."""

QUERY_BLOCK = 128
"""Queries whose scores are held at a time."""
MOST_INNER = 500
"""Calls of one sample, at most."""
DEFAULT_CACHE_BYTES = 32 * 2**20
"""Last-level cache where the system does not say (assumed)."""


@dataclass(frozen=True)
class Device:
    """What the system says about a device.

    Attributes
    ----------
    name
        as the driver or the operating system calls it.
    kind
        ``cpu``, ``nvidia`` or ``amd``.
    count
        equal devices that can be used together.
    memory_bytes, cache_bytes
        main memory, and the largest memory on the die. [bytes]
    units
        multiprocessors of a GPU, cores of a CPU that this process may use.
    software
        libraries and drivers with their versions.
    """

    name: str
    kind: Literal["cpu", "nvidia", "amd"]
    count: int
    memory_bytes: float
    cache_bytes: float
    units: int
    software: tuple[str, ...]


class Backend(Protocol):
    """One device, and the kernels of a decoder on it.

    Attributes
    ----------
    framework
        its name in file names of tables.
    dtype, chip_dtype
        the format computed in, as tables and as chip files call it.
    element_bytes
        bytes of one element.
    mode
        how calls are issued: ``python`` one by one, ``graph`` captured and replayed, ``eager`` queued.
    """

    framework: str
    dtype: str
    chip_dtype: str
    element_bytes: int
    device: Device
    mode: str

    def random(self, elements: int) -> Any:
        """Flat array of normal values."""

    def empty(self, *shape: int) -> Any:
        """Array of any values."""

    def copy(self, source: Any, out: Any) -> Any:
        """Copy an array."""

    def product(self, x: Any, weights: Any, out: Any) -> Any:
        """``x [m, k] @ weights [n, k]ᵀ``."""

    def prefill_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:
        """Causal attention, ``q [B, heads, S, d]`` over ``k, v [B, kv_heads, S, d]``."""

    def decode_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:
        """Attention of one query per sequence, ``q [B, heads, d]`` over ``k, v [B, kv_heads, L, d]``."""

    def add_norm(self, x: Any, residual: Any, weight: Any, out: Any) -> Any:
        """Add ``x`` to ``residual`` in place, and return its RMS norm times ``weight``."""

    def gate(self, both: Any, out: Any) -> Any:
        """``silu(a) * b`` of ``both = [a | b]``, ``[m, 2f]`` → ``[m, f]``."""

    def sampler(self, call: Call, least_s: float, before: Call | None = None) -> Callable[[], float]:
        """Warm a call up, and return what measures its time once, over at least ``least_s``. [s]

        On a CPU ``before`` runs before each call, outside the time: what a step does in between drives the call's data and code out of
        the caches. A GPU keeps kernels apart itself.
        """

    def all_reduce(self, elements: int, least_s: float) -> Callable[[], float]:
        """As ``sampler``, of the sum of an array over all devices."""


class NumpyBackend:
    """numpy on the CPU, in float32: products by its BLAS on all cores, everything else on one."""

    framework = "numpy"
    dtype = "float32"
    chip_dtype = "fp32"
    element_bytes = 4
    mode = "python"

    def __init__(self) -> None:
        """Look at the machine."""
        built = np.show_config(mode="dicts")
        blas = built.get("Build Dependencies", {}).get("blas", {})
        named = " ".join(str(blas[key]) for key in ("name", "version") if key in blas)
        self.device = cpu(f"numpy {np.__version__}", *([named] if named else []))
        self._scratch: dict[str, np.ndarray[Any, Any]] = {}

    def random(self, elements: int) -> Any:
        """See :class:`Backend`."""
        block = np.random.default_rng(0).standard_normal(min(elements, 2**20), dtype=np.float32)
        return np.tile(block, math.ceil(elements / len(block)))[:elements]

    def empty(self, *shape: int) -> Any:
        """See :class:`Backend`."""
        return np.zeros(shape, dtype=np.float32) + np.float32(0)  # touched, so that no page is missing later

    def copy(self, source: Any, out: Any) -> Any:
        """See :class:`Backend`."""
        np.copyto(out, source)
        return out

    def product(self, x: Any, weights: Any, out: Any) -> Any:
        """See :class:`Backend`."""
        return np.matmul(x, weights.T, out=out)

    def prefill_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:
        """See :class:`Backend`; block by block of queries, no further than the last one's own key."""
        batch, heads, length, width = q.shape
        kv_heads = k.shape[1]
        group = heads // kv_heads
        block = min(QUERY_BLOCK, length)
        hidden = np.triu(np.full((block, block), -np.inf, dtype=np.float32), 1)
        for b, h, start in itertools.product(range(batch), range(kv_heads), range(0, length, block)):
            end, mine = min(start + block, length), slice(h * group, (h + 1) * group)
            rows = end - start
            queries = self._get("queries", group, rows, width)
            np.multiply(q[b, mine, start:end], np.float32(width**-0.5), out=queries)
            scores = self._get("scores", group * rows, end)
            np.matmul(queries.reshape(group * rows, width), k[b, h, :end].T, out=scores)
            scores.reshape(group, rows, end)[:, :, start:] += hidden[:rows, :rows]
            total = _exponentials(scores)
            found = self._get("found", group * rows, width)
            np.matmul(scores, v[b, h, :end], out=found)
            np.divide(found, total, out=found)
            out[b, mine, start:end] = found.reshape(group, rows, width)
        return out

    def decode_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:
        """See :class:`Backend`."""
        batch, heads, width = q.shape
        kv_heads, length = k.shape[1:3]
        queries = (q * np.float32(width**-0.5)).reshape(batch, kv_heads, heads // kv_heads, width)
        scores = self._get("scores", batch, kv_heads, heads // kv_heads, length)
        np.matmul(queries, k.transpose(0, 1, 3, 2), out=scores)
        total = _exponentials(scores)
        found = out.reshape(batch, kv_heads, heads // kv_heads, width)
        np.matmul(scores, v, out=found)
        np.divide(found, total, out=found)
        return out

    def add_norm(self, x: Any, residual: Any, weight: Any, out: Any) -> Any:
        """See :class:`Backend`."""
        np.add(residual, x, out=residual)
        squares = np.einsum("ij,ij->i", residual, residual)
        np.multiply(residual, (1 / np.sqrt(squares / residual.shape[1] + np.float32(1e-6)))[:, None], out=out)
        return np.multiply(out, weight, out=out)

    def gate(self, both: Any, out: Any) -> Any:
        """See :class:`Backend`."""
        width = both.shape[1] // 2
        a, b = both[:, :width], both[:, width:]
        np.negative(a, out=out)
        np.exp(out, out=out)
        np.add(out, np.float32(1), out=out)
        np.divide(a, out, out=out)
        return np.multiply(out, b, out=out)

    def sampler(self, call: Call, least_s: float, before: Call | None = None) -> Callable[[], float]:
        """See :class:`Backend`."""
        return host_sampler(call, least_s, before, cores=self.device.units)

    def all_reduce(self, elements: int, least_s: float) -> Callable[[], float]:  # noqa: ARG002  # no devices to sum over
        """See :class:`Backend`."""
        raise InputError(f"all-reduce of {elements} elements: numpy knows one device")

    def _get(self, name: str, *shape: int) -> Any:
        size = math.prod(shape)
        if name not in self._scratch or len(self._scratch[name]) < size:
            self._scratch[name] = self.empty(size)
        return self._scratch[name][:size].reshape(shape)


def _exponentials(scores: Any) -> Any:
    """Replace scores by exponentials, the largest of each row 1, and return the sums of the rows."""
    np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
    np.exp(scores, out=scores)
    return scores.sum(axis=-1, keepdims=True)


def host_sampler(call: Call, least_s: float, before: Call | None, *, cores: int) -> Callable[[], float]:
    """Time calls that return when they are done.

    On one core by the processor time of this process: the same as the time on the wall, less what other programs took of the core
    meanwhile. On several cores by the wall, as theirs would be added up.
    """
    clock = time.process_time if cores == 1 else time.perf_counter
    numbers = itertools.count()

    def apart() -> float:
        number = next(numbers)
        if before is not None:
            before(number)
        start = clock()
        call(number)
        return clock() - start

    apart()
    start = clock()
    apart()
    inner = max(1, min(MOST_INNER, math.ceil(least_s / max(clock() - start, 1e-7))))

    def sample() -> float:
        if before is not None:
            return max(sum(apart() for _ in range(inner)), 1e-9) / inner
        start = clock()
        for _ in range(inner):
            call(next(numbers))
        return max(clock() - start, 1e-9) / inner

    return sample


def cpu(*software: str) -> Device:
    """Processor of this machine, as far as the operating system tells."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        name=_processor_name(),
        kind="cpu",
        count=1,
        memory_bytes=float(_memory_bytes()),
        cache_bytes=float(_cache_bytes()),
        units=cores,
        software=(*software, f"Python {platform.python_version()}", f"{platform.system()} {platform.release()}"),
    )


def _processor_name() -> str:
    listed = _text("/proc/cpuinfo")
    for line in listed.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise InputError(
            f"the size of this machine's memory: {sys.platform} does not tell it in a way this program knows"
        ) from None


def _cache_bytes() -> int:
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [text for file in levels if (text := _text(str(file)).strip())]
    factors = {"K": 2**10, "M": 2**20}
    found = [int(size[:-1]) * factors[size[-1]] for size in sizes if size[-1] in factors and size[:-1].isdigit()]
    return max(found, default=DEFAULT_CACHE_BYTES)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
