"""Speed of the roofline over many points: compile one deployment, sweep a grid, rank every place for a model.

    python benchmarks/sweep.py [--repeats 20] [--max-chips 64] [--context 8192] [--top 10]

The ranking takes every slice of the catalogue up to --max-chips (nodes joined by a network included) times every
precision below: all that can be sharded and hold one sequence are priced at the largest batch that fits; the best are
compiled and swept over the batch. Median and range of the repeats; the ranking runs a quarter as often.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from timing import measure

from simulator.catalog.chips import chip_names, load_chip
from simulator.catalog.models import load_model
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit
from simulator.roofline.precision import parse_precision
from simulator.roofline.sweep import decode_curves, max_batch, sweep_decode

PRECISIONS = ("bf16", "fp8kv8", "int8kv8", "w8a16kv8", "w4a16", "w4a16kv8", "fp4kv8")
SURVIVORS = 20


def slices_up_to(most: int) -> Iterator[str]:
    """Every slice of at most ``most`` chips: of one scale-up domain, and whole domains joined."""
    for name in chip_names():
        specs = legal_slices(name)
        yield from (spec for spec in specs if resolve_slice(spec).n_chips <= most)
        largest = resolve_slice(specs[-1])
        if load_chip(name).scale_out is not None and largest.domains[0].kind != "torus":
            yield from (f"{name}:{nodes}x{largest.n_chips}" for nodes in range(2, most // largest.n_chips + 1))


def rank(model: str, most: int, context: int) -> tuple[dict[str, int], list[tuple[float, Deployment, int]]]:
    """Counts of what was tried, and (tokens/s/chip, deployment, batch), best first."""
    architecture, precisions = load_model(model), [parse_precision(p) for p in PRECISIONS]
    counts = {"slices": 0, "tried": 0, "legal": 0, "fit": 0}
    found = []
    for spec in slices_up_to(most):
        slice_ = resolve_slice(spec)
        counts["slices"] += 1
        for precision in precisions:
            counts["tried"] += 1
            try:
                d = Deployment(architecture, slice_, precision)
                batch = min(int(max_batch(memory_fit(d), context)), d.max_num_seqs)
                counts["legal"] += 1
                if batch:
                    found.append((step_report(d, decode=batch, context=context).tokens_per_s_per_chip, d, batch))
                    counts["fit"] += 1
            except ChipsecondsError:  # a sharding this model does not have, or a rate nobody published
                continue
    found.sort(key=lambda f: -f[0])
    for _, d, _ in found[:SURVIVORS]:
        decode_curves(d, [context])
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--max-chips", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args()
    d = Deployment(load_model("llama-3-70b"), resolve_slice("tpu-v5e:4x4"), parse_precision("w8a16kv8"))
    cost, fit = compile_step_cost(d), memory_fit(d)
    batch, context = np.arange(1, 251)[:, None], np.arange(1, 401) * 256
    measure("compile_step_cost, 8,192 tokens and 256 rows", lambda: compile_step_cost(d), args.repeats)
    measure(
        f"sweep_decode, {batch.size * context.size:,} points",
        lambda: sweep_decode(cost, fit, batch, context),
        args.repeats,
    )
    what = f"rank llama-3-70b, slices ≤ {args.max_chips} chips × {len(PRECISIONS)} precisions"
    measure(what, lambda: rank("llama-3-70b", args.max_chips, args.context), max(3, args.repeats // 4))
    counts, found = rank("llama-3-70b", args.max_chips, args.context)
    print("  " + ", ".join(f"{n:,} {name}" for name, n in counts.items()) + f"; {SURVIVORS} compiled and swept")
    print(f"\nmost tokens/s/chip at context {args.context:,}")
    for rate, best, size in found[: args.top]:
        print(f"  {best.slice.spec:<18} {best.precision.name:<10} batch {size:>3}  {rate:8,.0f}")


if __name__ == "__main__":
    main()
