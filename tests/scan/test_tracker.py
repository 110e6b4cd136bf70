"""tracker: real memory of this process under a real write-tracking userfaultfd."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

from gpuksm.hashing.protocol import KIND_UNREADABLE
from gpuksm.linux import pagemap, uffd, vm
from gpuksm.scan.columns import PAGE_BYTES, pages_of, stretches_of
from gpuksm.scan.page_map import CALM
from gpuksm.scan.state import KNOWN
from gpuksm.scan.tracker import Tracker, equals_elsewhere, gather, user_key
from gpuksm.scan.trees import no_stable_tree, stable_tree

PAGES = 64
ARM = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC


MAP_FIXED = 0x10

_mmap = ctypes.CDLL(None).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class Area:
    """Anonymous memory and what the guard does with it."""

    def __init__(self):
        self.memory = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = np.frombuffer(self.memory, np.uint8).reshape(PAGES, PAGE_BYTES)
        self.start = vm.address_of(self.memory)
        self.end = self.start + PAGES * PAGE_BYTES
        flags = uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY
        self.fd = ctypes.CDLL(None).syscall(uffd.SYS_USERFAULTFD, flags)
        uffd.api(self.fd, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED)
        uffd.register(self.fd, self.start, self.end - self.start)
        self.pagemap = pagemap.open_pagemap(os.getpid())

    def arm(self):
        written = pagemap.scan(
            self.pagemap,
            self.start,
            self.end,
            mask=pagemap.PAGE_IS_WRITTEN,
            ret=pagemap.PAGE_IS_WRITTEN,
            flags=ARM,
        )
        return np.array([(low, high) for low, high, _ in written], np.uint64).reshape(-1, 2)

    def put_file_over(self, first, pages):
        """Map a file over `pages` pages from `first` on, as a commit does, and read them."""
        start, length = self.start + first * PAGE_BYTES, pages * PAGE_BYTES
        file = os.memfd_create("stable")
        os.truncate(file, length)
        mapped = _mmap(start, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED, file, 0)
        assert mapped == start
        os.close(file)
        uffd.register(self.fd, start, length)
        for page in range(first, first + pages):
            _ = int(self.view[page, 0])

    def number(self, addresses):
        return [(int(address) - self.start) // PAGE_BYTES for address in addresses]


@pytest.fixture
def area():
    if not pagemap.probe():
        pytest.skip("no PAGEMAP_SCAN in this kernel")
    made = Area()
    yield made
    os.close(made.fd)
    os.close(made.pagemap)


def learn_all(tracker, digest=None):
    index = tracker.wanted()
    values = index.astype(np.uint64) + 1 if digest is None else np.full(len(index), digest, np.uint64)
    tracker.learn(index, values, np.zeros(len(index), np.uint8))


def test_calm_pages_are_present_armed_unwritten_and_anonymous(area):
    area.view[:40] = 1
    _ = int(area.view[50, 0])  # the zero page: read, never written
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    tracker.look()
    assert len(tracker.columns) == 0  # nothing is armed yet
    tracker.count_volatile()
    assert tracker.volatile == 40
    area.arm()
    area.view[3] = 2
    tracker.look()
    assert area.number(tracker.columns.address[:]) == [page for page in range(40) if page != 3]
    tracker.count_volatile()
    assert tracker.volatile == 1
    tracker.close()


def test_armed_pages_of_a_file_are_neither_calm_nor_volatile(area):
    """As merged memory is: the store's pages, in a mapping that is tracked."""
    area.view[:] = 1
    area.arm()
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    tracker.look()
    learn_all(tracker)
    area.put_file_over(10, 4)
    area.view[20] = 2
    tracker.count_volatile()
    assert tracker.volatile == 1  # neither the file's pages, which are unarmed
    area.arm()
    tracker.plan(np.arange(10, 14))  # only what was planned may have been merged
    left = [page for page in range(PAGES) if not 10 <= page < 14]
    assert tracker.still_calm(np.arange(PAGES)).tolist() == left
    tracker.prune()
    assert area.number(tracker.columns.address[:]) == left
    tracker.look()
    assert area.number(tracker.columns.address[:]) == left
    other = Tracker(os.getpid(), [], [(area.start, area.end)])  # merged by an earlier scan
    other.look()
    assert area.number(other.columns.address[:]) == left
    area.put_file_over(0, 2)
    area.arm()
    assert other.still_calm(np.arange(len(left))).tolist() == list(range(2, len(left)))
    for each in (tracker, other):
        each.close()


def test_of_what_no_plan_has_had_it_is_not_asked_whether_it_is_a_files(area):
    """That takes the kernel three times as long."""
    area.view[:] = 1
    area.arm()
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    tracker.look()
    asked, select_in = [], tracker.map.select_in
    tracker.map.select_in = lambda kind, low, high: (asked.append(kind), select_in(kind, low, high))[1]
    assert len(tracker.still_calm(np.arange(PAGES))) == PAGES
    tracker.learn(np.arange(8), np.ones(8, np.uint64), np.zeros(8, np.uint8))
    tracker.plan(np.arange(4))
    assert tracker.still_calm(np.arange(8, PAGES)).tolist() == list(range(8, PAGES))
    assert asked == [CALM, CALM]
    tracker.still_calm(np.arange(4, PAGES))
    tracker.still_calm(np.arange(4))
    assert asked[2:] == [CALM.anonymous()] * 2
    tracker.close()


def test_what_was_written_after_it_was_read_has_no_digest(area):
    area.view[:] = 1
    area.arm()
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    tracker.look()
    learn_all(tracker)
    area.view[3] = area.view[40] = 2
    tracker.keep_calm(np.arange(20))
    assert tracker.wanted().tolist() == [3]
    tracker.keep_calm(np.arange(64))
    assert tracker.wanted().tolist() == [3, 40]
    tracker.close()


def test_a_digest_holds_while_its_page_is_calm(area):
    area.view[:] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    area.arm()
    tracker.look()
    learn_all(tracker)
    assert len(tracker.wanted()) == 0
    area.view[5] = 2  # written and reported at the next arming: calm again, digest gone
    tracker.forget(area.arm())
    tracker.look()
    assert area.number(tracker.columns.address[tracker.wanted()]) == [5]
    area.view[7] = 2  # written and not armed again: not calm
    tracker.look()
    assert 7 not in area.number(tracker.columns.address[:])
    left = [page for page in range(PAGES) if page not in (5, 7)]
    assert area.number(tracker.columns.address[tracker.candidates()]) == left
    tracker.forget(area.arm())
    tracker.look()
    assert area.number(tracker.columns.address[tracker.wanted()]) == [5, 7]
    tracker.close()


def test_pages_written_or_freed_before_they_are_read_are_left_out(area):
    area.view[:] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    area.arm()
    tracker.look()
    area.view[9] = 2
    area.memory.madvise(mmap.MADV_DONTNEED, 20 * PAGE_BYTES, 2 * PAGE_BYTES)
    index = tracker.still_calm(tracker.wanted())
    assert area.number(tracker.columns.address[index]) == [p for p in range(PAGES) if p not in (9, 20, 21)]
    kinds = np.zeros(len(index), np.uint8)
    kinds[0] = KIND_UNREADABLE
    tracker.learn(index, np.ones(len(index), np.uint64), kinds)
    assert 0 not in area.number(tracker.columns.address[tracker.candidates()])
    tracker.close()


def test_pages_shared_by_fork_do_not_count(area):
    area.view[:] = 1
    area.arm()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read_end, 1)
        os._exit(0)
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    try:
        area.view[10:12] = 3
        area.arm()
        tracker.look()
        assert area.number(tracker.columns.address[:]) == [10, 11]
    finally:
        os.write(write_end, b"x")
        os.waitpid(child, 0)
        tracker.close()


def test_passive_trackers_see_all_that_is_present(area):
    area.view[4:8] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)], passive=True)
    tracker.look()
    assert area.number(tracker.columns.address[:]) == [4, 5, 6, 7]
    tracker.close()


@pytest.mark.parametrize("has_scan", [True, False])
def test_without_write_tracking_two_equal_digests_make_a_page_calm(area, has_scan, monkeypatch):
    monkeypatch.setattr(pagemap, "probe", lambda: has_scan)
    area.view[:10] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)], checksum=True)
    tracker.look()
    learn_all(tracker, 7)
    assert len(tracker.columns.address[tracker.candidates()]) == 0
    area.view[10] = 1
    tracker.look()
    assert len(tracker.wanted()) == 11
    index = tracker.wanted()
    tracker.learn(index, np.array([7] * 9 + [8, 7], np.uint64), np.zeros(11, np.uint8))
    assert area.number(tracker.columns.address[tracker.candidates()]) == list(range(9))
    assert tracker.volatile == 2
    tracker.close()


def test_runs_do_not_join_over_regions_or_targets(area):
    area.view[:] = 1
    middle = area.start + 32 * PAGE_BYTES
    first = Tracker(os.getpid(), [(area.start, middle, 3), (middle, area.end, 1)], passive=True)
    second = Tracker(os.getpid(), [(area.start, area.start + 2 * PAGE_BYTES, 3)], passive=True)
    for tracker in (first, second):
        tracker.look()
        learn_all(tracker)
    pages = gather([first, second])
    assert np.flatnonzero(~pages.joins).tolist() == [0, 32, 64]
    assert pages.target.tolist() == [0] * 64 + [1] * 2
    first.close()
    second.close()
    assert len(gather([]).address) == 0


@pytest.mark.parametrize("gap", [1, 4, 1000])
@pytest.mark.parametrize("capacity", [2, 16, 65536])
def test_looking_at_some_stretches_finds_what_looking_at_all_finds_there(area, gap, capacity, monkeypatch):
    monkeypatch.setattr("gpuksm.scan.page_map._WINDOW_GAP_PAGES", gap)
    monkeypatch.setattr("gpuksm.scan.page_map._WINDOW_PAGES", max(capacity, 4))
    monkeypatch.setattr("gpuksm.scan.page_map._CAPACITY", capacity)
    random = np.random.default_rng(gap * capacity)
    area.view[:] = 1
    area.arm()
    middle = area.start + 30 * PAGE_BYTES
    regions = [(area.start, middle), (middle + PAGE_BYTES, area.end)]
    for _ in range(40):
        area.view[random.integers(0, PAGES, 5)] = 2
        if random.integers(0, 4) == 0:
            area.arm()
        tracker = Tracker(os.getpid(), regions)
        everything = set(pages_of(*tracker.map.select(CALM)).tolist())
        chosen = np.flatnonzero(random.integers(0, 3, PAGES) == 0).astype(np.uint64)
        address = chosen * np.uint64(PAGE_BYTES) + np.uint64(area.start)
        first, pages = stretches_of(address)
        low = address[first]
        high = low + pages.astype(np.uint64) * np.uint64(PAGE_BYTES)
        found = tracker.map.select_in(CALM, low, high)
        expected = [page for page in address.tolist() if page in everything]
        assert pages_of(*found).tolist() == expected
        assert pages_of(*tracker.map.exclusive_in(*found)).tolist() == expected
        tracker.look_at(low, high)
        assert tracker.columns.address[:].tolist() == expected
        tracker.close()


def test_what_is_far_from_what_was_written_is_not_looked_at(area, monkeypatch):
    monkeypatch.setattr("gpuksm.scan.page_map._WINDOW_GAP_PAGES", 4)
    spans = []
    real = pagemap.scan_spans
    monkeypatch.setattr(
        pagemap,
        "scan_spans",
        lambda fd, wanted, *rest, **more: (spans.extend(wanted), real(fd, wanted, *rest, **more))[1],
    )
    tracker = Tracker(os.getpid(), [(area.start, area.end)])
    low = np.array([area.start, area.start + 3 * PAGE_BYTES, area.start + 60 * PAGE_BYTES], np.uint64)
    tracker.map.select_in(CALM, low, low + np.uint64(PAGE_BYTES))
    assert spans == [
        (area.start, area.start + 4 * PAGE_BYTES),
        (area.start + 60 * PAGE_BYTES, area.start + 61 * PAGE_BYTES),
    ]
    tracker.close()


def test_only_what_was_all_looked_up_a_moment_ago_needs_no_other_look(area, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gpuksm.scan.tracker.time.monotonic", lambda: now[0])
    area.view[:] = 1
    area.arm()
    tracker = Tracker(os.getpid(), [(area.start, area.end)])
    assert not tracker.was_just_looked_up()
    tracker.look()
    assert tracker.was_just_looked_up()
    now[0] += 0.1
    assert not tracker.was_just_looked_up()
    some = np.array([area.start], np.uint64)
    tracker.look_at(some, some + np.uint64(PAGE_BYTES))
    assert not tracker.was_just_looked_up()  # others without a digest were looked up long ago
    learn_all(tracker)
    tracker.drop(some, some + np.uint64(PAGE_BYTES))
    tracker.look_at(some, some + np.uint64(PAGE_BYTES))
    assert tracker.was_just_looked_up()
    assert tracker.wanted().tolist() == [0]
    passive = Tracker(os.getpid(), [(area.start, area.end)], passive=True)
    passive.look()
    assert not passive.was_just_looked_up()
    for each in (tracker, passive):
        each.close()


def test_gaps_wider_than_a_window_are_not_read(area):
    area.view[[0, 63]] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)], passive=True)
    far = np.array([area.start, area.start + 63 * PAGE_BYTES, area.start + (1 << 40)], np.uint64)
    assert tracker.map.exclusive(far).tolist() == [True, True, False]
    tracker.close()


def test_a_page_that_equals_nothing_but_itself_has_no_equal(area):
    area.view[:] = 1
    middle = area.start + 32 * PAGE_BYTES
    one = Tracker(os.getpid(), [(area.start, middle, 3)], passive=True)
    other = Tracker(os.getpid(), [(middle, area.end, 3)], passive=True)
    for number, tracker in enumerate((one, other)):
        tracker.look()
        index = tracker.wanted()
        tracker.learn(index, index.astype(np.uint64) + 1 + 100 * number, np.zeros(len(index), np.uint8))
    wanted = np.sort(one.columns.digest[[3, 7]] ^ user_key(one))
    nothing = no_stable_tree()

    def found(stable=nothing):
        return equals_elsewhere(wanted, [one, other], stable)

    assert not found()
    other.columns.digest[5] = one.columns.digest[7]
    assert found()
    other.columns.unmark(KNOWN, np.array([5]))
    assert not found()
    one.columns.digest[9] = one.columns.digest[3]
    assert found()
    one.columns.digest[9] = 0
    assert not found()
    assert found(stable_tree(1, np.array([512, 1, wanted[0]], "<u8").tobytes()))
    assert not found(stable_tree(1, np.array([512, 1, 0], "<u8").tobytes()))
    one.close()
    other.close()


def test_what_is_dropped_and_found_again_keeps_the_columns_in_order(area):
    area.view[:] = 1
    tracker = Tracker(os.getpid(), [(area.start, area.end, 3)])
    area.arm()
    tracker.look()
    learn_all(tracker)
    tracker.plan(tracker.candidates())
    at = lambda page: np.array([area.start + page * PAGE_BYTES], np.uint64)  # noqa: E731
    tracker.drop(np.concatenate([at(0), at(7), at(60)]), np.concatenate([at(2), at(8), at(64)]))
    left = [page for page in range(PAGES) if page not in (0, 1, 7, 60, 61, 62, 63)]
    assert area.number(tracker.columns.address[tracker.columns.calm()]) == left
    assert len(tracker.wanted()) == 0
    tracker.look_at(np.concatenate([at(0), at(5), at(62)]), np.concatenate([at(1), at(9), at(64)]))
    assert area.number(tracker.columns.address[tracker.columns.calm()]) == sorted([*left, 0, 7, 62, 63])
    assert area.number(tracker.columns.address[tracker.wanted()]) == [0, 7, 62, 63]
    kept = tracker.columns.digest[tracker.columns.known()]
    learn_again = tracker.wanted()
    tracker.learn(learn_again, np.full(4, 500, np.uint64), np.zeros(4, np.uint8))
    assert tracker.candidates().tolist() == learn_again.tolist()  # all others were planned before
    assert kept.tolist() == [page + 1 for page in left]  # what they were given, at their own pages
    tracker.close()


def kept_bytes(thing):
    """Bytes of all arrays that are kept in `thing`."""
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, (list, tuple)):
        return sum(map(kept_bytes, thing))
    return sum(map(kept_bytes, vars(thing).values())) if hasattr(thing, "__dict__") else 0


def test_a_tracker_keeps_few_bytes_of_each_page():
    pages = 4096
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(memory, np.uint8)[::PAGE_BYTES] = 1
    start = vm.address_of(memory)
    tracker = Tracker(os.getpid(), [(start, start + pages * PAGE_BYTES, 3)], passive=True)
    empty = kept_bytes(tracker)
    tracker.look()
    learn_all(tracker)
    tracker.plan(tracker.candidates())
    assert len(tracker.candidates()) == 0
    assert len(tracker.columns) == pages
    assert kept_bytes(tracker) - empty <= 10 * pages
    tracker.close()
