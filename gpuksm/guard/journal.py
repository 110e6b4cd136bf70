"""The ledger's memory: two logs in memfds that outlive the guard (the keeper holds them too).

What is merged where stands in /proc/PID/maps; what does not, and a successor must know, is
written here before it is done.  Records are appended and never changed; a record is complete
before its kind is written, so that dying in mid-append leaves a log that ends before it.

A log that has grown to several times what it tells is written anew: what still holds is
written behind the end, at a multiple of a page, and then the log's first record is told
that the others begin there, by one write of four bytes; last of all what lies between is given back.  If we
die before that write, the log is what it was, and what was begun is overwritten; after it
nothing but memory is lost, until the next time.

Agents hold the ledger too, read-only, for the case that guard and keeper die together; so
their processes can read it.  What is not theirs to know (digests, and what keys them;
who else is registered) is in the private log, which only guard and keeper have.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpuksm.guard import faults
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import punch_hole

RECORD = struct.Struct("<IIQQQ")
TARGET = 1  # 2 and 3 told what was mapped where
GONE, EXTENT, DIGESTS, BORDER, REGISTER, UNREGISTER = range(4, 10)
BORN, DISCARD, COREDUMP, COPY, HOME, NEXT, FILTERS, ADVICE = range(10, 18)
_PRIVATE = {DIGESTS, REGISTER, UNREGISTER, BORN}
LEDGER_NAME = "gpuksm-ledger"
_BEGIN = struct.Struct("<I")  # in the first record, behind its kind: the page at which the others begin
# A log is written anew when it has grown by this, and to so many times what it told then.
# What is no number is not believed: it must not keep a guard from starting.
_WANTED = os.environ.get("GPUKSM_JOURNAL_BYTES", "")
_GROWTH_BYTES = int(_WANTED) if _WANTED.isdecimal() else 1 << 20
_GROWTH = 4


class Record(NamedTuple):
    """One entry; the meaning of `a`, `b`, `c` depends on `kind`.

    TARGET: pid, start time, code page.
    EXTENT: first slot, slots, user; its `target` is a NUMA node + 1, or 0.
    DIGESTS: first slot, count; the column follows.
    BORDER: page.  REGISTER and UNREGISTER: pid, start, end (0, 0: all).
    DISCARD: start, end of what a target without agent discards (0, 0: all of that is done).
    COREDUMP: the target's coredump_filter before anything was merged in it.
    FILTERS: how many seccomp filters its agent had from the start; none where there is no such record.
    COPY: start, size of a copy that is to replace merged memory at c (0, 0: it has, or is gone).
    ADVICE: start, end of memory of which the target has said something, and what, as bits of advice.py
    (0, 0: none of all that was told before).
    BORN: the seed of the digests.
    HOME: whose ledger this is (waiting.home), inode of its store, when that was made, in clock
    ticks since boot; the first record, as BORN is of the private log.
    NEXT: the first slot that no extent has had yet.
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

    def replay(self) -> Iterator[Record]:
        """Every record from the start, private ones last; then appending goes on behind the last."""
        yield from self._ledger.replay()
        yield from self._private.replay()

    def trim(self) -> None:
        """Clear what an append that was broken off left behind the last record; after `replay`."""
        self._ledger.trim()
        self._private.trim()

    @property
    def ledger_has_grown(self) -> bool:
        """Whether it is time for `renew_ledger`."""
        return self._ledger.has_grown

    @property
    def private_has_grown(self) -> bool:
        """Whether it is time for `renew_private`."""
        return self._private.has_grown

    def renew_ledger(self, records: Iterable[Record]) -> None:
        """From now on the ledger tells `records`, behind its first one."""
        self._ledger.renew([b"".join(map(_packed, records))])

    def renew_private(self, records: Iterable[Record]) -> None:
        """The same of the private log; nothing private is appended while `records` are taken, one by one."""
        self._private.renew(map(_packed, records))


def _packed(record: Record) -> bytes:
    return RECORD.pack(*record[:5]) + record.column


class _Log:
    """One append-only log."""

    def __init__(self, name: str, fd: int | None) -> None:
        if fd is None:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.fchmod(fd, 0o400)  # who is handed a descriptor to read by cannot open it to write
        self.fd = fd
        self.end = 0
        self._begin = 0  # of the records behind the first
        self._told = 0  # bytes of them when they were written anew

    def write(self, body: bytes) -> None:
        """Append whole records."""
        if not body:
            return
        # The first word, the kind, comes last: without it the log ends here.
        os.pwrite(self.fd, body[4:], self.end + 4)
        os.pwrite(self.fd, body[:4], self.end)
        self.end += len(body)

    @property
    def has_grown(self) -> bool:
        """Whether it is time to write it anew."""
        size = self.end - self._begin
        return size > _GROWTH_BYTES and size > _GROWTH * self._told

    def trim(self) -> None:
        """Clear all behind the last record."""
        os.ftruncate(self.fd, self.end)

    def renew(self, pieces: Iterable[bytes]) -> None:
        """Write the log anew, see the head of this module: its first record, and what `pieces` hold."""
        self.trim()
        begin = at = (self.end // PAGE_SIZE + 1) * PAGE_SIZE  # never right behind the end: zeros end a log
        try:
            for piece in pieces:
                if os.pwrite(self.fd, piece, at) != len(piece):
                    raise OSError(28, "the journal could not be written: out of memory")
                at += len(piece)
            faults.point("journal-written")
        except OSError:
            self.trim()
            raise
        os.pwrite(self.fd, _BEGIN.pack(begin // PAGE_SIZE), 4)
        self._begin, self.end, self._told = begin, at, at - begin
        faults.point("journal-turned")
        if begin > PAGE_SIZE:
            punch_hole(self.fd, PAGE_SIZE, begin - PAGE_SIZE)

    def replay(self) -> Iterator[Record]:
        """Every record from the start."""
        first = os.pread(self.fd, RECORD.size, 0)
        if len(first) < RECORD.size or not any(first[:4]):
            return
        kind, page, a, b, c = RECORD.unpack(first)
        turned = kind in (HOME, BORN) and page
        if turned:
            yield Record(kind, 0, a, b, c)
        self._begin = page * PAGE_SIZE if turned else 0
        data = os.pread(self.fd, os.fstat(self.fd).st_size - self._begin, self._begin)
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
        self.end = self._begin + at
