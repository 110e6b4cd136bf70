"""The ledger's memory: a log in a memfd that outlives the guard (the keeper holds it too).

Every change of what is mapped where is written before it is made, so that a
successor that replays the log and then looks at /proc/PID/maps knows all: a run
it finds in both is merged, one that was never mapped is dropped.  Records are
appended and never changed; a record is complete before its kind is written, so
that dying in mid-append leaves a log that ends before it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

RECORD = struct.Struct("<IIQQQ")
TARGET, MAP, UNMAP, GONE, EXTENT, DIGESTS, BORDER, REGISTER, UNREGISTER = range(1, 10)
BORN, DISCARD, COREDUMP, COPY = range(10, 14)


class Record(NamedTuple):
    """One entry; the meaning of `a`, `b`, `c` depends on `kind`.

    TARGET: pid, start time, code page.  MAP: start, end, slot.  UNMAP: start, end.
    EXTENT: first slot, slots, user.  DIGESTS: first slot, count; the column follows.
    BORDER: page.  REGISTER and UNREGISTER: pid, start, end (0, 0: all).
    DISCARD: start, end of what a target without agent discards (0, 0: all of that is done).
    COREDUMP: the target's coredump_filter before anything was merged in it.
    COPY: start, size of a copy that is to replace merged memory at c (0, 0: it has, or is gone).
    BORN: when the store was made, in clock ticks since boot; the seed of its digests.
    """

    kind: int
    target: int
    a: int
    b: int
    c: int
    column: bytes = b""


class Journal:
    """An append-only log of `Record`s in a memfd."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("gpuksm-ledger", os.MFD_CLOEXEC) if fd is None else fd
        self.end = 0

    def append(
        self, kind: int, target: int = 0, a: int = 0, b: int = 0, c: int = 0, column: bytes = b""
    ) -> None:
        body = RECORD.pack(kind, target, a, b, c) + column
        self._write(body)

    def append_runs(self, kind: int, target: int, runs: Sequence[tuple[int, int, int]]) -> None:
        """Many MAP or UNMAP records in one write."""
        self._write(b"".join(RECORD.pack(kind, target, *run) for run in runs))

    def _write(self, body: bytes) -> None:
        if not body:
            return
        # The first word, the kind, comes last: without it the log ends here.
        os.pwrite(self.fd, body[4:], self.end + 4)
        os.pwrite(self.fd, body[:4], self.end)
        self.end += len(body)

    def replay(self) -> Iterator[Record]:
        """Every record from the start; afterwards appending goes on behind the last."""
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
