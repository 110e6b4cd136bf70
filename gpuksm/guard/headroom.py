"""Memory that must be there before we take it: for what unmerging gives back, and for the store.

Where it is not, the kernel kills somebody for it.  What a target gets back is charged to
its own memory control group, and it is the target that is killed there; new pages of the store are
charged to the guard's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gpuksm.errors import NotEnoughMemory
from gpuksm.guard.target import Target
from gpuksm.linux import cgroup, procfs
from gpuksm.linux._libc import PAGE_SIZE

_SPARE_BYTES = 16 << 20  # for the guard's own memory, where it shares a group with the store


def check_unmerge(targets: Iterable[Target]) -> None:
    """NotEnoughMemory when giving all of `targets` their memory back could have somebody killed for it."""
    needs: dict[Path, int] = {}
    rooms: dict[Path, int] = {}
    whole = 0
    for target in targets:
        need = target.runs.pages * PAGE_SIZE
        if not need:
            continue
        whole += need
        for group, room in cgroup.memory_room(target.pid).items():
            needs[group] = needs.get(group, 0) + need
            rooms[group] = room
    free = procfs.available_memory()
    if whole and whole > free * 9 // 10:
        raise NotEnoughMemory(
            f"unmerging needs {whole >> 20} MiB and only {free >> 20} MiB are available; "
            "free memory or unmerge some processes first (--pid)"
        )
    for group, need in needs.items():
        if need > rooms[group]:
            raise NotEnoughMemory(
                f"unmerging needs {need >> 20} MiB in the control group {group}, whose limit leaves "
                f"{rooms[group] >> 20} MiB, and the kernel would kill a process there; "
                "raise the limit or unmerge some processes first (--pid)"
            )


def store_pages() -> int:
    """Pages that the store may still grow by before a limit of the guard's own memory group is near."""
    rooms = cgroup.memory_room(os.getpid())
    return max(0, min(rooms.values(), default=1 << 62) - _SPARE_BYTES) // PAGE_SIZE
