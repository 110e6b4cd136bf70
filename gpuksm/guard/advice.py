"""What a target has said of its memory by madvise(2), and what is to be said again of what replaces it.

A mapping that takes another's place has none of its advice.  What must hold:
- Memory of MADV_DONTFORK stays so, merged, given back or zeroed by us: a virtual machine's children would
  else inherit its guest's memory.
- Memory that is not marked so never becomes it by us: a child would miss it.  So what is noted was read of
  the very mapping that is tracked (`Target.track`), what moves takes it along, and what is merged keeps
  what was noted before, as its mapping says only part of it.
- What is given back has the target's advice on huge pages and KSM again.

If we die: between a mapping and its advice stands only what the agent does whatever has become of us
(linked entries); our successor knows what was noted from the journal.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator

from gpuksm.linux import mappings

Range = tuple[int, int]
Advised = tuple[int, int, int]  # start, end, sum of the bits

DONTFORK = 1
# Bit, VmFlag (Documentation/filesystems/proc.rst) and what madvise(2) calls it.
_KINDS = ((DONTFORK, "dc", 10), (2, "hg", 14), (4, "nh", 15), (8, "mg", 12))


# All that agents ever say: MADV_DONTNEED and MADV_DONTDUMP as well.
CALLS = (4, 16, *(call for _, _, call in _KINDS))


@functools.cache
def bits_of(flags: frozenset[str]) -> int:
    """The advice that the VmFlags of a mapping tell of."""
    return sum(bit for bit, flag, _ in _KINDS if flag in flags)


def calls_for(bits: int) -> list[int]:
    """The second arguments of madvise(2) that say it again."""
    return [call for bit, _, call in _KINDS if bits & bit]


def told_by(entries: Iterable[mappings.SmapsVma]) -> Iterator[Advised]:
    """What /proc/PID/smaps tells of a process's own anonymous memory."""
    for entry in entries:
        if not entry.vma.inode and (bits := bits_of(entry.flags)):
            yield entry.vma.start, entry.vma.end, bits


class Advice:
    """The advice on each part of a target's memory that has any; ranges are page-aligned bytes."""

    def __init__(self, noted: Iterable[Advised] = ()) -> None:
        self._noted = _joined(noted)

    def __iter__(self) -> Iterator[Advised]:
        return iter(self._noted)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Advice) and self._noted == other._noted

    __hash__ = None  # type: ignore[assignment]

    def at(self, address: int) -> int:
        """The bits of what lies at `address`."""
        index = bisect.bisect_right(self._noted, (address, 1 << 64, 0)) - 1
        return self._noted[index][2] if index >= 0 and address < self._noted[index][1] else 0

    def until(self, address: int) -> int:
        """Where what holds at `address` ends, as far as it is noted."""
        index = bisect.bisect_right(self._noted, (address, 1 << 64, 0))
        if index and address < self._noted[index - 1][1]:
            return self._noted[index - 1][1]
        return self._noted[index][0] if index < len(self._noted) else 1 << 64

    def within(self, ranges: Iterable[Range]) -> Iterator[Advised]:
        """What is noted of `ranges` (sorted, disjoint)."""
        for low, high in ranges:
            index = max(0, bisect.bisect_right(self._noted, (low, 1 << 64, 0)) - 1)
            while index < len(self._noted) and self._noted[index][0] < high:
                start, end, bits = self._noted[index]
                if max(start, low) < min(end, high):
                    yield max(start, low), min(end, high), bits
                index += 1

    def moved(self, ranges: Iterable[Range], delta: int) -> Advice:
        """The same after `ranges` have moved by `delta`: of where they come from, and of what was where
        they go, nothing is known."""
        if not self._noted:
            return self
        gone = sorted(ranges)
        there = [(low + delta, high + delta) for low, high in gone]
        arrived = [(low + delta, high + delta, bits) for low, high, bits in self.within(gone)]
        return Advice([*outside(self._noted, sorted([*gone, *there])), *arrived])


def outside(noted: Iterable[Advised], ranges: list[Range]) -> Iterator[Advised]:
    """The parts of `noted` that lie in none of `ranges` (sorted; they may overlap)."""
    for start, end, bits in noted:
        at = start
        for low, high in ranges:
            if low >= end:
                break
            if at < low:
                yield at, low, bits
            at = max(at, high)
        if at < end:
            yield at, end, bits


def _joined(noted: Iterable[Advised]) -> list[Advised]:
    """`noted` in order, neighbours of the same bits as one."""
    joined: list[Advised] = []
    for start, end, bits in sorted(noted):
        last = joined[-1] if joined else None
        if last is not None and last[1] == start and last[2] == bits:
            joined[-1] = last[0], end, bits
        else:
            joined.append((start, end, bits))
    return joined
