"""follow: what a session remembers between rounds, on plain numbers and on real memory."""

from __future__ import annotations

import mmap
import os
from collections import Counter

import numpy as np
import pytest

from gpuksm.linux import procfs
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.engine import Target
from gpuksm.scan.follow import PIECE_SHIFT, Follower, Pieces
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.types import TargetRequest
from tests.scan.test_tracker import Area, learn_all

PIECE = 1 << PIECE_SHIFT


def column(*values):
    return np.array(values, np.uint64)


@pytest.fixture
def pieces():
    made = Pieces()
    made.cover(column(5 * PIECE), column(9 * PIECE))
    return made


def visits(watched, rounds, written, pages=64):
    """In which of `rounds` rounds piece 5 is visited, when `written(round)` says whether it was written."""
    seen = []
    for number in range(rounds):
        chosen = watched.visited(number, True)
        if chosen[0]:
            seen.append(number)
        low = column(5 * PIECE) if written(number) else column()
        watched.note(number, chosen, low, low + np.uint64(pages * PAGE_BYTES), first=False)
    return seen


def test_a_piece_that_keeps_being_written_is_visited_less_and_less_often(pieces):
    assert visits(pieces, 200, lambda number: True) == [0, 1, 3, 6, 11, 20, 37, 70, 103, 136, 169]
    assert pieces.written.tolist() == [64, 0, 0, 0]


def test_one_that_calms_down_comes_back_at_once(pieces):
    assert visits(pieces, 12, lambda number: number < 4) == [0, 1, 3, *range(6, 12)]


def test_written_now_and_then_is_not_volatile(pieces):
    assert visits(pieces, 20, lambda number: number % 2 == 0) == list(range(20))


def test_a_few_written_pages_keep_nobody_waiting(pieces):
    assert visits(pieces, 20, lambda number: True, pages=63) == list(range(20))


def test_without_smart_scan_everything_is_visited(pieces):
    visits(pieces, 30, lambda number: True)
    assert pieces.visited(31, False).all()


def test_stretches_join_neighbours_and_cover_keeps_what_is_known(pieces):
    visits(pieces, 3, lambda number: True)
    low, high = pieces.stretches(np.array([True, True, False, True]))
    assert (low.tolist(), high.tolist()) == ([5 * PIECE, 8 * PIECE], [7 * PIECE, 9 * PIECE])
    level = pieces.level[0]
    pieces.cover(column(PIECE, 5 * PIECE), column(PIECE + PAGE_BYTES, 6 * PIECE))
    assert pieces.number.tolist() == [1, 5]
    assert pieces.level.tolist() == [0, level]
    low, _ = pieces.stretches(np.zeros(2, np.bool_))
    assert len(low) == 0


@pytest.fixture
def area():
    made = Area()
    yield made
    os.close(made.fd)
    os.close(made.pagemap)


@pytest.fixture
def follower(area):
    pid = os.getpid()
    target = Target(pid, 1, "test", Tracker(pid, [(area.start, area.end, 3)]), Counter())
    made = Follower(target, TargetRequest(pid), procfs.stat(pid).start_time)
    made.cover()
    yield made
    target.leave()


def round_of(follower, area, number):
    """One round; which pages want a digest."""
    follower.choose(number, True)
    follower.armed(number, area.arm())
    tracker = follower.tracker
    wanted = area.number(tracker.columns.address[tracker.wanted()])
    learn_all(tracker)
    return wanted


def test_only_what_was_written_and_then_calm_is_looked_at(area, follower):
    area.view[:40] = 1
    assert round_of(follower, area, 0) == []
    assert round_of(follower, area, 1) == list(range(40))
    assert round_of(follower, area, 2) == []
    area.view[[3, 50]] = 2
    assert round_of(follower, area, 3) == []
    assert 3 not in area.number(follower.tracker.columns.address[follower.tracker.columns.calm()])
    assert follower.volatile == 2
    area.view[50] = 3
    assert round_of(follower, area, 4) == [3]
    assert round_of(follower, area, 5) == [50]
    assert round_of(follower, area, 6) == []
    assert follower.volatile == 0
    assert len(follower.tracker.columns.address[follower.tracker.candidates()]) == 41


def test_what_an_earlier_scanner_armed_is_found_too(area, follower):
    area.view[:] = 1
    area.arm()
    assert round_of(follower, area, 0) == []
    assert round_of(follower, area, 1) == list(range(64))


def test_new_regions_are_looked_at_and_gone_ones_pruned(area, follower):
    area.view[:] = 1
    middle = area.start + 32 * PAGE_BYTES
    follower.refreshed([[area.start, middle, 3]], [], 0.0)
    area.arm()
    round_of(follower, area, 0)
    assert round_of(follower, area, 1) == list(range(32))
    follower.refreshed([[middle, area.end, 3]], [], 0.0)
    assert round_of(follower, area, 2) == list(range(32, 64))
    follower.tracker.prune()
    assert area.number(follower.tracker.columns.address[follower.tracker.candidates()]) == list(range(32, 64))


def test_a_changed_size_asks_for_a_refresh(follower):
    assert follower.wants_refresh()
    follower.refreshed([], [], 0.0)
    follower.wants_refresh()
    follower.refreshed([], [], 0.0)
    more = mmap.mmap(-1, 64 << 20)
    assert follower.wants_refresh()
    more.close()
