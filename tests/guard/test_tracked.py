"""What of a region is tracked as plain memory: all but merged runs and border pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpuksm.guard.runs import Run, Runs
from gpuksm.guard.target import Target
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
