"""What of the store a process maps, for who takes it over: read before it is frozen, looked at again within.

A process may have tens of thousands of mappings.  To make runs of them takes several times as long as to have
the kernel tell them, so inside the freeze only what it tells another way than before is made anew.

What must hold: after a `refresh` within the freeze the runs are what the text of /proc/PID/maps said then, as
if all of it had been read for the first time.  Nothing here changes the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from gpuksm import writers
from gpuksm.guard.runs import Run, Runs
from gpuksm.linux import mappings, procfs
from gpuksm.linux._libc import PAGE_SIZE


class Inventory:
    """The runs of process `pid`, which maps the store `inode`, as of now; TargetGone, NotPermitted."""

    def __init__(self, pid: int, inode: int) -> None:
        self._pid, self._inode = pid, inode
        self._text = procfs.read(pid, "maps")
        found = runs_in(self._text, inode)
        # What runs may change its mappings while they are told: one that has just been joined to the next is
        # told twice then, in part.  Nothing of such a text can be relied on.
        if any(one.end > other.start for one, other in itertools.pairwise(found)):
            self._text, found = b"", []
        self.runs = Runs()
        self.runs.add_all(found)

    def refresh(self) -> None:
        """Look again; TargetGone, NotPermitted."""
        before, now = self._text, procfs.read(self._pid, "maps")
        first, behind = _same_lines(before, now)
        for gone in runs_in(before[first : len(before) - behind], self._inode):
            self.runs.remove(gone.start, gone.end)
        self.runs.add_all(runs_in(now[first : len(now) - behind], self._inode))
        self._text = now


def runs_in(text: bytes, inode: int) -> list[Run]:
    """What lines of /proc/PID/maps tell of the store `inode`."""
    found = mappings.parse_file_mappings(text, inode, writers.STORE_PATH)
    return [Run(start, end, offset // PAGE_SIZE) for start, end, offset in found]


def _same_lines(before: bytes, now: bytes) -> tuple[int, int]:
    """How many bytes both have in common at their start and, behind that, at their end: whole lines."""
    most, ends = min(len(before), len(now)), (len(before), len(now))
    first = _alike(most, lambda low, high: before[low:high] == now[low:high])
    first = now.rfind(b"\n", 0, first) + 1
    behind = _alike(
        most - first,
        lambda low, high: before[ends[0] - high : ends[0] - low] == now[ends[1] - high : ends[1] - low],
    )
    start = now.find(b"\n", len(now) - behind) + 1 if behind else 0
    return first, len(now) - start if start else 0


def _alike(most: int, same: Callable[[int, int], bool]) -> int:
    """The most bytes, up to `most`, of which all are the `same`; each is looked at some two times."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if same(low, middle):
            low = middle
        else:
            high = middle - 1
    return low
