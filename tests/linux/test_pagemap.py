"""pagemap: categories of anonymous memory of this process."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from gpuksm.linux import pagemap, vm

PAGE = 4096
needs_scan = pytest.mark.skipif(not pagemap.probe(), reason="no PAGEMAP_SCAN in this kernel")


@pytest.fixture
def memory():
    area = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    yield area
    area.close()


@pytest.fixture
def fd():
    descriptor = pagemap.open_pagemap(os.getpid())
    yield descriptor
    os.close(descriptor)


@needs_scan
def test_scan_finds_exactly_the_pages_that_are_present(memory, fd):
    start = vm.address_of(memory)
    for page in (0, 1, 2, 10, 63):
        memory[page * PAGE] = 1
    got = pagemap.scan(
        fd, start, start + 64 * PAGE, mask=pagemap.PAGE_IS_PRESENT, ret=pagemap.PAGE_IS_PRESENT
    )
    pages = [(address - start) // PAGE for s, e, _ in got for address in range(s, e, PAGE)]
    assert pages == [0, 1, 2, 10, 63]
    assert all(category == pagemap.PAGE_IS_PRESENT for _, _, category in got)


@needs_scan
def test_scan_goes_on_when_its_buffer_is_full(fd):
    pages = 3 * 4096 * 2
    area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = vm.address_of(area)
    view = np.frombuffer(area, np.uint8)
    view[:: 2 * PAGE] = 1  # every second page: no two stretches join
    got = pagemap.scan(
        fd, start, start + pages * PAGE, mask=pagemap.PAGE_IS_PRESENT, ret=pagemap.PAGE_IS_PRESENT
    )
    assert [s for s, _, _ in got] == list(range(start, start + pages * PAGE, 2 * PAGE))
    regions = np.zeros((5, 3), np.uint64)
    count, walk_end = pagemap.scan_into(
        fd,
        start,
        start + pages * PAGE,
        regions.ctypes.data,
        5,
        mask=pagemap.PAGE_IS_PRESENT,
        ret=pagemap.PAGE_IS_PRESENT,
    )
    assert count == 5
    assert start + 9 * PAGE <= walk_end < start + pages * PAGE
    del view
    area.close()


@needs_scan
def test_a_long_range_is_walked_in_strides(fd, monkeypatch):
    """What it finds is the same; it walks further where that is quick, and begins anew where it is not."""
    pages = 512
    area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start, end = vm.address_of(area), vm.address_of(area) + pages * PAGE
    for page in range(0, pages, 3):
        area[page * PAGE] = 1
    monkeypatch.setattr(pagemap, "_LEAST_STRIDE", 8 * PAGE)
    monkeypatch.setattr(pagemap, "_LONGEST_STRIDE", 64 * PAGE)
    walked, now = [], 0.0
    scan_into = pagemap.scan_into

    def walk(fd, low, high, *args, **what):
        nonlocal now
        walked.append((high - low) // PAGE)
        now += 0.01 if len(walked) == 8 else 1e-6
        return scan_into(fd, low, high, *args, **what)

    monkeypatch.setattr(pagemap, "scan_into", walk)
    monkeypatch.setattr(pagemap.time, "monotonic", lambda: now)
    present = {"mask": pagemap.PAGE_IS_PRESENT, "ret": pagemap.PAGE_IS_PRESENT}
    found = [each for some in pagemap.calls(fd, start, end, pagemap.Stride(), **present) for each in some]
    assert walked == [8, 16, 32, 64, 64, 64, 64, 64, 8, 16, 32, 64, 16]
    walked.clear()
    assert found == pagemap.scan(fd, start, end, **present)
    assert walked == [pages]


@needs_scan
def test_arming_untracked_memory_is_refused_and_bad_ranges_are_errors(memory, fd):
    start = vm.address_of(memory)
    memory[0] = 1
    flags = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC
    with pytest.raises(PermissionError):
        pagemap.scan(fd, start, start + PAGE, mask=pagemap.PAGE_IS_WRITTEN, flags=flags)
    with pytest.raises(OSError, match="Invalid argument"):
        pagemap.scan(fd, start + 1, start + PAGE, ret=pagemap.PAGE_IS_PRESENT)


def test_entries_tell_present_and_exclusive(memory, fd):
    start = vm.address_of(memory)
    memory[3 * PAGE] = 1
    entries = np.zeros(64, np.uint64)
    assert pagemap.read_entries(fd, start, entries.data) == 64
    present = np.flatnonzero(entries & np.uint64(pagemap.ENTRY_PRESENT))
    assert present.tolist() == [3]
    assert int(entries[3]) & pagemap.ENTRY_EXCLUSIVE
    child = os.fork()
    if child == 0:
        os.read(os.pipe()[0], 1)
        os._exit(0)
    try:
        pagemap.read_entries(fd, start, entries.data)
        assert not int(entries[3]) & pagemap.ENTRY_EXCLUSIVE
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
