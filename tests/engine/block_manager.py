"""A plain manager of hashed KV blocks, independent of both engines: what their hits and a replayed log are checked against.

Blocks are numbers, the free queue is an ordered dictionary, and what can be found is a dictionary of dictionaries. Nothing
here knows time, budgets or requests that wait. Written from C1 to C9 of docs/engine-prefix-cache.md and W1 to W11 of docs/engine-kv-memory.md.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from simulator.engine.block_runs import ADMITS, FREES, GIVES, LEAVES, PUBLISHES, TAKES
from simulator.engine.records import Requests
from simulator.roofline.kv_groups import KvGroups


class Layers(NamedTuple):
    """Groups of layers, any number of either kind, with windows of ``window`` tokens, sliding or chunks: more than a ``KvGroups`` may be."""

    full: int = 1
    windowed: int = 0
    window: int = 0
    chunked: bool = False


ONE_GROUP = Layers()


class Manager:
    """All blocks, and what requests, named by their rows, own of them.

    A place of a prompt has a block in each group of layers, the windowed groups first.
    """

    def __init__(self, n_blocks: int, rows: Sequence[Sequence], block_size: int, layers: Layers | KvGroups = ONE_GROUP):
        self.rows, self.block_size, self.layers = rows, block_size, layers
        """``rows``: ids of each request's full blocks."""
        self.groups = range(layers.windowed + layers.full)
        self.free = OrderedDict.fromkeys(range(n_blocks))
        self.holds = {}
        self.found = {}
        """Blocks by group and id, each with when it was published: at a moment, those of one in the order in which their owners were admitted."""
        self.admitted = {}
        self.admissions = 0
        self.owners = [0] * n_blocks
        self.tables = {}
        """Of each row and group its published blocks, by place, and None where its window has left them."""
        self.loose = []
        """Blocks taken but not published, not yet known by whom and for which group: they are all alike."""
        self.evicted = 0

    # What is found

    def hits(self, row: int, known: int) -> int:
        """Places found (W8): full groups from the left give a bound, within which windowed ones are searched (as vLLM does)."""
        windowed, window, size = self.layers.windowed, self.layers.window, self.block_size
        ids = self.rows[row][: (known - 1) // size]
        bound = 0
        while bound < len(ids) and all((group, ids[bound]) in self.found for group in self.groups[windowed:]):
            bound += 1
        if not windowed:
            return bound
        there = [all((group, block_id) in self.found for group in self.groups[:windowed]) for block_id in ids[:bound]]
        return last_chunk(there, window, size) if self.layers.chunked else last_run(there, -(-(window - 1) // size))

    def gone(self, tokens: int) -> int:
        """Places of a windowed group before the window of the token that follows ``tokens`` (W2)."""
        if not self.layers.windowed:
            return 0
        past = tokens % self.layers.window if self.layers.chunked else min(tokens, self.layers.window - 1)
        return (tokens - past) // self.block_size

    # What happens

    def take(self, count: int) -> None:
        """Take blocks from the front of the queue; what they held is evicted (C2, W11)."""
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            key = self.holds.pop(block, None)
            if key is not None:
                del self.found[key][block]
                if not self.found[key]:
                    del self.found[key]
                self.evicted += 1
            self.owners[block] = 1
            self.loose.append(block)

    def admit(self, row: int, known: int, brought: int = 0) -> int:
        """Own what is found and not before the window (C6, W9); return the places found. ``brought``: tokens there without the cache."""
        hits = self.hits(row, known)
        gone = self.gone(max(hits * self.block_size, brought))
        self.tables[row] = []
        self.admitted[row] = self.admissions = self.admissions + 1
        for group in self.groups:
            first = gone if group < self.layers.windowed else 0
            same = [self.found[group, block_id] for block_id in self.rows[row][first:hits]]
            own = [min(blocks, key=blocks.get) for blocks in same]
            for block in own:
                if self.owners[block] == 0:
                    del self.free[block]
                self.owners[block] += 1
            self.tables[row].append([None] * first + own)
        return hits

    def fill(self, row: int, full: int, moment: int = 0) -> None:
        """Publish the first ``full`` places; the blocks that the row has none for yet come out of the loose ones (C3, W7)."""
        for group, table in enumerate(self.tables[row]):
            for block_id in self.rows[row][len(table) : full]:
                block = self.loose.pop()
                table.append(block)
                self.holds[block] = group, block_id
                self.found.setdefault((group, block_id), {})[block] = moment, self.admitted[row]

    def give(self, count: int) -> None:
        """Give back blocks that nobody can find."""
        for _ in range(count):
            self.disown(self.loose.pop())

    def leave(self, row: int, passed: int) -> None:
        """The row's windows have left the first ``passed`` places: what it owns of them goes back (W10). Loose ones are given by :meth:`give`."""
        for table in self.tables[row][: self.layers.windowed]:
            for block in reversed(table[:passed]):
                if block is not None:
                    self.disown(block)
            table[:passed] = [None] * passed

    def release(self, row: int, owned: int, passed: int = 0) -> None:
        """Take all blocks of a row that owns so many, none of them in the first ``passed`` places of windowed groups (C7, W10)."""
        places, rest = divmod(owned + self.layers.windowed * passed, len(self.groups))
        assert rest == 0
        for group, table in enumerate(self.tables.pop(row)):
            gone = passed if group < self.layers.windowed else 0
            assert not any(block is not None for block in table[:gone])
            self.give(places - max(len(table), gone))
            for block in reversed(table):
                if block is not None:
                    self.disown(block)

    def disown(self, block: int) -> None:
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free[block] = None

    # Whole requests

    def serve(self, row: int, prompt: int, output: int, step_tokens: int, brought: int = 0) -> int:
        """Serve a request when nobody else is there, in steps of ``step_tokens`` at most; return the places found."""
        size, windowed = self.block_size, self.layers.windowed
        hits = self.admit(row, prompt, brought)
        computed = max(hits * size, brought)
        passed = self.gone(computed)
        owned = sum(block is not None for table in self.tables[row] for block in table)
        last = prompt + output - 1
        while computed < last:
            # Without windows nothing goes back on the way, and all is taken and published in the same order however it is cut.
            computed = min(computed + step_tokens, max(prompt, computed + 1)) if windowed else last
            needed = len(self.groups) * -(-computed // size) - windowed * passed
            self.take(needed - owned)
            self.fill(row, computed // size)
            left, passed = passed, self.gone(computed)
            owned = needed - windowed * (passed - left)
            if passed > left:
                found = [
                    block for table in self.tables[row][:windowed] for block in table[:passed] if block is not None
                ]
                self.give(needed - owned - len(found))
                self.leave(row, passed)
        self.release(row, owned, passed)
        return hits

    def follow(self, log: Iterable[Sequence[int]], brought: Iterable[int]) -> int:
        """Do what an engine's log says, in which each admission finds what is found here; return how many places were found.

        Entries are a kind, a row and two amounts; ``brought`` is of each admission, in their order. Of several steps at once an engine may give
        before it has taken: blocks are taken at the front of the queue and given at its end, so only which are free in between differs. What
        a request publishes as it stops, nothing of places that its windows have left until then (P6).
        """
        found, early, brought = 0, 0, iter(brought)
        for (kind, row, amount, more), following in pairwise([*log, (None, None, 0, 0)]):
            if kind == TAKES:
                self.take(max(0, amount - early))
                early = max(0, early - amount)
            elif kind == ADMITS:
                assert early == 0
                assert self.admit(row, more, next(brought)) == amount
                found += amount
            elif kind == PUBLISHES:
                if following[:2] == (FREES, row):
                    self.leave(row, following[3])
                self.fill(row, amount, more)
            elif kind == LEAVES:
                self.leave(row, amount)
            elif kind == GIVES:
                for _ in range(amount):
                    if not self.loose:
                        self.take(1)
                        early += 1
                    self.give(1)
            else:
                assert kind == FREES
                self.release(row, amount, more)
        return found


def last_run(there: Sequence[bool], length: int) -> int:
    """End of the last run of ``length`` places that are there, of those from the first on if no run is as long."""
    run = 0
    for place in reversed(range(len(there))):
        if run == length:
            return place + 1 + run
        run = run + 1 if there[place] else 0
    return run


def last_chunk(there: Sequence[bool], window: int, block_size: int) -> int:
    """How far places are there from the start of the chunk of the token after them all on; of the chunk before where that starts within a place."""
    bound = len(there)
    while True:
        start = bound * block_size // window * window
        place = start // block_size
        while place < bound and there[place]:
            place += 1
        if place * block_size >= start:
            return place
        bound = place


def ids_of_blocks(requests: Requests, block_size: int, *, outputs: bool = False) -> list[list]:
    """Ids of each request's full blocks; an id of a larger unit is cut into several, of smaller units a block takes its last one's."""
    hashes, rows = requests.hashes, []
    unit = hashes.block_tokens
    for row, (prompt, output) in enumerate(zip(requests.prompt_tokens, requests.output_tokens, strict=True)):
        ids = hashes.ids[hashes.offsets[row] : hashes.offsets[row + 1]].tolist()
        tokens = min(len(ids) * unit, int(prompt + output - 1 if outputs and hashes.covers_output else prompt))
        lasts = range(block_size - 1, tokens, block_size)
        rows.append([(ids[last // unit], last % unit // block_size * (unit > block_size)) for last in lasts])
    return rows
