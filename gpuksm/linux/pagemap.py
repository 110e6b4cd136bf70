"""PAGEMAP_SCAN and the entries of /proc/PID/pagemap.

PAGEMAP_SCAN (include/uapi/linux/fs.h, since Linux 6.7, 52526ca7fdb9) reports
page categories and arms write tracking.  A page is selected when
((categories ^ inverted) & mask) == mask and, where `anyof` is not 0,
((categories ^ inverted) & anyof) != 0; of a selected page the bits in `ret` are
reported, as (start, end, bits) for stretches with equal bits.

Select positively: "not WRITTEN" also holds for memory that was unmapped and
mapped anew.  WPALLOWED & PRESENT & not WRITTEN is what means "unchanged".

While a call walks, the kernel holds the lock of that address space, and who maps or unmaps there
waits (docs/hazards.md, 59): so `calls` walks a long range in strides.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence

from gpuksm.linux._libc import PAGE_SIZE, supported
from gpuksm.linux.procfs import errors_of

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7

PM_SCAN_WP_MATCHING = 1 << 0  # write-protect what was selected
PM_SCAN_CHECK_WPASYNC = 1 << 1  # EPERM where write tracking is not registered

# Bits of a pagemap entry, Documentation/admin-guide/mm/pagemap.rst.
ENTRY_PRESENT = 1 << 63
ENTRY_SWAPPED = 1 << 62
ENTRY_FILE = 1 << 61
ENTRY_EXCLUSIVE = 1 << 56
ENTRY_BYTES = 8

REGION = struct.Struct("=3Q")  # struct page_region: start, end, categories
_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_PAGEMAP_SCAN = 0xC0606610
_START_OFFSET, _WALK_END_OFFSET, _VECTOR_OFFSET = 16, 32, 40
_SPAN = struct.Struct("=2Q")
_REGIONS_PER_CALL = 4096
# How far a call walks: half a millisecond where each page is there; farther where walking shows to be quick
# (huge pages, or nothing there), for there are reservations of many TiB.
_LEAST_STRIDE, _LONGEST_STRIDE = 32 << 20, 1 << 30
_QUICK_SECONDS, _SLOW_SECONDS = 2e-4, 1e-3


def open_pagemap(pid: int) -> int:
    """A read-only descriptor of /proc/PID/pagemap; the caller closes it."""
    with errors_of(pid):
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def scan_into(
    fd: int,
    start: int,
    end: int,
    buffer_address: int,
    capacity: int,
    *,
    inverted: int = 0,
    mask: int = 0,
    anyof: int = 0,
    ret: int = 0,
    flags: int = 0,
) -> tuple[int, int]:
    """One PAGEMAP_SCAN call over [start, end) into `capacity` page_regions at `buffer_address`.

    Returns (regions written, address the walk ended at); where that is below
    `end` the buffer was full, and the caller goes on from there.  With capacity
    0 and PM_SCAN_WP_MATCHING pages are armed and nothing is reported.  Raises
    OSError: ENOTTY (no PAGEMAP_SCAN), EPERM (CHECK_WPASYNC), ESRCH (target gone).
    """
    argument = bytearray(
        _ARGUMENT.pack(
            _ARGUMENT.size,
            flags,
            start,
            end,
            0,
            buffer_address,
            capacity,
            0,
            inverted,
            mask,
            anyof,
            ret,
        )
    )
    count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
    walk_end: int = struct.unpack_from("=Q", argument, _WALK_END_OFFSET)[0]
    if count:
        # Where the buffer fills with the very last page, walk_end lies up to 512
        # pages before stretches that were reported (seen on 6.18): going on from
        # there would report them twice.
        last = buffer_address + (count - 1) * REGION.size
        walk_end = max(walk_end, ctypes.c_uint64.from_address(last + 8).value)
    return count, walk_end


def scan_spans(
    fd: int,
    spans: Sequence[tuple[int, int]],
    buffer_address: int,
    capacity: int,
    *,
    inverted: int = 0,
    mask: int = 0,
) -> int:
    """One PAGEMAP_SCAN call for each (start, end) of `spans`; how many page_regions are in the buffer then.

    It must have room for one for each page.  Errors as `scan_into`.
    """
    argument = bytearray(
        _ARGUMENT.pack(_ARGUMENT.size, 0, 0, 0, 0, 0, 0, 0, inverted, mask, 0, PAGE_IS_PRESENT)
    )
    count = 0
    for start, end in spans:
        _SPAN.pack_into(argument, _START_OFFSET, start, end)
        _SPAN.pack_into(argument, _VECTOR_OFFSET, buffer_address + count * REGION.size, capacity - count)
        count += fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
    return count


class Stride:
    """How far, in bytes, the next call over a long range is to walk."""

    def __init__(self) -> None:
        self.bytes = _LEAST_STRIDE
        self._began = 0.0

    def begin(self, at: int, end: int) -> int:
        """Where the call that begins now, at `at`, is to end."""
        self._began = time.monotonic()
        return min(end, at + self.bytes)

    def done(self) -> None:
        """The call has ended."""
        took = time.monotonic() - self._began
        if took < _QUICK_SECONDS:
            self.bytes = min(2 * self.bytes, _LONGEST_STRIDE)
        elif took > _SLOW_SECONDS:
            self.bytes = _LEAST_STRIDE


def calls(
    fd: int,
    start: int,
    end: int,
    stride: Stride | None = None,
    /,
    *,
    inverted: int = 0,
    mask: int = 0,
    anyof: int = 0,
    ret: int = 0,
    flags: int = 0,
) -> Iterator[list[tuple[int, int, int]]]:
    """(start, end, categories) in [start, end), page-aligned, as each call finds them; errors as `scan_into`.

    They never overlap; neighbours with equal categories may be reported in two pieces where one call ended.
    Without a `stride` a call ends where its buffer is full.
    """
    buffer = bytearray(REGION.size * _REGIONS_PER_CALL)
    pinned = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    address = ctypes.addressof(pinned)
    while start < end:
        until = end if stride is None else stride.begin(start, end)
        count, walk_end = scan_into(
            fd,
            start,
            until,
            address,
            _REGIONS_PER_CALL,
            inverted=inverted,
            mask=mask,
            anyof=anyof,
            ret=ret,
            flags=flags,
        )
        if stride is not None:
            stride.done()
        yield list(REGION.iter_unpack(bytes(memoryview(buffer)[: count * REGION.size])))
        if walk_end <= start:
            break
        start = walk_end


def scan(fd: int, start: int, end: int, **what: int) -> list[tuple[int, int, int]]:
    """All that `calls` finds; `what` are its selecting arguments.  For short ranges and stopped processes."""
    return [found for each in calls(fd, start, end, **what) for found in each]


def read_entries(fd: int, start: int, buffer: bytearray | memoryview) -> int:
    """Fill `buffer` with the 8-byte pagemap entries of the pages from `start`; returns entries read."""
    view = memoryview(buffer).cast("B")
    offset = start // PAGE_SIZE * ENTRY_BYTES
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            break
        done += got
    return done // ENTRY_BYTES


def probe() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    fd = open_pagemap(os.getpid())
    try:
        return supported(lambda: scan_into(fd, 0, PAGE_SIZE, 0, 0))
    finally:
        os.close(fd)
