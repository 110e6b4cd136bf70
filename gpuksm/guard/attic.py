"""Userfaultfds of processes that have no agent just now, out of reach of the death of guard and keeper.

Those are forked children, and targets that a successor takes over.  A unix socket's queue holds
the descriptors that were sent into it for as long as its receiving end is open somewhere: here
in guard, keeper and every agent.  Unlike a descriptor in an agent's table one in the queue can
be taken back without the agent, by receiving it; it must be, when the process has an agent or is
gone: while it is there that process waits with its events for somebody.

What must hold: what is in it is of use only where guard and keeper have died together, and only
believed as far as it is a userfaultfd; a process can put descriptors of its own there (it can
take both ends from its agent).

If we die while taking one out: the others, which we hold for a moment, are lost here, and are with
the keeper still.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket

from gpuksm.linux import uffd

_BYTES = 16
_MOST = 100_000
_QUEUE_BYTES = 64 << 20  # a message takes about 1 KiB
_SO_SNDBUFFORCE = 32
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


def put(sending: int, number: int, uffd_event: int) -> bool:
    """Put the userfaultfd of process `number` into the queue; one that is full takes nothing more."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sending)) as end:
        rights = array.array("i", [uffd_event])
        end.sendmsg([b"%d" % number], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)
        return True
    return False


def take_all(receiving: int) -> dict[int, int]:
    """Everything in the queue, by number; every descriptor is the caller's to close."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(receiving)) as end:
        for _ in range(_MOST):
            # Not recv_fds, which takes flags and does not pass them on.
            data, rights, _, _ = end.recvmsg(_BYTES, socket.CMSG_LEN(4), _FLAGS)
            if not data:
                break
            fds = array.array("i", b"".join(each for _, kind, each in rights if kind == socket.SCM_RIGHTS))
            number = int(data) if data.isdigit() else -1
            for fd in fds:
                if number < 0 or number in found or not uffd.is_one(fd):
                    os.close(fd)
                    continue
                os.set_blocking(fd, False)
                found[number] = fd
    return found


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
        self.inside: set[int] = set()
        for fd in self.copies().values():
            os.close(fd)

    def copies(self) -> dict[int, int]:
        """Duplicates of all that is there, by number."""
        found = take_all(self.receiving)
        copies = {number: os.dup(fd) for number, fd in found.items()}
        self._put_back(found)
        return copies

    def put(self, number: int, uffd_event: int) -> None:
        """Put the userfaultfd of process `number` there, unless it is."""
        if number not in self.inside and put(self.sending, number, uffd_event):
            self.inside.add(number)

    def remove(self, number: int) -> None:
        """Take out what is there of process `number`."""
        if number not in self.inside:
            return
        found = take_all(self.receiving)
        if number in found:
            os.close(found.pop(number))
        self._put_back(found)

    def _put_back(self, found: dict[int, int]) -> None:
        self.inside = {number for number, fd in found.items() if put(self.sending, number, fd)}
        for fd in found.values():
            os.close(fd)
