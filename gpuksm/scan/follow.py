"""What a resident scanner remembers of a target between rounds, so that a settled one costs next to nothing.

Arming tells what was written since the last round.  What had been written before
and is not in that list was calm for a whole round: only that is looked up, read
and hashed.  Memory is watched in pieces of a fixed size; one of which much was
written in several visits in a row is visited less and less often (smart scan), since arming
it makes each of its pages cost its writer a fault.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuksm.linux import procfs
from gpuksm.scan.columns import I64, PAGE_BYTES, U64, intersect, ranges_within, subtract
from gpuksm.scan.engine import Target
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.types import TargetRequest

PIECE_SHIFT = 23  # 8 MiB
# Fewer written pages cost too little to look at that their neighbours should wait for it.
_BUSY_PAGES = 64
_MAX_LEVEL = 7  # at most 32 rounds are skipped
# Reading a target's map again may take this share of the time at most.
_REFRESH_SHARE = 0.05


def no_stretches() -> tuple[U64, U64]:
    return np.empty(0, np.uint64), np.empty(0, np.uint64)


class Pieces:
    """Pieces of memory by number (address >> PIECE_SHIFT): how often they were busy in a row.

    `number` u8 ascending; `level` how many visits in a row found many pages written; `due` the
    round of the next visit; `written` pages found written at the last.
    """

    def __init__(self) -> None:
        self.number = np.empty(0, np.uint64)
        self.level = np.empty(0, np.int64)
        self.due = np.empty(0, np.int64)
        self.written = np.empty(0, np.int64)

    def cover(self, low: U64, high: U64) -> None:
        """Watch the pieces that the stretches [low, high) touch; what is known of them stays."""
        first = low >> np.uint64(PIECE_SHIFT)
        counts = (((high - np.uint64(1)) >> np.uint64(PIECE_SHIFT)) - first + np.uint64(1)).astype(np.int64)
        number = np.unique(np.repeat(first, counts) + ranges_within(counts).astype(np.uint64))
        columns = [np.zeros(len(number), np.int64) for _ in range(3)]
        if len(self.number):
            at = np.minimum(np.searchsorted(self.number, number), len(self.number) - 1)
            same = self.number[at] == number
            for new, old in zip(columns, (self.level, self.due, self.written), strict=True):
                new[same] = old[at[same]]
        self.number = number
        self.level, self.due, self.written = columns

    def visited(self, round_number: int, smart: bool) -> NDArray[np.bool_]:
        """Which pieces this round visits."""
        if not smart:
            return np.ones(len(self.number), np.bool_)
        return np.asarray(self.due <= round_number)

    def stretches(self, chosen: NDArray[np.bool_]) -> tuple[U64, U64]:
        """The chosen pieces as stretches, neighbours joined."""
        number = self.number[chosen]
        if not len(number):
            return no_stretches()
        first = np.concatenate(([True], np.diff(number) != 1))
        last = np.append(first[1:], True)
        shift = np.uint64(PIECE_SHIFT)
        return number[first] << shift, (number[last] + np.uint64(1)) << shift

    def note(self, round_number: int, chosen: NDArray[np.bool_], low: U64, high: U64, *, first: bool) -> None:
        """Enter what the visit to `chosen` found written; `first`: since for ever, which says nothing."""
        pages = np.zeros(len(self.number), np.int64)
        if not first:
            begin = self.number << np.uint64(PIECE_SHIFT)
            parts_low, parts_high = intersect(low, high, begin, begin + np.uint64(1 << PIECE_SHIFT))
            of = np.searchsorted(self.number, parts_low >> np.uint64(PIECE_SHIFT))
            sizes = ((parts_high - parts_low) // PAGE_BYTES).astype(np.int64)
            pages = np.bincount(of, sizes, len(self.number)).astype(np.int64)
        self.written[chosen] = pages[chosen]
        level = np.where(pages >= _BUSY_PAGES, np.minimum(self.level + 1, _MAX_LEVEL), 0)
        self.level[chosen] = level[chosen]
        # Busy twice in a row: 1 round is skipped, then 2, 4, 8...
        skip = np.where(level > 1, np.int64(1) << np.maximum(level - 2, 0), 0)
        self.due[chosen] = (round_number + 1 + skip)[chosen]


@dataclass
class Follower:
    """One target over the rounds of a session."""

    target: Target
    request: TargetRequest
    start_time: int
    pieces: Pieces = field(default_factory=Pieces)
    pending: tuple[U64, U64] = field(default_factory=no_stretches)  # written, not yet known to be calm
    changed: bool = False
    visits: int = 0
    skipped_pieces: int = 0
    _size: int = -1
    _refresh_at: float = 0.0
    _visiting: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    @property
    def tracker(self) -> Tracker:
        assert self.target.tracker is not None
        return self.target.tracker

    def wants_refresh(self) -> bool:
        """Whether its memory map has changed, as far as can be told without reading it; TargetGone."""
        size = procfs.memory_size(self.target.pid)
        self.changed |= size != self._size
        self._size = size
        return self.changed and time.monotonic() >= self._refresh_at

    def refreshed(self, regions: list[list[int]], merged: list[list[int]], seconds: float) -> None:
        """Take over what the guard says is there now."""
        low, high = self.tracker.map.low, self.tracker.map.high
        self.tracker.set_regions(regions, merged)
        if self.visits:
            new = subtract(self.tracker.map.low, self.tracker.map.high, low, high)
            self.pending = _union(subtract(*self.pending, *new), new)
        self.cover()
        self.changed = False
        self._refresh_at = time.monotonic() + seconds / _REFRESH_SHARE

    def cover(self) -> None:
        """Watch all of the regions in pieces."""
        self.pieces.cover(self.tracker.map.low, self.tracker.map.high)

    def choose(self, round_number: int, smart: bool) -> U64 | None:
        """Stretches (n, 2) to arm in this round; None for everything."""
        self._visiting = self.pieces.visited(round_number, smart)
        self.skipped_pieces = int(len(self._visiting) - self._visiting.sum())
        if not self.skipped_pieces:
            return None
        return np.stack(self.pieces.stretches(self._visiting), axis=1)

    def armed(self, round_number: int, written: U64) -> None:
        """Arming found `written` (n, 2) in the pieces that were chosen: find out what has become calm.

        Only that is looked up; TargetGone.
        """
        low, high = written[:, 0].copy(), written[:, 1].copy()
        visited = self.pieces.stretches(self._visiting)
        if not self.visits:
            # What an earlier scanner has armed is not reported: everything may become calm now.
            self.pending = self.tracker.map.low, self.tracker.map.high
        waiting = intersect(*self.pending, *visited)
        elsewhere = subtract(*self.pending, *visited)
        # At the first visit it is not known since when a page has been calm.
        calm = subtract(*waiting, low, high) if self.visits else no_stretches()
        self.pending = _union(elsewhere, (low, high) if self.visits else waiting)
        self.pieces.note(round_number, self._visiting, low, high, first=not self.visits)
        self.visits += 1
        self.tracker.drop(low, high)
        if len(calm[0]):
            self.tracker.look_at(*calm)

    @property
    def volatile(self) -> int:
        """Pages that were written between the last two looks at them."""
        return int(self.pieces.written.sum())


def _union(one: tuple[U64, U64], other: tuple[U64, U64]) -> tuple[U64, U64]:
    """Two disjoint sets of stretches as one, in order."""
    low, high = np.concatenate((one[0], other[0])), np.concatenate((one[1], other[1]))
    order: I64 = np.argsort(low, kind="stable")
    return low[order], high[order]
