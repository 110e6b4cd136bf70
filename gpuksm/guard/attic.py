"""Userfaultfds of processes that have no agent just now, out of reach of the death of guard and keeper.

Those are forked children, and targets that a successor takes over.  A unix socket's queue holds
the descriptors that were sent into it for as long as its receiving end is open somewhere: here
in guard, keeper and every agent.  Unlike a descriptor in an agent's table one in the queue can
be taken back without the agent, by receiving it; it must be, when the process has an agent or is
gone: while it is there that process waits with its events for somebody.

What must hold: what is in it is of use only where guard and keeper have died together, and only
believed as far as it is a userfaultfd; a process can put descriptors of its own there (it can
take both ends from its agent).

If we die while taking one out: one of the others is in the queue twice, and what was to go may be there
still; the next guard takes it for a process to take over, finds that it is gone or has an agent, and lets
it go.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys

from gpuksm.linux import uffd

_BYTES = 16
_MOST = 100_000
_QUEUE_BYTES = 64 << 20  # a message takes about 1 KiB
_SO_SNDBUFFORCE, _SO_PEEK_OFF = 32, 42
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


def put(sending: int, number: int, uffd_event: int) -> bool:
    """Put the userfaultfd of process `number` into the queue; one that is full takes nothing more."""
    with socket.socket(fileno=os.dup(sending)) as end:
        return send(end, b"%d" % number, uffd_event.to_bytes(4, sys.byteorder))


def send(end: socket.socket, number: bytes, rights: bytes) -> bool:
    """As `put`, on a socket; `rights` is the descriptor's number, an int of C."""
    try:
        end.sendmsg([number], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def copies(receiving: int) -> dict[int, int]:
    """Duplicates of all that is in the queue, by number; every descriptor is the caller's to close."""
    found: dict[int, int] = {}
    with socket.socket(fileno=os.dup(receiving)) as end:
        # Looking at the messages one after the other takes none out (Linux 3.4, unix(7)).
        end.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        try:
            for _ in range(_MOST):
                if (message := _receive(end, socket.MSG_PEEK)) is None:
                    break
                number, fd = message
                if fd is not None and found.setdefault(number, fd) != fd:
                    os.close(fd)
        finally:
            end.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
    return found


def _receive(end: socket.socket, flags: int) -> tuple[int, int | None] | None:
    """Number and userfaultfd (None for what is none) of the next message, or None."""
    try:
        # Not recv_fds, which takes flags and does not pass them on.
        data, rights, _, _ = end.recvmsg(_BYTES, socket.CMSG_LEN(4), _FLAGS | flags)
    except OSError:
        return None
    if not data:
        return None
    fds = array.array("i", b"".join(each for _, kind, each in rights if kind == socket.SCM_RIGHTS))
    good = [fd for fd in fds if data.isdigit() and uffd.is_one(fd)]
    for fd in fds:
        if fd in good:
            os.set_blocking(fd, False)
        else:
            os.close(fd)
    return int(data) if data.isdigit() else -1, good[0] if good else None


def _length(end: socket.socket) -> int:
    """How many messages are in the queue."""
    end.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        for count in range(_MOST):
            try:
                if not end.recv(_BYTES, _FLAGS | socket.MSG_PEEK):
                    return count
            except OSError:
                return count
        return _MOST
    finally:
        end.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)


def _drop(end: socket.socket) -> None:
    """Take the message at the head out; what it brings is closed, there being no room for it."""
    with contextlib.suppress(BlockingIOError):
        end.recv(_BYTES, _FLAGS)


class Attic:
    """The guard's two ends of the queue, and what it knows to be in it."""

    def __init__(self, sending: int | None = None, receiving: int | None = None) -> None:
        if sending is None or receiving is None:
            one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for option in (socket.SO_SNDBUF, _SO_SNDBUFFORCE):  # the latter is for root
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, option, _QUEUE_BYTES)
            sending, receiving = one.detach(), other.detach()
        self.sending, self.receiving = sending, receiving
        found = copies(receiving)
        self.inside = set(found)
        for fd in found.values():
            os.close(fd)

    def put(self, number: int, uffd_event: int) -> None:
        """Put the userfaultfd of process `number` there, unless it is."""
        if number not in self.inside and put(self.sending, number, uffd_event):
            self.inside.add(number)

    def remove(self, number: int) -> None:
        """Take out what is there of process `number`.

        The queue is turned once.  Each of the others is sent again before it is taken out, so that it is
        in there all the time, and twice for a moment; of those that are there twice one is left.
        """
        if number not in self.inside:
            return
        self.inside.discard(number)
        kept: set[int] = set()
        with socket.socket(fileno=os.dup(self.receiving)) as end:
            for _ in range(_length(end)):
                other, fd = _receive(end, socket.MSG_PEEK) or (-1, None)
                if fd is not None:
                    sent = other == number or other in kept or put(self.sending, other, fd)
                    os.close(fd)
                    if not sent:
                        return  # no room: it stays at the head
                    kept.add(other)
                _drop(end)
