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
from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import KIND_UNREADABLE
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
    ranges_within,
    stretches_of,
    windows,
)
from gpuksm.scan.runs import Pages
from gpuksm.scan.trees import StableTree

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

    def starts_of(self, address: U64) -> I64:
        """Indices into `address` (ascending) of the pages at which a region starts."""
        at = np.searchsorted(address, self.low)
        at = at[at < len(address)]
        return at[np.isin(address[at], self.low)]

    def exclusive(self, address: U64) -> NDArray[np.bool_]:
        """For each page whether it is present, anonymous and mapped by this process alone."""
        first, pages = stretches_of(address)
        low = address[first]
        found = self.exclusive_in(low, low + pages.astype(np.uint64) * np.uint64(PAGE_BYTES))
        at = np.minimum(np.searchsorted(found, address), max(len(found) - 1, 0))
        return found[at] == address if len(found) else np.zeros(len(address), np.bool_)

    def exclusive_in(self, low: U64, high: U64) -> U64:
        """Addresses of the pages in [low, high) that are present, anonymous and no other process's."""
        low, high = cut_stretches(low, high, _WINDOW_PAGES)
        out = np.empty(count_pages(low, high), np.uint64)
        pick = library(COLUMN_KERNELS).pick_entries
        wanted = pagemap.ENTRY_PRESENT | pagemap.ENTRY_EXCLUSIVE
        count = 0
        for first, end in windows(low, high, _WINDOW_GAP_PAGES * PAGE_BYTES, _WINDOW_PAGES * PAGE_BYTES):
            base = int(low[first])
            entries = np.empty((int(high[end - 1]) - base) // PAGE_BYTES, np.uint64)
            try:
                got = pagemap.read_entries(self._fd, base, entries.data)
            except OSError as error:
                raise _gone_or(error, self.pid) from None
            entries[got:] = 0
            count = pick(
                entries,
                base // PAGE_BYTES,
                low[first:end],
                high[first:end],
                wanted | pagemap.ENTRY_FILE,
                wanted,
                out,
                count,
            )
        return out[:count].copy() if count < len(out) // 2 else out[:count]

    def present(self) -> tuple[U64, U64]:
        """Stretches of the regions that hold all present anonymous pages, and not many others."""
        # Where much is present, asking which it is takes longer than looking at all entries.
        dense = count_pages(self.low, self.high) <= 2 * procfs.resident_size(self.pid)
        if dense or not pagemap.probe():
            return self.low, self.high
        return self.select(PRESENT_MASK, PRESENT_INVERTED)

    def present_exclusive(self) -> U64:
        """Addresses of all present anonymous pages of the regions that no other process maps."""
        return self.exclusive_in(*self.present())


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
        self._planned = np.empty(0, np.bool_)
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
        address = self.map.exclusive_in(*self.map.select(CALM_MASK, CALM_INVERTED))
        self.columns = carry_over(self.columns, address)

    def keep_calm(self, index: I64) -> None:
        """Drop the digests of those pages of `index` that are not calm any more; TargetGone."""
        calm = index if self._unarmed else self.still_calm(index)
        if len(calm) < len(index):
            self.columns.known[np.setdiff1d(index, calm, assume_unique=True)] = False

    def count_volatile(self) -> None:
        """Set `volatile`: pages written since they were armed last; TargetGone."""
        if self._unarmed:
            return
        written = pagemap.PAGE_IS_WRITTEN | PRESENT_MASK
        self.volatile = count_pages(*self.map.select(written, PRESENT_INVERTED))

    def drop(self, low: U64, high: U64) -> None:
        """Forget the pages in the stretches [low, high) altogether: they were written."""
        first = np.searchsorted(self.columns.address, low)
        counts = np.searchsorted(self.columns.address, high) - first
        if counts.any():
            keep = np.ones(len(self.columns.address), np.bool_)
            keep[np.repeat(first, counts) + ranges_within(counts)] = False
            self._keep(keep)

    def prune(self) -> None:
        """Forget the pages that are not calm any more; TargetGone."""
        keep = np.zeros(len(self.columns.address), np.bool_)
        keep[self.still_calm(np.arange(len(keep)))] = True
        self._keep(keep)

    def look_at(self, low: U64, high: U64) -> None:
        """Add the pages in the stretches [low, high) that are calm now, without a digest; TargetGone."""
        found = self.map.select(CALM_MASK, CALM_INVERTED, int(low[0]), int(high[-1]))
        address = self.map.exclusive_in(*intersect(*found, low, high))
        at = np.searchsorted(self.columns.address, address)
        new = np.append(self.columns.address, np.uint64(0))[at] != address
        if new.any():
            at = at[new]
            old, digest, kind, known = self.columns
            self.columns = Columns(
                np.insert(old, at, address[new]),
                np.insert(digest, at, 0),
                np.insert(kind, at, 0),
                np.insert(known, at, False),
            )

    def _keep(self, keep: NDArray[np.bool_]) -> None:
        address, digest, kind, known = self.columns
        self.columns = Columns(address[keep], digest[keep], kind[keep], known[keep])

    def wanted(self) -> I64:
        """Indices into `columns` of the pages that have no digest."""
        return np.flatnonzero(~self.columns.known)

    def still_calm(self, index: I64) -> I64:
        """Those of `index` whose pages are calm at this moment (just before they are read)."""
        if not len(index):
            return index
        address = self.columns.address[index]
        low, high = int(address[0]), int(address[-1]) + PAGE_BYTES
        if self._unarmed:
            return index[self.map.exclusive(address)]
        return index[inside(address, *self.map.select(CALM_MASK, CALM_INVERTED, low, high))]

    def learn(self, index: I64, digest: U64, kind: NDArray[np.uint8]) -> None:
        """Enter what hashing the pages `index` gave."""
        self.columns.digest[index] = digest
        self.columns.kind[index] = kind
        self.columns.known[index] = kind != KIND_UNREADABLE

    @property
    def unarmed(self) -> bool:
        """True without write tracking: nobody tells what was written."""
        return self._unarmed

    def candidates(self) -> I64:
        """Indices into `columns` of the pages that may be merged: calm, with a digest, not yet planned."""
        keep = self.columns.known
        if self._checksum:
            before = carry_over(self._previous, self.columns.address)
            keep = keep & before.known & (before.digest == self.columns.digest)
            self.volatile = int(self.columns.known.sum() - keep.sum())
        if len(self._planned) == len(keep):
            keep = keep & ~self._planned
        return np.flatnonzero(keep)

    def plan(self, index: I64) -> None:
        """From now on the pages `index` are no candidates, until `columns` change or `plan_anew`."""
        if len(self._planned) != len(self.columns.address):
            self._planned = np.zeros(len(self.columns.address), np.bool_)
        self._planned[index] = True

    def plan_anew(self) -> None:
        """All pages may be candidates again."""
        self._planned = np.empty(0, np.bool_)


def gather(trackers: Sequence[Tracker], chosen: Sequence[I64] | None = None) -> Pages:
    """The candidates of all trackers as the planner's columns, in their order.

    `chosen` are indices into the columns of each, ascending; None: all its candidates.
    """
    if chosen is None:
        chosen = [tracker.candidates() for tracker in trackers]
    counts = [len(index) for index in chosen]
    total = sum(counts)
    target, address = np.empty(total, np.uint32), np.empty(total, np.uint64)
    digest, kind = np.empty(total, np.uint64), np.empty(total, np.uint8)
    joins, watched = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    at = 0
    for number, (tracker, index) in enumerate(zip(trackers, chosen, strict=True)):
        part = slice(at, at + len(index))
        at += len(index)
        columns = tracker.columns
        target[part] = number
        np.take(columns.address, index, out=address[part])
        np.take(columns.kind, index, out=kind[part])
        np.take(columns.digest, index, out=digest[part])
        digest[part] ^= user_key(tracker)
        mine = address[part]
        if len(index):
            np.equal(mine[1:], mine[:-1] + np.uint64(PAGE_BYTES), out=joins[part][1:])
            joins[part][tracker.map.starts_of(mine)] = False
        if len(tracker.merged_low):
            watched[part] = inside(mine + np.uint64(PAGE_BYTES), tracker.merged_low, tracker.merged_high)
    return Pages(target, address, digest, kind, joins, watched)


def user_key(tracker: Tracker) -> np.uint64:
    """What digests are changed by so that they differ between users, whose pages are never merged.

    The guard enforces that; here it only keeps useless candidates out of the plan.
    """
    return np.uint64((tracker.user + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)


def equals_elsewhere(wanted: U64, trackers: Sequence[Tracker], stable: StableTree) -> bool:
    """Whether a digest of `wanted` is that of two pages that are known, or of a slot of the store.

    `wanted` ascends, without repetitions, and each is the digest of a known page of `trackers`.
    """
    pages = 0
    for tracker in trackers:
        columns = tracker.columns
        digest = columns.digest[columns.known] ^ user_key(tracker)
        at = np.minimum(np.searchsorted(wanted, digest), len(wanted) - 1)
        pages += int((wanted[at] == digest).sum())
    return pages > len(wanted) or bool(np.isin(wanted, stable.digest).any())
