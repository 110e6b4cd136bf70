"""What /proc tells a test about a process: states, descriptors, mappings, PSS.

Read here independently of `gpuksm.linux.procfs`, so that a mistake there cannot
hide itself from the tests.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STORE_PREFIX = "/memfd:gpuksm"


class Mapping(NamedTuple):
    """One line of /proc/PID/maps; `start` and `end` in bytes."""

    start: int
    end: int
    perms: str
    path: str

    @property
    def pages(self) -> int:
        return (self.end - self.start) // 4096


def mappings(pid: int) -> list[Mapping]:
    """All mappings of `pid` in address order."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        found.append(Mapping(start, end, fields[1], fields[5] if len(fields) > 5 else ""))
    return found


def store_mappings(pid: int, start: int = 0, end: int = 1 << 63) -> list[Mapping]:
    """The private mappings of the store that overlap [start, end)."""
    return [
        mapping
        for mapping in mappings(pid)
        if mapping.path.startswith(STORE_PREFIX)
        and mapping.perms[3] == "p"
        and mapping.start < end
        and mapping.end > start
    ]


def merged_pages(pid: int, start: int = 0, end: int = 1 << 63) -> int:
    """Pages of [start, end) that are mapped from the store (written ones included)."""
    return sum(
        (min(mapping.end, end) - max(mapping.start, start)) // 4096
        for mapping in store_mappings(pid, start, end)
    )


def private_pages(pid: int, start: int, end: int) -> int:
    """Pages of [start, end) of which `pid` has a copy of its own in memory: present and anonymous."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        file.seek(start // 4096 * 8)
        entries = struct.unpack(f"<{(end - start) // 4096}Q", file.read((end - start) // 4096 * 8))
    return sum(entry >> 61 & 0b101 == 0b100 for entry in entries)


def rollup(pid: int) -> dict[str, int]:
    """/proc/PID/smaps_rollup in bytes by name."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values


def thread_states(pid: int) -> dict[int, str]:
    """State letter of every thread; empty once the process is gone."""
    states = {}
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            states[int(tid)] = _state(Path(f"/proc/{pid}/task/{tid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return states


def stopped_threads(pid: int) -> list[int]:
    """Threads that somebody left stopped or traced."""
    return [tid for tid, state in thread_states(pid).items() if state in "tT"]


def alive(pid: int) -> bool:
    """True while `pid` exists and is no zombie."""
    try:
        return _state(Path(f"/proc/{pid}/stat")) not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]


@dataclass(frozen=True)
class Footprint:
    """What must be as before once gpuksm has left a process."""

    threads: int
    descriptors: tuple[tuple[int, str], ...]
    areas: tuple[tuple[int, int, str, str], ...]
    userfault_flags: int
    coredump_filter: str
    tracer: str


def left_behind(before: Footprint, after: Footprint) -> list[str]:
    """How `after` differs from `before`, in words; empty when gpuksm left nothing behind."""
    said = []
    for name in ("threads", "descriptors", "userfault_flags", "coredump_filter", "tracer"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            said.append(f"{name}: {old} -> {new}")
    for text, areas in (
        ("mapping gone", set(before.areas) - set(after.areas)),
        ("mapping new", set(after.areas) - set(before.areas) - _code_page(before, after)),
    ):
        said += [f"{text}: {start:#x}-{end:#x} {perms} {path}" for start, end, perms, path in sorted(areas)]
    return said


def await_nothing_left(pid: int, before: Footprint, seconds: float = 10) -> None:
    """Wait until `pid` is as it was `before`: an agent takes a moment to end."""
    deadline = time.monotonic() + seconds
    while left := left_behind(before, footprint(pid)):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def _code_page(before: Footprint, after: Footprint) -> set[tuple[int, int, str, str]]:
    """The one page of code that an agent cannot unmap because it ends on it; the next agent does."""
    new = set(after.areas) - set(before.areas)
    pages = {area for area in new if area[2:] == ("r-xp", "") and area[1] - area[0] == 4096}
    return pages if len(pages) == 1 else set()


def footprint(pid: int) -> Footprint:
    """The traces that a merge could leave in `pid`; anonymous neighbours are joined."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Footprint(
        threads=int(status["Threads"]),
        descriptors=tuple(sorted(descriptors(pid).items())),
        areas=_joined(pid),
        userfault_flags=userfault_flags(pid),
        coredump_filter=Path(f"/proc/{pid}/coredump_filter").read_text().strip(),
        tracer=status["TracerPid"].strip(),
    )


def _joined(pid: int) -> tuple[tuple[int, int, str, str], ...]:
    joined: list[tuple[int, int, str, str]] = []
    for mapping in mappings(pid):
        last = joined[-1] if joined else (0, 0, "", "")
        if last[1:] == (mapping.start, mapping.perms, mapping.path) and not mapping.path.startswith("/"):
            joined[-1] = (last[0], mapping.end, mapping.perms, mapping.path)
        else:
            joined.append((mapping.start, mapping.end, mapping.perms, mapping.path))
    return tuple(joined)


def userfault_flags(pid: int) -> int:
    """How many VMAs are registered with some userfaultfd ("um", "uw", "ui" in VmFlags)."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    flags = [set(line.split()[1:]) for line in lines if line.startswith("VmFlags:")]
    return sum(bool(each & {"um", "uw", "ui"}) for each in flags)


def anonymous_code(pid: int) -> list[Mapping]:
    """Executable mappings of no file and no name: agents' code pages, in victims that make none."""
    return [mapping for mapping in mappings(pid) if "x" in mapping.perms and not mapping.path]


def descriptors(pid: int) -> dict[int, str]:
    """What each descriptor of `pid` is open on; without those that it closes meanwhile."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found


def waits_in(pid: int) -> str:
    """The kernel function that the first thread of `pid` sleeps in; `0` while it runs."""
    return Path(f"/proc/{pid}/wchan").read_text()


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    """The pid of a process that does nothing any more, so that nothing of it changes."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            deadline = time.monotonic() + 20
            while "nanosleep" not in waits_in(child.pid):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield child.pid
        finally:
            child.kill()
