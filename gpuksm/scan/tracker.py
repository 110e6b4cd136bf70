"""What is known of each target's pages: where they are, whether they are calm, their digests.

The guard alone arms write tracking; here it is only read.  A page is calm when
it is present, armed, unwritten, anonymous, not the zero page and mapped by this
process alone.  A digest holds while its page stays calm from one round to the
next: whatever the guard reports as written at arming, and whatever is not calm
when the round looks, loses it.

Without write tracking (`checksum`), calm means that two rounds in a row saw the
same digest, as in the original KSM; the guard then compares inside its freeze.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import TargetGone
from gpuksm.hashing.protocol import KIND_UNREADABLE
from gpuksm.linux import pagemap, procfs
from gpuksm.scan.columns import PAGE_BYTES, U64, count_pages, inside, intersect, pages_of
from gpuksm.scan.runs import Pages

_CAPACITY = 65536
# Entries of pagemap are read for whole windows; a gap of more pages starts a new one.
_WINDOW_GAP_PAGES = 256
_WINDOW_PAGES = 1 << 19

_ANONYMOUS = pagemap.PAGE_IS_FILE | pagemap.PAGE_IS_PFNZERO | pagemap.PAGE_IS_SWAPPED
CALM_MASK = pagemap.PAGE_IS_WPALLOWED | pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_WRITTEN | _ANONYMOUS
CALM_INVERTED = pagemap.PAGE_IS_WRITTEN | _ANONYMOUS
PRESENT_MASK = pagemap.PAGE_IS_PRESENT | _ANONYMOUS
PRESENT_INVERTED = _ANONYMOUS


class Columns(NamedTuple):
    """Pages of one target, ascending: address u8, digest u8, kind u1, known bool (digest holds)."""

    address: U64
    digest: U64
    kind: NDArray[np.uint8]
    known: NDArray[np.bool_]


def empty_columns() -> Columns:
    return Columns(
        np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty(0, np.bool_)
    )


def carry_over(old: Columns, address: U64) -> Columns:
    """Columns for `address` with the digests that `old` knows of the same pages."""
    count = len(address)
    new = Columns(address, np.zeros(count, np.uint64), np.zeros(count, np.uint8), np.zeros(count, np.bool_))
    if len(old.address) and count:
        at = np.minimum(np.searchsorted(old.address, address), len(old.address) - 1)
        same = (old.address[at] == address) & old.known[at]
        new.digest[same] = old.digest[at[same]]
        new.kind[same] = old.kind[at[same]]
        new.known[same] = True
    return new


class PageMap:
    """A read-only view of which pages of a process are present; `close` it.

    Raises TargetGone when the process has exited.
    """

    def __init__(self, pid: int, regions: Sequence[Sequence[int]]) -> None:
        table = np.array([tuple(region[:2]) for region in regions], np.uint64).reshape(-1, 2)
        self.pid = pid
        self.set_regions(table)
        self._fd = pagemap.open_pagemap(pid)
        self._buffer = np.empty((_CAPACITY, 3), np.uint64)

    def set_regions(self, table: U64) -> None:
        """Look at the stretches `table` (n, 2) from now on; ascending and disjoint."""
        self.low = np.ascontiguousarray(table[:, 0])
        self.high = np.ascontiguousarray(table[:, 1])

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def select(
        self, mask: int, inverted: int, low: int | None = None, high: int | None = None
    ) -> tuple[U64, U64]:
        """Stretches within the regions (and [low, high)) of pages PAGEMAP_SCAN selects."""
        if not len(self.low):
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        at = int(self.low[0]) if low is None else low
        end = int(self.high[-1]) if high is None else high
        found: list[U64] = []
        while at < end:
            try:
                count, walk_end = pagemap.scan_into(
                    self._fd,
                    at,
                    end,
                    self._buffer.ctypes.data,
                    _CAPACITY,
                    inverted=inverted,
                    mask=mask,
                    ret=pagemap.PAGE_IS_PRESENT,
                )
            except OSError as error:
                raise _gone_or(error, self.pid) from None
            found.append(self._buffer[:count, :2].copy())
            if walk_end <= at:
                break
            at = walk_end
        table = np.concatenate(found)
        return intersect(table[:, 0], table[:, 1], self.low, self.high)

    def starts_region(self, address: U64) -> NDArray[np.bool_]:
        """For each address whether a region starts there."""
        return inside(address, self.low, self.low + np.uint64(1))

    def exclusive(self, address: U64) -> NDArray[np.bool_]:
        """For each page whether it is present, anonymous and mapped by this process alone."""
        result = np.zeros(len(address), np.bool_)
        if not len(address):
            return result
        page = address // PAGE_BYTES
        new = np.concatenate(([True], np.diff(page) > _WINDOW_GAP_PAGES))
        # Long windows are cut as well, so that the buffer stays small.
        window = np.cumsum(new)
        start_of = page[np.flatnonzero(new)][window - 1]
        cut = np.concatenate(([True], np.diff((page - start_of) // _WINDOW_PAGES) != 0)) | new
        firsts = np.flatnonzero(cut)
        for first, last in zip(firsts.tolist(), np.append(firsts[1:], len(page)).tolist(), strict=True):
            base = int(page[first])
            entries = np.zeros(int(page[last - 1]) - base + 1, np.uint64)
            try:
                pagemap.read_entries(self._fd, base * PAGE_BYTES, entries.data)
            except OSError as error:
                raise _gone_or(error, self.pid) from None
            picked = entries[(page[first:last] - np.uint64(base)).astype(np.int64)]
            wanted = np.uint64(pagemap.ENTRY_PRESENT | pagemap.ENTRY_EXCLUSIVE)
            result[first:last] = picked & (wanted | np.uint64(pagemap.ENTRY_FILE)) == wanted
        return result

    def present_exclusive(self) -> U64:
        """Addresses of all present anonymous pages of the regions that no other process maps."""
        if pagemap.probe():
            address = pages_of(*self.select(PRESENT_MASK, PRESENT_INVERTED))
            return address[self.exclusive(address)]
        found = [np.empty(0, np.uint64)]
        step = _WINDOW_PAGES * PAGE_BYTES
        for low, high in zip(self.low.tolist(), self.high.tolist(), strict=True):
            for at in range(low, high, step):
                address = np.arange(at, min(at + step, high), PAGE_BYTES, dtype=np.uint64)
                found.append(address[self.exclusive(address)])
        return np.concatenate(found)


def _gone_or(error: OSError, pid: int) -> Exception:
    # EFAULT: the address space went while the call looked at it.
    if error.errno in (errno.ESRCH, errno.EFAULT):
        return TargetGone(f"process {pid} is gone")
    return error


class Tracker:
    """The pages of one target over the rounds of a scan.

    `columns` are the pages that were calm when the round looked.  With
    `passive` nobody attaches: every page that is present passes for calm.
    """

    def __init__(
        self,
        pid: int,
        regions: Sequence[Sequence[int]],
        merged: Sequence[Sequence[int]] = (),
        *,
        checksum: bool = False,
        passive: bool = False,
    ) -> None:
        self.map = PageMap(pid, [])
        self.set_regions(regions, merged)
        self.pid = pid
        self.user = procfs.user(pid)
        self.columns = empty_columns()
        self.volatile = 0
        self._checksum = checksum
        self._unarmed = checksum or passive
        self._previous = empty_columns()

    def set_regions(self, regions: Sequence[Sequence[int]], merged: Sequence[Sequence[int]] = ()) -> None:
        """Look at `regions`, and at copies that the target made of pages of `merged`, from now on."""
        table = np.array([tuple(part[:2]) for part in (*regions, *merged)], np.uint64).reshape(-1, 2)
        self.map.set_regions(table[np.argsort(table[:, 0], kind="stable")])
        spans = np.array(sorted(tuple(part[:2]) for part in merged), np.uint64).reshape(-1, 2)
        self.merged_low, self.merged_high = spans[:, 0].copy(), spans[:, 1].copy()

    def close(self) -> None:
        """Give the descriptor back."""
        self.map.close()

    def forget(self, written: U64) -> None:
        """Drop the digests of pages in `written`, stretches (n, 2) as the guard's `arm` returns them."""
        if len(written) and len(self.columns.address):
            low, high = written[:, 0], written[:, 1]
            self.columns.known[inside(self.columns.address, low, high)] = False

    def look(self) -> None:
        """Find the pages that are calm now; digests of those that stayed calm are kept.

        Raises TargetGone.
        """
        if self._unarmed:
            address = self.map.present_exclusive()
            self._previous = self.columns
            self.columns = carry_over(empty_columns(), address)
            self.volatile = 0
            return
        address = pages_of(*self.map.select(CALM_MASK, CALM_INVERTED))
        address = address[self.map.exclusive(address)]
        self.columns = carry_over(self.columns, address)
        written = pagemap.PAGE_IS_WRITTEN | PRESENT_MASK
        self.volatile = count_pages(*self.map.select(written, PRESENT_INVERTED))

    def drop(self, low: U64, high: U64) -> None:
        """Forget the pages in the stretches [low, high) altogether: they were written."""
        if len(low) and len(self.columns.address):
            self._keep(~inside(self.columns.address, low, high))

    def prune(self) -> None:
        """Forget the pages that are not calm any more; TargetGone."""
        keep = np.zeros(len(self.columns.address), np.bool_)
        keep[self.still_calm(np.arange(len(keep)))] = True
        self._keep(keep)

    def look_at(self, low: U64, high: U64) -> None:
        """Add the pages in the stretches [low, high) that are calm now, without a digest; TargetGone."""
        found = self.map.select(CALM_MASK, CALM_INVERTED, int(low[0]), int(high[-1]))
        address = pages_of(*intersect(*found, low, high))
        address = address[self.map.exclusive(address)]
        if len(address):
            self.columns = carry_over(self.columns, np.union1d(self.columns.address, address))

    def _keep(self, keep: NDArray[np.bool_]) -> None:
        address, digest, kind, known = self.columns
        self.columns = Columns(address[keep], digest[keep], kind[keep], known[keep])

    def wanted(self) -> NDArray[np.int64]:
        """Indices into `columns` of the pages that have no digest."""
        return np.flatnonzero(~self.columns.known)

    def still_calm(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `index` whose pages are calm at this moment (just before they are read)."""
        if not len(index):
            return index
        address = self.columns.address[index]
        low, high = int(address[0]), int(address[-1]) + PAGE_BYTES
        if self._unarmed:
            return index[self.map.exclusive(address)]
        return index[inside(address, *self.map.select(CALM_MASK, CALM_INVERTED, low, high))]

    def learn(self, index: NDArray[np.int64], digest: U64, kind: NDArray[np.uint8]) -> None:
        """Enter what hashing the pages `index` gave."""
        self.columns.digest[index] = digest
        self.columns.kind[index] = kind
        self.columns.known[index] = kind != KIND_UNREADABLE

    def candidates(self) -> Columns:
        """The pages that may be merged: calm, and with a digest."""
        keep = self.columns.known.copy()
        if self._checksum:
            before = carry_over(self._previous, self.columns.address)
            keep &= before.known & (before.digest == self.columns.digest)
            self.volatile = int(self.columns.known.sum() - keep.sum())
        address, digest, kind, known = self.columns
        return Columns(address[keep], digest[keep], kind[keep], known[keep])


def gather(trackers: Sequence[Tracker]) -> Pages:
    """The candidates of all trackers as the planner's columns, in their order."""
    columns: list[Columns] = [tracker.candidates() for tracker in trackers]
    counts = [len(column.address) for column in columns]
    address = np.concatenate([np.empty(0, np.uint64), *(column.address for column in columns)])
    joins = np.zeros(len(address), np.bool_)
    at = 0
    for tracker, column, count in zip(trackers, columns, counts, strict=True):
        follows = np.diff(column.address) == PAGE_BYTES
        joins[at + 1 : at + count] = follows & ~tracker.map.starts_region(column.address[1:])
        at += count
    return Pages(
        np.repeat(np.arange(len(trackers), dtype=np.uint32), counts),
        address,
        np.concatenate([np.empty(0, np.uint64), *map(within_user, trackers, columns)]),
        np.concatenate([np.empty(0, np.uint8), *(column.kind for column in columns)]),
        joins,
        np.concatenate([np.empty(0, np.bool_), *map(_watched, trackers, columns)]),
    )


def _watched(tracker: Tracker, column: Columns) -> NDArray[np.bool_]:
    """Which pages have merged memory right behind them."""
    return inside(column.address + np.uint64(PAGE_BYTES), tracker.merged_low, tracker.merged_high)


def within_user(tracker: Tracker, column: Columns) -> U64:
    """Digests that differ between users, whose pages are never merged with each other.

    The guard enforces that; here it only keeps useless candidates out of the plan.
    """
    key = (tracker.user + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return column.digest ^ np.uint64(key)
