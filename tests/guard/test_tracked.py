"""What of a region is tracked as plain memory: all but merged runs and border pages."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm.errors import TargetGone
from gpuksm.guard import tracking
from gpuksm.guard.runs import Run, Runs
from gpuksm.guard.target import Target
from gpuksm.linux import mappings, pagemap
from gpuksm.linux._libc import PAGE_SIZE

PAGES = st.integers(0, 40)


@given(st.lists(st.tuples(PAGES, st.integers(1, 4)), max_size=8), st.sets(PAGES), PAGES, st.integers(1, 20))
def test_all_that_is_not_merged_and_no_border_page(
    runs: list[tuple[int, int]], borders: set[int], first: int, count: int
) -> None:
    merged = Runs()
    for slot, (page, pages) in enumerate(runs):
        merged.add(Run(page * PAGE_SIZE, (page + pages) * PAGE_SIZE, 100 * slot))
    target: Any = SimpleNamespace(runs=merged)
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    found = Target._unmerged(target, start, end, sorted(page * PAGE_SIZE for page in borders))
    pages = [page for low, high in found for page in range(low // PAGE_SIZE, high // PAGE_SIZE)]
    covered = {page + at for page, pages in runs for at in range(pages)}
    assert pages == [page for page in range(first, first + count) if page not in covered | borders]


def _target(**more: Any) -> Any:
    return SimpleNamespace(
        pid=1, pagemap=3, maps=4, closed=False, reviewed=1, tainted=[], regions=[(0, 8)], spans=[], **more
    )


def test_what_was_armed_before_a_hole_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is armed now: nobody would hear again of what had been written there."""
    armed: list[tuple[int, int]] = []

    def calls(_fd: int, start: int, end: int, *_: Any, **__: Any) -> Iterator[list[tuple[int, int, int]]]:
        for at in range(start, end, 2):
            if at == 4:  # not tracked any more
                raise PermissionError
            written = [] if (at, at + 2) in armed else [(at, at + 1, 2)]
            armed.append((at, at + 2))
            yield written

    vmas = [SimpleNamespace(start=0, end=4), SimpleNamespace(start=4, end=6), SimpleNamespace(start=6, end=8)]
    monkeypatch.setattr(pagemap, "calls", calls)
    monkeypatch.setattr(mappings, "query_vma", lambda _fd, at: next((v for v in vmas if at < v.end), None))
    found = tracking.arm(_target(), lambda: None)
    assert found == ([(0, 1), (2, 3), (6, 7)], True)


def test_others_are_served_between_two_strides_and_may_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target, breaths = _target(), []

    def calls(
        _fd: int, _start: int, _end: int, stride: Any, **_: Any
    ) -> Iterator[list[tuple[int, int, int]]]:
        assert isinstance(stride, pagemap.Stride)
        for _ in range(4):
            assert not target.closed, "its descriptor may be another's by now"
            yield []

    def breathe() -> None:
        breaths.append(1)
        target.closed = len(breaths) == 6

    monkeypatch.setattr(pagemap, "calls", calls)
    tracking.arm(target, breathe)
    assert len(breaths) == 4
    with pytest.raises(TargetGone):
        tracking.arm(target, breathe)
    assert len(breaths) == 6
