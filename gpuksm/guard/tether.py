"""Staying attached: how forks are seen without CAP_SYS_PTRACE.

An unprivileged guard gets no fork events from userfaultfd, so it stays the tracer of
every thread of a target that has merged memory; the kernel then holds each forked
child at its first instruction until the child has an agent (docs/hazards.md, 2).

The price: signals pass through us, no debugger can attach meanwhile, and a setuid
program that a forked child executes runs without its privilege.  vfork children
(posix_spawn, Python's subprocess) are let go at once.

If we die the kernel lets every thread go on.  Forks made before the successor holds
the threads again are not guarded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from gpuksm.guard import children
from gpuksm.guard.target import Target
from gpuksm.linux import census, procfs, ptrace

if TYPE_CHECKING:
    from gpuksm.guard.guard import Guard

_OPTIONS = (
    ptrace.O_TRACESYSGOOD
    | ptrace.O_TRACEFORK
    | ptrace.O_TRACEVFORK
    | ptrace.O_TRACECLONE
    | ptrace.O_TRACEEXEC
)
_RELEASE_NS = 50_000_000
_SERVE_NS = 10_000_000  # then it is the others' turn


class Tether:
    """Every thread that this guard traces all the time."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._loose: set[int] = set()  # to be let go as soon as they stop
        self._new = 0  # tasks that our tracees have started so far
        self.restless = False  # some that are new may not have been looked at

    def hold(self, target: Target) -> None:
        """Trace all threads of `target` but the agent from now on."""
        while True:
            new = [
                tid
                for tid in procfs.threads(target.pid)
                if tid != target.link.agent.tid and tid not in target.tethered
            ]
            if not new:
                return
            for tid in new:
                try:
                    ptrace.seize(tid, _OPTIONS)
                except OSError as error:
                    if error.errno not in (errno.ESRCH, errno.EPERM):
                        raise
                target.tethered.add(tid)

    def release(self, target: Target) -> None:
        """Stop tracing `target`; its threads go on untouched."""
        for tid in target.tethered:
            with contextlib.suppress(OSError):
                ptrace.interrupt(tid)
        deadline = time.monotonic_ns() + _RELEASE_NS
        left = set(target.tethered)
        while left and time.monotonic_ns() < deadline:
            left = {tid for tid in left if not _let_go(tid)}
        self._loose |= left
        target.tethered.clear()

    def let_go(self, tids: set[int]) -> None:
        """Stop tracing threads of which nothing more is known, as they stop."""
        for tid in tids:
            with contextlib.suppress(OSError):
                ptrace.interrupt(tid)
        self._loose |= {tid for tid in tids if not _let_go(tid)}

    def serve(self) -> None:
        """Handle every stop of a tethered thread.

        A task that is new to us may have stopped before we knew it, and will not tell us again: as long as
        there are new ones all are looked at once more.
        """
        deadline = time.monotonic_ns() + _SERVE_NS
        self.restless = True
        while self.restless:
            known = self._new
            for target in [each for each in self._guard.targets.values() if each.tethered]:
                if target.parked is not None:
                    continue
                for tid in list(target.tethered):
                    stop = ptrace.peek_stop(tid)
                    if stop is not None:
                        self._serve(target, tid, stop)
            self._loose = {tid for tid in self._loose if not _let_go(tid)}
            self.restless = self._new != known
            if time.monotonic_ns() > deadline:
                return

    def _serve(self, target: Target, tid: int, stop: ptrace.Stop) -> None:
        if stop.kind == "gone":
            ptrace.reap(tid)
            target.tethered.discard(tid)
            return
        with contextlib.suppress(ProcessLookupError):
            if stop.kind == "signal":
                ptrace.cont(tid, stop.signal)
            elif stop.event == ptrace.EVENT_STOP and stop.signal != ptrace.SIGTRAP:
                # Job control: leave it stopped.  Consumed, or it would be reported for ever.
                os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | ptrace.WALL)
                ptrace.listen(tid)
            else:
                if stop.event == ptrace.EVENT_EXEC:
                    self._guard.drop(target)
                    return
                self._new_task(target, tid, stop.event)
                ptrace.cont(tid)

    def _new_task(self, target: Target, tid: int, event: int) -> None:
        if event not in (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE):
            return
        self._new += 1
        new = ptrace.event_message(tid)
        if event == ptrace.EVENT_CLONE and census.process_of_thread(new) == target.pid:
            target.tethered.add(new)
        elif event == ptrace.EVENT_VFORK or not target.runs.pages or _shares(target.pid, new):
            self._loose.add(new)
        else:
            self._guard.orphans.append(
                children.Orphan(
                    target.id,
                    None,
                    self._guard.new_id(),
                    new,
                    borders=set(target.borders),
                    coredump_filter=target.coredump_filter,
                    advice=children.inherited(target.advice),
                    tethered={new},
                    filters=target.link.agent.filters,
                )
            )


def _shares(pid: int, other: int) -> bool:
    from gpuksm.linux import pidfd

    return bool(pidfd.same_memory(pid, other))


def _let_go(tid: int) -> bool:
    """Detach a thread that has stopped (or ended); False while it runs."""
    stop = ptrace.peek_stop(tid)
    if stop is None:
        return False
    if stop.kind == "gone":
        ptrace.reap(tid)
        return True
    return ptrace.detach(tid, stop.signal if stop.kind == "signal" else 0)
