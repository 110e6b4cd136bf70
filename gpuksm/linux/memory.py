"""Comparing and addressing buffers of our own process: memcmp(3) without a copy."""

from __future__ import annotations

import ctypes

from gpuksm.linux._libc import PAGE_SIZE, function

_memcmp = function("memcmp", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, checked=False)


class PageBuffer:
    """A page-aligned buffer of `pages` pages with a stable address, for reads and comparisons."""

    def __init__(self, pages: int) -> None:
        import mmap

        self.pages = pages
        self.data = mmap.mmap(-1, pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self.view = memoryview(self.data)


def equal(a: int, b: int, length: int) -> bool:
    """True when `length` bytes at our addresses `a` and `b` are equal."""
    return bool(_memcmp(a, b, length) == 0)


def first_difference(a: int, b: int, pages: int) -> int:
    """Index of the first page that differs between two buffers, `pages` when none does."""
    low = 0
    while low < pages:
        step = pages - low
        # Halve until one page differs: log2(pages) comparisons, each from the last equal page on.
        while not equal(a + low * PAGE_SIZE, b + low * PAGE_SIZE, step * PAGE_SIZE):
            if step == 1:
                return low
            step = (step + 1) // 2
        low += step
    return pages


_fallocate = function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the memory of [offset, offset + length) of a memfd; it reads as zeros (fallocate(2))."""
    _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)
