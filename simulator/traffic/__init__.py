"""Traffic: when requests arrive and how long they are.

:class:`TrafficSpec` is the ``[traffic]`` table of a scenario, :func:`build_stream` makes the requests of it, and
:func:`read_trace` reads a file of them. See ``docs/traffic.md``.
"""

from simulator.traffic.blocks import StreamBlocks, stream_blocks
from simulator.traffic.readers import Trace, read_trace
from simulator.traffic.spec import Mix, TrafficSpec, build_stream, load_mix, resolve
from simulator.traffic.stream import Stream

__all__ = [
    "Mix",
    "Stream",
    "StreamBlocks",
    "Trace",
    "TrafficSpec",
    "build_stream",
    "load_mix",
    "read_trace",
    "resolve",
    "stream_blocks",
]
