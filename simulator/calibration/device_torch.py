"""Kernels of a decoder in PyTorch, on a GPU or the CPU: the other back-end of ``calibrate device``.

On a GPU calls are captured in a graph and replayed, as servers run decode steps, and timed by the device's own events. What cannot be
captured is queued and timed the same way, and the back-end's ``mode`` then says ``eager``.
"""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulator.calibration.device_numpy import MOST_INNER, Call, Device, cpu, host_sampler
from simulator.errors import InputError

FORMATS = {"bfloat16": ("bf16", 2), "float32": ("fp32", 4)}
"""Format of the tables -> the chip's format, and bytes."""


class TorchBackend:
    """PyTorch on one kind of device.

    Raises
    ------
    InputError
        If PyTorch is not installed, there is no such device, or the device does not compute in the format.
    """

    framework = "torch"

    def __init__(self, device: str | None = None, dtype: str | None = None) -> None:
        """Look at the device; by default the first GPU, else the CPU, in bfloat16 where it has units for that."""
        try:
            import torch  # noqa: PLC0415  # an optional extra, and slow to import
        except ImportError:
            raise InputError(
                "PyTorch is not installed: pip install 'chipseconds[torch]', or choose --backend numpy"
            ) from None
        self.torch = torch
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind, _, index = name.partition(":")
        if kind not in {"cuda", "cpu"} or not (index == "" or index.isdigit()):
            raise InputError(f"device {name!r}: must be cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {name!r}: PyTorch {torch.__version__} sees no GPU; use cpu")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} GPU(s), counted from 0")
        self.on_gpu = kind == "cuda"
        self.target = torch.device(f"cuda:{int(index or 0)}" if self.on_gpu else "cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.target)
        self.dtype = dtype or ("bfloat16" if self._has_bf16() else "float32")
        if self.dtype not in FORMATS:
            raise InputError(f"dtype {self.dtype!r}: must be one of {', '.join(FORMATS)}")
        if self.dtype == "bfloat16" and not self._has_bf16():
            raise InputError(f"dtype {self.dtype!r}: {name} only emulates it; use float32")
        self.chip_dtype, self.element_bytes = FORMATS[self.dtype]
        self.torch_dtype = getattr(torch, self.dtype)
        self.mode = "graph" if self.on_gpu else "python"
        self.device = self._gpu(one=bool(index)) if self.on_gpu else cpu(f"torch {torch.__version__}")

    def _has_bf16(self) -> bool:
        if self.on_gpu:
            return bool(self.torch.cuda.is_bf16_supported(including_emulation=False))
        try:
            return bool(self.torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001  # no public question
        except (AttributeError, RuntimeError):
            return False

    def _gpu(self, *, one: bool) -> Device:
        torch = self.torch
        found = torch.cuda.get_device_properties(self.target)
        alike = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_name(i) == found.name]
        hip = torch.version.hip
        driver = _driver()
        return Device(
            name=found.name,
            kind="amd" if hip else "nvidia",
            count=1 if one else len(alike),
            memory_bytes=float(found.total_memory),
            cache_bytes=float(getattr(found, "L2_cache_size", 0)),
            units=int(found.multi_processor_count),
            software=(
                f"torch {torch.__version__}",
                f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
                *([f"driver {driver}"] if driver else []),
            ),
        )

    def random(self, elements: int) -> Any:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        made = self.torch.Generator(device=self.target).manual_seed(0)
        block = self.torch.randn(min(elements, 2**22), generator=made, device=self.target).to(self.torch_dtype)
        return block.repeat(math.ceil(elements / len(block)))[:elements]

    def empty(self, *shape: int) -> Any:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        return self.torch.zeros(shape, dtype=self.torch_dtype, device=self.target)

    def copy(self, source: Any, out: Any) -> Any:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        return out.copy_(source)

    def product(self, x: Any, weights: Any, out: Any) -> Any:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        return self.torch.mm(x, weights.t(), out=out)

    def prefill_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:  # noqa: ARG002  # the library allocates
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        attention = self.torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    def decode_attention(self, q: Any, k: Any, v: Any, out: Any) -> Any:  # noqa: ARG002  # as above
        """See :class:`~simulator.calibration.device_numpy.Backend`; heads that share keys pass as queries."""
        batch, heads, width = q.shape
        kv_heads = k.shape[1]
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
        found = self.torch.nn.functional.scaled_dot_product_attention(grouped, k, v)
        return found.reshape(batch, heads, width)

    def add_norm(self, x: Any, residual: Any, weight: Any, out: Any) -> Any:  # noqa: ARG002  # as above
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        residual.add_(x)
        return self.torch.nn.functional.rms_norm(residual, (residual.shape[1],), weight, 1e-6)

    def gate(self, both: Any, out: Any) -> Any:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        width = both.shape[1] // 2
        return self.torch.mul(self.torch.nn.functional.silu(both[:, :width]), both[:, width:], out=out)

    def sampler(self, call: Call, least_s: float, before: Call | None = None) -> Callable[[], float]:
        """See :class:`~simulator.calibration.device_numpy.Backend`."""
        if self.on_gpu:
            return self._gpu_sampler(call, least_s)
        return host_sampler(call, least_s, before, cores=self.device.units)

    def _gpu_sampler(self, call: Call, least_s: float) -> Callable[[], float]:
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # libraries choose kernels and workspaces now, not during capture
            for i in range(3):
                call(i)
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        once = self._elapsed(lambda: call(3))
        inner = max(1, min(MOST_INNER, math.ceil(least_s / max(once, 1e-7))))
        try:
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                for i in range(inner):
                    call(i)
            play: Callable[[], object] = graph.replay
        except RuntimeError:
            cuda.synchronize()
            self.mode = "eager"

            def play() -> object:
                for i in range(inner):
                    call(i)
                return None

        play()
        cuda.synchronize()
        return lambda: self._elapsed(play) / inner

    def _elapsed(self, play: Callable[[], object]) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        play()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def all_reduce(self, elements: int, least_s: float) -> Callable[[], float]:
        """See :class:`~simulator.calibration.device_numpy.Backend`; NCCL from one process, calls queued back to back."""
        torch = self.torch
        from torch.cuda import nccl  # noqa: PLC0415  # as torch itself

        arrays = [torch.zeros(elements, dtype=self.torch_dtype, device=f"cuda:{i}") for i in range(self.device.count)]

        def call() -> None:
            nccl.all_reduce(arrays)

        def finish() -> None:
            for i in range(self.device.count):
                torch.cuda.synchronize(i)

        for _ in range(3):
            call()
        finish()
        start = time.perf_counter()
        call()
        finish()
        inner = max(4, min(MOST_INNER, math.ceil(least_s / max(time.perf_counter() - start, 1e-6))))

        def sample() -> float:
            begin = time.perf_counter()
            for _ in itertools.repeat(None, inner):
                call()
            finish()
            return (time.perf_counter() - begin) / inner

        return sample


def _driver() -> str:
    """Version of NVIDIA's driver, where the kernel module tells."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in first.split() if word[:1].isdigit() and word.count(".") >= 1), "")
