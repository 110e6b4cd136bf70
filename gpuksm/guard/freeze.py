"""Freezing and thawing every thread that shares a target's memory.

What must hold: a frozen thread keeps its registers, its pending signals and its
job-control state; a freeze always ends (deadline), and whatever it had stopped
by then goes on.  Stops are peeked at, never consumed (gpuksm.linux.ptrace), so
that a guard that dies in here loses nothing: the kernel lets the threads go on
and a signal that was about to be delivered is delivered.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable

from gpuksm.errors import TargetGone
from gpuksm.guard import restart, urgency
from gpuksm.linux import census, pidfd, procfs, ptrace

DEADLINE_NS = 50_000_000
_SPIN_NS, _SPIN_URGENT_NS = 300_000, 30_000  # others may need the processor


class FreezeFailed(Exception):
    """The target could not be frozen now (deadline, another tracer, shared memory); try later."""


def _exited(pid: int, tid: int) -> bool:
    try:
        return procfs.stat(tid).state in "ZX"
    except TargetGone:
        return True


class Freeze:
    """One freeze of process `pid`, all its threads but `spare` (the agent).

    `tethered`: threads that this guard traces all the time; they are continued
    instead of let go.  Threads that do not stop before the deadline become
    stragglers: `release_stragglers` lets them go as they stop, or the next freeze
    takes them over.
    """

    def __init__(self, pid: int, spare: int | None, tethered: set[int] | None = None) -> None:
        self.pid = pid
        self.spare = spare
        self.tethered = tethered if tethered is not None else set()
        self.stops: dict[int, ptrace.Stop] = {}
        self.waiting: set[int] = set()
        self._gone: set[int] = set()
        self.thawed_ns = 0  # when (time.monotonic_ns) everything was let go

    @property
    def holds(self) -> bool:
        """True when threads have stopped or have been asked to."""
        return bool(self.stops or self.waiting)

    def begin(self) -> bool:
        """Ask every thread not yet asked to stop; True when there were new ones."""
        new = False
        for tid in procfs.threads(self.pid):
            if tid == self.spare or tid in self.stops or tid in self.waiting or tid in self._gone:
                continue
            new = True
            if _stragglers.pop(tid, None) is not None:
                self.waiting.add(tid)  # asked to stop by an earlier freeze, and still ours
                continue
            try:
                if tid not in self.tethered:
                    ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
            except OSError as error:
                if error.errno == errno.ESRCH or _exited(self.pid, tid):
                    self._gone.add(tid)
                    continue
                raise FreezeFailed(f"thread {tid} of process {self.pid} is traced by another") from None
            # From here on the thread is ours: even if it has just died, its end must be collected.
            self.waiting.add(tid)
            with contextlib.suppress(OSError):
                ptrace.interrupt(tid)
        return new

    def collect(self) -> None:
        """Note every asked thread that has stopped or exited since."""
        for tid in list(self.waiting):
            stop = ptrace.peek_stop(tid)
            if stop is None:
                continue
            self.waiting.discard(tid)
            if stop.kind == "gone":
                ptrace.reap(tid)
                self._gone.add(tid)
                self.tethered.discard(tid)
            else:
                self.stops[tid] = stop
                if stop.kind == "stop" and stop.event == ptrace.EVENT_STOP:
                    restart.mend(tid)

    def complete(self, service: Callable[[], None] | None = None, deadline_ns: int = DEADLINE_NS) -> None:
        """Wait until every thread has stopped; FreezeFailed (and thawed) at the deadline.

        `service` is called over and over meanwhile: a thread that waits for one of
        our events cannot stop before the event was read.
        """
        started = time.monotonic_ns()
        spin = _SPIN_URGENT_NS if urgency.is_urgent() else _SPIN_NS
        try:
            while True:
                self.collect()
                if not self.waiting and not self.begin():
                    if not self.stops:
                        raise TargetGone(f"process {self.pid} has exited")
                    return
                elapsed = time.monotonic_ns() - started
                if elapsed > deadline_ns:
                    raise FreezeFailed(f"a thread of process {self.pid} did not stop in time")
                if service is not None:
                    service()
                if elapsed > spin and self.waiting:
                    urgency.go_beside(self.pid, next(iter(self.waiting)))
                    time.sleep(max(1e-4, elapsed / 8e9))  # others have to run for that
        except BaseException:
            self.thaw()
            raise

    def check_unshared(self, known: ProcessCensus) -> None:
        """Raise FreezeFailed when a process outside the freeze shares the memory (hazard 6)."""
        sharer = known.sharer_of(self.pid)
        if sharer is not None:
            raise FreezeFailed(f"process {sharer} shares the memory of process {self.pid}")

    def thaw(self) -> None:
        """Let everything go on; harmless when nothing is stopped."""
        self.collect()
        for tid, stop in self.stops.items():
            if tid in self.tethered:
                if stop.kind == "stop" and stop.event == ptrace.EVENT_STOP and stop.signal == ptrace.SIGTRAP:
                    _quietly(ptrace.cont, tid)
                # Every other stop stays for the tether, which sees it because it was only peeked at.
            elif not ptrace.detach(tid, stop.signal if stop.kind == "signal" else 0):
                _stragglers[tid] = self.tethered  # killed in the freeze: to be reaped
        self.stops.clear()
        _stragglers.update(dict.fromkeys(self.waiting, self.tethered))
        self.waiting.clear()
        self.thawed_ns = time.monotonic_ns()


# Threads that were asked to stop and had not by the deadline, with the tether they belong to.
_stragglers: dict[int, set[int]] = {}


def release_stragglers() -> bool:
    """Let go threads that stopped after their deadline, reap those that ended; True when none is left."""
    for tid, tethered in list(_stragglers.items()):
        stop = ptrace.peek_stop(tid)
        if stop is None:
            continue
        if stop.kind == "gone":
            ptrace.reap(tid)
            tethered.discard(tid)
        elif tid not in tethered:
            if not ptrace.detach(tid, stop.signal if stop.kind == "signal" else 0):
                continue
        elif stop.event == ptrace.EVENT_STOP and stop.signal == ptrace.SIGTRAP:
            _quietly(ptrace.cont, tid)
        del _stragglers[tid]
    return not _stragglers


def let_go(tid: int) -> None:
    """Let go a thread that was seized and asked to stop: now if it has, else as soon as it does."""
    _stragglers[tid] = set()
    release_stragglers()


def _quietly(call: Callable[[int], None], tid: int) -> None:
    try:
        call(tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise


class ProcessCensus:
    """Which processes share a target's memory, asked cheaply again and again.

    The first question compares the target with every process; later ones only
    with ids handed out since, because only a running thread of the target can
    create a sharer and every one of them would have a newer id.
    """

    def __init__(self) -> None:
        self._last_seen: dict[int, int] = {}

    def sharer_of(self, pid: int) -> int | None:
        """A process that shares the memory of `pid`, or None; call it while `pid` is frozen."""
        newest = census.newest_pid()
        last = self._last_seen.get(pid)
        if last is not None and last <= newest <= last + 4096:
            candidates = list(range(last + 1, newest + 1))
        else:
            candidates = procfs.pids()
        for other in pidfd.sharing_memory(pid, candidates):
            if other != pid and census.process_of_thread(other) != pid:
                return other
        self._last_seen[pid] = newest
        return None

    def forget(self, pid: int) -> None:
        self._last_seen.pop(pid, None)
