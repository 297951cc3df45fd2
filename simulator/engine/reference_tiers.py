"""The reference engine's memory below HBM, written from docs/engine-kv-memory.md (rules F1 to F10)."""

from collections import OrderedDict
from collections.abc import Sequence

from simulator.engine.kv_memory import Tier


class TierStack:
    """What each tier holds, the most recently used last, and until when its link is busy."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tiers
        self.held: list[OrderedDict[int, None]] = [OrderedDict() for _ in tiers]
        self.link_free_s = [0.0] * len(tiers)
        self.counts: dict[str, float] = {"loads": 0, "loads_declined": 0}
        for i in range(len(tiers)):
            self.counts |= {f"tier{i}_stored_blocks": 0, f"tier{i}_loaded_blocks": 0}

    def keep(self, block_id: int, tier: int = 0) -> None:
        """Keep a block in ``tier``, where it was evicted from above or put; pass on the one it drives out (F2)."""
        if tier == len(self.tiers):
            return
        held = self.held[tier]
        if block_id in held:
            held.move_to_end(block_id)
            return
        held[block_id] = None
        self.counts[f"tier{tier}_stored_blocks"] += 1
        if len(held) > self.tiers[tier].blocks:
            self.keep(held.popitem(last=False)[0], tier + 1)

    def put(self, block_ids: Sequence[int]) -> None:
        """Write computed blocks through, into the tiers that want them (F9)."""
        for tier, settings in enumerate(self.tiers):
            for block_id in block_ids if settings.write_through else ():
                self.keep(block_id, tier)

    def warm(self, block_ids: Sequence[int]) -> None:
        """Let the last tier hold some blocks already (F10)."""
        held = self.held[-1]
        for block_id in reversed(block_ids):
            held[block_id] = None
            held.move_to_end(block_id)
            if len(held) > self.tiers[-1].blocks:
                held.popitem(last=False)

    def run(self, block_ids: Sequence[int]) -> list[tuple[int, int]]:
        """The leading ones of ``block_ids`` that some tier holds, each with the first tier that does (F3)."""
        found = []
        for block_id in block_ids:
            holders = [tier for tier, held in enumerate(self.held) if block_id in held]
            if not holders:
                break
            found.append((block_id, holders[0]))
        return found

    def ends_s(self, run: Sequence[tuple[int, int]], now_s: float) -> dict[int, float]:
        """When each tier's link would have carried its blocks of a run (F6)."""
        ends_s = {}
        for tier in {tier for _, tier in run}:
            blocks = sum(holder == tier for _, holder in run)
            ends_s[tier] = max(now_s, self.link_free_s[tier]) + blocks * self.tiers[tier].block_s
        return ends_s

    def ready_s(self, run: Sequence[tuple[int, int]], now_s: float) -> float:
        """When all blocks of a run would be there (F6)."""
        return max(end_s + self.tiers[tier].latency_s for tier, end_s in self.ends_s(run, now_s).items())

    def load(self, run: Sequence[tuple[int, int]], now_s: float) -> None:
        """Put a run on the links (F6, F7)."""
        for tier, end_s in self.ends_s(run, now_s).items():
            self.link_free_s[tier] = end_s
        for block_id, tier in reversed(run):
            self.held[tier].move_to_end(block_id)
            self.counts[f"tier{tier}_loaded_blocks"] += 1
        self.counts["loads"] += 1
