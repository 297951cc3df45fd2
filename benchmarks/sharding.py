"""Speed of the search over shardings: every split of every slice for two models in several precisions.

    python benchmarks/sharding.py [--max-chips 64] [--batch 64] [--context 4096]

Slices are those of one scale-up domain, and 2, 4 or 8 whole ones joined by a network. One run on one core; the first line is
the time of one search. Times are the processor's, which other work on the machine stretches less than the clock's.
"""

import argparse
import time

from simulator.catalog.chips import chip_names
from simulator.catalog.models import load_model
from simulator.catalog.slices import Slice, legal_slices, resolve_slice
from simulator.errors import ChipsecondsError
from simulator.roofline.precision import parse_precision
from simulator.roofline.search import search

MODELS = ("llama-3-70b", "deepseek-v3")
PRECISIONS = ("bf16", "fp8", "w8a16kv8", "w4a16")


def slices(most: int) -> list[Slice]:
    """Slices of at most ``most`` chips."""
    found = []
    for name in chip_names():
        inside = [resolve_slice(spec) for spec in legal_slices(name)]
        found += [s for s in inside if s.n_chips <= most]
        for nodes in (2, 4, 8):
            size = inside[-1].n_chips
            if nodes * size <= most and inside[-1].domains[0].kind != "torus" and inside[-1].chip.scale_out:
                found.append(resolve_slice(f"{name}:{nodes}x{size}"))
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-chips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    args = parser.parse_args()
    models, precisions = [load_model(m) for m in MODELS], [parse_precision(p) for p in PRECISIONS]
    places = slices(args.max_chips)
    searches = tried = fit = refused = 0
    start, clock = time.process_time(), time.perf_counter()
    for slice_ in places:
        for model in models:
            for precision in precisions:
                try:
                    found = search(model, slice_, decode=args.batch, context=args.context, precision=precision)
                except ChipsecondsError:  # a format the chip cannot compute
                    refused += 1
                    continue
                searches += 1
                tried += len(found.tried)
                fit += sum(t.report is not None for t in found.tried)
    took, clock = time.process_time() - start, time.perf_counter() - clock
    print(f"{1e3 * took / max(searches, 1):.1f} ms per search, {1e3 * took / max(tried, 1):.2f} ms per sharding")
    print(
        f"{len(places)} slices, {searches} searches ({refused} refused), {tried} shardings, {fit} priced: {took:.1f} s, "
        f"{clock:.1f} s by the clock"
    )


if __name__ == "__main__":
    main()
