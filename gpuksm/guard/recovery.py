"""A successor takes over: the ledger's memory, the userfaultfds, then a new agent for every target.

The dead guard's agents wait for a word to end; merged memory is still mapped and its
events wait in the userfaultfds that the keeper held, or the agents where the keeper has died
too (waiting.py).  Each target is taken
like a forked child: it gets an agent while frozen, what it really maps is what it
has merged, and events that had to be read to freeze it are dealt with before it
goes on.
"""

from __future__ import annotations

import contextlib
import os

from gpuksm.errors import GpuksmError
from gpuksm.guard import adoption, children, journal
from gpuksm.guard.guard import Guard
from gpuksm.linux import procfs

_UNKNOWN = (1).to_bytes(8, "little")  # a digest that is none


def recover(guard: Guard, inherited: dict[str, int]) -> None:
    """Rebuild `guard` from its journal and the descriptors that the keeper held."""
    orphans = _replay(guard)
    for start, slots, digests in guard.store.extents():
        if not any(digests):  # the private log was lost: what is filled must not pass for punched
            guard.store.set_digests(start, 0, _UNKNOWN * slots)
    for tag, fd in inherited.items():
        kind, _, number = tag.partition(":")
        if kind == "track":
            # Closing it ends its write tracking; the new agent brings a fresh one.
            guard.keep(tag, None)
            os.close(fd)
        elif kind == "event":
            orphan = orphans.setdefault(int(number), children.Orphan(0, None, int(number)))
            orphan.uffd_event = fd
        elif kind == "word":
            orphan = orphans.setdefault(int(number), children.Orphan(0, None, int(number)))
            orphan.word = fd
    for child in guard.attic.inside - orphans.keys():
        guard.attic.remove(child)  # let go; with it there that process would wait for us for ever
    guard.reserve_ids(max(orphans, default=0))
    for orphan in orphans.values():
        if orphan.uffd_event is not None:
            guard.orphans.append(orphan)
    adoption.adopt_orphans(guard)
    adoption.find_strays(guard, procfs.pids())
    adoption.adopt_orphans(guard)
    guard.reclaimer.soon()  # the guard before us may have had slots to free


def _replay(guard: Guard) -> dict[int, children.Orphan]:
    """Extents, registrations and what is known of each target that still lives."""
    orphans: dict[int, children.Orphan] = {}
    for record in guard.journal.replay():
        if record.kind == journal.BORN:
            guard.seed = record.a
        elif record.kind == journal.EXTENT:
            guard.store.adopt(record.a, record.b, record.c, record.target)
        elif record.kind == journal.NEXT:
            guard.store.reserve(record.a)
        elif record.kind == journal.DIGESTS:
            with contextlib.suppress(KeyError):  # of an extent that is gone, which the ledger has forgotten
                guard.store.set_digests(record.a, 0, record.column)
        elif record.kind == journal.HOME:
            guard.store_born = record.c
        elif record.kind == journal.TARGET:
            pid = record.a if _same_process(record.a, record.b) else None
            before = orphans.get(record.target)
            orphans[record.target] = children.Orphan(0, None, record.target, pid)
            orphans[record.target].discards = before.discards if before else []
        elif record.kind == journal.COPY and record.target in orphans:
            orphans[record.target].copy = (record.a, record.b, record.c) if record.b else None
        elif record.kind == journal.COREDUMP and record.target in orphans:
            orphans[record.target].coredump_filter = record.a
        elif record.kind == journal.FILTERS and record.target in orphans:
            orphans[record.target].filters = record.a
        elif record.kind == journal.ADVICE and record.target in orphans:
            advised = (record.a, record.b, record.c)
            orphans[record.target].advice = [*orphans[record.target].advice, advised] if record.b else []
        elif record.kind == journal.GONE:
            orphans.pop(record.target, None)
        elif record.kind == journal.DISCARD:
            orphan = orphans.setdefault(record.target, children.Orphan(0, None, record.target))
            orphan.discards = [*orphan.discards, (record.a, record.b)] if record.b else []
        elif record.kind == journal.BORDER and record.target in orphans:
            orphans[record.target].borders.add(record.a)
        elif record.kind == journal.REGISTER:
            guard.registry.note(record.a, None if record.c == 0 else [(record.b, record.c)])
        elif record.kind == journal.UNREGISTER:
            guard.registry.drop(record.a, None if record.c == 0 else [(record.b, record.c)])
    guard.journal.trim()
    guard.registry.listed()  # forgets those that have exited
    return orphans


def _same_process(pid: int, start_time: int) -> bool:
    try:
        return procfs.stat(pid).start_time == start_time
    except GpuksmError:
        return False
