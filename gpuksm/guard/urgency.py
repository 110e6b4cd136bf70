"""Coming before jobs while a target stands still for us, and only then.

A scan and its guard run below the priority of jobs.  But while a target is frozen, every moment in
which guard or agent wait for a processor is part of the pause, and most of it where jobs keep all
processors busy.  So both have a real-time priority, among the lowest, for as long as a freeze
lasts, where that is allowed (root).

What must hold: the agent gets its own policy back when the target goes on; where its process limits the
time at such a priority (RLIMIT_RTTIME, by SIGXCPU) it keeps its own.  Ours is above the agent's, whose
code is in its process's hands: one that runs on and on is put back when our patience ends.

If we die: the agent keeps the priority until our successor sends it away, asleep.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator

from gpuksm.errors import TargetGone
from gpuksm.linux import procfs

_SHORTEST_SECONDS, _LONGEST_SECONDS = 1e-5, 1e-3
_POLICY = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
_OURS, _THEIRS = os.sched_param(2), os.sched_param(1)
_USUAL = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
_allowed = True
_urgent = False
_home: set[int] | None = None  # the processors that are ours, when we have gone to one of them


@contextlib.contextmanager
def urgent(pid: int, agent: int) -> Iterator[None]:
    """Have us and thread `agent` (0: none) of process `pid` come first within, where that is allowed.

    While one target is waited for another may be frozen: the outermost puts us back.
    """
    global _urgent, _home
    ours = None if _urgent else _raise(0)
    _urgent = _urgent or ours is not None
    theirs = _raise(agent) if _urgent and agent and _unlimited(pid) else None
    try:
        yield
    finally:
        if theirs is not None:
            _lower(agent, theirs)
        if ours is not None:
            _lower(0, ours)
            _urgent = False
            if _home is not None:
                with contextlib.suppress(OSError):  # none of them may be ours any more: then we stay
                    os.sched_setaffinity(0, _home)
                _home = None


def go_beside(pid: int, tid: int) -> None:
    """Run on the processor of thread `tid`, which is to stop or work for us, until `urgent` is left.

    Where all processors are busy it would else wait there until who runs has had a scheduler's slice,
    and again for each of its stops.  When we go to sleep there, who has waited longest is next.
    """
    global _home
    if not _urgent:
        return
    _home = _home or os.sched_getaffinity(0)
    with contextlib.suppress(OSError, TargetGone):
        os.sched_setaffinity(0, {procfs.thread_processor(pid, tid)} & _home or _home)


def is_urgent() -> bool:
    """Whether we come first now."""
    return _urgent


def glances() -> Iterator[None]:
    """Something to go through between looks at a thread that is to do something, as often as one looks.

    Within `urgent` it lets that run, should it need our processor: longer and longer, for it may have to
    wait there until others have had their share, and we come before all of them.
    """
    seconds = _SHORTEST_SECONDS
    while True:
        if _urgent:
            time.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_SECONDS)
        yield


def _raise(tid: int) -> int | None:
    """Raise a thread (0: us); its policy before, None when it stays as it is."""
    global _allowed
    if not _allowed:
        return None
    try:
        before = os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK
        if before not in _USUAL:
            return None
        os.sched_setscheduler(tid, _POLICY, _THEIRS if tid else _OURS)
    except PermissionError:
        _allowed = tid != 0  # what we may not do now we never may
        return None
    except OSError:
        return None
    return before


def _lower(tid: int, policy: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(tid, policy, os.sched_param(0))


def _unlimited(pid: int) -> bool:
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] == resource.RLIM_INFINITY
    except OSError:
        return False
