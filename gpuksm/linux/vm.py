"""process_vm_readv / process_vm_writev and the addresses of local buffers.

An iovec is (base u8, length u8), include/uapi/linux/uio.h: a C-contiguous
numpy array of shape (n, 2) and dtype u8 is an array of them, and the `*_at`
functions take its address, so that no caller builds one in a Python loop.  All
calls release the GIL.  Transfers stop at the first byte that cannot be read:
the result tells how far they came; EFAULT means not a byte.  ESRCH (gone) and
EPERM reach the caller as OSError.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from collections.abc import Sequence

from gpuksm.linux._libc import PAGE_SIZE, function
from gpuksm.linux.procfs import errors_of

IOV_MAX = 1024  # include/uapi/linux/uio.h UIO_MAXIOV

_process_vm_readv = function(
    "process_vm_readv",
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_process_vm_writev = function(
    "process_vm_writev",
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_pread = function(
    "pread", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong
)

_vmsplice = function(
    "vmsplice", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint
)

# Address of process_vm_readv, for machine code that calls it without the interpreter; -1 on failure.
READV_ADDRESS: int = ctypes.cast(_process_vm_readv, ctypes.c_void_p).value or 0

Segment = tuple[int, int]  # address, bytes
Writable = bytearray | memoryview | mmap.mmap


def readv_at(pid: int, local: int, local_count: int, remote: int, remote_count: int) -> int:
    """process_vm_readv with iovec arrays at addresses `local` and `remote`; returns bytes read."""
    return int(_process_vm_readv(pid, local, local_count, remote, remote_count, 0))


def writev_at(pid: int, local: int, local_count: int, remote: int, remote_count: int) -> int:
    """process_vm_writev with iovec arrays at addresses `local` and `remote`; returns bytes written."""
    return int(_process_vm_writev(pid, local, local_count, remote, remote_count, 0))


def _iovecs(segments: Sequence[Segment]) -> ctypes.Array[ctypes.c_uint64]:
    flat = [word for segment in segments for word in segment]
    return (ctypes.c_uint64 * len(flat))(*flat)


def readv(pid: int, local: Sequence[Segment], remote: Sequence[Segment]) -> int:
    """Read memory of process `pid`: at most 1024 (address, bytes) on each side; returns bytes read."""
    mine, theirs = _iovecs(local), _iovecs(remote)
    return readv_at(pid, ctypes.addressof(mine), len(local), ctypes.addressof(theirs), len(remote))


def read_pages(pid: int, local: int, pages: Sequence[int]) -> int:
    """Read the pages at addresses `pages` (at most 1024) of process `pid` to `local`, one behind the other.

    Returns bytes read.
    """
    theirs = array("Q", (PAGE_SIZE,)) * (2 * len(pages))
    theirs[0::2] = array("Q", pages)
    mine = array("Q", (local, len(pages) * PAGE_SIZE))
    return readv_at(pid, mine.buffer_info()[0], 1, theirs.buffer_info()[0], len(pages))


def writev(pid: int, local: Sequence[Segment], remote: Sequence[Segment]) -> int:
    """Write memory of process `pid`: at most 1024 (address, bytes) on each side; returns bytes written."""
    mine, theirs = _iovecs(local), _iovecs(remote)
    return writev_at(pid, ctypes.addressof(mine), len(local), ctypes.addressof(theirs), len(remote))


def address_of(buffer: Writable) -> int:
    """Address of a writable contiguous buffer, good while the caller keeps and does not resize it."""
    view = memoryview(buffer).cast("B")
    return ctypes.addressof((ctypes.c_char * len(view)).from_buffer(view))


def read_into(pid: int, address: int, buffer: Writable) -> int:
    """Read process `pid` from `address` on into all of a writable `buffer`; returns bytes read."""
    size = memoryview(buffer).nbytes
    return readv(pid, [(address_of(buffer), size)], [(address, size)])


def splice_page(pipe: int, address: int) -> None:
    """Put the page at our `address` itself into a pipe, which holds it until it is read (vmsplice(2))."""
    vector = (ctypes.c_uint64 * 2)(address, PAGE_SIZE)
    _vmsplice(pipe, ctypes.addressof(vector), 1, 0)


def open_mem(pid: int) -> int:
    """A read-only descriptor of /proc/PID/mem, through which PROT_NONE memory can be read too."""
    with errors_of(pid):
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)


def pread_at(fd: int, address: int, size: int, offset: int) -> int:
    """pread(2) of `size` bytes at `offset` into local memory at `address`; returns bytes read."""
    return int(_pread(fd, address, size, offset))
