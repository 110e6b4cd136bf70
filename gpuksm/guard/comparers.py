"""The guard's side of its comparers (comparer.py): starting them, handing out jobs, doing what none answers.

What must hold (docs/hazards.md, 10): no process but the guard has an agent's socket while that agent has
something to do.  A comparer is a fork of the guard, and has duplicates of everything until it has closed
them.  So it is started by the main loop alone, between two requests, as a new keeper is (keeping.py), and
nothing else is done until it says that it has closed them, or is dead.

What counts is what was compared for the request that is being carried out.  A job that nobody answers is
done here: a comparer that has died, is stopped, or may not read the target makes a scan slower, not wrong.

If we die: they are killed; the successor starts its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gpuksm.guard import comparer, faults
from gpuksm.guard.store import Store
from gpuksm.linux.descriptors import await_readable

MOST = 8
_MOST_JOBS = 12  # of one comparer: while the guard maps, nobody hands out more
_START_SECONDS = 5.0
_FIRST_SECONDS, _IDLE_SECONDS = 60.0, 5.0  # they are kept: until there is something to do, and after that
_ANSWER_SECONDS = 2.0  # for one job, beside busy jobs; then it is done here
_NAP_SECONDS = 0.0005
_OPEN, _HANDED, _DONE = range(3)


def _number(variable: str) -> int | None:
    """What is no number is not believed: it must not keep a guard from starting."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


JOB_PAGES = _number("GPUKSM_COMPARER_PAGES") or 2048  # of one job, some milliseconds
_FORCED = _number("GPUKSM_COMPARERS")  # so many, whatever a scanner asks for


class Job:
    """Something to compare: a kind of comparer.py, its arguments, and the answer once it is there."""

    __slots__ = ("answer", "arguments", "kind", "state")

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.arguments = kind, arguments
        self.state = _OPEN
        self.answer: Any = None

    def done(self, answer: Any) -> None:
        self.state, self.answer = _DONE, answer


class _Comparer:
    """One process; `jobs` are those it has not answered, in their order."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid, self.sock = pid, sock
        self.jobs: deque[Job] = deque()
        self.heard = 0.0  # when it answered last, or was given a job when it had none


class Comparers:
    """Those that there are, and how many there shall be."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted = 0
        self._crew: list[_Comparer] = []
        self._ended: list[int] = []  # to be waited for
        self._kept_until = 0.0

    def __len__(self) -> int:
        return len(self._crew)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [each.pid for each in self._crew]

    @property
    def ending(self) -> bool:
        """Whether some that were let go have not ended yet."""
        return bool(self._ended)

    def want(self, count: int) -> None:
        """Have so many, from the next `tend` on until they have had nothing to do for a while."""
        self._wanted = min(MOST, count if _FORCED is None else _FORCED)
        self._kept_until = time.monotonic() + _FIRST_SECONDS

    def tend(self) -> None:
        """Start those that are wanted, let idle ones go; see the head of this module for when."""
        wanted, self._wanted = self._wanted, 0
        while len(self._crew) < wanted and self._start():
            pass
        if self._crew and time.monotonic() > self._kept_until:
            self.dismiss()
        self._ended = [pid for pid in self._ended if not _reaped(pid)]

    def dismiss(self) -> None:
        """Let all of them go."""
        for each in list(self._crew):
            self._lose(each)

    def begin(self, jobs: Iterable[Job]) -> None:
        """Hand out as many of `jobs` as are taken."""
        for job in jobs:
            if not self._hand_out(job):
                break

    def finish(self, jobs: list[Job], breathe: Callable[[], None]) -> None:
        """Have all of `jobs` done, what nobody has taken here.  Raises what comparing here raises."""
        left = deque(job for job in jobs if job.state == _OPEN)
        handed = [job for job in jobs if job.state == _HANDED]
        while left or handed:
            self._collect()
            if left:
                job = left.popleft()
                while left and self._hand_out(left[-1]):
                    handed.append(left.pop())
                job.done(comparer.do(self._store, job.kind, job.arguments, breathe))
            else:
                left.extend(job for job in handed if job.state == _OPEN)  # of those that were lost
                handed = [job for job in handed if job.state == _HANDED]
                if handed and not left:
                    self._wait()
            breathe()
        self._kept_until = time.monotonic() + _IDLE_SECONDS

    # -- one of them ---------------------------------------------------------------

    def _hand_out(self, job: Job) -> bool:
        """Give `job` to who has least to do; False when nobody takes it."""
        each = min(self._crew, key=lambda each: len(each.jobs), default=None)
        if each is None or len(each.jobs) >= _MOST_JOBS:
            return False
        try:
            each.sock.send(comparer.packed(job.kind, job.arguments))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EMSGSIZE:  # that is done here
                self._lose(each)
            return False
        if not each.jobs:
            each.heard = time.monotonic()
        each.jobs.append(job)
        job.state = _HANDED
        return True

    def _collect(self) -> None:
        """Take the answers that are there."""
        for each in [each for each in self._crew if each.jobs]:
            try:
                while each.jobs and (message := each.sock.recv(comparer.MESSAGE_BYTES)):
                    answer = comparer.answer_of(message, each.jobs[0].kind)
                    each.jobs.popleft().done(answer)
                    each.heard = time.monotonic()
                if each.jobs:
                    self._lose(each)
            except BlockingIOError:
                continue
            except (OSError, ValueError):  # it is dead, or could not do it
                self._lose(each)

    def _wait(self) -> None:
        """A moment for an answer; who owes one for too long is let go."""
        busy = [each for each in self._crew if each.jobs]
        if not await_readable([each.sock.fileno() for each in busy], _NAP_SECONDS):
            for each in busy:
                if time.monotonic() > each.heard + _ANSWER_SECONDS:
                    self._lose(each)

    def _lose(self, each: _Comparer) -> None:
        """Have no more to do with one; what it has not answered is open again."""
        self._crew.remove(each)
        each.sock.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)  # our child, which nobody has waited for: it is that pid
        self._ended.append(each.pid)
        for job in each.jobs:
            job.state = _OPEN

    def _start(self) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            guard = os.getpid()
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                return False
            if not pid:
                comparer.run(theirs, self._store, guard)
        each = _Comparer(pid, ours)
        self._crew.append(each)
        ready = False
        with contextlib.suppress(OSError):
            faults.point("comparer-forked")
            ready = bool(await_readable([ours.fileno()], _START_SECONDS)) and ours.recv(16) == comparer.READY
        ours.setblocking(False)
        if not ready:
            self._lose(each)
            os.waitpid(pid, 0)  # until then it may have what agents rely on
            self._ended.remove(pid)
        return ready


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
