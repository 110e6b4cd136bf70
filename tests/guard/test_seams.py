"""Long mappings that are cut while they are looked at: what is seen then, what is told of it, what stays."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm import writers
from gpuksm.errors import TargetGone
from gpuksm.guard import seams, tracking
from gpuksm.guard.advice import Advice
from gpuksm.guard.runs import Runs
from gpuksm.guard.target import Target
from gpuksm.linux import mappings, uffd, vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.mappings import SmapsVma, Vma
from tests import requirements_env

PART = 2 << 20
LONG, TOUCHED = 64 << 20, 16 << 20
PLENTY = 10_000


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """This process as a target of a guard that registers its memory for real."""
    requirements_env.need("uffd")
    monkeypatch.setattr(seams, "PART_BYTES", PART)
    fd = ctypes.CDLL(None).syscall(uffd.SYS_USERFAULTFD, uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    uffd.api(fd, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED)
    made: Any = SimpleNamespace(
        pid=os.getpid(),
        id=1,
        allowed=writers.NOTHING,
        advice=Advice(),
        runs=Runs(),
        borders=set(),
        regions=[],
        closed=False,
    )
    made.link = SimpleNamespace(uffd_track=fd)
    made.is_own = lambda _start, _end: False
    for name in ("track", "learn_advice", "note_advice", "_unmerged", "_merged_within", "_unlocked"):
        setattr(made, name, getattr(Target, name).__get__(made))
    yield made
    os.close(fd)


@pytest.fixture
def area() -> Iterator[mmap.mmap]:
    made = mmap.mmap(-1, LONG, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, TOUCHED, PAGE_SIZE):
        made[at] = 7
    yield made
    made.close()


def _in(area: mmap.mmap, entries: list[SmapsVma] | None = None) -> list[SmapsVma]:
    """The VMAs of `area`, which has no neighbours of its kind."""
    start = vm.address_of(area)
    every = mappings.smaps(os.getpid()) if entries is None else entries
    return [entry for entry in every if start <= entry.vma.start < start + LONG]


def test_a_long_mapping_is_looked_at_in_parts_and_told_of_as_one(target: Any, area: mmap.mmap) -> None:
    [before] = _in(area)
    parts = seams.cut(target, PLENTY)
    pieces = _in(area)
    assert max(entry.vma.end - entry.vma.start for entry in pieces) <= 2 * PART
    assert len(pieces) >= LONG // PART - 2
    assert all(low % PART == 0 for low, _ in parts), "a huge page would be split"
    [told] = _in(area, seams.joined(pieces, parts))
    assert told == before
    seams.let_go(target, parts)
    assert _in(area) == [before]


def test_no_more_parts_than_there_is_room_for(target: Any, area: mmap.mmap) -> None:
    parts = seams.cut(target, 6)
    assert 0 < len(parts) <= 6
    seams.let_go(target, parts)
    assert seams.cut(target, 1) == []
    assert len(_in(area)) == 1


def test_what_is_tracked_stays_registered_as_one_and_nothing_else(target: Any, area: mmap.mmap) -> None:
    start = vm.address_of(area)
    parts = seams.cut(target, PLENTY)
    middle = start + LONG // 2 + PAGE_SIZE
    target.track([(start + PAGE_SIZE, middle)], None)
    seams.let_go(target, parts)
    assert [(entry.vma.start, "uw" in entry.flags) for entry in _in(area)] == [
        (start, False),
        (start + PAGE_SIZE, True),
        (middle, False),
    ]
    others = [entry for entry in mappings.smaps(os.getpid()) if "uw" in entry.flags]
    assert others == _in(area)[1:2]
    seams.take_apart(target)
    assert len(_in(area)) == 1
    assert target.regions == []
    assert all(area[at] == 7 for at in range(0, TOUCHED, PAGE_SIZE))


def test_looking_for_what_may_be_merged_sees_parts(
    target: Any, area: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time only: what is tracked already is never let go of."""
    start, looks = vm.address_of(area), []
    smaps = mappings.smaps

    def look(pid: int, between: Any) -> list[SmapsVma]:
        found = smaps(pid, between)
        looks.append(len(_in(area, found)))
        return found

    monkeypatch.setattr(mappings, "smaps", look)
    journal: Any = SimpleNamespace(append=lambda *_: None)
    ranges = [(start, start + LONG)]
    for _ in range(2):
        regions, skipped = tracking.begin(target, journal, lambda: None, ranges, PLENTY)
        assert ([(low, high) for low, high, _ in regions], skipped) == (ranges, {})
        assert target.regions == ranges
        [entry] = _in(area, smaps(os.getpid()))
        assert "uw" in entry.flags
    assert looks[0] > LONG // PART - 2
    assert looks[1] == 1


def test_others_are_served_while_it_is_looked_at_and_it_may_be_gone_then(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaths: list[int] = []

    def breathe() -> None:
        breaths.append(1)
        target.closed = len(breaths) == 20

    monkeypatch.setattr(seams, "let_go", lambda *_: pytest.fail("its descriptors may be others'"))
    with pytest.raises(TargetGone):
        tracking.begin(target, SimpleNamespace(), breathe, None, 0)
    assert len(breaths) == 20


# Stretches of a few parts, as (part, parts); regions of pages that begin and end within parts.
STRETCHES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=6)


def _disjoint(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    kept: list[tuple[int, int]] = []
    for first, count in sorted(stretches):
        if not kept or first >= kept[-1][1]:
            kept.append((first, first + count))
    return kept


@given(STRETCHES, STRETCHES)
def test_all_of_the_parts_is_let_go_of_but_what_is_tracked(
    parts: list[tuple[int, int]], regions: list[tuple[int, int]]
) -> None:
    cut, tracked = _disjoint(parts), _disjoint(regions)
    target: Any = SimpleNamespace(regions=tracked, link=None)
    gone: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "_unregister", lambda _, low, high: gone.update(range(low, high)))
        seams.let_go(target, cut)
    inside = {at for low, high in cut for at in range(low, high)}
    assert gone == inside - {at for low, high in tracked for at in range(low, high)}


def test_only_what_was_cut_is_put_together() -> None:
    """Neighbours that were two mappings before stay two, and so do parts that have come to differ."""

    def entry(low: int, high: int, flags: str, **other: Any) -> SmapsVma:
        vma = Vma(low, high, other.pop("perms", "rw-p"), 0, "00:00", 0, "")
        return SmapsVma(vma, frozenset(flags.split()), *(1, 2, 0), other.pop("key", 0))

    entries = [
        entry(0, 2, "rd wr"),
        entry(2, 4, "rd wr uw"),
        entry(4, 6, "rd wr"),
        entry(6, 8, "rd wr"),
        entry(8, 10, "rd wr uw dd"),
        entry(10, 12, "rd wr uw dd", key=1),
        entry(14, 16, "rd wr uw dd", key=1),
    ]
    told = seams.joined(entries, [(2, 4), (8, 10), (14, 16)])
    assert [(each.vma.start, each.vma.end) for each in told] == [(0, 6), (6, 8), (8, 10), (10, 12), (14, 16)]
    assert told[0] == SmapsVma(Vma(0, 6, "rw-p", 0, "00:00", 0, ""), frozenset({"rd", "wr"}), 3, 6, 0, 0)


def test_what_has_gone_is_not_unregistered_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def unregister(_fd: int, start: int, _length: int) -> None:
        calls.append(start)
        raise OSError(12, "Cannot allocate memory") if start >= 2 * PART else OSError(22, "Invalid argument")

    monkeypatch.setattr(seams, "PART_BYTES", PART)
    monkeypatch.setattr(uffd, "unregister", unregister)
    link = SimpleNamespace(uffd_track=-1)
    target: Any = SimpleNamespace(regions=[(0, 8 * PART)], link=link, closed=False)
    seams.take_apart(target)
    assert calls == [0, PART, 2 * PART]


def test_others_are_served_while_it_is_left_and_it_may_be_gone_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(seams, "PART_BYTES", PART)
    monkeypatch.setattr(uffd, "unregister", lambda _fd, start, _length: calls.append(start))
    link = SimpleNamespace(uffd_track=-1)
    target: Any = SimpleNamespace(regions=[(0, 2 * PART), (4 * PART, 8 * PART)], link=link, closed=False)

    def breathe() -> None:
        target.closed = len(calls) == 4

    seams.take_apart(target, breathe)
    assert calls == [0, PART, 4 * PART, 5 * PART]
