"""What memory really costs, before and after: the honest half of a scan's numbers.

Saved bytes are the fall of targets' own memory (anonymous and swap), less what was
spent on it: blocks of the store and page tables.  PSS of store pages is left out on
purpose: pages that nobody has touched since are in nobody's PSS (docs/hazards.md, 27).

The kernel counts each process's own pages, and says how many there are at once.  A page that
a fork shares is in more than one count, but is never merged either, so that no count falls by
it.  Where the counts are not exact, PSS is summed up over all pages: 9 ms a GiB, in which who
maps or unmaps memory there waits (59).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing.crew import usable_cpus
from gpuksm.linux import mappings, procfs

VMA_BYTES = 256  # vm_area_struct (192) and its share of the maple tree's nodes, /proc/slabinfo


_TRIES = 8


class Held(NamedTuple):
    """Bytes one process holds itself: anonymous memory and swap; and its page tables."""

    anonymous: int
    tables: int


def held(pid: int) -> Held | None:
    """What process `pid` holds now; None when it is gone."""
    try:
        said = procfs.status(pid)
        if counts_are_exact():
            anonymous = _kib(said, "RssAnon") + _kib(said, "VmSwap")
        else:
            rollup = mappings.smaps_rollup(pid)
            anonymous = rollup.get("Pss_Anon", 0) + rollup.get("SwapPss", 0)
    except (TargetGone, NotPermitted):
        return None
    return Held(anonymous, _kib(said, "VmPTE"))


def _kib(said: dict[str, str], name: str) -> int:
    return int(said.get(name, "0 kB").split()[0]) * 1024


@functools.cache
def counts_are_exact() -> bool:
    """Whether /proc/PID/status tells of each page.

    It does since Linux 6.16 (82241a83cd15) and where that was taken over; else it leaves out what each
    processor has counted but not yet handed on, some dozen pages.
    """
    area = mmap.mmap(-1, _TRIES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_NOHUGEPAGE)
    me, told = os.getpid(), 0
    for page in range(_TRIES):
        before = procfs.status(me)
        area[page * mmap.PAGESIZE] = 1
        # Other threads may take memory just then.
        told += _kib(procfs.status(me), "RssAnon") - _kib(before, "RssAnon") == mmap.PAGESIZE
    area.close()
    return told > _TRIES // 2


def snapshot(pids: Iterable[int]) -> dict[int, Held]:
    """{pid: what it holds} of all that run."""
    wanted = list(pids)
    # Where counts are not exact the kernel walks the page tables of each.
    with ThreadPoolExecutor(usable_cpus()) as crew:
        found = zip(wanted, crew.map(held, wanted), strict=True)
        return {pid: value for pid, value in found if value is not None}


def saved_bytes(before: dict[int, Held], after: dict[int, Held], store_growth: int) -> int:
    """Bytes saved; a process that is missing on one side (it exited) counts on neither."""
    both = before.keys() & after.keys()
    anonymous = sum(before[pid].anonymous - after[pid].anonymous for pid in both)
    tables = sum(after[pid].tables - before[pid].tables for pid in both)
    return anonymous - tables - store_growth


def cpu_seconds(pid: int) -> float:
    """CPU time process `pid` has used; 0 when it is gone."""
    try:
        stat = procfs.stat(pid)
    except TargetGone:
        return 0.0
    return (stat.utime + stat.stime) / procfs.TICKS_PER_SECOND
