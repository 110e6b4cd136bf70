"""Sources of pages: of this process's memory, parts of another, and how one is read quickest."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import MAX_SEGMENTS, PAGE_BYTES, PageSource, RemoteSource, Stretches
from gpuksm.linux import vm

# Of one process_vm_readv: long enough that a call's cost does not count, short enough that little is
# read twice where a page has gone.
_CALL_PAGES = 512

Read = Callable[[int, int, NDArray[np.uint8], NDArray[np.bool_]], None]


class ArraySource:
    """The pages of a C-contiguous uint8 array, the last incomplete one left out; each read is one copy."""

    def __init__(self, octets: NDArray[np.uint8]) -> None:
        self._octets = octets.reshape(-1)

    @property
    def pages(self) -> int:
        return len(self._octets) // PAGE_BYTES

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """See `PageSource.read`; numpy copies without the GIL."""
        np.copyto(out[: count * PAGE_BYTES], self._octets[first * PAGE_BYTES : (first + count) * PAGE_BYTES])
        ok[:count] = True


class OwnMemory(ArraySource):
    """The same, read as another process's memory is: by process_vm_readv."""

    @property
    def stretches(self) -> Stretches:
        """See `RemoteSource`."""
        return Stretches(
            np.array([0, self.pages], np.int64),
            np.array([self._octets.ctypes.data], np.uint64),
            np.array([os.getpid()], np.int64),
        )


class _Part:
    """Pages first to end - 1 of another source."""

    def __init__(self, source: PageSource, first: int, end: int) -> None:
        self._source, self._first, self._end = source, first, end

    @property
    def pages(self) -> int:
        return self._end - self._first

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """See `PageSource.read`."""
        self._source.read(self._first + first, count, out, ok)


class _RemotePart(_Part):
    """The same of a `RemoteSource`."""

    def __init__(self, source: RemoteSource, first: int, end: int) -> None:
        super().__init__(source, first, end)
        firsts, addresses, pids = source.stretches
        begin = int(firsts.searchsorted(first, "right")) - 1
        stop = max(int(firsts.searchsorted(end, "left")), begin + 1)
        addresses = addresses[begin:stop].copy()
        addresses[:1] += np.uint64(first - int(firsts[begin])) * np.uint64(PAGE_BYTES)
        clipped = firsts[begin : stop + 1].clip(first, end) - first
        self.stretches = Stretches(clipped, addresses, pids[begin:stop].copy())


def part_of(source: PageSource, first: int, end: int) -> PageSource:
    """Pages `first` to `end` - 1 of `source`, remote when that is; 0 <= first < end <= source.pages."""
    kind = _RemotePart if isinstance(source, RemoteSource) else _Part
    return kind(source, first, end)  # type: ignore[arg-type]


def reader_of(source: PageSource) -> Read:
    """What reads as `source.read` does, without the interpreter where the source allows that."""
    if not isinstance(source, RemoteSource):
        return source.read
    stretches, read = source.stretches, library("gpuksm.hashing._page_kernel").read_pages

    def compiled(first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        segments = np.empty(2 + 2 * MAX_SEGMENTS, np.uint64)
        ok[:count] = True
        at, end, base = first, first + count, out.ctypes.data
        while at < end:
            place = base + (at - first) * PAGE_BYTES
            at = read(
                vm.READV_ADDRESS,
                *stretches,
                at,
                end,
                _CALL_PAGES,
                place,
                segments.ctypes.data,
                segments,
            )
            if at < end:
                pages = min(_CALL_PAGES, end - at)
                source.read(at, pages, out[(at - first) * PAGE_BYTES :], ok[at - first :])
                at += pages

    return compiled
