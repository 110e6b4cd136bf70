"""The order of a first pass: what is read before the first plan, and what each plan is about."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuksm.scan import slices
from gpuksm.scan.state import KNOWN

PAGES = 4000


class _Tracker:
    """A target of PAGES calm pages; `keep_calm` and `count_volatile` note when they were called."""

    pid = 7

    def __init__(self) -> None:
        self.state = np.zeros(PAGES, np.uint8)
        self.columns = self
        self.checked: list[tuple[float, int]] = []
        self.counted: list[float] = []

    def __len__(self) -> int:
        return PAGES

    def count_wanted(self) -> int:
        return int((self.state == 0).sum())

    def wanted(self, first: int, end: int) -> Any:
        return np.flatnonzero(self.state[first:end] == 0) + first

    def known(self) -> Any:
        return self.state == KNOWN

    def candidates(self, first: int, end: int) -> Any:
        return np.flatnonzero(self.state[first:end] == KNOWN) + first

    def keep_calm(self, index: Any) -> None:
        self.checked.append((time.monotonic(), len(index)))

    def count_volatile(self) -> None:
        self.counted.append(time.monotonic())


class _Repeats:
    """Takes every page for one that has an equal, once it was added."""

    def __init__(self, *_: Any) -> None:
        self.added = 0

    def add(self, tracker: _Tracker, first: int, end: int) -> None:
        assert first == self.added, "each page once"
        assert tracker.known()[first:end].all()
        self.added = end

    def candidates(self, tracker: _Tracker, first: int, end: int) -> Any:
        return tracker.candidates(first, end)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a pass in four slices, reading for `seconds` each time: (tracker, [(what, when, pages)])."""

    def run(seconds: float, settle: float, slice_pages: int = PAGES // 4) -> tuple[_Tracker, list[Any]]:
        tracker, did = _Tracker(), list[Any]()

        def digest(wanted: Any, *_: Any) -> dict[int, int]:
            ((_, index),) = wanted
            assert (tracker.state[index] == 0).all(), "read twice"
            tracker.state[index] = KNOWN
            time.sleep(seconds)
            did.append(("read", time.monotonic(), index))
            return {7: len(index)}

        engine: Any = SimpleNamespace(
            progress=SimpleNamespace(update=lambda *_: None),
            options=SimpleNamespace(batch_pages=100),
            hasher=SimpleNamespace(leave=lambda _: None),
            budgets=lambda _: np.array([1000]),
            stable=lambda: SimpleNamespace(digest=()),
            plan=lambda pages, *_: did.append(("plan", time.monotonic(), pages)),
            commit=lambda *_: None,
        )
        monkeypatch.setattr(slices, "SLICE_PAGES", slice_pages)
        monkeypatch.setattr(slices, "digest", digest)
        monkeypatch.setattr(slices, "Repeats", _Repeats)
        monkeypatch.setattr(slices, "gather", lambda _trackers, chosen: chosen[0])
        monkeypatch.setattr(slices, "_mark", lambda *_: np.array([0]))
        monkeypatch.setattr(
            slices, "_merge_rest", lambda *_, **__: did.append(("rest", time.monotonic(), ()))
        )
        target: Any = SimpleNamespace(tracker=tracker)
        assert slices.merge_everything(engine, [target], time.monotonic() + settle) == {7: PAGES}
        return tracker, did

    return run


def _order(did: list[Any]) -> str:
    return "".join(what[0] for what, _, _ in did)


def test_until_memory_has_settled_it_is_read_and_then_planned_slice_by_slice(ran: Any) -> None:
    tracker, did = ran(0.001, 0.5)
    assert _order(did) == "r" * 7 + "p" * 7 + "r"
    began = did[0][1]
    assert did[7][1] - began > 0.45, "planned before it had settled"
    assert [len(index) for what, _, index in did if what == "plan"] == [PAGES // 16] * 4 + [PAGES // 4] * 3
    assert [pages for _, pages in tracker.checked] == [PAGES], "what was read meanwhile was not looked at"
    assert len(tracker.counted) == 1


def test_as_soon_as_memory_has_settled_something_is_planned(ran: Any) -> None:
    tracker, did = ran(0.01, 0.0)
    assert _order(did) == "rp" * 7 + "r"
    assert len(did[1][2]) == PAGES // 16
    assert len(tracker.checked) == 1, "what was looked up before it had settled"


def test_every_page_is_read_and_then_planned_once(ran: Any) -> None:
    _, did = ran(0.03, 0.05)
    waiting: set[int] = set()
    for what, _, index in did[:-1]:
        if what == "read":
            waiting |= set(index)
            continue
        assert set(index) <= waiting
        waiting -= set(index)
    assert not waiting


def test_little_memory_is_planned_at_once(ran: Any) -> None:
    tracker, did = ran(0.001, 0.05, slice_pages=PAGES)
    assert _order(did) == "rr"  # read, and the rest
    assert len(tracker.checked) == len(tracker.counted) == 1
