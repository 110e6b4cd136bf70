"""A comparer: a process beside the guard that compares pages with their slots, and does nothing else.

It is a fork of the guard (comparers.py) that sheds all it does not need: what is left are the store,
read-only, and a socket on which jobs come and answers go, each a marshalled tuple.

What must hold (docs/hazards.md, 10, 13): it only reads.  It has no agent's socket and no userfaultfd; until
that is so the guard waits and does nothing.  It may die at any line, or answer late, and the guard compares
by itself; when the guard dies it is killed, and until then there is nothing it could do wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import marshal
import os
import signal
import socket
import traceback
from array import array
from collections.abc import Callable
from typing import Any, NoReturn

from gpuksm.guard import chains, faults, verify
from gpuksm.guard.store import Store
from gpuksm.guard.verify import Piece
from gpuksm.linux import process

READY = b"ready"
MESSAGE_BYTES = 1 << 18  # more than a socket takes at once
_NICE = 10  # as scanners have: jobs come first, and nobody stands still for what is done here
PIECES, PAGES = "pieces", "pages"

Breathe = Callable[[], None]
Part = tuple[int, int, "array[int]", "array[int]"]  # thread, address, numbers of pages behind it, their slots


def do(store: Store, kind: str, arguments: tuple[Any, ...], breathe: Breathe) -> Any:
    """The answer to a job: for PIECES see `verify.verify`, for PAGES `_pages`.  Raises what they do."""
    work: Callable[..., Any] = verify.verify if kind == PIECES else _pages
    return work(store, *arguments, breathe)


def _pages(store: Store, parts: list[Part], breathe: Breathe) -> list[bytes | None]:
    """What `chains.compare` says of each of the parts; None where the target is gone."""
    return [_compared(store, *part, breathe) for part in parts]


def _compared(
    store: Store, tid: int, addr: int, numbers: array[int], slots: array[int], breathe: Breathe
) -> bytes | None:
    try:
        return bytes(chains.compare(store, tid, addr, numbers, slots, breathe))
    except ProcessLookupError:
        return None


def packed(kind: str, arguments: tuple[Any, ...]) -> bytes:
    """A job as a message."""
    if kind == PIECES:
        tids, wanted = arguments
        arguments = (tids, _plain(wanted))
    return marshal.dumps((kind, *arguments))


def _unpacked(message: memoryview) -> tuple[str, tuple[Any, ...]]:
    kind, *arguments = marshal.loads(message)
    if kind == PIECES:
        tids, wanted = arguments
        return kind, (tids, _pieces(wanted))
    (parts,) = arguments
    columns = [(tid, addr, array("I", numbers), array("Q", slots)) for tid, addr, numbers, slots in parts]
    return kind, (columns,)


def answer_of(message: bytes, kind: str) -> Any:
    """The answer to a job of `kind` that a message has; ValueError for one that it could not do."""
    (answer,) = marshal.loads(message)
    return _pieces(answer) if kind == PIECES else answer


def _plain(pieces: dict[int, Any]) -> dict[int, list[tuple[Any, ...]] | None]:
    """Lists of pieces as what can be marshalled."""
    return {number: None if mine is None else list(map(tuple, mine)) for number, mine in pieces.items()}


def _pieces(plain: dict[int, Any]) -> dict[int, list[Piece] | None]:
    return {
        number: None if mine is None else list(itertools.starmap(Piece, mine))
        for number, mine in plain.items()
    }


def run(sock: socket.socket, store: Store, guard: int) -> NoReturn:
    """Be a comparer of process `guard`, whose child this is, until it closes its end of `sock` or dies."""
    with contextlib.suppress(BaseException):
        _shed(sock, store)
        if process.die_with_parent(guard):
            process.set_title("gpuksm comparer")
            os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
            sock.send(READY)
            _serve(sock, store)
    os._exit(0)


def _shed(sock: socket.socket, store: Store) -> None:
    """Close all but the two and the standard streams; be ended by signals as usual."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    kept = {0, 1, 2, sock.fileno(), store.read_only}
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
        with contextlib.suppress(OSError):  # the folder's own, which is closed by now
            os.close(fd)
    store.fd = store.read_only


def _serve(sock: socket.socket, store: Store) -> None:
    message = bytearray(MESSAGE_BYTES)
    while got := sock.recv_into(message):
        kind, arguments = _unpacked(memoryview(message)[:got])
        faults.point("comparing")
        reply: tuple[Any, ...] = ()
        try:
            answer = do(store, kind, arguments, lambda: None)
            reply = (_plain(answer) if kind == PIECES else answer,)
        except OSError:
            traceback.print_exc()  # into guard.log
        sock.send(marshal.dumps(reply))
