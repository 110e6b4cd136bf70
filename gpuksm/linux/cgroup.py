"""Which processes a control group holds, and how much memory its limit leaves a process.

Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.procs, which is the same in the
hierarchies of version 1; memory.max, memory.current, memory.stat) and
Documentation/admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 62  # version 1 says the largest number of pages that there is


class Limits(NamedTuple):
    """The files of one version: limit, usage, and the prefix of what counts groups below in memory.stat."""

    limit: str
    usage: str
    prefix: str


_VERSION_1 = Limits("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = Limits("memory.max", "memory.current", "")


def processes(path: str) -> list[int]:
    """Pids in the group at `path` and all groups below it, sorted.

    `path` is a directory, or relative to the cgroup mount, with or without a
    leading slash, as /proc/PID/cgroup shows it.  Raises FileNotFoundError when
    there is no such group.  Groups that vanish meanwhile count as empty.
    """
    group = Path(path)
    if not (group / "cgroup.procs").is_file():
        group = MOUNT / path.lstrip("/")
    if not (group / "cgroup.procs").is_file():
        raise FileNotFoundError(path)
    pids: set[int] = set()
    for folder, _, _ in os.walk(group):
        try:
            pids.update(map(int, Path(folder, "cgroup.procs").read_text().split()))
        except OSError:
            continue  # removed meanwhile, or a threaded group, whose processes its parent lists
    pids.discard(0)  # shown for processes of another pid namespace
    return sorted(pids)


def memory_room(pid: int, mount: Path = MOUNT) -> dict[Path, int]:
    """Bytes that each limited memory group of process `pid`, its parents included, still lets it have.

    File cache, which the kernel drops first, counts as room; swap does not.  Groups that cannot be seen
    (another cgroup namespace) are left out.
    """
    rooms: dict[Path, int] = {}
    for group, top, files in _memory_groups(pid, mount):
        while True:
            room = _room(group, files)
            if room is not None:
                rooms[group] = room
            if group == top or top not in group.parents:
                break
            group = group.parent
    return rooms


def _memory_groups(pid: int, mount: Path) -> Iterator[tuple[Path, Path, Limits]]:
    """The group of process `pid` in each hierarchy that may limit memory, and that hierarchy's root."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, files = mount / "memory", _VERSION_1
        elif not controllers:
            top, files = mount, _VERSION_2
        else:
            continue
        yield Path(os.path.normpath(top / path.lstrip("/"))), top, files


def _room(group: Path, files: Limits) -> int | None:
    """Bytes left below the limit of one group; None where it has none."""
    try:
        limit = (group / files.limit).read_text().strip()
        if limit == "max" or int(limit) > _UNLIMITED:
            return None
        usage = int((group / files.usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cache = sum(int(stat.get(f"{files.prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return max(0, int(limit) - usage + cache)
