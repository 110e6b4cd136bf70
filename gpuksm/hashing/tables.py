"""Digests on a device: sorted, looked up in the stable tree, and only the candidates brought back.

One queue of its own, so that this runs beside the ring's copies and hashes.
The stable tree's sorted column is uploaded once and stays until it is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.device import DeviceFailed, MemoryCapReached, wait
from gpuksm.hashing.kernels import BLOCK, DIGIT_BITS, SORT_KEYS

if TYPE_CHECKING:
    from gpuksm.hashing.device import Device, Queue

# Kernels count keys in 32 bits and look a tile ahead.
MAX_KEYS = 1 << 31
# Enough groups to fill any device; more only cost launches of idle threads.
_MAX_GROUPS = 1 << 16
_TILE = BLOCK * SORT_KEYS

MARK_GROUP_START, MARK_EQUAL, MARK_MATCHED = 1, 2, 4


class Candidates(NamedTuple):
    """The pages that may have an equal, in the order of their digests; all columns have the same length.

    digests u8 ascending; order u4: the index each had before; match i8: the
    first equal entry of the table, or -1; marks u1: MARK_GROUP_START on the
    first of equal digests, MARK_EQUAL on all that have an equal beside them,
    MARK_MATCHED on those in the table.
    """

    digests: NDArray[np.uint64]
    order: NDArray[np.uint32]
    match: NDArray[np.int64]
    marks: NDArray[np.uint8]


class Tables:
    """Sorting and matching on one device.

    Every method raises what `device.failures` lists when the device cannot go
    on, and MemoryCapReached when its arrays do not fit the cap.  Made only for
    a device that sorts known keys rightly; DeviceFailed for another.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._queue: Queue = device.queue()
        self._table: Any = None
        self._table_size = 0
        self._check()

    def _check(self) -> None:
        """Let the device sort known keys; raises DeviceFailed when it does so wrongly."""
        keys = np.arange(1000, dtype=np.uint64)[::-1] // np.uint64(3) << np.uint64(50)
        ordered, order = self.sort(keys)
        wanted = np.argsort(keys, kind="stable")
        if not np.array_equal(order, wanted) or not np.array_equal(ordered, keys[wanted]):
            raise DeviceFailed(f"{self.device.name} sorts wrongly")

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """(sorted, order), stable."""
        count = _checked(digests)
        keys, order = self._sorted(digests)
        sorted_keys, sorted_order = np.empty(count, np.uint64), np.empty(count, np.uint32)
        self._fetch((sorted_keys, keys), (sorted_order, order))
        return sorted_keys, sorted_order

    def set_table(self, table: NDArray[np.uint64] | None) -> None:
        """Keep this ascending column on the device, or none."""
        self._table, self._table_size = None, 0
        if table is not None and table.size:
            self._table, self._table_size = self._send(table), _checked(table)

    @property
    def has_table(self) -> bool:
        return self._table is not None

    def match(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Index of the first equal entry of the table for each digest, or -1."""
        count = _checked(digests)
        match = np.empty(count, np.int64)
        self._fetch((match, self._matched(self._send(digests), count)))
        return match

    def candidates(self, digests: NDArray[np.uint64]) -> Candidates:
        """Sort, match and mark; only what has an equal comes back."""
        count = _checked(digests)
        keys, order = self._sorted(digests)
        match = self._matched(keys, count)
        groups = -(-count // BLOCK)
        marks, counts, total = (self.device.buffer(size) for size in (count, groups * 4, 4))
        launch, n = self._queue.launch, np.uint32(count)
        launch("mark_equal", groups, keys, match, n, marks, counts)
        launch("scan_counts", 1, counts, np.uint32(groups), total)
        chosen = np.empty(1, np.uint32)
        self._fetch((chosen, total))
        found = room_for(int(chosen[0]))
        if found.order.size:
            packed = [self.device.buffer(column.nbytes) for column in found]
            launch("gather_marked", groups, keys, order, match, marks, n, counts, *packed)
            columns: tuple[NDArray[Any], ...] = found
            self._fetch(*zip(columns, packed, strict=True))
        return found

    def _sorted(self, digests: NDArray[np.uint64]) -> tuple[Any, Any]:
        """Buffers of sorted keys and their order."""
        count = digests.size
        n, tiles = np.uint32(count), -(-count // _TILE)
        bins = tiles << DIGIT_BITS
        keys, spare_keys = self._send(digests), self.device.buffer(count * 8)
        order, spare_order = self.device.buffer(count * 4), self.device.buffer(count * 4)
        counts, total = self.device.buffer(bins * 4), self.device.buffer(4)
        launch = self._queue.launch
        launch("number_pages", _groups(count), order, n)
        for shift in range(0, 64, DIGIT_BITS):
            launch("sort_count", tiles, keys, n, np.uint32(shift), counts)
            launch("scan_counts", 1, counts, np.uint32(bins), total)
            launch("sort_scatter", tiles, keys, order, n, np.uint32(shift), counts, spare_keys, spare_order)
            keys, spare_keys, order, spare_order = spare_keys, keys, spare_order, order
        wait(self._queue, self._queue.mark())
        return keys, order

    def _matched(self, keys: Any, count: int) -> Any:
        """A buffer of match_table's answers; without a table every one is -1."""
        found = self.device.buffer(count * 8)
        table = keys if self._table is None else self._table
        arguments = (keys, np.uint32(count), table, np.uint32(self._table_size), found)
        self._queue.launch("match_table", _groups(count), *arguments)
        return found

    def _send(self, column: NDArray[np.uint64]) -> Any:
        buffer = self.device.buffer(column.nbytes)
        self._queue.upload(buffer, np.ascontiguousarray(column))
        wait(self._queue, self._queue.mark())
        return buffer

    def _fetch(self, *columns: tuple[NDArray[Any], Any]) -> None:
        """Fill each host array from its buffer."""
        for column, buffer in columns:
            self._queue.download(column, buffer)
        wait(self._queue, self._queue.mark())


def room_for(count: int) -> Candidates:
    """Columns for `count` candidates, not yet filled."""
    return Candidates(
        np.empty(count, np.uint64),
        np.empty(count, np.uint32),
        np.empty(count, np.int64),
        np.empty(count, np.uint8),
    )


def candidates_of(
    digests: NDArray[np.uint64], order: NDArray[np.uint32], match: NDArray[np.int64]
) -> Candidates:
    """What `Tables.candidates` gives, on the CPU; `digests` sorted."""
    same = digests[1:] == digests[:-1]
    before, after = np.zeros(digests.size, np.bool_), np.zeros(digests.size, np.bool_)
    before[1:], after[:-1] = same, same
    marks = np.where(before, 0, MARK_GROUP_START).astype(np.uint8)
    marks[before | after] |= MARK_EQUAL
    marks[match >= 0] |= MARK_MATCHED
    chosen = np.flatnonzero(marks & (MARK_EQUAL | MARK_MATCHED))
    return Candidates(digests[chosen], order[chosen], match[chosen], marks[chosen])


def _groups(count: int) -> int:
    return min(-(-count // BLOCK), _MAX_GROUPS)


def _checked(digests: NDArray[np.uint64]) -> int:
    if digests.size >= MAX_KEYS:
        raise MemoryCapReached(f"{digests.size} digests are more than kernels can count")
    return int(digests.size)
