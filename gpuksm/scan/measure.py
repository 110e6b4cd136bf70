"""What memory really costs, before and after: the honest half of a scan's numbers.

Saved bytes are the fall of what targets hold alone (anonymous PSS and swap),
less what was spent on it: blocks of the store and page tables.  PSS of store
pages is left out on purpose: pages that nobody has touched since are in nobody's
PSS (docs/hazards.md, 27).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing.crew import usable_cpus
from gpuksm.linux import mappings, procfs

VMA_BYTES = 256  # vm_area_struct (192) and its share of the maple tree's nodes, /proc/slabinfo


class Held(NamedTuple):
    """Bytes one process holds alone: anonymous memory and swap; and its page tables."""

    anonymous: int
    tables: int


def held(pid: int) -> Held | None:
    """What process `pid` holds now; None when it is gone."""
    try:
        rollup = mappings.smaps_rollup(pid)
        tables = procfs.status(pid).get("VmPTE", "0 kB").split()[0]
    except (TargetGone, NotPermitted):
        return None
    return Held(rollup.get("Pss_Anon", 0) + rollup.get("SwapPss", 0), int(tables) * 1024)


def snapshot(pids: Iterable[int]) -> dict[int, Held]:
    """{pid: what it holds} of all that run."""
    wanted = list(pids)
    # The kernel walks the page tables of each: 15 ms a GiB.
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
