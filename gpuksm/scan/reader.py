"""Reads pages of live processes into staging buffers.

A source is made for one batch, from page addresses the tracker has just found
present: nothing here asks for a page that was not.  One `read` becomes one
process_vm_readv with as many segments as there are stretches.  A page that has
gone since is marked, never an error.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from functools import cached_property
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import GpuksmError
from gpuksm.hashing.protocol import Stretches
from gpuksm.linux import vm
from gpuksm.scan.columns import PAGE_BYTES, U64, stretches_of


class LivePages:
    """A `PageSource` over pages of several processes; `close` gives descriptors back.

    `parts` are (pid, page addresses u8, ascending), read in that order.
    """

    def __init__(self, parts: list[tuple[int, U64]]) -> None:
        first_page: list[NDArray[np.int64]] = []
        addresses: list[U64] = [np.empty(0, np.uint64)]
        counts: list[int] = []
        pages = 0
        for _, column in parts:
            first, _ = stretches_of(column)
            first_page.append(first + pages)
            addresses.append(column[first])
            counts.append(len(first))
            pages += len(column)
        self._stretches = Stretches(
            np.concatenate((*first_page, np.array([pages], np.int64))),
            np.concatenate(addresses),
            np.repeat(np.array([pid for pid, _ in parts], np.int64), counts),
        )
        self._pages = pages
        self._mem: dict[int, int] = {}
        self._opening = Lock()

    @property
    def pages(self) -> int:
        return self._pages

    @property
    def stretches(self) -> Stretches:
        """See `RemoteSource`."""
        return self._stretches

    @cached_property
    def _lists(self) -> tuple[list[int], list[int], list[int]]:
        """The same as Python lists.

        A read touches one or a few stretches, and list access is ten times cheaper than picking
        single elements out of an array.
        """
        first, address, pid = self._stretches
        return first.tolist(), address.tolist(), pid.tolist()

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """See `PageSource.read`."""
        ok[:count] = True
        firsts, addresses, pids = self._lists
        at = bisect_right(firsts, first) - 1
        page, end = first, first + count
        base = out.ctypes.data
        while page < end:
            pid = pids[at]
            segments: list[tuple[int, int]] = []
            begin = page
            while page < end and pids[at] == pid and len(segments) < vm.IOV_MAX:
                pages = min(firsts[at + 1], end) - page
                segments.append((addresses[at] + (page - firsts[at]) * PAGE_BYTES, pages * PAGE_BYTES))
                page += pages
                if page < end and page == firsts[at + 1]:
                    at += 1
            self._read_process(
                pid, segments, base + (begin - first) * PAGE_BYTES, ok[begin - first : page - first]
            )

    def _read_process(
        self, pid: int, segments: list[tuple[int, int]], out: int, ok: NDArray[np.bool_]
    ) -> None:
        total = len(ok) * PAGE_BYTES
        done = 0
        while done < total:
            try:
                done += vm.readv(pid, [(out + done, total - done)], segments)
            except OSError as error:
                if error.errno in (errno.ESRCH, errno.EPERM):
                    ok[done // PAGE_BYTES :] = False
                    return
                # The first page of what is left cannot be read this way.
                ok[done // PAGE_BYTES] = self._read_forced(pid, segments[0][0], out + done)
                done += PAGE_BYTES
            done = done // PAGE_BYTES * PAGE_BYTES
            segments = _behind(segments, total - done)

    def _read_forced(self, pid: int, address: int, out: int) -> bool:
        """Read one page through /proc/PID/mem, which also reads PROT_NONE memory."""
        try:
            with self._opening:
                if pid not in self._mem:
                    self._mem[pid] = vm.open_mem(pid)
            return vm.pread_at(self._mem[pid], out, PAGE_BYTES, address) == PAGE_BYTES
        except (OSError, GpuksmError):
            return False

    def close(self) -> None:
        """Close the descriptors that reading opened."""
        while self._mem:
            os.close(self._mem.popitem()[1])


def _behind(segments: list[tuple[int, int]], left: int) -> list[tuple[int, int]]:
    """The last `left` bytes of `segments`."""
    rest: list[tuple[int, int]] = []
    for address, size in reversed(segments):
        if left <= 0:
            break
        part = min(size, left)
        rest.append((address + size - part, part))
        left -= part
    return rest[::-1]
