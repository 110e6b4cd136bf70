"""Advice that was noted, against one page at a time; whose it is that is noted."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpuksm import eligibility, writers
from gpuksm.errors import TargetGone
from gpuksm.guard import tracking
from gpuksm.guard.advice import DONTFORK, Advice, calls_for, told_by
from gpuksm.guard.children import inherited
from gpuksm.guard.runs import Run, Runs
from gpuksm.guard.target import Target
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.mappings import SmapsVma, Vma

PAGES = 24
# Bits of each page, 0 where there is nothing to note; ranges as sets of pages.
LAYOUTS = st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=PAGES, max_size=PAGES)


def _of(layout: list[int]) -> Advice:
    return Advice((page, page + 1, bits) for page, bits in enumerate(layout) if bits)


def _pages(advice: Advice) -> list[int]:
    return [advice.at(page) for page in range(PAGES)]


@given(LAYOUTS)
def test_neighbours_of_one_kind_are_one_range(layout: list[int]) -> None:
    advice = _of(layout)
    assert _pages(advice) == layout
    ranges = list(advice)
    assert all(not (a[1] == b[0] and a[2] == b[2]) for a, b in itertools.pairwise(ranges))
    assert advice == Advice(ranges)
    for page in range(PAGES):
        end = advice.until(page)
        assert set(layout[page : min(end, PAGES)]) == {layout[page]}
        assert end >= PAGES or layout[end] != layout[page]


@given(LAYOUTS, st.integers(0, PAGES), st.integers(0, PAGES))
@example([1, 1] + [0] * (PAGES - 2), 1, 0)
def test_what_is_within_a_range(layout: list[int], first: int, count: int) -> None:
    found = [0] * PAGES
    for start, end, bits in _of(layout).within([(first, min(PAGES, first + count))]):
        assert start < end
        found[start:end] = [bits] * (end - start)
    assert found == [bits * (first <= page < first + count) for page, bits in enumerate(layout)]


@given(LAYOUTS, st.data())
def test_what_moves(layout: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, PAGES // 2))
    old = data.draw(st.integers(0, PAGES - size))
    elsewhere = [place for place in range(PAGES - size + 1) if abs(place - old) >= size]
    new = data.draw(st.sampled_from(elsewhere)) if elsewhere else old
    wanted = list(layout)
    if new != old:
        wanted[old : old + size] = [0] * size
        wanted[new : new + size] = layout[old : old + size]
    pieces = sorted({old, *data.draw(st.sets(st.integers(old, old + size - 1))), old + size})
    moved = _of(layout).moved(itertools.pairwise(pieces), new - old)
    assert _pages(moved) == wanted if new != old else _pages(moved) == layout


def test_only_a_programs_own_memory_tells() -> None:
    told = list(told_by([*_smaps("rd wr dc hg"), *_smaps("rd wr dc", inode=7), *_smaps("rd wr ac", at=9)]))
    assert told == [(4 * PAGE_SIZE, 8 * PAGE_SIZE, DONTFORK | 2)]
    assert calls_for(told[0][2]) == [10, 14]


def _smaps(flags: str, inode: int = 0, at: int = 4) -> Iterator[SmapsVma]:
    vma = Vma(at * PAGE_SIZE, (at + 4) * PAGE_SIZE, "rw-p", 0, "00:00", inode, "")
    yield SmapsVma(vma, frozenset(flags.split()), 0, 0, 0, 0)


def test_a_child_has_the_advice_of_what_it_has() -> None:
    assert inherited([(0, 1, 2), (1, 2, DONTFORK), (2, 3, DONTFORK | 2), (3, 4, 8)]) == [(0, 1, 2), (3, 4, 8)]


def test_what_came_between_looking_and_tracking_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other memory may have come to lie there, which a child would miss if it were marked."""
    looks = [list(_smaps("rd wr dc")), list(_smaps("rd wr"))]
    monkeypatch.setattr(mappings, "smaps", lambda _pid, _between=None: looks.pop(0))
    target: Any = SimpleNamespace(
        pid=1, id=1, allowed=writers.NOTHING, advice=Advice(), runs=Runs(), regions=[(0, 1)], closed=False
    )
    target.runs.add(Run(0, PAGE_SIZE, 5))
    target.is_own = lambda _start, _end: False
    target.track = lambda regions, _limits: regions
    for name in ("learn_advice", "note_advice"):
        setattr(target, name, getattr(Target, name).__get__(target))
    journal: Any = SimpleNamespace(append=lambda *_: None)
    regions, _ = tracking.begin(target, journal, lambda: None, None)
    assert regions == [(4 * PAGE_SIZE, 8 * PAGE_SIZE, 3)]
    assert list(target.advice) == []


def test_the_agents_own_memory_is_no_reason_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept from children, in every target; to look takes the kernel as long as the target is large."""
    looks = [list(_smaps("rd wr dc"))]
    monkeypatch.setattr(mappings, "smaps", lambda _pid, _between=None: looks.pop(0))
    target: Any = SimpleNamespace(pid=1, allowed=writers.NOTHING, regions=[(0, 1)], closed=False)
    target.is_own = lambda start, end: (start, end) == (4 * PAGE_SIZE, 8 * PAGE_SIZE)
    target.track = lambda regions, _limits: regions
    target.learn_advice = lambda *_: None
    journal: Any = SimpleNamespace()
    assert tracking.begin(target, journal, lambda: None, None) == ([], {})
    assert looks == []


def test_what_is_told_of_a_place_does_not_hold_for_what_was_moved_there() -> None:
    """Merged memory came to lie there while it was looked at: marked, a child would miss it."""
    target: Any = SimpleNamespace(id=1, advice=Advice([(20, 30, 2)]), runs=Runs())
    target.runs.add(Run(4, 8, 5))
    target.runs.add(Run(22, 24, 9))
    target.note_advice = Target.note_advice.__get__(target)
    journal: Any = SimpleNamespace(append=lambda *_: None)
    Target.learn_advice(target, journal, [(2, 10, DONTFORK), (20, 26, DONTFORK)])
    assert list(target.advice) == [(2, 4, 1), (8, 10, 1), (20, 22, 1), (22, 24, 2), (24, 26, 1)]


def test_others_are_served_while_it_is_looked_at_and_it_may_be_gone_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target: Any = SimpleNamespace(pid=os.getpid(), closed=False)
    breaths: list[int] = []

    def breathe() -> None:
        breaths.append(1)
        target.closed = len(breaths) == 20

    monkeypatch.setattr(eligibility, "regions", lambda *_, **__: pytest.fail("its descriptors are others'"))
    with pytest.raises(TargetGone):
        tracking.begin(target, SimpleNamespace(), breathe, None)  # type: ignore[arg-type]
    assert len(breaths) == 20
