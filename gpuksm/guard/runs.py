"""The merged runs of one target: sorted, disjoint address ranges with the slots they map."""

from __future__ import annotations

import bisect
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


class Runs:
    """A set of runs; adjacent runs with consecutive slots become one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[Run] = []
        self.pages = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def first_stretch(self, pages: int) -> tuple[int, int]:
        """Where the first runs lie that follow each other without a gap: at most so many pages."""
        start = end = self._starts[0]
        for run in self._runs:
            if run.start != end or end - start >= pages * PAGE_SIZE:
                break
            end = run.end
        return start, min(end, start + pages * PAGE_SIZE)

    def at(self, address: int) -> Run | None:
        """The run that covers `address`."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._runs[index].end:
            return self._runs[index]
        return None

    def overlapping(self, start: int, end: int) -> list[Run]:
        """The parts of runs inside [start, end), in order."""
        index = bisect.bisect_right(self._starts, start) - 1
        if index < 0 or self._runs[index].end <= start:
            index += 1
        found: list[Run] = []
        while index < len(self._runs) and self._starts[index] < end:
            found.append(self._runs[index].cut(start, end))
            index += 1
        return found

    def remove(self, start: int, end: int) -> list[Run]:
        """Forget [start, end); the parts of runs that were there."""
        removed = self.overlapping(start, end)
        if not removed:
            return removed
        first = bisect.bisect_right(self._starts, removed[0].start) - 1
        last = bisect.bisect_right(self._starts, removed[-1].start) - 1
        left, right = self._runs[first], self._runs[last]
        rest = []
        if left.start < start:
            rest.append(left.cut(left.start, start))
        if right.end > end:
            rest.append(right.cut(end, right.end))
        self._runs[first : last + 1] = rest
        self._starts[first : last + 1] = [run.start for run in rest]
        self.pages -= sum(run.pages for run in removed)
        return removed

    def add(self, run: Run) -> None:
        """Put `run` in place of whatever was there."""
        self.remove(run.start, run.end)
        self.pages += run.pages
        index = bisect.bisect_left(self._starts, run.start)
        if index and self._joins(self._runs[index - 1], run):
            index -= 1
            run = Run(self._runs[index].start, run.end, self._runs[index].slot)
            del self._runs[index], self._starts[index]
        if index < len(self._runs) and self._joins(run, self._runs[index]):
            run = Run(run.start, self._runs[index].end, run.slot)
            del self._runs[index], self._starts[index]
        self._runs.insert(index, run)
        self._starts.insert(index, run.start)

    def add_all(self, runs: Sequence[Run]) -> None:
        """`add` each of `runs` (ascending, disjoint); quick where nothing lies in or between them."""
        if not runs:
            return
        at = bisect.bisect_left(self._starts, runs[0].start)
        free = not at or self._runs[at - 1].end <= runs[0].start
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
        self._runs[at:at] = inner
        self._starts[at:at] = [run.start for run in inner]
        self.pages += sum(run.pages for run in inner)
        self.add(joined[0])
        if len(joined) > 1:
            self.add(joined[-1])

    @staticmethod
    def _joins(left: Run, right: Run) -> bool:
        return left.end == right.start and left.slot_end == right.slot
