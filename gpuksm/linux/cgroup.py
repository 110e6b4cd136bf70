"""Which processes a control group holds.

Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.procs); the file is the
same in the hierarchies of version 1.
"""

from __future__ import annotations

import os
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


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
