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

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import KIND_UNREADABLE, KIND_ZERO
from gpuksm.linux import procfs
from gpuksm.scan import page_map
from gpuksm.scan.addresses import Addresses, Mask
from gpuksm.scan.columns import (
    COLUMN_KERNELS,
    I64,
    MARKS,
    PAGE_BYTES,
    U64,
    count_pages,
    inside,
    stretches_of,
)
from gpuksm.scan.nodes import Nodes, apart, no_nodes, nodes_of, parted
from gpuksm.scan.page_map import PageMap
from gpuksm.scan.runs import Pages
from gpuksm.scan.state import CALM, KIND, KNOWN, PLANNED, carry_over, columns_of, empty_columns
from gpuksm.scan.trees import StableTree

_FRESH_SECONDS = 0.02
# Nodes are asked for this many pages at a time.
_PIECE = 1 << 18


class Tracker:
    """The pages of one target over the rounds of a scan.

    `columns` are the pages that were calm when they were looked at.  With
    `passive` nobody attaches: every page that is present passes for calm.  With `by_node` pages of
    different NUMA nodes have different digests.
    """

    def __init__(
        self,
        pid: int,
        regions: Sequence[Sequence[int]],
        merged: Sequence[Sequence[int]] = (),
        *,
        checksum: bool = False,
        passive: bool = False,
        by_node: bool = False,
    ) -> None:
        self.map = PageMap(pid, [])
        self.set_regions(regions, merged)
        self.pid = pid
        self.user = procfs.user(pid)
        self.columns = empty_columns()
        self.volatile = 0
        self.by_node = by_node
        self._checksum = checksum
        self._unarmed = checksum or passive
        self._previous = empty_columns()
        self._looked = 0.0  # when the pages without a digest were looked up, of the monotonic clock

    def set_regions(self, regions: Sequence[Sequence[int]], merged: Sequence[Sequence[int]] = ()) -> None:
        """Look at `regions`, and at copies that the target made of pages of `merged`, from now on."""
        table = np.array([tuple(part[:2]) for part in (*regions, *merged)], np.uint64).reshape(-1, 2)
        self.map.set_regions(table[np.argsort(table[:, 0], kind="stable")])
        spans = np.array(sorted(tuple(part[:2]) for part in merged), np.uint64).reshape(-1, 2)
        self.merged_low, self.merged_high = spans[:, 0].copy(), spans[:, 1].copy()
        self._some_merged = len(spans) > 0
        self._merged_by_us_only = not self._some_merged

    def close(self) -> None:
        """Give the descriptor back."""
        self.map.close()

    def forget(self, written: U64) -> None:
        """Drop the digests of pages in `written`, stretches (n, 2) as the guard's `arm` returns them."""
        self.columns.unmark(KNOWN, self.columns.address.within(written[:, 0], written[:, 1]))

    def look(self) -> None:
        """Find the pages that are calm now; digests of those that stayed calm are kept.

        Raises TargetGone.
        """
        if self._unarmed:
            address = Addresses.of_stretches(*self.map.present_exclusive())
            self._previous = self.columns
            self.columns = columns_of(address, self.by_node)
            self.volatile = 0
            return
        began = time.monotonic()
        address = Addresses.of_stretches(*self.map.exclusive_in(*self.map.select(page_map.CALM)))
        self.columns = carry_over(self.columns, address, self.by_node)
        if self.by_node:
            self._drop_moved()
        self._looked = began

    def _drop_moved(self) -> None:
        """Pages that have moved to another node since they were asked for have no digest."""
        columns = self.columns
        for at in range(0, len(columns), _PIECE):
            known = np.flatnonzero(columns.known(slice(at, at + _PIECE))) + at
            now = self.ask_nodes(columns.address[known], columns.kind(known))
            columns.unmark(KNOWN, known[now != columns.node[known]])

    def tell_nodes_apart(self, by_node: bool) -> None:
        """From now on pages of different nodes have different digests, or not; none is known any more."""
        self.by_node = by_node
        self.columns.unmark(KNOWN, slice(None))
        node = np.zeros(len(self.columns), np.uint16) if by_node else no_nodes()
        self.columns = replace(self.columns, node=node)

    def keep_calm(self, index: I64) -> None:
        """Drop the digests of those pages of `index` that are not calm any more; TargetGone."""
        calm = index if self._unarmed else self.still_calm(index)
        if len(calm) < len(index):
            self.columns.unmark(KNOWN, np.setdiff1d(index, calm, assume_unique=True))

    def count_volatile(self) -> None:
        """Set `volatile`: pages written since they were armed last; TargetGone."""
        if self._unarmed:
            return
        written = self.map.select(page_map.WRITTEN)
        self.volatile = count_pages(*self.map.select_in(page_map.PRESENT.anonymous(), *written))

    def drop(self, low: U64, high: U64) -> None:
        """The pages in the stretches [low, high) were written: they have no digest, and are not calm."""
        self.columns.unmark(KNOWN | CALM | PLANNED, self.columns.address.within(low, high))

    def prune(self) -> None:
        """Forget the pages that are not calm any more; TargetGone."""
        columns = self.columns
        calm = columns.calm()
        low, high = columns.address.keep(calm).stretches()
        calm &= columns.address.covered(*self._calm_in(low, high, some_merged=True))
        self.columns = columns.keep(calm)

    def look_at(self, low: U64, high: U64) -> None:
        """Find the pages in the stretches [low, high) that are calm now; TargetGone."""
        began = time.monotonic()
        none_waits = not self.count_wanted()
        low, high = self.map.exclusive_in(*self.map.select_in(page_map.CALM, low, high))
        self._looked = began if none_waits else 0.0
        self.columns.mark(CALM, self.columns.address.within(low, high))
        self.columns = self.columns.joined(low, high, self.by_node)

    def wanted(self, first: int = 0, end: int | None = None) -> I64:
        """Indices into `columns` (of `first` to `end` - 1) of the calm pages that have no digest."""
        return np.flatnonzero(self.columns.marked(CALM | KNOWN, CALM, slice(first, end))) + first

    def count_wanted(self) -> int:
        """How many calm pages have no digest."""
        return int(np.count_nonzero(self.columns.marked(CALM | KNOWN, CALM)))

    def was_just_looked_up(self) -> bool:
        """Whether all pages without a digest were looked up within the time that reading a batch takes."""
        return time.monotonic() - self._looked < _FRESH_SECONDS

    def still_calm(self, index: I64) -> I64:
        """Those of `index` whose pages are calm at this moment (just before they are read)."""
        if not len(index):
            return index
        address = self.columns.address[index]
        first, pages = stretches_of(address)
        low = address[first]
        high = low + pages.astype(np.uint64) * np.uint64(PAGE_BYTES)
        # What has no digest was in no plan of ours since it was found.
        fresh = self._merged_by_us_only and self.columns.marked(KNOWN | PLANNED, 0, index).all()
        calm_low, calm_high = self._calm_in(low, high, some_merged=self._some_merged and not fresh)
        if np.array_equal(low, calm_low) and np.array_equal(high, calm_high):
            return index  # all, as almost always
        return index[inside(address, calm_low, calm_high)]

    def _calm_in(self, low: U64, high: U64, *, some_merged: bool) -> tuple[U64, U64]:
        """Stretches of the pages in [low, high) that are calm at this moment; TargetGone.

        Without `some_merged` none of them may have been merged since it was found.
        """
        if self._unarmed:
            return self.map.exclusive_in(low, high)
        kind = page_map.CALM.anonymous() if some_merged else page_map.CALM
        return self.map.select_in(kind, low, high)

    def learn(self, index: I64, digest: U64, kind: NDArray[np.uint8]) -> None:
        """Enter what hashing the pages `index` gave."""
        known = kind != KIND_UNREADABLE
        if self.by_node:
            node = self.ask_nodes(self.columns.address[index], kind)
            self.columns.node[index] = node
            digest, known = apart(digest, node), known & ((node > 0) | (kind == KIND_ZERO))
        self.columns.learn(index, digest, kind, known)

    def ask_nodes(self, address: U64, kind: NDArray[np.uint8]) -> Nodes:
        """The node + 1 of each of these pages, 0 for those that are gone, and for zeros, which need none."""
        node = np.zeros(len(address), np.uint16)
        wanted = (kind != KIND_ZERO) & (kind != KIND_UNREADABLE)
        with contextlib.suppress(TargetGone, NotPermitted):
            node[wanted] = nodes_of(self.pid, address[wanted])
        return node

    @property
    def unarmed(self) -> bool:
        """True without write tracking: nobody tells what was written."""
        return self._unarmed

    def candidates(self, first: int = 0, end: int | None = None) -> I64:
        """Indices into `columns` (of `first` to `end` - 1) of the pages that may be merged.

        They are calm, with a digest, and not yet planned.
        """
        return np.flatnonzero(self.may_be_merged(first, end)) + first

    def may_be_merged(self, first: int = 0, end: int | None = None) -> Mask:
        """For each page of `columns` (of `first` to `end` - 1) whether it is one of the candidates."""
        part = slice(first, end)
        keep = self.columns.marked(KNOWN | PLANNED, KNOWN, part)
        if self._checksum:
            before = carry_over(self._previous, self.columns.address)
            same = before.known() & (before.digest == self.columns.digest)
            self.volatile = int((self.columns.known() & ~same).sum())
            keep &= same[part]
        return keep

    def plan(self, index: I64) -> None:
        """From now on the pages `index` are no candidates, until other pages come or go, or `plan_anew`."""
        self.columns.mark(PLANNED, index)
        self._some_merged = True

    def plan_anew(self) -> None:
        """All pages may be candidates again."""
        self.columns.unmark(PLANNED, slice(None))


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
    node = np.zeros(total, np.uint16) if any(tracker.by_node for tracker in trackers) else no_nodes()
    at = 0
    for number, (tracker, index) in enumerate(zip(trackers, chosen, strict=True)):
        part = slice(at, at + len(index))
        at += len(index)
        columns = tracker.columns
        target[part] = number
        columns.address.take(index, address[part])
        np.take(columns.state, index, out=kind[part])
        kind[part] &= np.uint8(KIND)
        np.take(columns.digest, index, out=digest[part])
        digest[part] ^= user_key(tracker)
        if len(node):
            np.take(columns.node, index, out=node[part])
        mine = address[part]
        if len(index):
            np.equal(mine[1:], mine[:-1] + np.uint64(PAGE_BYTES), out=joins[part][1:])
            joins[part][tracker.map.starts_of(mine)] = False
        if len(tracker.merged_low):
            watched[part] = inside(mine + np.uint64(PAGE_BYTES), tracker.merged_low, tracker.merged_high)
    return Pages(target, address, digest, kind, parted(joins, node), watched, node)


def user_key(tracker: Tracker) -> np.uint64:
    """What digests are changed by so that they differ between users, whose pages are never merged.

    The guard enforces that; here it only keeps useless candidates out of the plan.
    """
    return np.uint64((tracker.user + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)


def equals_elsewhere(wanted: U64, trackers: Sequence[Tracker], stable: StableTree) -> bool:
    """Whether a digest of `wanted` is that of two pages that are known, or of a slot of the store.

    `wanted` ascends, without repetitions, and each is the digest of a known page of `trackers`.
    """
    marks = np.zeros(MARKS, np.uint8)
    marks[wanted & np.uint64(MARKS - 1)] = 1
    count = library(COLUMN_KERNELS).count_equal
    pages = 0
    for tracker in trackers:
        columns = tracker.columns
        pages += count(columns.digest, columns.state, KNOWN, user_key(tracker), wanted, marks)
    return pages > len(wanted) or stable.holds_any(wanted)
