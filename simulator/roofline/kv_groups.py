"""Groups of layers whose KV blocks are handed out together, as vLLM's hybrid KV cache manager forms them."""

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError


@dataclass(frozen=True)
class KvGroups:
    """How many KV blocks the tokens of one sequence take.

    The layers of a model lie in groups of equally many; a block holds ``block_size`` tokens of the layers of one group, and all groups share one
    pool of blocks. Layers with a window give the blocks before it back (rules W1 to W5 of ``docs/engine-kv-memory.md``).

    Attributes
    ----------
    full
        groups of layers that keep all keys.
    windowed
        groups of layers that keep a window's; 0: none, all layers lie in one group.
    window
        keys that windowed layers see at most. [tokens]
    chunked
        whether windows are chunks of the context instead of sliding.
    """

    full: int = 1
    windowed: int = 0
    window: int = 0
    chunked: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.full < 0 or self.windowed < 0 or (self.windowed == 0 and self.full != 1):
            raise InputError(f"kv_groups: {self.full} full and {self.windowed} windowed: without windows there is one")
        if (self.window < 1) == (self.windowed > 0):
            raise InputError(f"kv_groups: {self.windowed} windowed groups with a window of {self.window} tokens")

    @property
    def count(self) -> int:
        """Groups in all."""
        return self.full + self.windowed

    def in_all(self, places: int, passed: int) -> int:
        """Blocks of all groups for so many places of each, of which a window has left the first ``passed`` (W1, W3)."""
        return self.count * places - self.windowed * passed

    def passed(self, tokens: int, block_size: int) -> int:
        """Blocks of each windowed group that the window has left once ``tokens`` tokens are computed (W2).

        >>> KvGroups(1, 1, window=128).passed(160, 16), KvGroups(1, 1, window=128, chunked=True).passed(160, 16)
        (2, 8)
        """
        if not self.windowed:
            return 0
        first_seen = tokens // self.window * self.window if self.chunked else max(0, tokens + 1 - self.window)
        return first_seen // block_size

    def blocks(self, tokens: ArrayLike, block_size: int) -> NDArray[np.int64]:
        """Blocks that a sequence owns between steps once ``tokens`` tokens are computed (W2). [tokens' shape]"""
        held = np.asarray(tokens, dtype=np.int64)
        return self._owned(held, held, block_size)

    def blocks_in_step(self, tokens: ArrayLike, block_size: int) -> NDArray[np.int64]:
        """Blocks that a sequence owns in the decode step that computes its last of ``tokens`` tokens (W3). [tokens' shape]"""
        held = np.asarray(tokens, dtype=np.int64)
        return self._owned(held - 1, held, block_size)

    def _owned(self, before: NDArray[np.int64], held: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
        if not self.windowed:
            return np.asarray(-(-held // block_size))
        passed = before // self.window * self.window if self.chunked else np.maximum(0, before - self.window + 1)
        return np.asarray(self.count * -(-held // block_size) - self.windowed * (passed // block_size))

    def most_blocks(self, tokens: ArrayLike, block_size: int, step_tokens: int) -> NDArray[np.int64]:
        """Blocks that a sequence owns at most on its way to ``tokens`` tokens, in steps of ``step_tokens`` at most (W4). [tokens' shape]"""
        blocks = -(-np.asarray(tokens, dtype=np.int64) // block_size)
        if not self.windowed:
            return np.asarray(blocks)
        kept = np.minimum(blocks, self.most_in_window(block_size, step_tokens))
        return np.asarray(self.full * blocks + self.windowed * kept)

    def longest(self, num_blocks: int, block_size: int, step_tokens: int) -> float:
        """Tokens of the longest sequence that ``num_blocks`` blocks hold whatever its chunks; inf where only windows are kept and fit."""
        pages = num_blocks // self.count
        bound = self.most_in_window(block_size, step_tokens)
        if self.windowed and pages >= bound:
            if not self.full:
                return inf
            pages = (num_blocks - self.windowed * bound) // self.full
        return float(pages * block_size)

    def tokens_held(self, num_blocks: int, block_size: int) -> float:
        """Tokens, windows' and others', of all sequences together that ``num_blocks`` blocks may hold at most; inf without full layers."""
        return num_blocks * block_size / self.full if self.full else inf

    def most_in_window(self, block_size: int, step_tokens: int) -> int:
        """Blocks of one windowed group that a sequence owns at most; 0 without windows."""
        return -(-(self.window - 1 + step_tokens) // block_size) + 1 if self.windowed else 0
