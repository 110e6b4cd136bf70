"""Which processes and ranges asked to be merged; written to the journal, so a successor knows."""

from __future__ import annotations

import os
from typing import Any

from gpuksm.errors import GuardError
from gpuksm.guard.journal import REGISTER, UNREGISTER, Journal

Ranges = list[tuple[int, int]] | None  # None: the whole process


class Registry:
    """Registered ranges by process."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ranges: dict[int, Ranges] = {}

    def add(self, pid: int, ranges: Ranges) -> None:
        """Remember what a process asks to have merged; ranges add up."""
        self.note(pid, ranges)
        for start, end in ranges or [(0, 0)]:
            self._journal.append(REGISTER, 0, pid, start, end)

    def note(self, pid: int, ranges: Ranges) -> None:
        """`add` without the journal (replay)."""
        known = self._ranges.get(pid, [])
        self._ranges[pid] = None if ranges is None or known is None else known + ranges

    def remove(self, pid: int, ranges: Ranges) -> None:
        """Forget ranges, or with None all; GuardError when the process is not registered."""
        if pid not in self._ranges:
            raise GuardError(f"process {pid} is not registered; see `gpuksm status`")
        self.drop(pid, ranges)
        for start, end in ranges or [(0, 0)]:
            self._journal.append(UNREGISTER, 0, pid, start, end)

    def drop(self, pid: int, ranges: Ranges) -> None:
        """`remove` without the journal (replay)."""
        known = self._ranges.get(pid)
        left = [] if ranges is None or known is None else [piece for piece in known if piece not in ranges]
        self._ranges[pid] = left
        if not left:
            del self._ranges[pid]

    def entries(self) -> list[tuple[int, int, int]]:
        """(pid, start, end) of all that is registered; 0, 0 for a whole process."""
        return [
            (pid, start, end) for pid, ranges in self._ranges.items() for start, end in ranges or [(0, 0)]
        ]

    def listed(self) -> list[dict[str, Any]]:
        """What is registered, by processes that still live."""
        for pid in [pid for pid in self._ranges if not os.path.exists(f"/proc/{pid}")]:
            del self._ranges[pid]
        return [{"pid": pid, "ranges": ranges} for pid, ranges in self._ranges.items()]
