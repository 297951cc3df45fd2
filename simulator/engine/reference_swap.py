"""The reference engine's host memory for preempted requests, written from docs/engine-kv-memory.md (rules E1 to E4)."""

from simulator.engine.kv_memory import HostSwap


class HostPool:
    """What of which request is in host memory, and the copies of the step being scheduled. Requests are named by their rows.

    Copies wait for the next step of their scheduler that has tokens (M18).
    """

    def __init__(self, settings: HostSwap) -> None:
        self.settings = settings
        self.held: dict[int, int] = {}
        """Blocks in host memory."""
        self.copies: list[tuple[int, int]] = []
        """Rows and blocks that the step copies, out or in."""
        names = ("swap_out_blocks", "swap_in_blocks", "swap_fallbacks", "max_host_blocks")
        self.counts: dict[str, float] = dict.fromkeys(names, 0) | {"swap_s": 0.0}

    def copy_out(self, row: int, blocks: int) -> bool:
        """Keep a preempted request's blocks, if there is room; return whether there was (E1)."""
        if sum(self.held.values()) + blocks > self.settings.blocks:
            self.counts["swap_fallbacks"] += 1
            return False
        self.held[row] = blocks
        if blocks:
            self.copies.append((row, blocks))
        self.counts["swap_out_blocks"] += blocks
        self.counts["max_host_blocks"] = max(self.counts["max_host_blocks"], sum(self.held.values()))
        return True

    def copy_in(self, row: int, blocks: int) -> None:
        """Bring a request's blocks back that it did not find in the prefix cache, and free host memory of all (E2)."""
        del self.held[row]
        if blocks:
            self.copies.append((row, blocks))
        self.counts["swap_in_blocks"] += blocks

    def forget(self, row: int) -> None:
        """Free the host memory of a request whose client has left (M13)."""
        self.held.pop(row, None)

    def delay_s(self, device_s: float) -> float:
        """Time by which the copies lengthen a step that would take the device ``device_s`` (E3)."""
        copying_s = sum(blocks for _, blocks in self.copies) * self.settings.block_s
        return max(0.0, copying_s - device_s) if self.settings.overlapped else copying_s

    def shares(self, delay_s: float) -> list[tuple[int, float]]:
        """Rows, and what they pay of a delay (E4)."""
        total = sum(blocks for _, blocks in self.copies)
        self.counts["swap_s"] += delay_s
        return [(row, delay_s * blocks / total) for row, blocks in self.copies]
