"""Runs against a plain dictionary of pages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from gpuksm.guard.runs import Run, Runs
from gpuksm.linux._libc import PAGE_SIZE

STEPS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12), st.integers(0, 60)), max_size=40
)


def by_page(runs: Iterable[Run]) -> dict[int, int]:
    """{page number: slot}"""
    return {run.start // PAGE_SIZE + i: run.slot + i for run in runs for i in range(run.pages)}


@given(STEPS)
def test_like_a_dictionary_of_pages(steps: list[tuple[bool, int, int, int]]) -> None:
    runs, model = Runs(), dict[int, int]()
    for add, page, pages, slot in steps:
        start, end = page * PAGE_SIZE, (page + pages) * PAGE_SIZE
        if add:
            runs.add(Run(start, end, slot))
            model.update({page + i: slot + i for i in range(pages)})
        else:
            removed = {
                run.start // PAGE_SIZE + i: run.slot + i
                for run in runs.remove(start, end)
                for i in range(run.pages)
            }
            assert removed == {page + i: model[page + i] for i in range(pages) if page + i in model}
            for i in range(pages):
                model.pop(page + i, None)
        assert by_page(runs) == model
        assert runs.pages == len(model)
        ordered = list(runs)
        assert {
            page for low, high in runs.stretches() for page in range(low // PAGE_SIZE, high // PAGE_SIZE)
        } == set(model)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(runs.stretches()))
        assert runs.loose_ends() == [high for _, high in runs.stretches()]
        if model:
            low, high = runs.stretches()[0]
            assert runs.first_stretch(5) == (low, min(high, low + 5 * PAGE_SIZE))
        for address in range(0, 60 * PAGE_SIZE, PAGE_SIZE):
            behind = [(max(low, address), high) for low, high in runs.stretches() if high > address]
            first = [(low, min(high, low + 3 * PAGE_SIZE)) for low, high in behind[:1]]
            assert runs.first_stretch(3, address) == (first[0] if first else None)
        for left, right in itertools.pairwise(ordered):
            assert left.end <= right.start
            assert not (left.end == right.start and left.slot_end == right.slot), "neighbours must be joined"
        for probe in range(50):
            run = runs.at(probe * PAGE_SIZE)
            assert (run is not None) == (probe in model)


@given(
    STEPS, st.integers(0, 40), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 60)))
)
def test_many_at_once_are_as_one_by_one(
    steps: list[tuple[bool, int, int, int]], page: int, many: list[tuple[int, int, int]]
) -> None:
    one, other = Runs(), Runs()
    for _, place, pages, slot in steps:
        for runs in (one, other):
            runs.add(Run(place * PAGE_SIZE, (place + pages) * PAGE_SIZE, slot))
    fresh = []
    for gap, pages, slot in many:
        page += gap
        fresh.append(Run(page * PAGE_SIZE, (page + pages) * PAGE_SIZE, slot))
        page += pages
    for run in fresh:
        one.add(run)
    other.add_all(fresh)
    assert list(one) == list(other)
    assert one.pages == other.pages
