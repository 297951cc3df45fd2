"""Memory below HBM that a replica may keep KV blocks in: what is said about it, and what it costs."""

from dataclasses import dataclass
from math import inf, isfinite

from simulator.errors import InputError

#: Whether blocks held below HBM are loaded or computed again.
LOAD_POLICIES = ("always", "never", "cheaper")


def _check_time(name: str, value_s: float) -> None:
    if not 0 <= value_s < inf:
        raise InputError(f"{name} = {value_s}: must be finite and not negative")


@dataclass(frozen=True)
class HostSwap:
    """Host memory that preempted requests are copied to, instead of being computed again.

    Attributes
    ----------
    blocks
        KV blocks of all chips that it holds.
    block_s
        time to copy one block, out or in, over all chips' links to their hosts. [s]
    overlapped
        whether copies run beside the step's computation, so that only what they take longer than it is waited for.
    """

    blocks: int
    block_s: float = 0.0
    overlapped: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.blocks < 0:
            raise InputError(f"engine.host_blocks = {self.blocks}: must not be negative")
        _check_time("time to swap one block", self.block_s)


@dataclass(frozen=True)
class Tier:
    """A level of memory below HBM that keeps evicted blocks of the prefix cache.

    Attributes
    ----------
    blocks
        KV blocks that it holds.
    block_s
        time to load one block on its link: bytes of a block ÷ bandwidth. [s]
    latency_s
        time from the request of a load to its first byte. [s]
    name
        for results.
    write_through
        whether blocks of prompts are put into it when they are computed, not only when those above evict them (rule F9).
    """

    blocks: int
    block_s: float
    latency_s: float = 0.0
    name: str = "host"
    write_through: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.blocks < 1:
            raise InputError(f"engine.cache_tiers {self.name!r}: {self.blocks} blocks: must be at least 1")
        _check_time(f"engine.cache_tiers {self.name!r}: time to load one block", self.block_s)
        _check_time(f"engine.cache_tiers {self.name!r}: latency_s", self.latency_s)
        if not isfinite(self.block_s):
            raise InputError(f"engine.cache_tiers {self.name!r}: its bandwidth must be positive")
