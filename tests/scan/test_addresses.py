"""addresses: stretches against plain columns of addresses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.scan.addresses import Addresses
from gpuksm.scan.columns import PAGE_BYTES, stretches_of

BASE = 0x7F0000000000
sets = st.sets(st.integers(0, 60)).map(sorted)


def column(pages):
    return np.array(pages, np.uint64) * np.uint64(PAGE_BYTES) + np.uint64(BASE)


def stretches(pages):
    address = column(pages)
    first, count = stretches_of(address)
    return address[first], address[first] + count.astype(np.uint64) * np.uint64(PAGE_BYTES)


def indices(which, count):
    """A mask or indices as indices."""
    return which.tolist() if which.dtype != np.bool_ else np.arange(count)[which].tolist()


def same(mine, pages):
    """It holds `pages`, in as few stretches as can be."""
    assert len(mine) == len(pages)
    assert mine[:].tolist() == column(pages).tolist()
    low, high = mine.stretches()
    expected_low, expected_high = stretches(pages)
    assert low.tolist() == expected_low.tolist()
    assert high.tolist() == expected_high.tolist()
    assert mine.nbytes == 16 * len(low) + 8


@settings(deadline=None)
@given(sets, st.data())
def test_addresses_are_those_of_the_column(pages, data):
    mine, plain = Addresses.of_pages(column(pages)), column(pages)
    same(mine, pages)
    index = data.draw(st.lists(st.integers(0, len(pages) - 1)) if pages else st.just([]))
    for chosen in (sorted(index), index):
        assert mine[np.array(chosen, np.int64)].tolist() == plain[np.array(chosen, np.int64)].tolist()
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages))), np.bool_)
    assert mine[mask].tolist() == plain[mask].tolist()
    part = slice(*sorted(data.draw(st.tuples(st.integers(0, 61), st.integers(0, 61)))))
    assert mine[part].tolist() == plain[part].tolist()
    same(mine.keep(mask), [page for page, kept in zip(pages, mask, strict=True) if kept])


@settings(deadline=None)
@given(sets, st.lists(st.integers(-2 * PAGE_BYTES, 63 * PAGE_BYTES)))
def test_places_are_those_of_a_search(pages, offsets):
    address = np.array([BASE + offset for offset in offsets], np.uint64)
    found = Addresses.of_pages(column(pages)).find(address)
    assert found.tolist() == np.searchsorted(column(pages), address).tolist()


@settings(deadline=None)
@given(sets, sets)
def test_with_other_stretches_they_behave_like_sets(some, others):
    mine, theirs = Addresses.of_pages(column(some)), stretches(others)
    both = [at for at, page in enumerate(some) if page in others]
    assert np.flatnonzero(mine.covered(*theirs)).tolist() == both
    assert indices(mine.within(*theirs), len(some)) == both
    assert mine.count(*theirs) == len(both)
    same(mine.joined(*theirs), sorted({*some, *others}))


@settings(deadline=None)
@given(st.sets(st.integers(0, 60)).map(sorted), st.lists(st.integers(0, 3)))
def test_stretches_that_touch_or_are_empty_are_the_pages_in_them(cuts, empty):
    low, high = column(cuts[:-1]), column(cuts[1:])
    keep = np.array([at not in empty for at in range(len(low))], np.bool_)
    high = np.where(keep, high, low)
    pages = [page for at, first in enumerate(cuts[:-1]) if keep[at] for page in range(first, cuts[at + 1])]
    same(Addresses.of_stretches(low, high), pages)


def test_few_pages_are_told_by_index_and_many_by_a_mask():
    mine = Addresses.of_pages(column(range(1000)))
    few, many = mine.within(*stretches([5, 900])), mine.within(*stretches(range(100)))
    assert few.tolist() == [5, 900]
    assert many.dtype == np.bool_
    assert np.flatnonzero(many).tolist() == list(range(100))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_page_that_is_not_there_has_no_address(wrong):
    mine = Addresses.of_pages(column([1, 2, 9]))
    with pytest.raises(IndexError):
        mine[np.array([0, wrong])]
    with pytest.raises(IndexError):
        Addresses.of_pages(column([]))[np.array([wrong])]
