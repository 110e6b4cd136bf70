"""opening: in what order targets are looked up and read, and when they have settled."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.scan import engine as engine_module
from gpuksm.scan import measure, opening
from gpuksm.scan.attaching import Armed
from gpuksm.scan.types import TargetRequest

PAGES = 3 * opening._PIECE_PAGES


class _Engine:
    """Targets as a guard tells of them, and what was done with them, in order."""

    def __init__(self, settle: float = 0.0) -> None:
        self.did: list[tuple[str, int]] = []
        self.targets: list[Any] = []
        self.options = SimpleNamespace(settle_seconds=settle, batch_pages=1000)
        self.progress = SimpleNamespace(update=lambda *_: None)
        self.left: list[int] = []
        self.hasher = SimpleNamespace(leave=self.left.append)
        self.look = self._look
        self.read: Counter[int] = Counter()

    def _look(self, pid: int) -> None:
        self.did.append(("look", pid))

    def take(self, reply: dict[str, Any]) -> list[Any]:
        (item,) = reply["targets"]
        pid = item["pid"]
        self.did.append(("take", pid))
        tracker = SimpleNamespace(
            pid=pid,
            look=lambda: self.look(pid),
            wanted=lambda first, end: np.arange(first, min(end, PAGES)),
            columns=range(PAGES),
        )
        target = SimpleNamespace(
            pid=pid,
            tracker=None if item.get("error") else tracker,
            refusal=item if item.get("error") else None,
            followed=lambda: tracker,
        )
        target.leave = lambda: setattr(target, "tracker", None)
        self.targets.append(target)
        return [target]


class _Attaching(list[Armed]):
    """What the guard answers, told each `after` seconds; armed at 1000, 1001 and so on."""

    def __init__(self, pids: list[int], after: float = 0.0, refused: bool = False, exited: int = 0) -> None:
        self.wanted = pids
        self._after = after
        refusal = {"error": "NotPermitted", "message": "no"} if refused else {}
        for number, pid in enumerate(pids):
            reply = {"targets": [{"pid": pid, **refusal}]}
            at = None if refused or pid == exited else 1000.0 + number
            self.append(Armed(TargetRequest(pid), None if pid == 3 else measure.Held(pid, 0), reply, at))

    def __iter__(self) -> Iterator[Armed]:
        for item in super().__iter__():
            time.sleep(self._after)
            yield item


def _open(monkeypatch: pytest.MonkeyPatch, engine: Any, attaching: Any) -> opening.Opening:
    def digest(wanted: Any, *_: Any) -> dict[int, int]:
        ((tracker, index),) = wanted
        engine.did.append(("read", tracker.pid))
        assert (index >= engine.read[tracker.pid]).all(), "read twice"
        engine.read[tracker.pid] += len(index)
        time.sleep(0.001)
        return {tracker.pid: len(index)}

    monkeypatch.setattr(opening, "digest", digest)
    return opening.open_targets(engine, attaching)


def test_each_is_looked_up_and_read_while_the_next_is_attached_to(monkeypatch: Any) -> None:
    engine = _Engine()
    found = _open(monkeypatch, engine, _Attaching([1, 2, 3], after=0.05))
    assert found.before == {1: measure.Held(1, 0), 2: measure.Held(2, 0)}  # the third had gone
    for pid in (1, 2, 3):
        assert [what for what, of in engine.did if of == pid and what != "read"] == ["take", "look"]
    assert engine.did.index(("look", 1)) < engine.did.index(("take", 2)), "one after the other"
    assert engine.did.index(("read", 1)) < engine.did.index(("take", 2)), "nothing was read meanwhile"
    assert found.scanned == engine.read
    assert found.scanned[1] == PAGES
    assert engine.left == [1, 0]


def test_memory_has_settled_when_the_first_was_armed_for_so_long(monkeypatch: Any) -> None:
    assert _open(monkeypatch, _Engine(settle=0.2), _Attaching([1, 2])).settled == 1000.2
    # The guard waits for later ones, but not for long: then the last must have settled as well.
    assert _open(monkeypatch, _Engine(settle=1.0), _Attaching([1, 2])).settled == 1002.0


def test_one_that_exits_before_it_is_armed_is_left(monkeypatch: Any) -> None:
    engine = _Engine()
    found = _open(monkeypatch, engine, _Attaching([1, 2], exited=1))
    assert [target.tracker is None for target in engine.targets] == [True, False]
    assert found.settled == 1001.0
    assert ("look", 1) not in engine.did


def test_one_that_exits_before_it_is_taken_is_no_error(monkeypatch: Any) -> None:
    """Loading what a scan needs takes a while, in which its pid may become another's."""
    for error in (TargetGone, NotPermitted):

        def tracker(*_: Any, error: type[Exception] = error, **__: Any) -> None:
            raise error("gone")

        monkeypatch.setattr(engine_module, "Tracker", tracker)
        item = {"pid": 1, "target": 7, "name": "job", "regions": []}
        target = engine_module._opened(item, False, False)
        assert (target.tracker, target.error, target.refusal) == (None, None, None)


def test_one_that_has_gone_is_left_and_any_other_failure_ends_it(monkeypatch: Any) -> None:
    engine = _Engine()

    def gone(pid: int) -> None:
        raise TargetGone(f"process {pid} is gone")

    engine.look = gone
    found = _open(monkeypatch, engine, _Attaching([1]))
    assert (found.scanned, engine.targets[0].tracker) == ({}, None)

    def broken(pid: int) -> None:
        raise ZeroDivisionError

    engine.look = broken
    with pytest.raises(ZeroDivisionError):
        _open(monkeypatch, engine, _Attaching([1, 2]))
    assert all(thread.name != "gpuksm-ahead" for thread in threading.enumerate())


def test_what_is_read_ahead_is_read_of_all_targets_alike(monkeypatch: Any) -> None:
    engine = _Engine()
    both = threading.Event()

    def look(pid: int) -> None:
        if pid == 1:
            both.wait(10)
            time.sleep(0.1)  # until the second waits to be looked up

    class Slow(_Attaching):
        def __iter__(self) -> Iterator[Armed]:
            yield from super().__iter__()
            both.set()
            time.sleep(1)

    engine.look = look  # type: ignore[method-assign]
    found = _open(monkeypatch, engine, Slow([1, 2]))
    assert found.scanned[1] == found.scanned[2] == PAGES
    assert [of for what, of in engine.did if what == "read"] == [1, 2] * 3


def test_where_all_are_refused_the_first_reason_is_raised(monkeypatch: Any) -> None:
    with pytest.raises(NotPermitted):
        _open(monkeypatch, _Engine(), _Attaching([1, 2], refused=True))
    engine = _Engine()
    assert _open(monkeypatch, engine, _Attaching([])).before == {}
    assert engine.did == []


def test_a_guard_that_fails_ends_the_thread(monkeypatch: Any) -> None:
    class Lost(_Attaching):
        def __iter__(self) -> Iterator[Armed]:
            yield from super().__iter__()
            raise ConnectionError

    with pytest.raises(ConnectionError):
        _open(monkeypatch, _Engine(), Lost([1, 2]))
    assert all(thread.name != "gpuksm-ahead" for thread in threading.enumerate())
