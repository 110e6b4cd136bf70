"""Taking processes over that have no agent: forked children, and the targets of the guard before us.

What must hold: a userfaultfd is served as a process's own only if it is (identity.py); one that
cannot be taken over yet stays an orphan, its events waiting.  The agent of the guard before us
ends only when its userfaultfd is where our death and the keeper's leaves it (attic.py).

If we die: our successor has the same orphans from the keeper, or from the agents.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpuksm.errors import GpuksmError, NotPermitted, TargetGone, Unsupported
from gpuksm.guard import callers, identity, sandbox
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.attach import attach
from gpuksm.guard.children import Orphan, maps_store
from gpuksm.guard.freeze import FreezeFailed
from gpuksm.guard.leftovers import older_agents, unmap_leftovers
from gpuksm.guard.target import set_coredump_filter
from gpuksm.linux import mappings, procfs, uffd

if TYPE_CHECKING:
    from gpuksm.guard.guard import Guard
    from gpuksm.guard.target import Target

_RETRY_SECONDS = 0.05
_SEARCHES = 40
_SETTLE_SECONDS = 2.0
_DISMISSAL_SECONDS = 0.05
_WATCHED = {"um", "uw", "ui"}  # of VmFlags: registered for missing, write-protected or minor faults


def adopt_orphans(guard: Guard) -> None:
    """Try to adopt every orphan that is due; those that cannot be yet stay, their events waiting."""
    for orphan in list(guard.orphans):
        if time.monotonic() < orphan.due:
            continue
        if orphan.uffd_event is not None and not uffd.memory_exists(orphan.uffd_event):
            _let_go(guard, orphan)
            continue
        if orphan.pid is not None and _is_anothers(orphan):
            orphan.pid = None
        if orphan.pid is None:
            orphan.pid = _search(guard, orphan)
            orphan.guessed = True
        if orphan.pid is None and (orphan.uffd_event is not None or orphan.tries < _SEARCHES):
            # Not visible yet, or one of several: its events wait.
            orphan.tries += 1
            orphan.due = time.monotonic() + _RETRY_SECONDS
            continue
        if orphan.pid is None or not _alive(orphan.pid):
            _let_go(guard, orphan)
            continue
        guard.orphans.remove(orphan)
        orphan.guard = guard
        _dismiss_agent(guard, orphan)
        try:
            attachment = attach(
                orphan.pid,
                guard.gifts(),
                guard.census,
                fork_events=guard.privileged,
                tethered=orphan.tethered,
                child=orphan,
                believed=orphan.filters,
            )
            if not guard.privileged:
                guard.tether.hold(guard.targets[orphan.id])
            with contextlib.suppress(OSError, TargetGone, AgentStuck):
                # Of the dead guard's agent, or inherited from the parent.
                unmap_leftovers(attachment, guard.targets[orphan.id].memory)
        except (TargetGone, sandbox.Forbidden):
            _let_go(guard, orphan)
        except (FreezeFailed, AgentStuck, Unsupported, NotPermitted, OSError):
            _undo(guard, orphan)
            if not maps_store(guard, orphan.pid):
                _let_go(guard, orphan)  # it called exec, or unmapped everything
                continue
            if orphan.guessed:
                orphan.pid = None
            orphan.tries += 1
            orphan.due = time.monotonic() + _RETRY_SECONDS
            guard.orphans.append(orphan)


def _undo(guard: Guard, orphan: Orphan) -> None:
    """An adoption has failed half-way: the orphan has its userfaultfd, and nothing else is left of it."""
    target = guard.targets.pop(orphan.id, None)
    if target is None:
        return
    orphan.uffd_event = target.link.uffd_event
    guard.attic.put(orphan.id, target.link.uffd_event)
    target.close(but_event=True)
    guard.keep(f"track:{orphan.id}", None)
    guard.keep(f"word:{orphan.id}", None)


def find_strays(guard: Guard, pids: Iterable[int]) -> None:
    """Make orphans of those of `pids` that map the store and that nobody knows or watches.

    They are children whose userfaultfd was lost with guard and keeper (hazard 14): read, and not yet in
    the attic, or just taken out of it.  A child whose fork event waits is not to be seen yet, and
    one that somebody has a userfaultfd of shows that in its mappings.
    """
    known = {target.pid for target in guard.targets.values()} | {other.pid for other in guard.orphans}
    for pid in pids:
        if pid in known or pid == os.getpid() or not maps_store(guard, pid):
            continue
        with contextlib.suppress(GpuksmError):
            if not _is_watched(guard, pid):
                guard.orphans.append(Orphan(0, None, guard.new_id(), pid))


def take_over(guard: Guard, pid: int) -> Target | None:
    """Process `pid`, no target yet, as one if merged memory is in it: an orphan, or one without anybody.

    It is never attached anew, as if nothing were merged in it: Unsupported when it has to wait (hazard 43).
    """
    if not maps_store(guard, pid):
        return None
    find_strays(guard, [pid])
    settle(guard)
    target = guard.find(pid)
    if target is None:
        raise Unsupported(
            f"process {pid} is just being taken over, or shares its memory with one that is merged; "
            "try again later"
        )
    return target


def _is_watched(guard: Guard, pid: int) -> bool:
    return any(
        entry.flags & _WATCHED for entry in mappings.smaps(pid) if entry.vma.inode == guard.store.inode
    )


def settle(guard: Guard) -> list[int]:
    """Wait until orphans are adopted, as far as that goes in reasonable time; pids of the others."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while guard.orphans and time.monotonic() < deadline:
        guard.breathe()
        time.sleep(_RETRY_SECONDS / 10)
    return [orphan.pid for orphan in guard.orphans if orphan.pid is not None]


def _alive(pid: int) -> bool:
    try:
        return procfs.stat(pid).state not in "ZX"
    except TargetGone:
        return False


def _let_go(guard: Guard, orphan: Orphan) -> None:
    if orphan in guard.orphans:
        guard.orphans.remove(orphan)
    if orphan.id in guard.targets:
        guard.drop(guard.targets[orphan.id])
        return
    _dismiss_agent(guard, orphan)
    guard.attic.remove(orphan.id)
    guard.tether.let_go(orphan.tethered)
    if orphan.pid is not None and orphan.coredump_filter is not None:
        set_coredump_filter(orphan.pid, orphan.coredump_filter)
    guard.keep(f"event:{orphan.id}", None)
    if orphan.uffd_event is not None:
        os.close(orphan.uffd_event)


def _dismiss_agent(guard: Guard, orphan: Orphan) -> None:
    """Let the agent of the guard before us end, and wait a moment for that: it has mappings, and
    userfaultfds that write tracking would meet."""
    if orphan.word is None:
        return
    if orphan.uffd_event is not None:
        guard.attic.put(orphan.id, orphan.uffd_event)
    os.set_blocking(orphan.word, False)
    with contextlib.suppress(OSError):
        os.eventfd_write(orphan.word, 1)
    guard.keep(f"word:{orphan.id}", None)
    os.close(orphan.word)
    orphan.word = None
    deadline = time.monotonic() + _DISMISSAL_SECONDS
    with contextlib.suppress(GpuksmError):
        while orphan.pid is not None and older_agents(orphan.pid) and time.monotonic() < deadline:
            time.sleep(_DISMISSAL_SECONDS / 100)


def _is_anothers(orphan: Orphan) -> bool:
    """True when the orphan's userfaultfd is known not to watch the process that it is taken for."""
    if orphan.uffd_event is None or orphan.pid is None:
        return False
    return identity.watches(orphan.uffd_event, orphan.pid) is False


def _search(guard: Guard, orphan: Orphan) -> int | None:
    """The process whose memory the orphan's userfaultfd watches: one that maps the store and is nobody's.

    Where the kernel does not show which (a process that can have no mapping more), the
    only one that there is, unless it waits for an event and the userfaultfd has none.
    """
    known = {target.pid for target in guard.targets.values()} | {other.pid for other in guard.orphans}
    strays = [pid for pid in procfs.pids() if pid not in known and pid != os.getpid()]
    strays = [pid for pid in strays if maps_store(guard, pid)]
    if orphan.uffd_event is None:
        return strays[0] if len(strays) == 1 else None
    shown = {pid: identity.watches(orphan.uffd_event, pid) for pid in strays}
    for pid, watched in shown.items():
        if watched:
            return pid
    if len(strays) != 1 or shown[strays[0]] is False:
        return None
    try:
        if callers.anyone_waits(strays[0]) and not callers.readable(orphan.uffd_event):
            return None
    except (TargetGone, GpuksmError):
        return None
    return strays[0]
