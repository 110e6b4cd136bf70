"""Kernel KSM as a benchmark drives it: at full speed, and afterwards as it was.

`FullSpeed` notes every setting before it changes any, and `restore` puts all of them
back.  It refuses a KSM that somebody uses.  Run by root.
Counters and settings: Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import NamedTuple

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.linux import procfs

FOLDER = Path("/sys/kernel/mm/ksm")
STOP, RUN, UNMERGE = "0", "1", "2"
# advisor_mode comes first: with an advisor, pages_to_scan cannot be written.
FULL_SPEED = {"advisor_mode": "none", "pages_to_scan": "1000000", "sleep_millisecs": "0"}
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


def setting(name: str) -> str:
    """What a file of /sys/kernel/mm/ksm says (of several words the chosen one); "" without such a file."""
    try:
        words = (FOLDER / name).read_text().split()
    except FileNotFoundError:
        return ""
    return next((word.strip("[]") for word in words if word.startswith("[")), " ".join(words))


def number(name: str) -> int:
    """A counter of KSM."""
    return int(setting(name))


def why_not() -> str:
    """Why KSM cannot be driven here, or nothing."""
    if os.geteuid():
        return "root is needed to drive kernel KSM"
    if not FOLDER.is_dir():
        return f"this kernel has no KSM ({FOLDER} is missing)"
    if not os.access(FOLDER / "run", os.W_OK):
        return f"{FOLDER}/run cannot be written"
    if setting("run") == RUN or number("pages_shared"):
        return "KSM is in use on this machine: stop it first (echo 2 > /sys/kernel/mm/ksm/run)"
    return ""


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, past ones too: utime + stime of /proc/PID/stat, in nanoseconds.

    0 when it is gone.  The clock id is that of clock_getcpuclockid(3).
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


def ksmd() -> int:
    """The pid of KSM's kernel thread."""
    for pid in procfs.pids():
        try:
            stat = procfs.stat(pid)
        except (TargetGone, NotPermitted):
            continue
        if stat.comm == "ksmd" and stat.flags & procfs.PF_KTHREAD:
            return pid
    raise SystemExit("there is no ksmd")


class Sample(NamedTuple):
    """One look at KSM while it works."""

    seconds: float
    cpu_seconds: float
    sharing: int


class FullSpeed:
    """KSM with its settings at full speed; stopped unless it is told to run.

    Making one changes nothing, and locks out others until this process ends.
    """

    def __init__(self) -> None:
        reason = why_not()
        if reason:
            raise SystemExit(reason)
        # Two at once would put back each other's settings.
        self._lock = os.open(FOLDER, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("another benchmark drives KSM now") from None
        self._original = {name: setting(name) for name in (*FULL_SPEED, "run")}
        self.pid = ksmd()

    def begin(self) -> None:
        """Stop KSM, if it is not stopped, and set it to full speed."""
        self._write("run", STOP)
        for name, value in FULL_SPEED.items():
            self._write(name, value)

    def restore(self) -> None:
        """Clear KSM and put everything back as it was; doing it twice does no harm."""
        self.clear()
        # advisor_mode after what cannot be written with an advisor, and run last.
        for name in (*reversed(FULL_SPEED), "run"):
            self._write(name, self._original[name])

    def _write(self, name: str, value: str) -> None:
        # Not every kernel has an advisor.
        if (FOLDER / name).exists():
            (FOLDER / name).write_text(value)

    def start(self) -> None:
        """Let ksmd work."""
        self._write("run", RUN)

    def stop(self) -> None:
        """Let it stop; what is merged stays so."""
        self._write("run", STOP)

    def clear(self) -> None:
        """Stop it and have it forget everything, processes that have ended in particular."""
        self._write("run", UNMERGE)
        self._write("run", STOP)

    def merge(self, expected: int, limit: float) -> tuple[float, float]:
        """Start, wait for the saving, and return (wall, CPU seconds of ksmd) until 99 % of it was there.

        It is there when `pages_sharing` is near the `expected` pages and no longer
        grows, or when it has not grown for two whole scans, or after `limit` seconds.
        """
        began, cpu_before = time.monotonic(), cpu_seconds(self.pid)
        samples = [Sample(0, 0, number("pages_sharing"))]
        grown_at, scans_then = 0.0, number("full_scans")
        self.start()
        while True:
            time.sleep(0.01)
            now = time.monotonic() - began
            sample = Sample(now, cpu_seconds(self.pid) - cpu_before, number("pages_sharing"))
            if sample.sharing > max(row.sharing for row in samples[-50:]):
                grown_at, scans_then = now, number("full_scans")
            samples.append(sample)
            near = sample.sharing >= 0.99 * expected and now - grown_at > 0.3
            settled = sample.sharing and number("full_scans") > scans_then + 2
            if near or settled or now > limit:
                break
        goal = 0.99 * max(row.sharing for row in samples)
        first = next(row for row in samples if row.sharing >= goal)
        return first.seconds, first.cpu_seconds
