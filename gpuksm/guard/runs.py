"""The merged runs of one target: sorted, disjoint address ranges with the slots they map."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpuksm.linux._libc import PAGE_SIZE


class Run(NamedTuple):
    """Addresses [start, end) map the store from `slot` on."""

    start: int
    end: int
    slot: int

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE

    @property
    def slot_end(self) -> int:
        return self.slot + self.pages

    def cut(self, start: int, end: int) -> Run:
        """The part inside [start, end), which must overlap."""
        low, high = max(start, self.start), min(end, self.end)
        return Run(low, high, self.slot + (low - self.start) // PAGE_SIZE)


def marked(marks: bytearray, mark: int) -> Iterator[tuple[int, int]]:
    """Where `mark` (0 or 1) stands in `marks`, a byte a page: (first, behind the last) of each stretch."""
    at = marks.find(mark)
    while at >= 0:
        end = marks.find(1 - mark, at)
        end = len(marks) if end < 0 else end
        yield at, end
        at = marks.find(mark, end)


class Runs:
    """A set of runs; adjacent runs with consecutive slots become one.

    Kept as columns, 24 bytes a run: a process whose equal pages are scattered has tens of thousands.
    """

    def __init__(self) -> None:
        self._starts, self._ends, self._slots = (array("Q") for _ in range(3))
        self.pages = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Run]:
        return map(Run, self._starts, self._ends, self._slots)

    def first_stretch(self, pages: int, at: int = 0) -> tuple[int, int] | None:
        """Where the first runs from address `at` on lie that follow each other without a gap, or None.

        At most `pages` of them.
        """
        index = bisect.bisect_right(self._ends, at)
        if index == len(self):
            return None
        start = end = max(at, self._starts[index])
        while index < len(self) and max(at, self._starts[index]) == end and end - start < pages * PAGE_SIZE:
            end = self._ends[index]
            index += 1
        return start, min(end, start + pages * PAGE_SIZE)

    def loose_ends(self) -> list[int]:
        """Ends of the runs behind which no other begins."""
        if not self._ends:
            return []
        return [end for end, start in zip(self._ends, [*self._starts[1:], 0], strict=True) if end != start]

    def stretches(self) -> list[tuple[int, int]]:
        """Where runs lie, adjacent ones as one."""
        ends = self.loose_ends()
        starts = [bisect.bisect_right(self._starts, end) for end in ends[:-1]]
        return list(zip([self._starts[index] for index in [0, *starts]] if ends else [], ends, strict=True))

    def at(self, address: int) -> Run | None:
        """The run that covers `address`."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._ends[index]:
            return self._get(index)
        return None

    def overlapping(self, start: int, end: int) -> list[Run]:
        """The parts of runs inside [start, end), in order."""
        index = bisect.bisect_right(self._starts, start) - 1
        if index < 0 or self._ends[index] <= start:
            index += 1
        found: list[Run] = []
        while index < len(self._starts) and self._starts[index] < end:
            found.append(self._get(index).cut(start, end))
            index += 1
        return found

    def remove(self, start: int, end: int) -> list[Run]:
        """Forget [start, end); the parts of runs that were there."""
        removed = self.overlapping(start, end)
        if not removed:
            return removed
        first = bisect.bisect_right(self._starts, removed[0].start) - 1
        last = bisect.bisect_right(self._starts, removed[-1].start) - 1
        left, right = self._get(first), self._get(last)
        rest = []
        if left.start < start:
            rest.append(left.cut(left.start, start))
        if right.end > end:
            rest.append(right.cut(end, right.end))
        self._put(first, last + 1, rest)
        self.pages -= sum(run.pages for run in removed)
        return removed

    def add(self, run: Run) -> None:
        """Put `run` in place of whatever was there."""
        self.remove(run.start, run.end)
        self.pages += run.pages
        first = last = bisect.bisect_left(self._starts, run.start)
        if first and self._joins(left := self._get(first - 1), run):
            first -= 1
            run = Run(left.start, run.end, left.slot)
        if last < len(self) and self._joins(run, right := self._get(last)):
            last += 1
            run = Run(run.start, right.end, run.slot)
        self._put(first, last, [run])

    def add_all(self, runs: Sequence[Run]) -> None:
        """`add` each of `runs` (ascending, disjoint); quick where nothing lies in or between them."""
        if not runs:
            return
        at = bisect.bisect_left(self._starts, runs[0].start)
        free = not at or self._ends[at - 1] <= runs[0].start
        if not free or (at < len(self._starts) and self._starts[at] < runs[-1].end):
            for run in runs:
                self.add(run)
            return
        joined = [runs[0]]
        for run in runs[1:]:
            if self._joins(joined[-1], run):
                joined[-1] = Run(joined[-1].start, run.end, joined[-1].slot)
            else:
                joined.append(run)
        # The first and the last may join what is there.
        inner = joined[1:-1]
        self._put(at, at, inner)
        self.pages += sum(run.pages for run in inner)
        self.add(joined[0])
        if len(joined) > 1:
            self.add(joined[-1])

    def add_columns(self, starts: array[int], ends: array[int], slots: array[int]) -> None:
        """`add` each of the runs behind each other that these columns are, of which none joins the next.

        Quick where nothing lies there.
        """
        at = bisect.bisect_left(self._starts, starts[0])
        free = not at or self._ends[at - 1] <= starts[0]
        if free and len(starts) > 2 and (at == len(self._starts) or self._starts[at] >= ends[-1]):
            # The first and the last may join what is there.
            self._starts[at:at], self._ends[at:at], self._slots[at:at] = starts[1:-1], ends[1:-1], slots[1:-1]
            self.pages += (ends[-2] - starts[1]) // PAGE_SIZE
            starts, ends, slots = starts[:: len(starts) - 1], ends[:: len(ends) - 1], slots[:: len(slots) - 1]
        for run in map(Run, starts, ends, slots):
            self.add(run)

    def _get(self, index: int) -> Run:
        return Run(self._starts[index], self._ends[index], self._slots[index])

    def _put(self, first: int, last: int, runs: Sequence[Run]) -> None:
        """Put `runs` in place of those from index `first` to `last` - 1."""
        starts, ends, slots = zip(*runs, strict=True) if runs else ((), (), ())
        self._starts[first:last] = array("Q", starts)
        self._ends[first:last] = array("Q", ends)
        self._slots[first:last] = array("Q", slots)

    @staticmethod
    def _joins(left: Run, right: Run) -> bool:
        return left.end == right.start and left.slot_end == right.slot
