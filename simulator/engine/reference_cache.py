"""The KV blocks of one scheduler of the reference engine: counted, or with a prefix cache as objects that are moved one by one.

Written from docs/engine-prefix-cache.md to be read; the comments name the rule a line carries out. All pools have the same methods.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from simulator.engine.block_hashes import BlockHashes

if TYPE_CHECKING:
    from simulator.engine.reference_tiers import TierStack

NOBODY = -1
"""Id of a block that cannot be found."""


@dataclass(eq=False)
class Block:
    """One KV block: the id it was last published under, and how many requests own it."""

    id: int = NOBODY
    owners: int = 0


class CountedPool:
    """Blocks that nobody finds again: as many as there are is all there is to know."""

    def __init__(self, num_blocks: int) -> None:
        self.free = num_blocks
        self.tables: dict[int, int] = {}
        """Blocks by row."""
        self.counts: dict[str, int] = {}

    def owned(self, row: int) -> int:
        """Blocks that a request owns."""
        return self.tables.get(row, 0)

    def lookup(self, row: int, longest: int) -> list[Block]:
        """Nothing."""
        del row, longest
        return []

    def ids_of(self, row: int) -> list[int]:
        """Nothing has an id."""
        del row
        return []

    def share(self, row: int, hits: list[Block]) -> None:
        """Let a request in that is admitted."""
        del hits
        self.tables[row] = 0

    def take(self, row: int, count: int) -> None:
        """Give a request new blocks."""
        self.free -= count
        self.tables[row] += count

    def give_back(self, row: int, count: int) -> None:
        """Take blocks from a request whose window has left them."""
        self.free += count
        self.tables[row] -= count

    def publish(self, row: int, full: int) -> None:
        """Nothing can be found."""

    def publish_at_end(self, row: int, full: int) -> None:
        """Nothing can be found."""

    def release(self, row: int) -> None:
        """Take a request's blocks away."""
        self.free += self.tables.pop(row, 0)

    def count_admission(self, known: int, hit_tokens: int) -> None:
        """Nothing is counted."""


class BlockPool:
    """All blocks of a scheduler, whoever owns them, and what each request owns.

    Requests are named by their rows. ``tables[row]`` are a request's blocks from the first token on.
    """

    def __init__(self, num_blocks: int, hashes: BlockHashes) -> None:
        self.num_blocks = num_blocks
        self.queue = OrderedDict.fromkeys(Block() for _ in range(num_blocks))
        self.published: dict[int, list[Block]] = {}
        """Blocks by id, the oldest first (C3)."""
        self.tables: dict[int, list[Block]] = {}
        self.ids: list[list[int]] = [
            hashes.ids[start:stop].tolist() for start, stop in pairwise(hashes.offsets.tolist())
        ]
        self.counts = dict.fromkeys(
            ("cache_queried_tokens", "cache_hit_tokens", "cache_hit_pairs", "evicted_blocks"), 0
        )
        self.tiers: TierStack | None = None
        """Where evicted blocks go."""

    @property
    def free(self) -> int:
        """Blocks in the queue."""
        return len(self.queue)

    def owned(self, row: int) -> int:
        """Blocks that a request owns."""
        return len(self.tables.get(row, ()))

    def ids_of(self, row: int) -> list[int]:
        """Ids of a request's blocks, from the first on, as far as they have some."""
        return self.ids[row]

    def lookup(self, row: int, longest: int) -> list[Block]:
        """The blocks, at most ``longest``, that a request need not compute (C5)."""
        hits: list[Block] = []
        for block_id in self.ids[row][:longest]:
            found = self.published.get(block_id)
            if not found:
                break
            hits.append(found[0])
        return hits

    def share(self, row: int, hits: list[Block]) -> None:
        """Let a request that is admitted own its hits (C6)."""
        for block in hits:
            if not block.owners:
                del self.queue[block]
            block.owners += 1
        self.tables[row] = list(hits)

    def take(self, row: int, count: int) -> None:
        """Give a request new blocks, evicting what they held (C2)."""
        for _ in range(count):
            block, _ = self.queue.popitem(last=False)
            if block.id != NOBODY:
                self.evict(block)
            block.owners = 1
            self.tables[row].append(block)

    def give_back(self, row: int, count: int) -> None:
        """Cannot be: windows that give blocks back are refused beside a prefix cache before a run begins (W5, ``refusals.LASTING``)."""
        raise AssertionError(
            f"request {row}: {count} blocks to give back from a prefix cache, which check_mixture refuses"
        )

    def evict(self, block: Block) -> None:
        """Let a block no longer be found in HBM (C2, F2)."""
        if self.tiers is not None:
            self.tiers.keep(block.id)
        self.withdraw(block)
        self.counts["evicted_blocks"] += 1

    def withdraw(self, block: Block) -> None:
        """Let a block no longer be found."""
        same = self.published[block.id]
        same.remove(block)
        if not same:
            del self.published[block.id]
        block.id = NOBODY

    def publish(self, row: int, full: int) -> None:
        """Let the first ``full`` blocks of a request be found, as far as they have ids (C3)."""
        for block, block_id in zip(self.tables.get(row, [])[:full], self.ids[row], strict=False):
            if block.id == NOBODY:
                block.id = block_id
                self.published.setdefault(block_id, []).append(block)

    def release(self, row: int) -> None:
        """Take a request's blocks away, the last first (C7)."""
        for block in reversed(self.tables.pop(row, [])):
            block.owners -= 1
            if not block.owners:
                self.queue[block] = None

    def publish_at_end(self, row: int, full: int) -> None:
        """Nothing: everything was published when it was scheduled (C3)."""

    def count_admission(self, known: int, hit_tokens: int) -> None:
        """Count a request that is admitted (C9)."""
        self.counts["cache_queried_tokens"] += known
        self.counts["cache_hit_tokens"] += hit_tokens
        self.counts["cache_hit_pairs"] += hit_tokens * (hit_tokens + 1) // 2


class RadixPool(BlockPool):
    """SGLang's tree of prefixes, in which an id is held by one block at most (rules D1 to D4)."""

    def __init__(self, num_blocks: int, hashes: BlockHashes) -> None:
        super().__init__(num_blocks, hashes)
        self.blank = list(self.queue)
        """Free blocks that hold nothing."""
        self.queue.clear()

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self.queue) + len(self.blank)

    def take(self, row: int, count: int) -> None:
        """Give a request new blocks, blank ones first (D1)."""
        for _ in range(count):
            if not self.blank:
                block, _ = self.queue.popitem(last=False)
                self.evict(block)
                self.blank.append(block)
            block = self.blank.pop()
            block.owners = 1
            self.tables[row].append(block)

    def publish(self, row: int, full: int) -> None:
        """Nothing yet: a block can be found once it is there (D2)."""

    def publish_at_end(self, row: int, full: int) -> None:
        """Let the first ``full`` blocks of a request be found; those already there replace the request's own (D2, D3)."""
        table = self.tables[row]
        for place, block_id in enumerate(self.ids[row][:full]):
            if table[place].id != NOBODY:
                continue
            found = self.published.get(block_id)
            if found is None:
                table[place].id = block_id
                self.published[block_id] = [table[place]]
                continue
            table[place].owners = 0
            self.blank.append(table[place])
            table[place] = found[0]
            self.queue.pop(found[0], None)
            found[0].owners += 1

    def release(self, row: int) -> None:
        """Take a request's blocks away, the last first (C7); what nobody can find becomes blank."""
        super().release(row)
        for block in [block for block in self.queue if block.id == NOBODY]:
            del self.queue[block]
            self.blank.append(block)
