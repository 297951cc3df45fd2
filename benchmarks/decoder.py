"""A small decoder with random weights, on the kernels that ``calibrate device`` times: what ``benchmarks/device.py`` predicts.

Run as a program it measures and predicts nothing, and needs numpy and PyTorch alone: for a machine that has no more than these.

    python benchmarks/decoder.py --backend torch --tables tables --steps steps.csv
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simulator.calibration.device_measure import measure
from simulator.calibration.device_numpy import Backend, NumpyBackend
from simulator.calibration.device_tables import write_tables
from simulator.calibration.device_torch import TorchBackend

Steps = list[tuple[str, int, int, list[float]]]
"""prefill or decode, tokens or sequences, context, and samples. [s]"""


@dataclass(frozen=True)
class Size:
    """A decoder like Llama: grouped queries, rotary positions, RMS norms, gated feed-forward."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocabulary: int

    def toml(self) -> str:
        """As a model file."""
        return f"""schema_version = 1
name = "small"
family = "llama"
d_model = {self.d_model}
vocab_size = {self.vocabulary}
tied_embeddings = false
source = "this benchmark"
kind = "assumed"

[[layers]]
count = {self.layers}
mixer = {{ kind = "attention", n_heads = {self.heads}, n_kv_heads = {self.kv_heads}, head_dim = {self.head_dim} }}
ffn = {{ kind = "dense", d_ff = {self.d_ff} }}
"""


SIZES = {
    "cpu": Size(1024, 8, 16, 4, 64, 2816, 8192),
    "gpu": Size(4096, 16, 32, 8, 128, 14336, 32768),
}
PREFILLS = {"cpu": (64, 256, 1024), "gpu": (128, 512, 2048, 8192)}
DECODES = {
    "cpu": tuple((b, c) for b in (1, 4, 16) for c in (256, 1024)),
    "gpu": tuple((b, c) for b in (1, 8, 64, 128) for c in (512, 4096)),
}


class Decoder:
    """The decoder on one back-end, with buffers for steps of up to ``rows`` tokens."""

    def __init__(self, backend: Backend, size: Size, rows: int) -> None:
        self.b, self.size = backend, size
        D, F = size.d_model, size.d_ff
        self.queries, self.keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.layers = [
            tuple(
                self._weights(*shape)
                for shape in ((self.queries + 2 * self.keys, D), (D, self.queries), (2 * F, D), (D, F), (1, D), (1, D))
            )
            for _ in range(size.layers)
        ]
        self.embedding, self.head, self.norm = (self._weights(n, D) for n in (size.vocabulary, size.vocabulary, 1))
        widths = {"x": D, "residual": D, "normed": D, "qkv": self.queries + 2 * self.keys, "attended": self.queries}
        widths |= {"up": 2 * F, "gated": F}
        self.buffers = {name: backend.empty(rows, width) for name, width in widths.items()}
        self.logits = backend.empty(rows, size.vocabulary)
        angles = np.arange(2**14)[:, None] / 10000.0 ** (np.arange(size.head_dim // 2) / (size.head_dim // 2))
        self.turn = [self._own(f(angles)[:, None, :]) for f in (np.cos, np.sin)]

    def _weights(self, *shape: int) -> Any:
        return self.b.random(int(np.prod(shape))).reshape(shape) * shape[-1] ** -0.5

    def _own(self, array: Any) -> Any:
        """An array of numpy's as one of the back-end's."""
        if isinstance(self.b, TorchBackend):
            made = self.b.torch.as_tensor(array, device=self.b.target)
            return made if array.dtype.kind == "i" else made.to(self.b.torch_dtype)
        return array if array.dtype.kind == "i" else array.astype(np.float32)

    def cache(self, batch: int, length: int) -> list[Any]:
        """Keys and values of every layer."""
        shape = (2, batch, self.size.kv_heads, length, self.size.head_dim)
        return [self.b.random(int(np.prod(shape))).reshape(shape) for _ in range(self.size.layers)]

    def tokens(self, n: int) -> Any:
        """Some token ids."""
        return self._own(np.arange(n, dtype=np.int64) * 7919 % self.size.vocabulary)

    def step(self, ids: Any, cache: list[Any], *, prefill: bool) -> Any:
        """One prompt from its beginning, or one more token of each sequence whose cache is full but for that token."""
        b, size, n = self.b, self.size, len(ids)
        buffer = {name: array[:n] for name, array in self.buffers.items()}
        length = cache[0].shape[3]
        positions = slice(0, n) if prefill else slice(length - 1, length)
        cos, sin = (table[positions] for table in self.turn)
        buffer["residual"][:] = 0
        x = self.embedding[ids]
        for (into, out, up, down, before, between), held in zip(self.layers, cache, strict=True):
            qkv = b.product(b.add_norm(x, buffer["residual"], before[0], buffer["normed"]), into, buffer["qkv"])
            both = qkv[:, : self.queries + self.keys].reshape(n, size.heads + size.kv_heads, size.head_dim)
            turn(both, cos, sin)
            q, k = both[:, : size.heads], both[:, size.heads :]
            v = qkv[:, self.queries + self.keys :].reshape(n, size.kv_heads, size.head_dim)
            shaped = buffer["attended"].reshape(n, size.heads, size.head_dim)
            if prefill:
                q, k, v = (array[None].swapaxes(1, 2) for array in (q, k, v))
                held[0, :, :, :n], held[1, :, :, :n] = k, v
                attended = b.prefill_attention(q, k, v, shaped[None].swapaxes(1, 2)).swapaxes(1, 2)
            else:
                held[0, :, :, -1], held[1, :, :, -1] = k, v
                attended = b.decode_attention(q, held[0], held[1], shaped)
            x = b.product(attended.reshape(n, self.queries), out, buffer["x"])
            hidden = b.product(b.add_norm(x, buffer["residual"], between[0], buffer["normed"]), up, buffer["up"])
            x = b.product(b.gate(hidden, buffer["gated"]), down, buffer["x"])
        last = b.add_norm(x, buffer["residual"], self.norm[0], buffer["normed"])
        last = last[-1:] if prefill else last
        return b.product(last, self.head, self.logits[: len(last)]).argmax(-1)

    def check(self, n: int = 32, allowed: float = 0.05) -> None:
        """Decoding the last token of a prompt on the cache of its prefill must give the logits of the prefill."""
        ids, cache = self.tokens(n), self.cache(1, n)
        self.step(ids, cache, prefill=True)
        prefilled = self.logits[0] + 0
        self.step(ids[-1:], cache, prefill=False)
        off = float(abs(self.logits[0] - prefilled).max() / abs(prefilled).max())
        if not off <= allowed:
            raise SystemExit(f"the decoder is wrong: logits of prefill and decode differ by {off:.1%}")
        print(f"decoder: logits of prefill and decode agree to {off:.1e} of the largest", flush=True)


def turn(x: Any, cos: Any, sin: Any) -> None:
    """Rotary positions, in place."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    first = a * cos - b * sin
    x[..., half:] = b * cos + a * sin
    x[..., :half] = first


def run_steps(backend: Backend, repeats: int) -> Steps:
    """Samples of every step, taken in turn, so that a disturbance meets all of them alike. [s]"""
    kind = "cpu" if backend.device.kind == "cpu" else "gpu"
    decoder = Decoder(backend, SIZES[kind], max(*PREFILLS[kind], *(b for b, _ in DECODES[kind])))
    decoder.check()
    found: dict[tuple[str, int, int], list[float]] = {}
    for turn_ in range(3):
        print(f"decoder: turn {turn_ + 1} of 3", flush=True)
        for n in PREFILLS[kind]:
            ids, cache = decoder.tokens(n), decoder.cache(1, n)
            sample = backend.sampler(lambda _, i=ids, c=cache: decoder.step(i, c, prefill=True), 1e-3)
            found.setdefault(("prefill", n, n), []).extend(sample() for _ in range(-(-repeats // 3)))
        for batch, context in DECODES[kind]:
            ids, cache = decoder.tokens(batch), decoder.cache(batch, context)
            sample = backend.sampler(lambda _, i=ids, c=cache: decoder.step(i, c, prefill=False), 1e-3)
            found.setdefault(("decode", batch, context), []).extend(sample() for _ in range(-(-repeats // 3)))
    return [(*key, samples) for key, samples in found.items()]


def write_steps(steps: Steps, file: Path) -> None:
    lines = [
        ",".join(map(str, (kind, n, context, *(f"{x:.6g}" for x in samples)))) for kind, n, context, samples in steps
    ]
    file.write_text("\n".join(["kind,n,context,samples_s", *lines]) + "\n", encoding="utf-8")


def read_steps(file: Path) -> Steps:
    rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [(kind, int(n), int(context), [float(x) for x in samples]) for kind, n, context, *samples in rows]


def backend_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--backend", choices=["numpy", "torch"], default="numpy")
    options.add_argument("--device", help="for torch: cuda or cpu")
    options.add_argument("--dtype", help="for torch: bfloat16 or float32")
    options.add_argument("--budget", type=float, default=60.0, help="seconds of calibration")
    options.add_argument("--repeats", type=int, default=9, help="samples of each step")


def backend_of(asked: argparse.Namespace) -> Backend:
    return NumpyBackend() if asked.backend == "numpy" else TorchBackend(asked.device, asked.dtype)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    backend_options(options)
    options.add_argument("--tables", type=Path, required=True, help="folder to write")
    options.add_argument("--steps", type=Path, required=True, help="CSV to write")
    asked = options.parse_args()
    backend = backend_of(asked)
    for file in write_tables(measure(backend, asked.budget, progress=print), asked.tables):
        print(f"wrote {file}", flush=True)
    write_steps(run_steps(backend, asked.repeats), asked.steps)
    print(f"wrote {asked.steps}, calls by {backend.mode}")


if __name__ == "__main__":
    main()
