"""Freeing slots that nobody maps any more.

What must hold (docs/hazards.md, 2): a slot is punched only when no process that
can be seen maps it, none could that is hidden from us, and no target's ledger has it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from gpuksm import writers
from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.guard.store import Store
from gpuksm.linux import mappings, procfs
from gpuksm.linux._libc import PAGE_SIZE

_AGAIN_SECONDS = 1.0
# Reading the maps of all processes takes a while: no more often, as long as nobody has ended.
_EVERY_SECONDS = 60.0


# Slots [start, end) that targets map as far as they have told; None while a child waits to be taken in.
Ledger = Callable[[], Iterable[tuple[int, int]] | None]


class Reclaimer:
    """Frees slots soon after a target is gone, and some time after targets have dropped merged pages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._due: float | None = None
        self._last = time.monotonic()
        self._known = 0

    def soon(self) -> None:
        """A target is gone, or was unmerged."""
        self._due = time.monotonic()

    def tick(self, born: int, happened: int, ledger: Ledger, breathe: Callable[[], None]) -> None:
        """Reclaim when it is due; `happened` counts what may have freed slots besides."""
        now = time.monotonic()
        if self._due is None and happened != self._known and now >= self._last + _EVERY_SECONDS:
            self._due = now
        if self._due is not None and now >= self._due:
            self._last, self._known = now, happened
            self._due = None  # who is served meanwhile may say `soon`
            if reclaim(self._store, born, ledger, breathe) is None:
                self._due = now + _AGAIN_SECONDS


def reclaim(store: Store, born: int, ledger: Ledger, breathe: Callable[[], None]) -> int | None:
    """Punch every slot without a mapping; slots freed, None when it has to wait.

    What a target maps by the ledger counts as mapped, too: it may have unmapped or moved that since, or
    forked, with the event waiting for us, and a child that is not to be seen yet maps it.  For the same
    reason others are served (`breathe`) only once all was read.

    `born` is when the store was made, in clock ticks since boot: only younger processes
    can have inherited a mapping that we are not allowed to see.
    """
    held = ledger()
    if held is None:
        return None
    pieces = list(held)
    for pid in procfs.pids():
        try:
            for start, end, offset in mappings.file_mappings(pid, store.inode, writers.STORE_PATH):
                first = offset // PAGE_SIZE
                pieces.append((first, first + (end - start) // PAGE_SIZE))
        except TargetGone:
            continue
        except NotPermitted:
            if _could_hold(pid, born):
                return None
    return store.free(_united(pieces), breathe)


def _could_hold(pid: int, born: int) -> bool:
    """A hidden process may map our store when it is younger and any of its user ids is ours."""
    try:
        if procfs.stat(pid).start_time < born:
            return False
        return str(os.geteuid()) in procfs.status(pid)["Uid"].split()
    except (TargetGone, KeyError):
        return False


def _united(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    united: list[tuple[int, int]] = []
    for low, high in sorted(pieces):
        if united and low <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], high))
        else:
            united.append((low, high))
    return united
