"""survey: memory of real processes that is looked up, read and hashed in one pass, window by window."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time

import numpy as np
import pytest

from gpuksm.errors import TargetGone
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.protocol import KIND_UNREADABLE
from gpuksm.linux import mappings, pagemap, vm
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.equals import Repeats
from gpuksm.scan.page_map import PageMap
from gpuksm.scan.reader import LivePages
from gpuksm.scan.survey import Lookout, Window, batches, survey
from gpuksm.scan.tracker import Tracker, gather
from gpuksm.scan.types import NoProgress

PAGES = 64


@pytest.fixture
def area():
    """(address, its pages): every third of them is not present."""
    memory = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(memory, np.uint8).reshape(PAGES, PAGE_BYTES)
    for page in range(PAGES):
        if page % 3:
            view[page] = page
    yield vm.address_of(memory), view
    del view


@pytest.fixture
def hasher():
    hasher = CpuHasher(3, 2, chunk_pages=5)
    yield hasher
    hasher.close()


def regions(start):
    """Two that lie side by side, and one that ends before the memory does."""
    cut = start + 20 * PAGE_BYTES
    return [(start, cut), (cut, start + 50 * PAGE_BYTES), (start + 51 * PAGE_BYTES, start + 62 * PAGE_BYTES)]


@pytest.mark.parametrize("batch", [1, 7, 16, 1000])
def test_a_survey_finds_what_looking_and_hashing_one_after_the_other_do(area, hasher, batch):
    start, _ = area
    trackers = [Tracker(os.getpid(), regions(start), passive=True) for _ in range(2)]
    other = Tracker(os.getpid(), regions(start), passive=True)
    other.look()
    count = len(other.columns)
    digests, kinds = np.empty(count, np.uint64), np.empty(count, np.uint8)
    hasher.digest(LivePages([(os.getpid(), other.columns.address[:])]), digests, kinds)
    other.learn(np.arange(len(digests)), digests, kinds)
    expected = gather([other, other])
    with Lookout(trackers, batch) as lookout:
        pages, scanned, alone = survey(lookout, hasher, batch, NoProgress(), lambda: 100)
    for name in ("target", "address", "digest", "kind", "joins", "watched"):
        assert getattr(pages, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(pages, name).dtype == getattr(expected, name).dtype
    assert scanned == [len(digests)] * 2 == [40] * 2
    assert alone == [0, 0]
    for tracker in (*trackers, other):
        tracker.close()


@pytest.mark.parametrize("batch", [7, 1000])
def test_what_has_no_equal_is_left_out_where_that_is_wanted(area, hasher, batch):
    start, view = area
    for page in (10, 11, 29):
        view[page] = 11
    view[40] = 0
    tracker = Tracker(os.getpid(), regions(start), passive=True)
    with Lookout([tracker], batch) as lookout:
        pages, scanned, alone = survey(
            lookout, hasher, batch, NoProgress(), lambda: 100, Repeats(4096, np.empty(0, np.uint64))
        )
    assert (pages.address - np.uint64(start)).tolist() == [page * PAGE_BYTES for page in (10, 11, 29, 40)]
    assert pages.joins.tolist() == [False, True, False, False]
    assert len(set(pages.digest[:3].tolist())) == 1
    assert (scanned, alone) == ([40], [36])
    tracker.close()


def test_batches_are_full_or_half_full_and_do_not_wait_for_more():
    taken = []

    def windows(*sizes):
        for size in sizes:
            taken.append(size)
            yield Window(0, None, np.zeros(size, np.uint64))

    found = batches(windows(3, 3, 9, 10, 2, 2, 5, 8, 1), 10)
    assert [window.address.size for window in next(found)] == [3, 3]
    assert taken == [3, 3]
    rest = [[window.address.size for window in batch] for batch in found]
    assert rest == [[9], [10], [2, 2, 5], [8], [1]]


class Vanishing(CpuHasher):
    """Page number `gone` of a batch cannot be read."""

    gone = 0

    def digest(self, source, digests, kinds):
        super().digest(source, digests, kinds)
        kinds[self.gone] = KIND_UNREADABLE


def vanished(trackers, gone):
    with Lookout(trackers, 1000) as lookout:
        hasher = Vanishing(3, 1)
        hasher.gone = gone
        found = survey(lookout, hasher, 1000, NoProgress(), lambda: 0)
        hasher.close()
    for tracker in trackers:
        tracker.close()
    return found


def test_what_vanishes_before_it_is_read_is_left_out(area):
    start, _ = area
    pages, scanned, _ = vanished(
        [Tracker(os.getpid(), [(start, start + PAGES * PAGE_BYTES)], passive=True)], 1
    )
    present = [page for page in range(PAGES) if page % 3]
    assert scanned == [len(present)]
    left = [(int(address) - start) // PAGE_BYTES for address in pages.address]
    assert left == [present[0], *present[2:]]
    assert not pages.joins[1]
    assert len(pages.digest) == len(pages.kind) == len(left)


def test_pages_of_two_targets_never_join(area):
    start, _ = area
    cut = start + 4 * PAGE_BYTES
    parts = [(start, cut + PAGE_BYTES), (cut, start + 9 * PAGE_BYTES)]
    pages, _, _ = vanished([Tracker(os.getpid(), [part], passive=True) for part in parts], 3)
    assert [(int(address) - start) // PAGE_BYTES for address in pages.address] == [1, 2, 4, 5, 7, 8]
    assert pages.joins.tolist() == [False, True, False, False, False, True]


def test_a_target_that_has_gone_has_no_windows(area):
    start, _ = area
    child = subprocess.Popen(["sleep", "60"])
    vma = next(vma for vma in mappings.maps(child.pid) if vma.path == "[stack]")
    gone = Tracker(child.pid, [(vma.start, vma.end)], passive=True)
    child.kill()
    child.wait()
    mine = Tracker(os.getpid(), [(start, start + PAGES * PAGE_BYTES)], passive=True)
    with Lookout([gone, mine], 1000) as lookout:
        assert [window.target for window in lookout.windows()] == [1]
    gone.close()
    mine.close()


def test_what_is_wrong_reaches_the_reader_and_no_thread_is_left(area, monkeypatch):
    start, _ = area
    mine = Tracker(os.getpid(), [(start, start + PAGES * PAGE_BYTES)], passive=True)
    monkeypatch.setattr(mine.map, "exclusive_in", lambda low, high: 1 // 0)
    with pytest.raises(ZeroDivisionError), Lookout([mine], 8) as lookout:
        list(lookout.windows())
    assert not [each for each in threading.enumerate() if each.name == "gpuksm-lookout"]
    mine.close()


def test_a_reader_that_gives_up_ends_the_thread_that_waits_for_it(area):
    start, _ = area
    mine = Tracker(os.getpid(), [(start, start + PAGES * PAGE_BYTES)], passive=True)

    def give_up():
        with Lookout([mine], 1):
            time.sleep(0.05)
            raise TargetGone("enough")

    with pytest.raises(TargetGone):
        give_up()
    assert not [each for each in threading.enumerate() if each.name == "gpuksm-lookout"]
    mine.close()


def test_it_looks_ahead_by_no_more_than_two_windows(area):
    start, _ = area
    mine = Tracker(os.getpid(), [(start, start + PAGES * PAGE_BYTES)], passive=True)
    looked = []
    real = mine.map.exclusive_in
    mine.map.exclusive_in = lambda low, high: (looked.append(1), real(low, high))[1]
    with Lookout([mine], 4) as lookout:
        time.sleep(0.2)
        assert len(looked) <= 2
        assert sum(len(window.address) for window in lookout.windows()) == PAGES - -(-PAGES // 3)
    mine.close()


def test_where_little_is_present_the_kernel_is_asked_what_is():
    if not pagemap.probe():
        pytest.skip("no PAGEMAP_SCAN in this kernel")
    size = 1 << 40  # looking at every page of it would take seconds
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    memory[5 * PAGE_BYTES] = 1
    memory[size - 1] = 1
    start = vm.address_of(memory)
    sparse = PageMap(os.getpid(), [(start, start + size)])
    low, high = sparse.present()
    assert low.tolist()[0] == start + 5 * PAGE_BYTES
    assert int((high - low).sum()) <= 2 << 21
    assert sparse.present_exclusive()[0].tolist()[0] == start + 5 * PAGE_BYTES
    sparse.close()
