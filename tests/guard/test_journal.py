"""The journal: what was appended is replayed, a torn end is no record."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import faults, journal, snapshot
from gpuksm.guard.journal import Journal, Record
from gpuksm.guard.store import Store


def test_replays_what_was_appended() -> None:
    log = Journal()
    log.append(journal.TARGET, 1, 10, 20, 30)
    log.append(journal.DIGESTS, 0, 512, 2, column=b"12345678abcdefgh")
    log.append(journal.BORDER, 1, 4096)
    log.append(journal.COPY, 1, 8192, 12288, 9)
    successor = Journal(os.dup(log.fd), os.dup(log.private_fd))
    public = [
        Record(journal.TARGET, 1, 10, 20, 30),
        Record(journal.BORDER, 1, 4096, 0, 0),
        Record(journal.COPY, 1, 8192, 12288, 9),
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


HOME = Record(journal.HOME, 0, 11, 22, 33)
BORN = Record(journal.BORN, 0, 44, 0, 0)
LEFT = [Record(journal.EXTENT, 0, 512, 2, 0), Record(journal.TARGET, 7, 1, 2, 3)]
DIGESTS = [Record(journal.DIGESTS, 0, 512, 2, 0, b"12345678abcdefgh")]


def _grown(monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Both logs have grown; what they tell of is LEFT and DIGESTS, if anything is believed."""
    monkeypatch.setattr(journal, "_GROWTH_BYTES", 20_000)
    log = Journal()
    for first in (HOME, BORN):
        log.append(*first[:5])
    assert not log.ledger_has_grown
    assert not log.private_has_grown
    while not log.ledger_has_grown:
        log.append(journal.BORDER, 7, 4096)
    while not log.private_has_grown:
        log.append(*DIGESTS[0])
    return log


def _told(log: Journal) -> list[Record]:
    return list(Journal(os.dup(log.fd), os.dup(log.private_fd)).replay())


def _renew(log: Journal) -> None:
    log.renew_ledger(LEFT)
    log.renew_private(DIGESTS)


def test_a_log_that_is_written_anew_tells_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _grown(monkeypatch)
    _renew(log)
    assert _told(log) == [HOME, *LEFT, BORN, *DIGESTS]
    assert not log.ledger_has_grown
    log.append(journal.GONE, 7)
    log.append(journal.REGISTER, 0, 5)
    after = [
        HOME,
        *LEFT,
        Record(journal.GONE, 7, 0, 0, 0),
        BORN,
        *DIGESTS,
        Record(journal.REGISTER, 0, 5, 0, 0),
    ]
    assert _told(log) == after
    successor = Journal(os.dup(log.fd), os.dup(log.private_fd))
    list(successor.replay())
    successor.append(journal.GONE, 8)
    assert _told(log)[4] == Record(journal.GONE, 8, 0, 0, 0)


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _grown(monkeypatch)
    for _ in range(50):
        _renew(log)
        while not log.ledger_has_grown:
            log.append(journal.BORDER, 7, 4096)
    for fd in (log.fd, log.private_fd):
        assert os.fstat(fd).st_blocks * 512 <= 40_000
    assert os.fstat(log.fd).st_size > 1_000_000


def test_it_grows_to_several_times_what_it_tells_before_it_is_written_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = _grown(monkeypatch)
    log.renew_ledger([Record(journal.BORDER, 7, 4096, 0, 0)] * 2000)
    records = 0
    while not log.ledger_has_grown:
        log.append(journal.BORDER, 7, 4096)
        records += 1
    assert records == 6001


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("point", "turned"), [("journal-written", False), ("journal-turned", True)])
def test_death_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, point: str, turned: bool, at_end: bool
) -> None:
    log = _grown(monkeypatch)
    while at_end and log._ledger.end % 4096:
        log.append(journal.BORDER, 7, 4096)
    before = _told(log)
    _at(monkeypatch, point, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        log.renew_ledger(LEFT)
    private = before[before.index(BORN) :]
    assert _told(log) == ([HOME, *LEFT, *private] if turned else before)
    monkeypatch.setattr(faults, "point", lambda _name: None)
    successor = Journal(os.dup(log.fd), os.dup(log.private_fd))
    list(successor.replay())
    successor.trim()
    successor.append(journal.GONE, 1)
    gone = Record(journal.GONE, 1, 0, 0, 0)
    assert _told(log) == [*([HOME, *LEFT] if turned else before[: -len(private)]), gone, *private]
    successor.renew_ledger(LEFT)
    assert _told(log) == [HOME, *LEFT, *private]
    assert os.fstat(log.fd).st_blocks * 512 <= 12_288


@pytest.mark.parametrize(("point", "turned"), [("journal-written", False), ("journal-turned", True)])
def test_an_error_while_it_is_written(monkeypatch: pytest.MonkeyPatch, point: str, turned: bool) -> None:
    log = _grown(monkeypatch)
    before = _told(log)
    _at(monkeypatch, point, lambda: OSError("injected"))
    with pytest.raises(OSError, match="injected"):
        log.renew_ledger(LEFT)
    log.append(journal.GONE, 1)
    private = before[before.index(BORN) :]
    gone = Record(journal.GONE, 1, 0, 0, 0)
    assert _told(log) == [*([HOME, *LEFT] if turned else before[: -len(private)]), gone, *private]


def _at(monkeypatch: pytest.MonkeyPatch, point: str, error: Callable[[], BaseException]) -> None:
    def passed(name: str) -> None:
        if name == point:
            raise error()

    monkeypatch.setattr(faults, "point", passed)


def test_what_an_append_that_was_broken_off_leaves_is_cleared() -> None:
    log = Journal()
    log.append(journal.GONE, 1)
    torn = journal.RECORD.pack(journal.DIGESTS, 0, 512, 100, 0)[4:] + b"\1" * 800
    os.pwrite(log.fd, torn, journal.RECORD.size + 4)
    successor = Journal(os.dup(log.fd))
    list(successor.replay())
    successor.trim()
    successor.append(journal.GONE, 3)
    assert [record.target for record in Journal(os.dup(log.fd)).replay()] == [1, 3]


@pytest.mark.parametrize("text", ["", "many", "-1", "1e6", "2048"])
def test_a_senseless_size_keeps_no_guard_from_starting(text: str) -> None:
    script = "from gpuksm.guard import journal; print(journal._GROWTH_BYTES)"
    env = {**os.environ, "GPUKSM_JOURNAL_BYTES": text}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True)
    assert int(done.stdout) == (2048 if text == "2048" else 1 << 20)


def test_what_is_told_anew_of_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their users, and the NUMA nodes of those that have one."""
    log, store = _grown(monkeypatch), Store()
    for start, user, node in ((512, 11, 3), (1 << 20, 11, 0), (1 << 21, 12, 1)):
        store.adopt(start, 4, user, node)
    registry = SimpleNamespace(entries=list)
    guard: Any = SimpleNamespace(journal=log, store=store, targets={}, orphans=[], registry=registry)
    snapshot.renew(guard)
    assert not log.ledger_has_grown
    successor = Store()
    for record in _told(log):
        if record.kind == journal.EXTENT:
            successor.adopt(record.a, record.b, record.c, record.target)
    assert successor.owners() == store.owners()
