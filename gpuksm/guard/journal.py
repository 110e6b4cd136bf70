"""The ledger's memory: two logs in memfds that outlive the guard (the keeper holds them too).

Every change of what is mapped where is written before it is made, so that a
successor that replays the log and then looks at /proc/PID/maps knows all: a run
it finds in both is merged, one that was never mapped is dropped.  Records are
appended and never changed; a record is complete before its kind is written, so
that dying in mid-append leaves a log that ends before it.

Agents hold the ledger too, read-only, for the case that guard and keeper die together; so
their processes can read it.  What is not theirs to know (digests, and what keys them;
who else is registered) is in the private log, which only guard and keeper have.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

RECORD = struct.Struct("<IIQQQ")
TARGET, MAP, UNMAP, GONE, EXTENT, DIGESTS, BORDER, REGISTER, UNREGISTER = range(1, 10)
BORN, DISCARD, COREDUMP, COPY, HOME = range(10, 15)
_PRIVATE = {DIGESTS, REGISTER, UNREGISTER, BORN}
LEDGER_NAME = "gpuksm-ledger"


class Record(NamedTuple):
    """One entry; the meaning of `a`, `b`, `c` depends on `kind`.

    TARGET: pid, start time, code page.  MAP: start, end, slot.  UNMAP: start, end.
    EXTENT: first slot, slots, user.  DIGESTS: first slot, count; the column follows.
    BORDER: page.  REGISTER and UNREGISTER: pid, start, end (0, 0: all).
    DISCARD: start, end of what a target without agent discards (0, 0: all of that is done).
    COREDUMP: the target's coredump_filter before anything was merged in it.
    COPY: start, size of a copy that is to replace merged memory at c (0, 0: it has, or is gone).
    BORN: the seed of the digests.
    HOME: whose ledger this is (waiting.home), inode of its store, when that was made, in clock
    ticks since boot; the first record.
    """

    kind: int
    target: int
    a: int
    b: int
    c: int
    column: bytes = b""


class Journal:
    """Append-only logs of `Record`s in memfds: `fd`, the ledger, and `private_fd`."""

    def __init__(self, fd: int | None = None, private_fd: int | None = None) -> None:
        self._ledger = _Log(LEDGER_NAME, fd)
        self._private = _Log("gpuksm-private", private_fd)
        self.fd, self.private_fd = self._ledger.fd, self._private.fd
        self.read_only = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def append(
        self, kind: int, target: int = 0, a: int = 0, b: int = 0, c: int = 0, column: bytes = b""
    ) -> None:
        log = self._private if kind in _PRIVATE else self._ledger
        log.write(RECORD.pack(kind, target, a, b, c) + column)

    def append_runs(self, kind: int, target: int, runs: Sequence[tuple[int, int, int]]) -> None:
        """Many MAP or UNMAP records in one write."""
        self._ledger.write(b"".join(RECORD.pack(kind, target, *run) for run in runs))

    def replay(self) -> Iterator[Record]:
        """Every record from the start, private ones last; then appending goes on behind the last."""
        yield from self._ledger.replay()
        yield from self._private.replay()


class _Log:
    """One append-only log."""

    def __init__(self, name: str, fd: int | None) -> None:
        if fd is None:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.fchmod(fd, 0o400)  # who is handed a descriptor to read by cannot open it to write
        self.fd = fd
        self.end = 0

    def write(self, body: bytes) -> None:
        """Append whole records."""
        if not body:
            return
        # The first word, the kind, comes last: without it the log ends here.
        os.pwrite(self.fd, body[4:], self.end + 4)
        os.pwrite(self.fd, body[:4], self.end)
        self.end += len(body)

    def replay(self) -> Iterator[Record]:
        """Every record from the start."""
        data = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        at = 0
        while at + RECORD.size <= len(data):
            kind, target, a, b, c = RECORD.unpack_from(data, at)
            if not kind:
                break
            at += RECORD.size
            column = b""
            if kind == DIGESTS:
                column = data[at : at + 8 * b]
                at += 8 * b
            yield Record(kind, target, a, b, c, column)
        self.end = at
