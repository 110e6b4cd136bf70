"""The guard's side of its keeper: what it is to hold, and another one when it has died.

What must hold (docs/hazards.md, 10): no process but the guard has an agent's socket
while that agent has something to do.  A new keeper is a fork of the guard for the
moment until it calls exec, and in that moment has duplicates of everything.  So it is
started by the main loop alone, between two requests: no agent has been given a table
that is not done, no target is frozen, and while one is parked (its agent was
stopped within a table) nothing is started.  All that a duplicate could do then is to delay the end
of agents that wait.  It has none after exec: the child closes all but what it is meant
to have before, and every descriptor is close-on-exec.

If we die between fork and exec: the child has its own copy of what to hold, finds the
link closed and starts our successor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from gpuksm.guard import keeper
from gpuksm.guard.attic import Attic
from gpuksm.guard.keeper import Patience
from gpuksm.linux import uffd
from gpuksm.linux.descriptors import await_readable

_READ_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred


class Keeping:
    """Tells the keeper what to hold; `held` is all of that, for one that comes after it."""

    def __init__(self, folder: Path, link: socket.socket, held: dict[str, int]) -> None:
        self.held = held
        self._folder = folder
        self._link: socket.socket | None = link
        self._process = _maker_of(link)  # a pidfd of the keeper
        self._patience = Patience()
        self._due = 0.0
        self._child: subprocess.Popen[bytes] | None = None

    def keep(self, tag: str, fd: int | None) -> None:
        """Let the keeper hold a duplicate of `fd` as `tag`; None: let it go."""
        if fd is None:
            self.held.pop(tag, None)
        else:
            self.held[tag] = fd
        self._say(tag, [] if fd is None else [fd])

    def read_event(self, fd: int, parent: int, child: int, attic: Attic) -> uffd.Event | None:
        """The next event of the userfaultfd `fd`, held for `parent`, by way of the keeper.

        If it brings a child's, the keeper holds that for the number `child`, and it is in the attic, before
        we know of it.  Without a keeper it is read here.
        """
        data = self._ask(f"event:{parent}", f"event:{child}")
        if data is None:
            event = uffd.read_event(fd)
            if event is not None and event.kind == uffd.EVENT_FORK:
                self.keep(f"event:{child}", event.a)
                attic.put(child, event.a)
            return event
        event = uffd.parse(data)
        if event is not None and event.kind == uffd.EVENT_FORK:
            attic.inside.add(child)
            return event._replace(a=self.held[f"event:{child}"])
        return event

    def number_of(self, fd: int) -> int | None:
        """The number for which the userfaultfd `fd` is held, or None."""
        tags = (tag for tag, held in self.held.items() if held == fd and tag.startswith("event:"))
        return next((int(tag.partition(":")[2]) for tag in tags), None)

    def _ask(self, parent: str, child: str) -> bytes | None:
        """What the keeper has read of `parent`; None when there is no keeper that answers.

        One that does not answer is killed: it must not read events later on, which nobody then
        has made ready to be read.
        """
        if self._link is None:
            return None
        data, fds = b"", list[int]()
        with contextlib.suppress(OSError):
            self._link.send(f"{keeper.FORK}{parent} {child}".encode().ljust(keeper.TAG_BYTES))
            if not await_readable([self._link.fileno()], _READ_SECONDS):
                self._kill()
            data, fds, _, _ = socket.recv_fds(self._link, keeper.TAG_BYTES, 1)
        if not data:
            self.lost()
            return None
        if fds:
            self.held[child] = fds[0]
        return b"" if data == keeper.NOTHING else data

    def _kill(self) -> None:
        if self._process is not None:
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def end(self) -> None:
        """Tell the keeper that we end on purpose: it ends too."""
        self._say(keeper.END, [])

    def link(self) -> socket.socket | None:
        """What becomes readable when the keeper dies; None while there is none."""
        return self._link

    def lost(self) -> None:
        """The link has become readable: the keeper is gone."""
        if self._link is not None:
            self._link.close()
            self._link = None
            if self._process is not None:
                os.close(self._process)
                self._process = None
            self._due = time.monotonic() + self._patience.died()

    def tend(self) -> None:
        """Start a new keeper when there is none and it is due; see the head of this module for when."""
        if self._child is not None:
            self._child.poll()
        if self._link is None and time.monotonic() >= self._due:
            self._start()

    def _start(self) -> None:
        self._patience.started()
        # Ours was told of the fault that is injected into us; it is not for a successor.
        os.environ.pop("GPUKSM_FAULT", None)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guard = os.pidfd_open(os.getpid())
        fds = {**self.held, "link": theirs.fileno(), "guard": guard}
        try:
            self._child = keeper.start(self._folder, fds)
            self._link, self._process = ours, os.pidfd_open(self._child.pid)
        except OSError:
            ours.close()
            self._due = time.monotonic() + self._patience.died()
        finally:
            theirs.close()
            os.close(guard)

    def _say(self, tag: str, fds: list[int]) -> None:
        """A keeper that is gone is no reason to stop: the next one is given all that is held."""
        if self._link is None:
            return
        try:
            socket.send_fds(self._link, [tag.encode().ljust(keeper.TAG_BYTES)], fds)
        except OSError:
            return


def _maker_of(link: socket.socket) -> int | None:
    """A pidfd of the process that made the pair of sockets that `link` is one of; None when it is gone."""
    pid, _, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
