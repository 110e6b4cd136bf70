"""columns: stretches against sets of pages."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.scan import columns

pages_strategy = st.sets(st.integers(0, 60)).map(sorted)


def stretches(pages):
    address = np.array(pages, np.uint64) * 4096
    first, count = columns.stretches_of(address)
    starts = address[first]
    return starts, starts + count.astype(np.uint64) * 4096


def as_pages(starts, ends):
    return [int(address) // 4096 for address in columns.pages_of(starts, ends)]


@settings(deadline=None)
@given(pages_strategy, pages_strategy)
def test_stretches_behave_like_sets(some, others):
    mine, theirs = stretches(some), stretches(others)
    assert as_pages(*mine) == some
    assert columns.count_pages(*mine) == len(some)
    assert as_pages(*columns.subtract(*mine, *theirs)) == sorted(set(some) - set(others))
    assert as_pages(*columns.intersect(*mine, *theirs)) == sorted(set(some) & set(others))
    found = columns.inside(np.array(some, np.uint64) * 4096, *theirs)
    assert [page for page, inside in zip(some, found, strict=True) if inside] == sorted(
        set(some) & set(others)
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 5)))
def test_ranges_within(counts):
    assert columns.ranges_within(np.array(counts, np.int64)).tolist() == [i for n in counts for i in range(n)]


@settings(deadline=None)
@given(pages_strategy, st.integers(1, 70))
def test_windows_hold_so_many_pages_and_leave_none_out(some, size):
    found = [as_pages(low, high) for low, high in columns.windows_of(*stretches(some), size)]
    assert [page for window in found for page in window] == some
    assert [len(window) for window in found[:-1]] == [size] * (len(found) - 1)
    assert all(0 < len(window) <= size for window in found)
