"""Agents that wait for a guard: what a first guard finds where guard and keeper have died together.

Such an agent (agent.py) holds in its own descriptor table all that a keeper would: the
userfaultfd, so that events of merged memory wait, the store, the ledger and the attic.  They are
taken from it by a pidfd of that one thread (Linux 6.9), and the guard then takes over as
from a keeper (recovery.py).

What must hold: nothing is believed of a process that is not ours.  Any process can have a
thread of that name with descriptors of its choice; store and ledger must be memfds made
by this user, and the ledger that of this runtime folder.  The store's is named in it.

If we die: nothing has been changed; the agents wait on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpuksm.errors import GpuksmError
from gpuksm.guard import journal
from gpuksm.guard.agent import STAY, STAY_OFFSET
from gpuksm.guard.arch import current
from gpuksm.guard.attach import AGENT_NAME
from gpuksm.guard.store import STORE_NAME
from gpuksm.linux import pidfd, procfs, vm
from gpuksm.linux._libc import PAGE_SIZE

_PATIENCE_SECONDS = 2.0  # for agents that are still within a system call
_RETRY_SECONDS = 0.02


class _NotYet(Exception):
    """An agent that may come to wait for us."""


class _NotOurs(Exception):
    """No agent, or that of another guard."""


class _Held(NamedTuple):
    """What one agent holds; every descriptor is ours to close."""

    target: int
    word: int
    event: int
    store: int
    ledger: int
    attic: tuple[int, int]
    home: journal.Record

    def close(self) -> None:
        for fd in (self.word, self.event, self.store, self.ledger, *self.attic):
            os.close(fd)


def home(folder: Path) -> int:
    """What tells the ledger of the guard of this runtime folder from that of another."""
    with contextlib.suppress(OSError):
        folder = folder.resolve()
    # The same path in a container is another folder.
    text = f"{folder}\0{os.readlink('/proc/self/ns/pid')}"
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8], "little") >> 1


def find(folder: Path) -> dict[str, int]:
    """Descriptors by tag, as a keeper's successor inherits them; {} when nobody waits."""
    held = _all_held(home(folder))
    newest = max((found.home.c for found in held), default=0)
    result: dict[str, int] = {}
    for found in held:
        if found.home.c != newest:
            found.close()
            continue
        if f"event:{found.target}" in result:
            # Of a takeover that was broken off: one of two was to end, and both hold the same.
            with contextlib.suppress(OSError):
                os.eventfd_write(found.word, 1)
            found.close()
            continue
        result[f"event:{found.target}"] = found.event
        result[f"word:{found.target}"] = found.word
        for tag, fd in (("store", found.store), ("ledger", found.ledger)):
            if tag not in result:
                result[tag] = _writable(fd)
            os.close(fd)
        for tag, fd in zip(("attic-in", "attic-out"), found.attic, strict=True):
            if result.setdefault(tag, fd) != fd:
                os.close(fd)
    return result


def _all_held(wanted: int) -> list[_Held]:
    """What the agents hold whose ledger says `wanted`, once they wait."""
    held: list[_Held] = []
    left = list(_agents())
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left:
        later = []
        for tid in left:
            try:
                held.append(_take(tid, wanted))
            except _NotYet:
                later.append(tid)
            except (_NotOurs, GpuksmError, OSError, struct.error):
                continue
        left = later
        if time.monotonic() > deadline:
            break
        time.sleep(_RETRY_SECONDS if left else 0)
    return held


def _agents() -> Iterator[int]:
    """Thread ids of what is named as agents are."""
    for pid in procfs.pids():
        with contextlib.suppress(GpuksmError, OSError):
            for tid in procfs.threads(pid):
                if tid != pid and procfs.stat(tid).comm == AGENT_NAME:
                    yield tid


def _take(tid: int, wanted: int) -> _Held:
    """Duplicates of what agent `tid` holds; _NotOurs, or _NotYet while it does not wait for a word."""
    call = procfs.thread_syscall(tid, tid)
    if call is None or call[0] != current().NR.READ:
        raise _NotYet
    waits_for, buffer = call[1][:2]
    block = buffer & ~(PAGE_SIZE - 1)
    header = bytearray(STAY.size)
    vm.read_into(tid, block + STAY_OFFSET, header)
    *numbers, target = STAY.unpack(header)
    fds: list[int] = []
    thread = pidfd.open_thread(tid)
    try:
        for number, name in zip(numbers, _NAMES, strict=True):
            fds.append(pidfd.steal(thread, number))
            if not os.readlink(f"/proc/self/fd/{fds[-1]}").startswith(name):
                raise _NotOurs
        word, event, store, ledger, sending, receiving = fds
        record = _home_of(ledger)
        if record.a != wanted or not _is_mine(store) or os.fstat(store).st_ino != record.b:
            raise _NotOurs
        if waits_for != numbers[0]:
            raise _NotYet  # its guard is just dying
        os.set_blocking(event, False)  # a process of ill will must not have us wait for it
        fds = []
        return _Held(target, word, event, store, ledger, (sending, receiving), record)
    finally:
        os.close(thread)
        for fd in fds:
            os.close(fd)


def _home_of(ledger: int) -> journal.Record:
    """The first record of a ledger that we have made."""
    first = os.pread(ledger, journal.RECORD.size, 0)
    record = journal.Record(*journal.RECORD.unpack(first))
    if record.kind != journal.HOME or not _is_mine(ledger):
        raise _NotOurs
    return record


_NAMES = (
    "anon_inode:[eventfd]",
    "anon_inode:[userfaultfd]",
    f"/memfd:{STORE_NAME} ",
    f"/memfd:{journal.LEDGER_NAME} ",
    "socket:",
    "socket:",
)


def _is_mine(fd: int) -> bool:
    return os.fstat(fd).st_uid == os.geteuid()


def _writable(fd: int) -> int:
    """The memfd that `fd` is open on, for writing; we made it, with mode 0400."""
    os.fchmod(fd, 0o600)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.fchmod(fd, 0o400)
