"""What ``calibrate device`` measures within a budget of time.

Each group of kernels has a grid of shapes far larger than can be measured. The grid is walked in an order that covers it evenly wherever
the walk stops; shapes too slow for the budget are left out first. One round measures as many shapes as its share of the
budget allows, further rounds measure the same shapes again, so that a disturbance of the machine meets some samples of many
shapes and not all samples of a few. Reported are medians; weights and keys move through memory from call to call, so that none is
found in a cache.

Needs numpy and, for its back-end, PyTorch: nothing else, so that it runs on a machine that has only these.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np

from simulator.calibration.device_numpy import Backend, Call
from simulator.calibration.device_tables import MEMORY_KERNELS, Key, Measurement, Timing
from simulator.errors import InputError

ROUNDS = 3
"""Times the list of shapes is gone through."""
SAMPLES, SAMPLES_OF_LONG, LONG_S = 4, 2, 2e-2
"""Samples of a shape in each round; fewer where a call takes long, as a long call averages over disturbances itself. [s]"""
LEAST_SAMPLE_S = 2e-3
"""Calls shorter than this are repeated within a sample. [s]"""
LEAST_BUDGET_S, MOST_BUDGET_S = 2.0, 600.0
DEAREST_SHARE = 0.03
"""Of a group's time in a round, the most that one shape may take."""
POOL_CACHES = 16
"""What holds weights and keys, as a multiple of the largest cache."""
MOST_POOL_SHARE, LEAST_POOL_BYTES, MOST_POOL_BYTES = 0.1, 2**28, 2**32
"""Of the device's memory, and in bytes: the same."""
MOST_VIEWS = 1024
"""Different weights or keys that calls of one shape take in turn, at most."""
MOST_ELEMENTS = 2**28
"""Of the inputs, and of the outputs, of one product."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_DEPTHS = (256, 512, 1024, 2048, 4096, 8192)
_ROWS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
_HEADS = ((16, 4, 64), (32, 8, 128), (8, 8, 64), (16, 2, 128), (32, 32, 128), (8, 1, 128), (24, 8, 128), (64, 8, 128))
"""Query heads, KV heads, width."""
_PROMPTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
_WIDTHS = (1024, 4096)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_BETWEEN = 2048
"""Inputs and outputs of the product that runs between two norms or gates, as one does in a step."""
_MESSAGES = tuple(2**i for i in range(10, 30))


@dataclass(frozen=True)
class _Group:
    """Shapes measured under one share of the budget.

    ``work`` gives FLOPs and bytes of a shape, from which its time is guessed; ``least`` are measured whatever the budget, and
    ``always`` are the first of them whatever they take.
    """

    name: str
    table: str
    share: float
    least: int
    shapes: tuple[tuple[Any, ...], ...]
    work: Callable[..., tuple[float, float]]
    call: Callable[..., Call]
    always: tuple[tuple[Any, ...], ...] = ()


def measure(backend: Backend, budget_s: float, *, progress: Callable[[str], None] | None = None) -> Measurement:
    """Measure a device for about ``budget_s`` seconds.

    Parameters
    ----------
    progress
        told what is measured next.

    Raises
    ------
    InputError
        If the budget is too small or unreasonably large.
    """
    if not LEAST_BUDGET_S <= budget_s <= MOST_BUDGET_S:
        raise InputError(f"budget {budget_s:g} s: must be {LEAST_BUDGET_S:g} to {MOST_BUDGET_S:g} s")
    say = progress or (lambda _: None)
    say(f"{backend.device.name}: {backend.framework}, {backend.dtype}, {budget_s:g} s")
    bench = _Bench(backend, budget_s)
    say(f"about {bench.flops_per_s / 1e9:,.0f} GFLOP/s and {bench.bytes_per_s / 1e9:,.1f} GB/s")
    samples: dict[Key, list[float]] = {}
    groups = bench.groups()
    for turn in range(ROUNDS):
        for group in groups:
            say(f"round {turn + 1} of {ROUNDS}: {group.name}")
            bench.go_through(group, samples, first=turn == 0)
    if backend.device.count > 1:
        say(f"all-reduce over {backend.device.count} devices")
        for size in _MESSAGES:
            sampler = backend.all_reduce(size // backend.element_bytes, LEAST_SAMPLE_S)
            samples[Key("comm", (backend.device.count, size))] = [sampler() for _ in range(ROUNDS * SAMPLES)]
    timings = {key: _timing(found) for key, found in samples.items()}
    return Measurement(
        backend.device,
        backend.framework,
        backend.dtype,
        backend.chip_dtype,
        backend.element_bytes,
        backend.mode,
        date.today().isoformat(),  # noqa: DTZ011  # the user's own day
        budget_s,
        timings,
    )


def _timing(samples: list[float]) -> Timing:
    low, median, high = (float(np.quantile(samples, q)) for q in (0.25, 0.5, 0.75))
    return Timing(median, min(samples), (high - low) / median, len(samples))


class _Bench:
    """Operands of all kernels, and what they may take."""

    def __init__(self, backend: Backend, budget_s: float) -> None:
        self.backend = backend
        self.round_s = budget_s / ROUNDS
        device = backend.device
        # A GPU also holds keys of servers' batches, which fill gigabytes; filling so many takes a CPU too long.
        wanted = POOL_CACHES * device.cache_bytes if device.kind == "cpu" else MOST_POOL_BYTES
        wanted = min(max(wanted, LEAST_POOL_BYTES), MOST_POOL_BYTES)
        pool_bytes = min(wanted, MOST_POOL_SHARE * device.memory_bytes)
        self.turns = 0
        self.pool = backend.random(int(pool_bytes) // backend.element_bytes)
        self.between = self.product(1, _BETWEEN, _BETWEEN)
        self.flops_per_s, self.bytes_per_s = self._guess()

    def _guess(self) -> tuple[float, float]:
        """FLOP/s and bytes/s by a few growing products and a copy: the guess that times of shapes are made from."""
        most = self.round_s / 40
        flops_per_s = 1.0
        for size in (256, 512, 1024, 2048, 4096, 8192):
            if size * size > len(self.pool):
                break
            sample = self.backend.sampler(self.product(size, size, size), LEAST_SAMPLE_S)
            seconds = min(sample() for _ in range(SAMPLES))
            flops_per_s = max(flops_per_s, 2.0 * size**3 / seconds)
            if 8 * SAMPLES * seconds > most:
                break
        elements = len(self.pool) // 4
        sample = self.backend.sampler(self.memory("copy", 1, elements), LEAST_SAMPLE_S)
        return flops_per_s, 2.0 * elements * self.backend.element_bytes / min(sample() for _ in range(SAMPLES))

    def groups(self) -> list[_Group]:
        """What there is to measure."""
        b = float(self.backend.element_bytes)
        pairs = [
            (n, k)
            for d in _DEPTHS
            for n, k in ((d, d), (3 * d // 2, d), (11 * d // 4, d), (d, 11 * d // 4), (11 * d // 2, d))
        ]
        cached = len(self.pool)

        def product(m: int, n: int, k: int) -> tuple[float, float]:
            return 2.0 * m * n * k, b * (n * k + m * k + m * n)

        def prefill(batch: int, seq: int, heads: int, kv_heads: int, width: int) -> tuple[float, float]:
            # The softmax costs about as much as the products of a narrow head: a guess for the plan alone.
            flops = 2.0 * batch * seq * (seq + 1) * heads * (width + 64)
            return 4 * flops, b * batch * seq * width * (2 * heads + 2 * kv_heads)

        def decode(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[float, float]:
            return 4.0 * batch * length * 16 * kv_heads * width, 2 * b * batch * length * kv_heads * width + heads

        def memory(kernel: str, rows: int, width: int) -> tuple[float, float]:
            return 0.0, 4 * MEMORY_KERNELS[kernel] * rows * width * b

        most = min(cached, MOST_ELEMENTS)
        rows = [(m, n, k) for n, k in pairs for m in _ROWS if n * k <= cached // 2 and m * max(n, k) <= most]
        single = [(1, n, k) for n, k in pairs if n * k <= cached // 2]
        prompts = [
            (n, s, *h)
            for h in _HEADS
            for n in (1, 2, 4, 8)
            for s in _PROMPTS
            if n * s <= _PROMPTS[-1] and 2 * n * s * h[0] * h[2] <= cached
        ]
        keys = [
            (n, s, *h) for h in _HEADS for n in _BATCHES for s in _CONTEXTS if 2 * n * s * h[1] * h[2] <= cached // 2
        ]
        moved = [(name, r, w) for r in _TOKENS for w in _WIDTHS for name in ("norm", "gate") if r * w <= cached // 8]
        found = (
            _Group("products", "gemm", 0.4, 20, _even(rows), product, self.product),
            _Group("products of one row", "gemm", 0.1, 6, _even(single), product, self.product),
            _Group("prefill attention", "attention_prefill", 0.2, 16, _even(prompts), prefill, self.prefill),
            _Group("decode attention", "attention_decode", 0.22, 24, _even(keys), decode, self.decode),
            _Group(
                "norms, gates and copies",
                "memory",
                0.08,
                12,
                _even(moved),
                memory,
                self.memory,
                (("copy", 1, len(self.pool) // 4),),
            ),
        )
        return [self._affordable(group) for group in found]

    def _affordable(self, group: _Group) -> _Group:
        """Without shapes that one sample each would spend too much on; at least the cheapest stay."""

        def guess(shape: tuple[Any, ...]) -> float:
            flops, moved = group.work(*shape)
            return flops / self.flops_per_s + moved / self.bytes_per_s

        limit = DEAREST_SHARE * group.share * self.round_s / (SAMPLES + 2)
        kept = tuple(shape for shape in group.shapes if guess(shape) <= limit)
        if len(kept) < group.least:
            kept = _cheapest(group, guess)
        return replace(group, shapes=(*group.always, *kept))

    def go_through(self, group: _Group, samples: dict[Key, list[float]], *, first: bool) -> None:
        """Measure a group once: in the first round what its time allows, later what the first did."""
        end = time.perf_counter() + group.share * self.round_s
        least = group.least + len(group.always)
        for count, shape in enumerate(group.shapes):
            key = Key(group.table, shape)
            over = time.perf_counter() > end
            if (first and over and count >= least) or (not first and key not in samples):
                break
            least_s = min(LEAST_SAMPLE_S, group.share * self.round_s / (4 * group.least * SAMPLES))
            before = self.between if group.table == "memory" else None
            sample = self.backend.sampler(group.call(*shape), least_s, before)
            found = samples.setdefault(key, [])
            found.append(sample())
            found.extend(sample() for _ in range((SAMPLES_OF_LONG if found[-1] > LONG_S else SAMPLES) - 1))

    def _views(self, *shape: int) -> list[Any]:
        """Arrays of one shape from all over the pool."""
        size = math.prod(shape)
        count = len(self.pool) // size
        places = np.linspace(0, count, min(count, MOST_VIEWS), endpoint=False).astype(np.int64)
        self.turns += 1  # begin where no recent shape has been
        places = np.roll(places, -int(len(places) * ((self.turns * _GOLDEN) % 1.0)))
        return [self.pool[i * size : (i + 1) * size].reshape(shape) for i in places.tolist()]

    def product(self, m: int, n: int, k: int) -> Call:
        """``[m, k] @ [n, k]ᵀ``."""
        weights, x, out = self._views(n, k), self._fresh(m, k), self.backend.empty(m, n)
        return lambda i: self.backend.product(x, weights[i % len(weights)], out)

    def prefill(self, batch: int, seq: int, heads: int, kv_heads: int, width: int) -> Call:
        """Causal attention of whole prompts."""
        q, k, v = (self._fresh(batch, h, seq, width) for h in (heads, kv_heads, kv_heads))
        out = self.backend.empty(batch, heads, seq, width)
        return lambda _: self.backend.prefill_attention(q, k, v, out)

    def decode(self, batch: int, length: int, heads: int, kv_heads: int, width: int) -> Call:
        """Attention of one new token per sequence."""
        cached = self._views(2, batch, kv_heads, length, width)
        q, out = self._fresh(batch, heads, width), self.backend.empty(batch, heads, width)

        def call(i: int) -> object:
            k, v = cached[i % len(cached)]
            return self.backend.decode_attention(q, k, v, out)

        return call

    def memory(self, kernel: str, rows: int, width: int) -> Call:
        """One of :data:`MEMORY_KERNELS`."""
        backend, out = self.backend, self.backend.empty(rows, width)
        if kernel == "gate":
            both = self._fresh(rows, 2 * width)
            return lambda _: backend.gate(both, out)
        x = self._fresh(rows, width)
        if kernel == "copy":
            return lambda _: backend.copy(x, out)
        residual, weight = backend.empty(rows, width), self._fresh(width)
        x = x * 0  # the residual must not grow from call to call
        return lambda _: backend.add_norm(x, residual, weight, out)

    def _fresh(self, *shape: int) -> Any:
        """An array that is in use, and so in a cache if it fits, like the activations of a step."""
        size = math.prod(shape)
        return self.pool[-size:].reshape(shape)


def _cheapest(group: _Group, guess: Callable[[tuple[Any, ...]], float]) -> tuple[tuple[Any, ...], ...]:
    """As few shapes as a fit needs: of attention from all head configurations in turn, as these are left out as a whole."""
    ranks: dict[tuple[Any, ...], int] = {}
    ordered = []
    for shape in sorted(group.shapes, key=guess):
        heads = shape[2:] if group.table.startswith("attention") else ()
        ranks[heads] = ranks.get(heads, -1) + 1
        ordered.append((ranks[heads], shape))
    return tuple(shape for _, shape in sorted(ordered, key=lambda item: item[0])[: group.least])


def _even(shapes: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """A grid in an order whose every beginning covers it evenly: by the fractions of multiples of the golden ratio."""
    return tuple(shapes[i] for i in sorted(range(len(shapes)), key=lambda i: (i * _GOLDEN) % 1.0))
