"""The journal: what was appended is replayed, a torn end is no record."""

from __future__ import annotations

import os

from gpuksm.guard import journal
from gpuksm.guard.journal import Journal, Record


def test_replays_what_was_appended() -> None:
    log = Journal()
    log.append(journal.TARGET, 1, 10, 20, 30)
    log.append(journal.DIGESTS, 0, 512, 2, column=b"12345678abcdefgh")
    log.append_runs(journal.MAP, 1, [(4096, 8192, 5), (8192, 12288, 9)])
    successor = Journal(os.dup(log.fd), os.dup(log.private_fd))
    public = [
        Record(journal.TARGET, 1, 10, 20, 30),
        Record(journal.MAP, 1, 4096, 8192, 5),
        Record(journal.MAP, 1, 8192, 12288, 9),
    ]
    assert list(successor.replay()) == [
        *public,
        Record(journal.DIGESTS, 0, 512, 2, 0, b"12345678abcdefgh"),
    ]
    assert list(Journal(os.dup(log.fd)).replay()) == public, "the ledger tells what is private"
    successor.append(journal.GONE, 1)
    assert list(Journal(os.dup(log.fd)).replay())[-1] == Record(journal.GONE, 1, 0, 0, 0)


def test_a_record_whose_kind_was_not_written_is_not_there() -> None:
    log = Journal()
    log.append(journal.GONE, 1)
    # What a death between the two writes of an append leaves behind.
    torn = journal.RECORD.pack(journal.GONE, 2, 0, 0, 0)[4:]
    os.pwrite(log.fd, torn, journal.RECORD.size + 4)
    successor = Journal(os.dup(log.fd))
    assert [record.target for record in successor.replay()] == [1]
    successor.append(journal.GONE, 3)
    assert [record.target for record in Journal(os.dup(log.fd)).replay()] == [1, 3]
