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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import KIND_NORMAL, KIND_UNREADABLE, KIND_ZERO
from gpuksm.linux import pagemap, procfs
from gpuksm.scan.columns import (
    COLUMN_KERNELS,
    I64,
    MARKS,
    PAGE_BYTES,
    U64,
    count_pages,
    inside,
    ranges_within,
    stretches_of,
)
from gpuksm.scan.nodes import Nodes, apart, no_nodes, nodes_of, parted, taken
from gpuksm.scan.page_map import CALM_INVERTED, CALM_MASK, PRESENT_INVERTED, PRESENT_MASK, PageMap
from gpuksm.scan.runs import Pages
from gpuksm.scan.trees import StableTree

_FRESH_SECONDS = 0.02


class Columns(NamedTuple):
    """Pages of one target, ascending: address u8, digest u8, kind u1, known bool, calm bool, node u2.

    known: the digest holds; calm: the page was, when it was looked at last.  Pages that are not calm
    keep their place, as most come back: what was written costs no copy of all columns.  node: empty
    where nodes make no difference.
    """

    address: U64
    digest: U64
    kind: NDArray[np.uint8]
    known: NDArray[np.bool_]
    calm: NDArray[np.bool_]
    node: Nodes = no_nodes()


def columns_of(address: U64, by_node: bool = False) -> Columns:
    """Columns of calm pages of which nothing is known."""
    count = len(address)
    return Columns(
        address,
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint8),
        np.zeros(count, np.bool_),
        np.ones(count, np.bool_),
        np.zeros(count, np.uint16) if by_node else no_nodes(),
    )


def empty_columns() -> Columns:
    return columns_of(np.empty(0, np.uint64))


def carry_over(old: Columns, address: U64, by_node: bool = False) -> Columns:
    """Columns for `address` with the digests that `old` knows of the same pages."""
    new = columns_of(address, by_node)
    if len(old.address) and len(address):
        at = np.minimum(np.searchsorted(old.address, address), len(old.address) - 1)
        same = (old.address[at] == address) & old.known[at]
        new.digest[same] = old.digest[at[same]]
        new.kind[same] = old.kind[at[same]]
        new.known[same] = True
        if by_node:
            new.node[same] = old.node[at[same]]
    return new


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
        self._planned = np.empty(0, np.bool_)
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
            self.columns = columns_of(address, self.by_node)
            self.volatile = 0
            return
        began = time.monotonic()
        address = self.map.exclusive_in(*self.map.select(CALM_MASK, CALM_INVERTED))
        self.columns = carry_over(self.columns, address, self.by_node)
        if self.by_node:
            self._drop_moved()
        self._looked = began

    def _drop_moved(self) -> None:
        """Pages that have moved to another node since they were asked for have no digest."""
        known = np.flatnonzero(self.columns.known)
        now = self.ask_nodes(self.columns.address[known], self.columns.kind[known])
        self.columns.known[known[now != self.columns.node[known]]] = False

    def tell_nodes_apart(self, by_node: bool) -> None:
        """From now on pages of different nodes have different digests, or not; none is known any more."""
        self.by_node = by_node
        self.columns = columns_of(self.columns.address, by_node)._replace(calm=self.columns.calm)

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
        """The pages in the stretches [low, high) were written: they have no digest, and are not calm."""
        first = np.searchsorted(self.columns.address, low)
        counts = np.searchsorted(self.columns.address, high) - first
        index = np.repeat(first, counts) + ranges_within(counts)
        self.columns.known[index] = False
        self.columns.calm[index] = False
        if len(self._planned) == len(self.columns.address):
            self._planned[index] = False

    def prune(self) -> None:
        """Forget the pages that are not calm any more; TargetGone."""
        keep = np.zeros(len(self.columns.address), np.bool_)
        keep[self.still_calm(np.flatnonzero(self.columns.calm))] = True
        address, digest, kind, known, calm, node = self.columns
        self.columns = Columns(
            address[keep], digest[keep], kind[keep], known[keep], calm[keep], taken(node, keep)
        )

    def look_at(self, low: U64, high: U64) -> None:
        """Find the pages in the stretches [low, high) that are calm now; TargetGone."""
        began = time.monotonic()
        none_waits = not len(self.wanted())
        address = self.map.exclusive_in(*self.map.select_in(CALM_MASK, CALM_INVERTED, low, high))
        self._looked = began if none_waits else 0.0
        at = np.searchsorted(self.columns.address, address)
        here = at < len(self.columns.address)
        here[here] = self.columns.address[at[here]] == address[here]
        self.columns.calm[at[here]] = True
        if not here.all():
            at, (old, digest, kind, known, calm, node) = at[~here], self.columns
            self.columns = Columns(
                np.insert(old, at, address[~here]),
                np.insert(digest, at, 0),
                np.insert(kind, at, 0),
                np.insert(known, at, False),
                np.insert(calm, at, True),
                np.insert(node, at, 0) if self.by_node else node,
            )

    def wanted(self, first: int = 0, end: int | None = None) -> I64:
        """Indices into `columns` (of `first` to `end` - 1) of the calm pages that have no digest."""
        part = slice(first, end)
        return np.flatnonzero(self.columns.calm[part] & ~self.columns.known[part]) + first

    def was_just_looked_up(self) -> bool:
        """Whether all pages without a digest were looked up within the time that reading a batch takes."""
        return time.monotonic() - self._looked < _FRESH_SECONDS

    def still_calm(self, index: I64) -> I64:
        """Those of `index` whose pages are calm at this moment (just before they are read)."""
        if not len(index):
            return index
        address = self.columns.address[index]
        if self._unarmed:
            return index[self.map.exclusive(address)]
        first, pages = stretches_of(address)
        low = address[first]
        high = low + pages.astype(np.uint64) * np.uint64(PAGE_BYTES)
        return index[inside(address, *self.map.select_in(CALM_MASK, CALM_INVERTED, low, high))]

    def learn(self, index: I64, digest: U64, kind: NDArray[np.uint8]) -> None:
        """Enter what hashing the pages `index` gave."""
        known = kind != KIND_UNREADABLE
        if self.by_node:
            node = self.ask_nodes(self.columns.address[index], kind)
            self.columns.node[index] = node
            digest, known = apart(digest, node), known & ((node > 0) | (kind == KIND_ZERO))
        self.columns.digest[index] = digest
        self.columns.kind[index] = kind
        self.columns.known[index] = known

    def ask_nodes(self, address: U64, kind: NDArray[np.uint8]) -> Nodes:
        """The node + 1 of each of these pages, 0 for those that are gone, and for zeros, which need none."""
        node = np.zeros(len(address), np.uint16)
        wanted = kind == KIND_NORMAL
        with contextlib.suppress(TargetGone, NotPermitted):
            node[wanted] = nodes_of(self.pid, address[wanted])
        return node

    @property
    def unarmed(self) -> bool:
        """True without write tracking: nobody tells what was written."""
        return self._unarmed

    def candidates(self) -> I64:
        """Indices into `columns` of the pages that may be merged: calm, with a digest, not yet planned."""
        return np.flatnonzero(self.may_be_merged())

    def may_be_merged(self) -> NDArray[np.bool_]:
        """For each page of `columns` whether it is one of the candidates; not to be changed."""
        keep = self.columns.known
        if self._checksum:
            before = carry_over(self._previous, self.columns.address)
            keep = keep & before.known & (before.digest == self.columns.digest)
            self.volatile = int(self.columns.known.sum() - keep.sum())
        if len(self._planned) == len(keep):
            keep = keep & ~self._planned
        return keep

    def plan(self, index: I64) -> None:
        """From now on the pages `index` are no candidates, until `columns` change or `plan_anew`."""
        if len(self._planned) != len(self.columns.address):
            self._planned = np.zeros(len(self.columns.address), np.bool_)
        self._planned[index] = True

    @property
    def planned(self) -> bool:
        """Whether a page of `columns` was planned since then."""
        return len(self._planned) == len(self.columns.address) and bool(self._planned.any())

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
    node = np.zeros(total, np.uint16) if any(tracker.by_node for tracker in trackers) else no_nodes()
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
        pages += count(columns.digest, columns.known, user_key(tracker), wanted, marks)
    return pages > len(wanted) or stable.holds_any(wanted)
