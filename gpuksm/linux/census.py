"""Which ids the kernel has handed out, and whose they are."""

from __future__ import annotations

import os

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.linux import procfs


def newest_pid() -> int:
    """The id of the newest thread of our pid namespace: last field of /proc/loadavg (proc(5))."""
    with open("/proc/loadavg", "rb") as file:
        return int(file.read().split()[4])


def process_of_thread(tid: int) -> int | None:
    """The process that thread `tid` belongs to (Tgid), None when it is gone or hidden."""
    try:
        return int(procfs.status(tid)["Tgid"])
    except (TargetGone, NotPermitted, KeyError):
        return None


def thread_exists(pid: int, tid: int) -> bool:
    """Whether thread `tid` of process `pid` is still there."""
    return os.path.exists(f"/proc/{pid}/task/{tid}")


def count_vmas(pid: int) -> int:
    """Number of VMAs of process `pid`: lines of /proc/PID/maps."""
    with procfs.errors_of(pid), open(f"/proc/{pid}/maps", "rb", buffering=1 << 20) as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
