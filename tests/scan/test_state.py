"""state: columns of pages against a dictionary of pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.hashing.protocol import KIND_CONSTANT, KIND_NORMAL, KIND_UNREADABLE, KIND_ZERO
from gpuksm.scan.addresses import Addresses
from gpuksm.scan.state import CALM, KNOWN, PLANNED, carry_over, columns_of, empty_columns
from tests.scan.test_addresses import column, sets, stretches

KINDS = (KIND_NORMAL, KIND_ZERO, KIND_CONSTANT, KIND_UNREADABLE)
PAGE = st.tuples(st.integers(1, 9), st.sampled_from(KINDS), st.booleans(), st.booleans(), st.integers(1, 3))
described = st.dictionaries(st.integers(0, 60), PAGE).map(lambda pages: dict(sorted(pages.items())))


def made(pages, by_node=False):
    """Columns of {page: (digest, kind, calm, planned, node)}."""
    columns = columns_of(Addresses.of_pages(column(list(pages))), by_node)
    digest, kind, calm, planned, node = (
        np.array([page[at] for page in pages.values()], np.int64) for at in range(5)
    )
    columns.learn(
        np.arange(len(pages)), digest.astype(np.uint64), kind.astype(np.uint8), kind != KIND_UNREADABLE
    )
    columns.unmark(CALM, calm == 0)
    columns.mark(PLANNED, np.flatnonzero(planned))
    if by_node:
        columns.node[:] = node
    return columns


def told(columns):
    """The same of columns, without digest, kind and node where no digest is known."""
    rows = zip(
        ((columns.address[:] - column([0])) // np.uint64(4096)).tolist(),
        columns.digest.tolist(),
        columns.kind().tolist(),
        columns.known().tolist(),
        columns.calm().tolist(),
        columns.marked(PLANNED, PLANNED).tolist(),
        columns.node.tolist() if len(columns.node) else [0] * len(columns),
        strict=True,
    )
    return {
        page: (*((digest, kind, node) if known else (0, 0, 0)), calm, planned)
        for page, digest, kind, known, calm, planned, node in rows
    }


def expected(pages, by_node, calm=None, planned=None):
    found = {}
    for number, (digest, kind, was_calm, was_planned, node) in pages.items():
        known = kind != KIND_UNREADABLE
        what = (digest, kind, node if by_node else 0) if known else (0, 0, 0)
        found[number] = (
            *what,
            was_calm if calm is None else calm,
            was_planned if planned is None else planned,
        )
    return found


@settings(deadline=None)
@given(described, st.booleans())
def test_what_is_entered_is_there(pages, by_node):
    columns = made(pages, by_node)
    assert told(columns) == expected(pages, by_node)
    zeros = [kind == KIND_ZERO for _, kind, _, _, _ in pages.values()]
    assert columns.zeros().tolist() == zeros
    candidates = columns.marked(KNOWN | PLANNED, KNOWN).tolist()
    assert candidates == [k != KIND_UNREADABLE and not planned for _, k, _, planned, _ in pages.values()]


@settings(deadline=None)
@given(described, sets, st.booleans())
def test_digests_are_carried_over_to_the_same_pages(pages, others, by_node):
    new = carry_over(made(pages, by_node), Addresses.of_pages(column(others)), by_node)
    known = expected({page: pages[page] for page in others if page in pages}, by_node, True, False)
    assert told(new) == {page: known.get(page, (0, 0, 0, True, False)) for page in others}


@settings(deadline=None)
@given(described, sets, st.booleans())
def test_pages_that_join_change_nothing_of_the_others_but_what_is_planned(pages, others, by_node):
    new = made(pages, by_node).joined(*stretches(others), by_node)
    more = set(others) - set(pages)
    old = expected(pages, by_node, planned=False if more else None)
    fresh = dict.fromkeys(more, (0, 0, 0, True, False))
    assert told(new) == dict(sorted({**old, **fresh}.items()))


@settings(deadline=None)
@given(described, st.data(), st.booleans())
def test_what_is_kept_stays_as_it_was_but_for_what_is_planned(pages, data, by_node):
    mask = data.draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)))
    new = made(pages, by_node).keep(np.array(mask, np.bool_))
    left = {page: pages[page] for page, kept in zip(pages, mask, strict=True) if kept}
    assert told(new) == expected(left, by_node, planned=None if all(mask) else False)


@pytest.mark.parametrize("by_node", [False, True])
def test_pages_join_what_was_empty(by_node):
    new = empty_columns().joined(*stretches([3, 4, 8]), by_node)
    assert told(new) == dict.fromkeys([3, 4, 8], (0, 0, 0, True, False))
    assert len(new.node) == (3 if by_node else 0)


@pytest.mark.parametrize(("by_node", "most"), [(False, 9.1), (True, 11.1)])
def test_a_page_of_dense_memory_takes_nine_bytes(by_node, most):
    columns = columns_of(Addresses.of_pages(column(range(1000))), by_node)
    columns.mark(PLANNED, slice(None))
    assert columns.nbytes <= most * len(columns)
