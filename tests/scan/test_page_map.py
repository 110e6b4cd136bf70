"""One page map asked by two threads at once: while a slice is read the next one's pages are looked up."""

from __future__ import annotations

import mmap
import os
import sys
import threading

import numpy as np

from gpuksm.linux import vm
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.page_map import PRESENT, PageMap

PAGES = 4096


def test_two_threads_may_ask_at_once() -> None:
    """Each of a part of its own, in which every second page is there."""
    memory = mmap.mmap(-1, 2 * PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(0, 2 * PAGES, 2):
        memory[page * PAGE_BYTES] = 1
    start = vm.address_of(memory)
    pages = PageMap(os.getpid(), [(start, start + 2 * PAGES * PAGE_BYTES)])
    wrong: list[str] = []

    def ask(first: int) -> None:
        low = np.array([start + first * PAGE_BYTES], np.uint64)
        wanted = low[0] + np.arange(0, PAGES, 2, dtype=np.uint64) * np.uint64(PAGE_BYTES)
        for turn in range(60):
            high = low + np.uint64(PAGES * PAGE_BYTES)
            found, _ = (
                pages.select_in(PRESENT, low, high) if turn % 2 else pages.select(PRESENT, low[0], high[0])
            )
            if not np.array_equal(found, wanted):
                wrong.append(f"{len(found)} pages from {first} on, turn {turn}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(first,)) for first in (0, PAGES)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
        pages.close()
    assert wrong == []
