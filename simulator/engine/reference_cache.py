"""The KV blocks of one scheduler of the reference engine: counted, or with a prefix cache as objects that are moved one by one.

Written from docs/engine-prefix-cache.md to be read; the comments name the rule a line carries out. All pools have the same methods.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from simulator.engine.block_hashes import BlockHashes
from simulator.roofline.kv_groups import KvGroups

if TYPE_CHECKING:
    from simulator.engine.reference_tiers import TierStack

NOBODY = -1
"""Id of a block that cannot be found."""


@dataclass(eq=False)
class Block:
    """One KV block: the id it was last published under, the group of layers it was taken for, and how many requests own it."""

    id: int = NOBODY
    group: int = 0
    owners: int = 0


Table = list[Block | None]
"""A request's blocks of one group, from its first token on; None where its window has left them."""


class CountedPool:
    """Blocks that nobody finds again: as many as there are is all there is to know."""

    def __init__(self, num_blocks: int, groups: KvGroups) -> None:
        self.groups = groups
        self.free = num_blocks
        self.tables: dict[int, int] = {}
        """Blocks by row."""
        self.passed: dict[int, int] = {}
        """Blocks of each windowed group that a request's window has left since its first token (W2)."""
        self.counts: dict[str, int] = {}

    def owned(self, row: int) -> int:
        """Blocks that a request owns."""
        return self.tables.get(row, 0)

    def lookup(self, row: int, longest: int) -> int:
        """No place is found."""
        del row, longest
        return 0

    def found(self, row: int, hits: int, passed: int) -> list[Table]:
        """Nothing is."""
        del row, hits, passed
        return []

    def ids_of(self, row: int) -> list[int]:
        """Nothing has an id."""
        del row
        return []

    def share(self, row: int, tables: list[Table], passed: int) -> None:
        """Let a request in that is admitted, where its window has left ``passed`` blocks (W3)."""
        del tables
        self.tables[row] = 0
        self.passed[row] = passed

    def take(self, row: int, places: int) -> None:
        """Give a request the blocks that it lacks for so many of each group."""
        count = self.groups.in_all(places, self.passed[row]) - self.tables[row]
        self.free -= count
        self.tables[row] += count

    def leave(self, passed: Sequence[tuple[int, int]]) -> None:
        """Take what windows have left from requests: rows, and blocks passed since their first token (W2)."""
        for row, places in passed:
            count = self.groups.windowed * (places - self.passed[row])
            self.free += count
            self.tables[row] -= count
            self.passed[row] = places

    def publish(self, row: int, full: int) -> None:
        """Nothing can be found."""

    def publish_at_end(self, row: int, full: int) -> None:
        """Nothing can be found."""

    def release(self, row: int) -> None:
        """Take a request's blocks away."""
        self.free += self.tables.pop(row, 0)
        self.passed.pop(row, None)

    def count_admission(self, known: int, hit_tokens: int) -> None:
        """Nothing is counted."""


class BlockPool:
    """All blocks of a scheduler, whoever owns them, and what each request owns.

    Requests are named by their rows. ``tables[row]`` are a request's blocks, group by group, the windowed ones first (W10).
    """

    def __init__(self, num_blocks: int, hashes: BlockHashes, groups: KvGroups, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.groups, self.block_size = groups, block_size
        self.queue = OrderedDict.fromkeys(Block() for _ in range(num_blocks))
        self.published: dict[tuple[int, int], list[Block]] = {}
        """Blocks by group and id, the oldest first (C3, W7)."""
        self.tables: dict[int, list[Table]] = {}
        self.passed: dict[int, int] = {}
        """Blocks of each windowed group that a request's window has left since its first token (W2)."""
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
        return sum(block is not None for table in self.tables.get(row, ()) for block in table)

    def ids_of(self, row: int) -> list[int]:
        """Ids of a request's blocks, from the first on, as far as they have some."""
        return self.ids[row]

    def lookup(self, row: int, longest: int) -> int:
        """Places, at most ``longest``, that a request need not compute (C5, W8)."""
        windowed = self.groups.windowed
        for hits in range(min(longest, len(self.ids[row])), 0, -1):
            first_seen = self.groups.passed(hits * self.block_size, self.block_size)
            needed = [range(first_seen if group < windowed else 0, hits) for group in range(self.groups.count)]
            if all((group, self.ids[row][i]) in self.published for group, places in enumerate(needed) for i in places):
                return hits
        return 0

    def found(self, row: int, hits: int, passed: int) -> list[Table]:
        """The blocks of the first ``hits`` places, but for those of windowed groups among the first ``passed`` (W9)."""
        return [
            [
                None if group < self.groups.windowed and place < passed else self.published[group, block_id][0]
                for place, block_id in enumerate(self.ids[row][:hits])
            ]
            for group in range(self.groups.count)
        ]

    def share(self, row: int, tables: list[Table], passed: int) -> None:
        """Let a request that is admitted own what it has found (C6); its window has left ``passed`` blocks (W3)."""
        for block in (block for table in tables for block in table if block is not None):
            if not block.owners:
                del self.queue[block]
            block.owners += 1
        self.tables[row] = [list(table) for table in tables]
        self.passed[row] = passed
        for table in self.tables[row][: self.groups.windowed]:
            table.extend([None] * (passed - len(table)))

    def take(self, row: int, places: int) -> None:
        """Give a request the blocks that it lacks for so many of each group."""
        for group, table in enumerate(self.tables[row]):
            while len(table) < places:
                table.append(self.new_block(group))

    def new_block(self, group: int) -> Block:
        """A block for a request, which evicts what it held (C2)."""
        block, _ = self.queue.popitem(last=False)
        if block.id != NOBODY:
            self.evict(block)
        block.owners, block.group = 1, group
        return block

    def leave(self, passed: Sequence[tuple[int, int]]) -> None:
        """Take what windows have left from requests: rows, and blocks passed since their first token (W2).

        First those that cannot be found, of all requests; then the others, the last first (W10).
        """
        for can_be_found in (False, True):
            for row, places in passed:
                for table in self.tables[row][: self.groups.windowed]:
                    for place in reversed(range(self.passed[row], places)):
                        block = table[place]
                        if block is not None and (block.id != NOBODY) == can_be_found:
                            table[place] = None
                            self.disown(block)
        self.passed.update(passed)

    def disown(self, block: Block) -> None:
        """Let a request no longer own a block, which joins the end of the queue if nobody else does (C7)."""
        block.owners -= 1
        if not block.owners:
            self.queue[block] = None

    def evict(self, block: Block) -> None:
        """Let a block no longer be found in HBM (C2, F2)."""
        if self.tiers is not None:
            self.tiers.keep(block.id)
        self.withdraw(block)
        self.counts["evicted_blocks"] += 1

    def withdraw(self, block: Block) -> None:
        """Let a block no longer be found."""
        same = self.published[block.group, block.id]
        same.remove(block)
        if not same:
            del self.published[block.group, block.id]
        block.id = NOBODY

    def publish(self, row: int, full: int) -> None:
        """Let the first ``full`` blocks of each group of a request be found, as far as it owns them and they have ids (C3, W7)."""
        for group, table in enumerate(self.tables.get(row, [])):
            for block, block_id in zip(table[:full], self.ids[row], strict=False):
                if block is not None and block.id == NOBODY:
                    block.id = block_id
                    self.published.setdefault((group, block_id), []).append(block)

    def release(self, row: int) -> None:
        """Take a request's blocks away, the last first, one group after the other (C7, W10)."""
        for table in self.tables.pop(row, []):
            for block in reversed(table):
                if block is not None:
                    self.disown(block)
        self.passed.pop(row, None)

    def publish_at_end(self, row: int, full: int) -> None:
        """Nothing: everything was published when it was scheduled (C3)."""

    def count_admission(self, known: int, hit_tokens: int) -> None:
        """Count a request that is admitted (C9)."""
        self.counts["cache_queried_tokens"] += known
        self.counts["cache_hit_tokens"] += hit_tokens
        self.counts["cache_hit_pairs"] += hit_tokens * (hit_tokens + 1) // 2


class RadixPool(BlockPool):
    """SGLang's tree of prefixes, in which an id is held by one block at most (rules D1 to D4); all layers lie in one group (W5)."""

    def __init__(self, num_blocks: int, hashes: BlockHashes, groups: KvGroups, block_size: int) -> None:
        super().__init__(num_blocks, hashes, groups, block_size)
        self.blank = list(self.queue)
        """Free blocks that hold nothing."""
        self.queue.clear()

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self.queue) + len(self.blank)

    def new_block(self, group: int) -> Block:
        """A block for a request, a blank one if there is one (D1)."""
        if not self.blank:
            block, _ = self.queue.popitem(last=False)
            self.evict(block)
            self.blank.append(block)
        block = self.blank.pop()
        block.owners, block.group = 1, group
        return block

    def publish(self, row: int, full: int) -> None:
        """Nothing yet: a block can be found once it is there (D2)."""

    def publish_at_end(self, row: int, full: int) -> None:
        """Let the first ``full`` blocks of a request be found; those already there replace the request's own (D2, D3)."""
        (table,) = self.tables[row]
        for place, (own, block_id) in enumerate(zip(table[:full], self.ids[row], strict=False)):
            if own is None or own.id != NOBODY:
                continue
            same = self.published.get((0, block_id))
            if same is None:
                own.id = block_id
                self.published[0, block_id] = [own]
                continue
            own.owners = 0
            self.blank.append(own)
            table[place] = same[0]
            self.queue.pop(same[0], None)
            same[0].owners += 1

    def release(self, row: int) -> None:
        """Take a request's blocks away, the last first (C7); what nobody can find becomes blank."""
        super().release(row)
        for block in [block for block in self.queue if block.id == NOBODY]:
            del self.queue[block]
            self.blank.append(block)
