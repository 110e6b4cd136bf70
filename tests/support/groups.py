"""Memory control groups that tests make, and take away again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import requirements_env

_IN_GROUP = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class Group(NamedTuple):
    """A memory control group of our own; `limit` and `usage` are its files."""

    path: Path
    limit: Path
    usage: Path

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What starts a program inside of it."""
        return inside(self.path)

    def used(self) -> int:
        """Bytes charged to it, anonymous and shared memory alone."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(self.usage.read_text()) - int(stat["inactive_file"]) - int(stat["active_file"])

    def allow(self, size: int) -> None:
        """Limit it to `size` bytes."""
        self.limit.write_text(str(size))

    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        name = "memory.events" if (self.path / "memory.events").exists() else "memory.oom_control"
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return int(dict(lines)["oom_kill"])


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[Group]:
    """A group of our own, of whichever version the machine has; gone in the end."""
    requirements_env.need("root")
    for base, limit, usage in (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("", "memory.max", "memory.current"),
    ):
        path = Path("/sys/fs/cgroup", base, f"gpuksm-test-{name}-{os.getpid()}")
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / limit).exists():
                yield Group(path, path / limit, path / usage)
                return
        finally:
            remove(path)
    requirements_env.require("memcg", "no memory control group can be made here")


def inside(path: Path) -> tuple[str, ...]:
    """What starts a program inside of the group at `path`."""
    return ("sh", "-c", _IN_GROUP, str(path))


def remove(path: Path) -> None:
    """Take a group away; what is in it goes to the one above."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for pid in (path / "cgroup.procs").read_text().split():
                (path.parent / "cgroup.procs").write_text(pid)
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.05)
