"""A plain manager of hashed KV blocks, independent of both engines: what a replayed log is checked against.

Blocks are numbers, the free queue is an ordered dictionary, and what can be found is a dictionary of ordered dictionaries. Nothing
here knows time, budgets or requests that wait.
"""

from collections import OrderedDict


class Manager:
    def __init__(self, n_blocks, rows):
        self.rows = rows
        """Ids of each request's full blocks."""
        self.free = OrderedDict.fromkeys(range(n_blocks))
        self.holds = {}
        self.found = {}
        self.owners = [0] * n_blocks
        self.tables = {}
        self.loose = []
        """Blocks taken for decoding, not yet known by whom: they are all alike."""
        self.evicted = 0

    def hits(self, row, longest):
        found = []
        for block_id in self.rows[row][:longest]:
            if block_id not in self.found:
                break
            found.append(next(iter(self.found[block_id])))
        return found

    def take(self, count):
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            block_id = self.holds.pop(block, None)
            if block_id is not None:
                del self.found[block_id][block]
                if not self.found[block_id]:
                    del self.found[block_id]
                self.evicted += 1
            self.owners[block] = 1
            taken.append(block)
        return taken

    def admit(self, row, known, block_size):
        """Own what is found; return how much that is."""
        table = self.hits(row, (known - 1) // block_size)
        for block in table:
            if self.owners[block] == 0:
                del self.free[block]
            self.owners[block] += 1
        self.tables[row] = table
        return len(table)

    def fill(self, row, full):
        """Publish the first ``full`` blocks; those it has none for yet come out of the loose ones."""
        table = self.tables[row]
        for place, block_id in enumerate(self.rows[row][:full]):
            if place == len(table):
                table.append(self.loose.pop())
            if table[place] not in self.holds:
                self.holds[table[place]] = block_id
                self.found.setdefault(block_id, OrderedDict())[table[place]] = None

    def release(self, row, owned):
        table = self.tables.pop(row)
        table += [self.loose.pop() for _ in range(owned - len(table))]
        for block in reversed(table):
            self.owners[block] -= 1
            if self.owners[block] == 0:
                self.free[block] = None
