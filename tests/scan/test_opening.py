"""opening: in what order targets are measured, attached to, armed, looked up, and when they have settled."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.scan import opening
from gpuksm.scan.types import TargetRequest

PAGES = 3 * opening._PIECE_PAGES


class _Engine:
    """Targets that take `slow` seconds to attach to, and what was done with them, in order."""

    def __init__(self, settle: float = 0.0, slow: float = 0.0) -> None:
        self.did: list[tuple[str, int]] = []
        self.targets: list[Any] = []
        self.options = SimpleNamespace(settle_seconds=settle, batch_pages=1000)
        self.progress = SimpleNamespace(update=lambda *_: None)
        self.left: list[int] = []
        self.hasher = SimpleNamespace(leave=self.left.append)
        self.slow, self.refused, self.look = slow, False, self._look
        self.armed: list[float] = []
        self.read: Counter[int] = Counter()

    def _look(self, pid: int) -> None:
        self.did.append(("look", pid))

    def attach(self, wanted: list[TargetRequest]) -> list[Any]:
        for request in wanted:
            self.did.append(("attach", request.pid))
            time.sleep(self.slow)
            tracker = SimpleNamespace(
                pid=request.pid,
                look=lambda pid=request.pid: self.look(pid),
                wanted=lambda first, end: np.arange(first, min(end, PAGES)),
                columns=range(PAGES),
            )
            target = SimpleNamespace(
                pid=request.pid,
                tracker=None if self.refused else tracker,
                refusal={"error": "NotPermitted", "message": "no"} if self.refused else None,
                followed=lambda tracker=tracker: tracker,
            )
            target.leave = lambda target=target: setattr(target, "tracker", None)
            self.targets.append(target)
        return self.targets[len(self.targets) - len(wanted) :]

    def arm(self, target: Any) -> Any:
        self.did.append(("arm", target.pid))
        self.armed.append(time.monotonic())
        return np.empty((0, 2), np.uint64)


def _open(monkeypatch: pytest.MonkeyPatch, engine: Any, pids: list[int]) -> opening.Opening:
    def held(pid: int) -> Any:
        engine.did.append(("held", pid))
        return None if pid == 3 else pid

    def digest(wanted: Any, *_: Any) -> dict[int, int]:
        ((tracker, index),) = wanted
        engine.did.append(("read", tracker.pid))
        assert (index >= engine.read[tracker.pid]).all(), "read twice"
        engine.read[tracker.pid] += len(index)
        time.sleep(0.001)
        return {tracker.pid: len(index)}

    monkeypatch.setattr(opening.measure, "held", held)
    monkeypatch.setattr(opening, "digest", digest)
    return opening.open_targets(engine, [TargetRequest(pid) for pid in pids])


def test_each_is_measured_before_it_is_attached_to_and_looked_up_once_it_is_armed(monkeypatch: Any) -> None:
    engine = _Engine(slow=0.01)
    found = _open(monkeypatch, engine, [1, 2, 3])
    assert found.before == {1: 1, 2: 2}  # the third had gone
    for pid in (1, 2, 3):
        mine = [what for what, of in engine.did if of == pid and what != "read"]
        assert mine == ["held", "attach", "arm", "look"]
    assert [of for what, of in engine.did if what == "attach"] == [1, 2, 3]
    assert engine.did.index(("look", 1)) < engine.did.index(("arm", 2)), "one after the other"
    assert engine.did.index(("read", 1)) < engine.did.index(("arm", 2)), "nothing was read meanwhile"
    assert found.scanned == engine.read
    assert found.scanned[1] == PAGES
    assert engine.left == [1, 0]


def test_memory_has_settled_when_the_first_was_armed_for_so_long(monkeypatch: Any) -> None:
    engine = _Engine(settle=0.2, slow=0.02)
    settled = _open(monkeypatch, engine, [1, 2]).settled
    assert abs(settled - engine.armed[0] - 0.2) < 0.01
    # The guard waits for later ones, but not for long: then the last must have settled as well.
    engine = _Engine(settle=1.0, slow=0.5)
    settled = _open(monkeypatch, engine, [1, 2]).settled
    assert abs(settled - engine.armed[1] - 1.0) < 0.01


def test_one_that_has_gone_is_left_and_any_other_failure_ends_it(monkeypatch: Any) -> None:
    engine = _Engine()

    def gone(pid: int) -> None:
        raise TargetGone(f"process {pid} is gone")

    engine.look = gone
    found = _open(monkeypatch, engine, [1])
    assert (found.scanned, engine.targets[0].tracker) == ({}, None)

    def broken(pid: int) -> None:
        raise ZeroDivisionError

    engine.look = broken
    with pytest.raises(ZeroDivisionError):
        _open(monkeypatch, engine, [1, 2])
    assert all(thread.name != "gpuksm-ahead" for thread in threading.enumerate())


def test_what_is_read_ahead_is_read_of_all_targets_alike(monkeypatch: Any) -> None:
    engine = _Engine()
    second, read = threading.Event(), threading.Event()

    def arm(target: Any) -> Any:
        if target.pid == 2:
            second.set()
        if target.pid == 4:
            read.wait(10)
        return np.empty((0, 2), np.uint64)

    def look(pid: int) -> None:
        if pid == 1:
            second.wait(10)
            time.sleep(0.1)  # until it waits to be looked up

    engine.arm, engine.look = arm, look  # type: ignore[method-assign]
    threading.Timer(1.0, read.set).start()
    found = _open(monkeypatch, engine, [1, 2, 4])
    assert found.scanned[1] == found.scanned[2] == PAGES
    assert [of for what, of in engine.did if what == "read" and of != 4] == [1, 2] * 3


def test_where_all_are_refused_the_first_reason_is_raised(monkeypatch: Any) -> None:
    engine = _Engine()
    engine.refused = True
    with pytest.raises(NotPermitted):
        _open(monkeypatch, engine, [1, 2])
    engine = _Engine()
    assert _open(monkeypatch, engine, []).before == {}
    assert engine.did == []


def test_a_guard_that_fails_ends_the_thread(monkeypatch: Any) -> None:
    engine = _Engine()

    def lost(target: Any) -> Any:
        raise ConnectionError

    engine.arm = lost  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        _open(monkeypatch, engine, [1, 2])
    assert all(thread.name != "gpuksm-ahead" for thread in threading.enumerate())
