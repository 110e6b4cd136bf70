"""nodes: digests that differ by node, and trackers told that memory of this process lies on several."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm.errors import TargetGone
from gpuksm.hashing.protocol import KIND_CONSTANT, KIND_UNREADABLE, KIND_ZERO
from gpuksm.linux import numa
from gpuksm.scan import nodes, tracker
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.nodes import apart, no_nodes, parted, taken
from gpuksm.scan.tracker import Tracker, gather
from tests.scan.test_tracker import Area, area

__all__ = ["area"]
PAGES = 64


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1024)), max_size=30))
def test_digests_differ_by_node_and_come_back(pairs: list[tuple[int, int]]) -> None:
    digest = np.array([pair[0] for pair in pairs], np.uint64)
    node = np.array([pair[1] for pair in pairs], np.uint16)
    changed = apart(digest, node)
    assert ((changed == digest) == ((node == 0) | (digest == 0))).all()
    back = (changed != 0) | (digest == 0)
    assert (apart(changed, node)[back] == digest[back]).all()


def test_no_two_nodes_change_a_digest_alike() -> None:
    keys = apart(np.ones(1025, np.uint64), np.arange(1025, dtype=np.uint16))
    assert len(np.unique(keys)) == 1025


def test_without_nodes_nothing_is_changed_or_copied() -> None:
    digest, joins = np.arange(5, dtype=np.uint64), np.ones(5, np.bool_)
    assert apart(digest, no_nodes()) is digest
    assert parted(joins, no_nodes()) is joins
    assert joins.all()
    assert len(taken(no_nodes(), np.arange(3))) == 0


@pytest.fixture
def spread(area: Area, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What the kernel is made to say: {page of `area`: node or negative errno}, 0 where nothing is said."""
    said: dict[int, int] = {}
    real = nodes.nodes_of

    def nodes_of(pid: int, address: np.ndarray) -> np.ndarray:
        found = real(pid, address)
        for at, page in enumerate(area.number(address)):
            if page in said and found[at]:
                found[at] = max(said[page] + 1, 0)
        return found

    monkeypatch.setattr(tracker, "nodes_of", nodes_of)
    return said


def learned(area: Area, digest: int = 7, **options: object) -> Tracker:
    """A tracker of all of `area`, whose pages all have one digest."""
    made = Tracker(os.getpid(), [(area.start, area.end, 3)], by_node=True, **options)
    made.look()
    index = made.wanted()
    made.learn(index, np.full(len(index), digest, np.uint64), np.zeros(len(index), np.uint8))
    return made


def test_pages_of_two_nodes_have_two_digests_and_no_runs_across(area, spread):
    area.view[:] = 1
    area.arm()
    spread.update(dict.fromkeys(range(20, 40), 1))
    made = learned(area)
    assert len(np.unique(made.columns.digest)) == 2
    assert (made.columns.node == [2 if 20 <= page < 40 else 1 for page in range(PAGES)]).all()
    pages = gather([made])
    assert np.flatnonzero(~pages.joins).tolist() == [0, 20, 40]
    assert pages.node.tolist() == made.columns.node.tolist()
    made.close()


def test_constant_pages_have_nodes_like_others(area, spread):
    area.view[:] = 1
    area.arm()
    spread.update(dict.fromkeys(range(20), 1))
    made = Tracker(os.getpid(), [(area.start, area.end, 3)], by_node=True)
    made.look()
    made.learn(made.wanted(), np.full(PAGES, 7, np.uint64), np.full(PAGES, KIND_CONSTANT, np.uint8))
    assert made.wanted().tolist() == []
    assert made.columns.node.tolist() == [2] * 20 + [1] * (PAGES - 20)
    made.close()


def test_a_page_that_is_gone_is_no_candidate(area, spread):
    area.view[:] = 1
    area.arm()
    spread[5] = -2
    made = learned(area)
    assert made.wanted().tolist() == [5]
    assert 5 not in area.number(made.columns.address[made.candidates()])
    made.close()


def test_zeros_and_what_cannot_be_read_are_not_asked_for(area, monkeypatch):
    area.view[:] = 1
    area.arm()
    asked = []
    real = nodes.nodes_of
    monkeypatch.setattr(
        tracker, "nodes_of", lambda pid, address: (asked.extend(area.number(address)), real(pid, address))[1]
    )
    made = Tracker(os.getpid(), [(area.start, area.end, 3)], by_node=True)
    made.look()
    kinds = np.zeros(PAGES, np.uint8)
    kinds[:10], kinds[10:12] = KIND_ZERO, KIND_UNREADABLE
    made.learn(made.wanted(), np.full(PAGES, 3, np.uint64), kinds)
    assert asked == list(range(12, PAGES))
    assert made.wanted().tolist() == [10, 11]
    pages = gather([made])
    assert pages.node[:10].tolist() == [0] * 10
    assert np.flatnonzero(~pages.joins).tolist() == [0, 10]
    made.close()


def test_a_page_that_moves_loses_its_digest(area, spread):
    area.view[:] = 1
    area.arm()
    made = learned(area)
    spread.update({3: 1, 9: 2})
    made.look()
    assert area.number(made.columns.address[made.wanted()]) == [3, 9]
    spread.clear()
    made.look()
    assert area.number(made.columns.address[made.wanted()]) == [3, 9]
    index = made.wanted()
    made.learn(index, np.full(2, 7, np.uint64), np.zeros(2, np.uint8))
    assert len(np.unique(made.columns.digest)) == 1
    made.close()


def test_columns_keep_nodes_with_their_pages(area, spread):
    spread.update({page: page % 3 for page in range(PAGES)})
    area.view[::2] = 1
    area.arm()
    made = learned(area)
    area.view[1::4] = 1
    area.view[8] = 2
    area.arm()
    made.drop(*np.array([[area.start + 8 * PAGE_BYTES], [area.start + 9 * PAGE_BYTES]], np.uint64))
    made.prune()
    made.look_at(*np.array([[area.start], [area.end]], np.uint64))
    expected = sorted({*range(0, PAGES, 2), *range(1, PAGES, 4)})
    assert area.number(made.columns.address[:]) == expected
    index = made.wanted()
    assert area.number(made.columns.address[index]) == sorted({8, *range(1, PAGES, 4)})
    made.learn(index, np.full(len(index), 7, np.uint64), np.zeros(len(index), np.uint8))
    assert (made.columns.node == [page % 3 + 1 for page in expected]).all()
    assert (made.columns.digest == apart(np.full(len(expected), 7, np.uint64), made.columns.node)).all()
    made.tell_nodes_apart(False)
    assert len(made.columns.node) == 0
    assert area.number(made.columns.address[made.wanted()]) == expected
    made.close()


def test_without_write_tracking_a_page_that_moves_is_not_calm(area, spread):
    area.view[:] = 1
    made = learned(area, checksum=True)
    spread[4] = 1
    made.look()
    index = made.wanted()
    made.learn(index, np.full(len(index), 7, np.uint64), np.zeros(len(index), np.uint8))
    assert area.number(made.columns.address[made.candidates()]) == [p for p in range(PAGES) if p != 4]
    made.close()


def test_a_process_that_ends_meanwhile_has_no_nodes(area, monkeypatch):
    area.view[:] = 1
    area.arm()

    def gone(pid, address):
        raise TargetGone(f"process {pid} is gone")

    made = Tracker(os.getpid(), [(area.start, area.end, 3)], by_node=True)
    made.look()
    monkeypatch.setattr(tracker, "nodes_of", gone)
    made.learn(made.wanted(), np.full(PAGES, 7, np.uint64), np.zeros(PAGES, np.uint8))
    assert len(made.candidates()) == 0
    made.close()


def test_where_nodes_make_no_difference_the_kernel_is_not_asked(area, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(numa, "nodes_at", refuse)
    monkeypatch.setattr(numa, "probe", refuse)
    area.view[:] = 1
    area.arm()
    made = Tracker(os.getpid(), [(area.start, area.end, 3)])
    made.look()
    made.learn(made.wanted(), np.full(PAGES, 7, np.uint64), np.zeros(PAGES, np.uint8))
    area.view[3] = 2
    made.prune()
    area.arm()
    made.look_at(*np.array([[area.start], [area.end]], np.uint64))
    made.look()
    assert len(made.columns.node) == len(gather([made]).node) == 0
    assert not nodes.wanted(True)
    made.close()
