"""Giving merged pages back as private memory, on request; targets take turns (turns.py).

What must hold: nobody is unmerged beyond what a control group's limit allows; where no process is named
nothing is merged in the end but in those that are said to have failed, those forked meanwhile included.

If we die: see restore.py; what has been given back stays so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gpuksm.errors import GpuksmError, NoSuchProcess, TargetGone
from gpuksm.guard import adoption, headroom, restore
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.freeze import FreezeFailed
from gpuksm.guard.sandbox import MUZZLED
from gpuksm.guard.turns import rest, take_turns
from gpuksm.linux import census

if TYPE_CHECKING:
    from gpuksm.guard.guard import Guard
    from gpuksm.guard.target import Target

Unmerged = tuple[int, list[int], dict[str, str]]  # pages, pauses in microseconds, {pid: why not}
_IDLE = 0.5  # times as long as one of several targets stood nobody does
_END_SECONDS = 0.5
_ROUNDS = 20  # of what is forked while its parent is unmerged, one that forks and forks


def unmerge(guard: Guard, pids: list[int] | None, max_pause_us: int) -> Unmerged:
    """Unmerge targets (None: all).  NoSuchProcess, and GuardError for want of memory: nothing was done."""
    late = adoption.settle(guard)
    chosen = list(guard.targets.values()) if pids is None else _named(guard, pids)
    headroom.check_unmerge(chosen)
    pages, pauses, failed = _unmerge_each(guard, chosen, max_pause_us)
    tried = {target.id for target in chosen}
    for _ in range(_ROUNDS if pids is None else 0):
        late = adoption.settle(guard)
        forked = [target for target in guard.targets.values() if target.id not in tried and target.runs.pages]
        if not forked:
            break
        tried |= {target.id for target in forked}
        try:
            headroom.check_unmerge(forked)
        except GpuksmError as error:
            failed |= {str(target.pid): str(error) for target in forked}
            continue
        count, more, others = _unmerge_each(guard, forked, max_pause_us)
        pages, pauses, failed = pages + count, pauses + more, failed | others
    failed |= {str(pid): "is just being taken over; try again" for pid in late if pids is None or pid in pids}
    _await_agents(guard, chosen)
    guard.reclaimer.soon()
    guard.tick()
    return pages, pauses, failed


def _await_agents(guard: Guard, chosen: Iterable[Target]) -> None:
    """Until the agents of targets that were left have ended.

    With each the kernel walks over all that was tracked, and whoever reads about the process meanwhile, as we
    are about to, waits for that.
    """
    agents = [(target.pid, target.link.agent.tid) for target in chosen if target.closed]
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline and any(tid and census.thread_exists(pid, tid) for pid, tid in agents):
        rest(0.001, guard.breathe)


def _named(guard: Guard, pids: list[int]) -> list[Target]:
    known = {target.pid: target for target in guard.targets.values()}
    for pid in pids:
        if pid not in known and not os.path.exists(f"/proc/{pid}"):
            raise NoSuchProcess(f"there is no process {pid}; see `gpuksm status` for what is merged")
    return [known[pid] for pid in pids if pid in known]


def _unmerge_each(guard: Guard, chosen: Iterable[Target], max_pause_us: int) -> Unmerged:
    pages, pauses, failed = 0, list[int](), dict[str, str]()

    def steps(target: Target) -> Iterator[float]:
        nonlocal pages
        if target.runs.pages and target.link.agent.muzzled():
            failed[str(target.pid)] = MUZZLED
            return
        try:
            guard.pins.review(target, anew=True)
            for count, pause_us in restore.restore_all(target, guard.journal, guard.frozen, max_pause_us):
                pages += count
                pauses.append(pause_us)
                yield pause_us / 1e6
        except (TargetGone, ProcessLookupError):
            pass
        except (FreezeFailed, AgentStuck, restore.RestoreFailed, OSError) as error:
            failed[str(target.pid)] = str(error)
            return
        guard.drop(target)

    take_turns({target.id: steps(target) for target in chosen}, guard.breathe, idle=_IDLE)
    return pages, pauses, failed


def leave_idle(guard: Guard) -> None:
    """Leave targets in which nothing is merged."""
    for target in list(guard.targets.values()):
        if target.runs.pages or target.parked is not None:
            continue
        with contextlib.suppress(FreezeFailed, TargetGone, AgentStuck), guard.frozen(target):
            pass
        if not target.runs.pages and target.parked is None:
            guard.drop(target)
