"""Print a traffic mix that stands in for a trace: ``python benchmarks/derive_mixes.py TRACE > my-mix.toml``."""

import sys
from pathlib import Path

from simulator.traffic import read_trace
from simulator.traffic.derive import mix_toml

trace = read_trace(Path(sys.argv[1]))
print(mix_toml(trace, description="…", source=Path(sys.argv[1]).name), end="")
