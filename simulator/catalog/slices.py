"""Slices: chips of one kind with an interconnect, and the strings that name them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinkDomain:
    """One level of an interconnect.

    Attributes
    ----------
    kind
        ``torus``: point-to-point links along axes. ``switched``: every chip reaches every other at full bandwidth
        (NVSwitch, a NIC network). ``full_mesh``: one link per pair (AMD). ``pcie``: through the host.
    dims, wraps
        Axis lengths, and whether each axis closes into a ring. One axis unless ``kind == "torus"``.
    bandwidth_bytes_per_s
        One direction. Per link for ``torus`` and ``full_mesh``; per chip, all links together, otherwise.
    latency_s
        Per hop for ``torus``; per message otherwise.
    """

    kind: Literal["torus", "switched", "full_mesh", "pcie"]
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]
    bandwidth_bytes_per_s: float
    latency_s: float

    @property
    def size(self) -> int:
        """Chips (or, for outer levels, groups) joined by this level."""
        n = 1
        for d in self.dims:
            n *= d
        return n
