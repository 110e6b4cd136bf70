"""A guard over plain numbers: applies plan records literally and checks every rule they must keep.

A page's content is an integer, 0 means a zero page.  The model knows nothing of
how plans are made; it follows docs/architecture.md.
"""

from __future__ import annotations

import numpy as np

from gpuksm import wire
from gpuksm.hashing.protocol import KIND_NORMAL, KIND_ZERO
from gpuksm.scan.nodes import apart, no_nodes, parted
from gpuksm.scan.planner import make_plan
from gpuksm.scan.requests import EXTENT_DTYPE, PLAN_DTYPE, requests
from gpuksm.scan.runs import Pages
from gpuksm.scan.trees import stable_tree

PAGE = 4096


def digest_of(content):
    """Any function without collisions; the order of digests must not be that of contents."""
    return (content * 0x9E3779B97F4A7C15) % (1 << 64)


class ModelGuard:
    """`processes`: for each target its regions, each a list of contents.

    `node_of(target, page)` tells the NUMA node of the page with that number in its target; without it
    nodes make no difference.  Merging over nodes is an error then, whatever is equal.
    """

    def __init__(self, processes, node_of=None):
        self.node_of = node_of
        self.memory = []  # per target {address: content} of pages that are still its own
        self.region_starts = []
        self.merged = []  # per target {address: slot}
        self.zeroed = []
        self.store = {}
        self.extents = []  # (first slot, slots, node + 1 or 0)
        self.next_slot = 7
        for regions in processes:
            self.add(regions)

    def add(self, regions):
        memory, starts, address = {}, [], 0x10000
        for region in regions:
            starts.append(address)
            for content in region:
                memory[address] = content
                address += PAGE
            address += PAGE * (len(region) % 2)  # some regions touch, some do not
        self.memory.append(memory)
        self.region_starts.append(set(starts))
        self.merged.append({})
        self.zeroed.append(set())

    def node(self, target, address):
        """Node + 1, as plans have it."""
        return self.node_of(target, (address - 0x10000) // PAGE) + 1 if self.node_of else 0

    def pages(self):
        rows = []
        for target, memory in enumerate(self.memory):
            before = None
            for address in sorted(memory):
                joins = before == address - PAGE and address not in self.region_starts[target]
                rows.append((target, address, memory[address], joins))
                before = address
        content = np.array([row[2] for row in rows], object)
        node = no_nodes()
        if self.node_of:
            node = np.array([self.node(*row[:2]) if row[2] else 0 for row in rows], np.uint16)
        return Pages(
            np.array([row[0] for row in rows], np.uint32),
            np.array([row[1] for row in rows], np.uint64),
            apart(np.array([digest_of(c) for c in content], np.uint64), node),
            np.array([KIND_ZERO if c == 0 else KIND_NORMAL for c in content], np.uint8),
            parted(np.array([row[3] for row in rows], np.bool_), node),
            np.zeros(len(rows), np.bool_),
            node,
        )

    def slots(self):
        words = [word for first, count, node in self.extents for word in (first, count | node << 32)]
        words += [
            digest_of(self.store[s]) for first, count, _ in self.extents for s in range(first, first + count)
        ]
        return stable_tree(len(self.extents), np.array(words, "<u8").tobytes(), self.node_of is not None)

    def round(self, budget=1000):
        """Plan and commit one round; returns the plan."""
        budgets = np.full(len(self.memory), budget, np.int64)
        before = [self.vmas(target) for target in range(len(self.memory))]
        plan = make_plan(self.pages(), self.slots(), budgets)
        for request in requests(plan):
            self.commit(len(request.extents), request.payload(np.arange(len(self.memory))))
        for target, count in enumerate(before):
            assert self.vmas(target) - count <= budget
        return plan

    def commit(self, count, payload):
        extents = np.frombuffer(payload[: count * EXTENT_DTYPE.itemsize], EXTENT_DTYPE)
        rest = payload[count * EXTENT_DTYPE.itemsize :]
        size = next(n for n in range(len(rest) // PLAN_DTYPE.itemsize, -1, -1) if self._plausible(rest, n))
        records = np.frombuffer(rest[: size * PLAN_DTYPE.itemsize], PLAN_DTYPE)
        digests = np.frombuffer(rest[size * PLAN_DTYPE.itemsize :], "<u8")
        new = []
        for slots, node, _ in extents.tolist():
            assert slots > 0
            assert (node > 0) == (self.node_of is not None)
            new.append((self.next_slot, slots, node))
            self.next_slot += slots + 3
        self.extents += new
        mapping = False
        self.loose = []
        for record in records:
            mapping |= record["op"] in (wire.OP_MAP, wire.OP_ZERO, wire.OP_MAP_EACH)
            assert not (mapping and record["op"] in (wire.OP_FILL, wire.OP_FILL_REPLICA))
            if record["op"] == wire.OP_MAP_EACH:
                for single in self._singles(record, digests):
                    self._apply(single, new, digests)
            else:
                self._apply(record, new, digests)
        for target, place, content in self.loose:
            # It could grow into the slots behind: the guard gives the last page up.
            if place + PAGE not in self.merged[target] or place + PAGE in self.region_starts[target]:
                del self.merged[target][place]
                self.memory[target][place] = content
        for first, slots, _ in new:
            assert all(slot in self.store for slot in range(first, first + slots)), "a slot nobody filled"

    @staticmethod
    def _plausible(rest, count):
        records = np.frombuffer(rest[: count * PLAN_DTYPE.itemsize], PLAN_DTYPE)
        in_column = int(records["pages"][np.isin(records["op"], (wire.OP_FILL, wire.OP_MAP_EACH))].sum())
        left = len(rest) - count * PLAN_DTYPE.itemsize
        return (
            left == 8 * in_column
            and np.isin(records["op"], (1, 2, 3, 4, 5)).all()
            and (records["pages"] > 0).all()
        )

    @staticmethod
    def _singles(record, column):
        """A MAP record for each page of a MAP_EACH."""
        assert record["flags"] == record["extent"] == record["slot"] == 0
        for index in range(int(record["pages"])):
            single = record.copy()
            slot = int(column[int(record["column_at"]) + index])
            single["op"], single["pages"] = wire.OP_MAP, 1
            single["addr"] += index * PAGE
            if slot & wire.EACH_NEW_EXTENT:
                slot -= wire.EACH_NEW_EXTENT
                single["flags"] = wire.FLAG_NEW_EXTENT
                single["extent"] = slot >> wire.EACH_EXTENT_SHIFT
                slot %= 1 << wire.EACH_EXTENT_SHIFT
            single["slot"] = slot
            yield single

    def _apply(self, record, new, digests):
        op, target, address, pages = (int(record[name]) for name in ("op", "target", "addr", "pages"))
        memory = self.memory[target]
        places = [address + i * PAGE for i in range(pages if op != wire.OP_FILL_REPLICA else 1)]
        assert all(place in memory for place in places), "a page that is not there, or mapped twice"
        assert not any(place in self.region_starts[target] for place in places[1:]), "a run over two regions"
        if op == wire.OP_ZERO:
            assert all(memory.pop(place) == 0 for place in places)
            self.zeroed[target].update(places)
            return
        if record["flags"] & wire.FLAG_NEW_EXTENT:
            first, slots, node = new[int(record["extent"])]
            slot = first + int(record["slot"])
        else:
            slot = int(record["slot"])
            first, slots, node = next(e for e in self.extents if e[0] <= slot < e[0] + e[1])
        assert slot + pages <= first + slots, "a run over the end of its extent"
        if self.node_of:
            assert all(self.node(target, place) == node for place in places), "pages of another node"
        if op == wire.OP_FILL_REPLICA:
            assert int(record["digest"]) == digest_of(memory[address])
            self.store.update((slot + i, memory[address]) for i in range(pages))
            return
        contents = [memory[place] for place in places]
        if op == wire.OP_FILL:
            assert [digest_of(c) for c in contents] == digests[int(record["column_at"]) :][:pages].tolist()
            assert not any(slot + i in self.store for i in range(pages)), "a slot filled twice"
            self.store.update((slot + i, content) for i, content in enumerate(contents))
        assert [self.store[slot + i] for i in range(pages)] == contents, "not equal"
        if slot + pages < first + slots:
            self.loose.append((target, places[-1], contents[-1]))
        for i, place in enumerate(places):
            del memory[place]
            self.merged[target][place] = slot + i

    def vmas(self, target):
        """VMAs of a target: neighbours differ in being merged, in their extent's place, or in region."""
        merged = self.merged[target]
        places = sorted([*self.memory[target], *self.zeroed[target], *merged])
        count, before = 0, None
        for place in places:
            slot = merged.get(place)
            same = (
                before is not None
                and before[0] == place - PAGE
                and place not in self.region_starts[target]
                and (before[1] is None) == (slot is None)
                and (slot is None or before[1] + 1 == slot)
            )
            count += not same
            before = place, slot
        return count

    def saved(self):
        """Pages freed, less the slots of the store."""
        freed = sum(len(merged) for merged in self.merged) + sum(len(zeroed) for zeroed in self.zeroed)
        return freed - len(self.store)

    def mapped(self):
        return [len(merged) for merged in self.merged]
