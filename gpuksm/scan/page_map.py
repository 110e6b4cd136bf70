"""Which pages of a process are present, calm, and its own alone: PAGEMAP_SCAN and pagemap, read only.

Both cost by the pages they walk over.  So of scattered stretches only these, and small gaps
between them, are looked at.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import TargetGone
from gpuksm.hashing.compiled import library
from gpuksm.linux import pagemap, procfs
from gpuksm.scan.columns import (
    COLUMN_KERNELS,
    I64,
    PAGE_BYTES,
    U64,
    count_pages,
    cut_stretches,
    inside,
    intersect,
    stretches_of,
    windows,
)

_CAPACITY = 65536
# Entries of pagemap are read for whole windows; a gap of more pages starts a new one.
_WINDOW_GAP_PAGES = 64
_WINDOW_PAGES = 1 << 19
_EVERYTHING = 1 << 62  # bytes
# Regions that are further from each other are not scanned in one go.
_REGION_GAP = 1 << 30  # bytes
_NO_STRETCHES = np.empty((0, 2), np.uint64)

_ABSENT = pagemap.PAGE_IS_PFNZERO | pagemap.PAGE_IS_SWAPPED


class Kind(NamedTuple):
    """What PAGEMAP_SCAN is to select: `mask` and `inverted` (gpuksm/linux/pagemap.py)."""

    mask: int
    inverted: int

    def anonymous(self) -> Kind:
        """The same, but no pages of files, such as merged ones.

        To tell these the kernel reads about the page itself, not only its table's entry: 50 ns a page, where
        all else takes 15.  `exclusive_in` leaves them out anyway.
        """
        return Kind(self.mask | pagemap.PAGE_IS_FILE, self.inverted | pagemap.PAGE_IS_FILE)


PRESENT = Kind(pagemap.PAGE_IS_PRESENT | _ABSENT, _ABSENT)
WRITTEN = Kind(pagemap.PAGE_IS_WRITTEN | PRESENT.mask, PRESENT.inverted)
CALM = Kind(
    pagemap.PAGE_IS_WPALLOWED | pagemap.PAGE_IS_WRITTEN | PRESENT.mask,
    pagemap.PAGE_IS_WRITTEN | PRESENT.inverted,
)


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

    def select(self, kind: Kind, low: int | None = None, high: int | None = None) -> tuple[U64, U64]:
        """Stretches within the regions (and [low, high)) of pages PAGEMAP_SCAN selects."""
        if not len(self.low):
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        found = [_NO_STRETCHES]
        for first, last in windows(self.low, self.high, _REGION_GAP, _EVERYTHING):
            at, end = int(self.low[first]), int(self.high[last - 1])
            found += self._scan(
                kind, at if low is None else max(at, low), end if high is None else min(end, high)
            )
        table = np.concatenate(found)
        return intersect(table[:, 0], table[:, 1], self.low, self.high)

    def select_in(self, kind: Kind, low: U64, high: U64) -> tuple[U64, U64]:
        """As `select`, of the stretches [low, high) only: what lies far from them is not looked at."""
        if not len(self.low) or not len(low):
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        found = [_NO_STRETCHES]
        near: list[tuple[int, int]] = []  # spans that fit the buffer together, whatever is found in them
        room = _CAPACITY
        for first, end in windows(low, high, _WINDOW_GAP_PAGES * PAGE_BYTES, _EVERYTHING):
            span = int(low[first]), int(high[end - 1])
            pages = (span[1] - span[0]) // PAGE_BYTES
            if near and pages > room:
                found.append(self._scan_near(kind, near))
                near, room = [], _CAPACITY
            if pages > room:
                found += self._scan(kind, *span)
                continue
            near.append(span)
            room -= pages
        found.append(self._scan_near(kind, near))
        table = np.concatenate(found)
        return intersect(*intersect(table[:, 0], table[:, 1], self.low, self.high), low, high)

    def _scan_near(self, kind: Kind, spans: list[tuple[int, int]]) -> U64:
        """The table of the stretches in `spans`, which have no more pages than the buffer entries."""
        try:
            count = pagemap.scan_spans(
                self._fd, spans, self._buffer.ctypes.data, _CAPACITY, inverted=kind.inverted, mask=kind.mask
            )
        except OSError as error:
            raise _gone_or(error, self.pid) from None
        return self._buffer[:count, :2].copy()

    def _scan(self, kind: Kind, at: int, end: int) -> list[U64]:
        """Tables of the stretches in [at, end) that PAGEMAP_SCAN selects."""
        found = [_NO_STRETCHES]
        stride = pagemap.Stride()
        while at < end:
            until = stride.begin(at, end)
            try:
                count, walk_end = pagemap.scan_into(
                    self._fd,
                    at,
                    until,
                    self._buffer.ctypes.data,
                    _CAPACITY,
                    inverted=kind.inverted,
                    mask=kind.mask,
                    ret=pagemap.PAGE_IS_PRESENT,
                )
            except OSError as error:
                raise _gone_or(error, self.pid) from None
            stride.done()
            if count:
                found.append(self._buffer[:count, :2].copy())
            if walk_end <= at:
                break
            at = walk_end
        return found

    def starts_of(self, address: U64) -> I64:
        """Indices into `address` (ascending) of the pages at which a region starts."""
        at: I64 = np.searchsorted(address, self.low)
        there = np.flatnonzero(at < len(address))  # np.isin would load numpy.ma for it
        starts: I64 = at[there][address[at[there]] == self.low[there]]
        return starts

    def exclusive(self, address: U64) -> NDArray[np.bool_]:
        """For each page whether it is present, anonymous and mapped by this process alone."""
        first, pages = stretches_of(address)
        low = address[first]
        return inside(address, *self.exclusive_in(low, low + pages.astype(np.uint64) * np.uint64(PAGE_BYTES)))

    def exclusive_in(self, low: U64, high: U64) -> tuple[U64, U64]:
        """Stretches of the pages in [low, high) that are present, anonymous and no other process's.

        Some may follow right behind each other.
        """
        low, high = cut_stretches(low, high, _WINDOW_PAGES)
        pick = library(COLUMN_KERNELS).pick_stretches
        wanted = pagemap.ENTRY_PRESENT | pagemap.ENTRY_EXCLUSIVE
        found = [_NO_STRETCHES]
        for first, spans in self._spans(low, high):
            # Entries of several windows, one behind the other, so that they are picked at once.
            entries = np.empty(sum(pages for _, _, pages in spans), np.uint64)
            shifts = np.empty(len(spans), np.int64)
            at = 0
            for number, (begin, _, pages) in enumerate(spans):
                base = int(low[begin])
                shifts[number] = base // PAGE_BYTES - at
                try:
                    got = pagemap.read_entries(self._fd, base, entries[at : at + pages].data)
                except OSError as error:
                    raise _gone_or(error, self.pid) from None
                entries[at + got : at + pages] = 0
                at += pages
            end = spans[-1][1]
            counts = [end - begin for begin, end, _ in spans]
            parts = low[first:end], high[first:end]
            out = np.empty((2, count_pages(*parts)), np.uint64)
            mask = wanted | pagemap.ENTRY_FILE
            count = pick(entries, np.repeat(shifts, counts), *parts, mask, wanted, *out)
            found.append(out[:, :count].T.copy())
        table = np.concatenate(found)
        return table[:, 0].copy(), table[:, 1].copy()

    @staticmethod
    def _spans(low: U64, high: U64) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Groups of windows (first stretch, end, pages) whose entries are read together."""
        group: list[tuple[int, int, int]] = []
        room = _WINDOW_PAGES
        for first, end in windows(low, high, _WINDOW_GAP_PAGES * PAGE_BYTES, _WINDOW_PAGES * PAGE_BYTES):
            pages = (int(high[end - 1]) - int(low[first])) // PAGE_BYTES
            if group and pages > room:
                yield group[0][0], group
                group, room = [], _WINDOW_PAGES
            group.append((first, end, pages))
            room -= pages
        if group:
            yield group[0][0], group

    def present(self) -> tuple[U64, U64]:
        """Stretches of the regions that hold all present anonymous pages, and not many others."""
        # Where much is present, asking which it is takes longer than looking at all entries.
        dense = count_pages(self.low, self.high) <= 2 * procfs.resident_size(self.pid)
        if dense or not pagemap.probe():
            return self.low, self.high
        return self.select(PRESENT)

    def present_exclusive(self) -> tuple[U64, U64]:
        """Stretches of all present anonymous pages of the regions that no other process maps."""
        return self.exclusive_in(*self.present())


def _gone_or(error: OSError, pid: int) -> Exception:
    # EFAULT: the address space went while the call looked at it.
    if error.errno in (errno.ESRCH, errno.EFAULT):
        return TargetGone(f"process {pid} is gone")
    return error
