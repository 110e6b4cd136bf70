"""NUMA nodes: where the pages of a process lie, and where those of a memfd are to lie.

What must hold: no process is changed by anything here.  move_pages(2) without a list of nodes
moves nothing and touches no page, it only tells; `prefer` is about a file of our own, through a
mapping of our own that nobody reads, and if we die the policy stays with the file or was never there.

The policy is MPOL_PREFERRED, never MPOL_BIND: where a node is full the kernel then takes memory of
another, and kills nobody for it.

Source: move_pages(2), mbind(2), include/uapi/linux/mempolicy.h.  A policy that is set through a
shared mapping of shared memory belongs to the file, and holds whoever makes a page of it
(Documentation/admin-guide/mm/numa_memory_policy.rst, "Shared Policy").
"""

from __future__ import annotations

import contextlib
import ctypes
import errno

from gpuksm.errors import FeatureMissing
from gpuksm.linux._libc import function, syscall_function
from gpuksm.linux.memory import PageBuffer
from gpuksm.linux.procfs import errors_of

MAX_NODES = 1024  # the kernel's CONFIG_NODES_SHIFT is 10 at most
_MPOL_DEFAULT, _MPOL_PREFERRED, _MPOL_LOCAL = 0, 1, 4
_MPOL_MF_MOVE = 2
_PROT_NONE, _MAP_SHARED = 0, 1

# System calls of x86-64; glibc has no functions for them.
_move_pages = syscall_function(
    "move_pages",
    279,
    ctypes.c_int,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)
_mbind = syscall_function(
    "mbind",
    237,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_uint,
)
_mmap = function(
    "mmap64",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    checked=False,
)
_munmap = function("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def nodes_at(pid: int, count: int, addresses: int, status: int) -> None:
    """Ask on which node each page of process `pid` lies: `count` addresses (u8) at our address `addresses`.

    Writes to `status` an int32 a page: the node, or a negative errno where there is none: not
    present (ENOENT), not mapped or the zero page (EFAULT).  TargetGone, NotPermitted.
    """
    with errors_of(pid):
        _move_pages(pid, count, addresses, None, status, 0)


def probe() -> bool:
    """Whether this kernel knows of nodes; without CONFIG_NUMA there is one, and nothing to ask for.

    FeatureMissing when it may not be asked.
    """
    page = PageBuffer(1)
    page.data[0] = 1
    address, status = ctypes.c_uint64(page.address), ctypes.c_int(-1)
    try:
        _move_pages(0, 1, ctypes.addressof(address), None, ctypes.addressof(status), 0)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return False
        raise FeatureMissing(
            f"pages cannot be merged by node: {error}, as seccomp filters of containers do; "
            "allow it there, or go without --no-merge-across-nodes"
        ) from None
    return True


def drain_lists() -> None:
    """Have the kernel empty its lists of pages that were touched just now, which hold them for a while.

    Asking for a page to be moved does that (lru_cache_disable, Linux 5.14); ours is where it is to be.  Each
    processor has to do something for it: one that is kept from that keeps us waiting.
    """
    page = PageBuffer(1)
    page.data[0] = 1
    address, status, node = ctypes.c_uint64(page.address), ctypes.c_int(-1), ctypes.c_int(0)
    with contextlib.suppress(OSError):  # a kernel without nodes
        _move_pages(0, 1, ctypes.addressof(address), None, ctypes.addressof(status), 0)
        node.value = max(0, status.value)
        where = ctypes.addressof(node)
        _move_pages(0, 1, ctypes.addressof(address), where, ctypes.addressof(status), _MPOL_MF_MOVE)


def prefer(fd: int, offset: int, length: int, node: int | None) -> None:
    """New pages of [offset, offset + length) of memfd `fd` are to lie on `node`; None: anywhere, as before.

    What is there already stays where it is.  OSError: EINVAL for a node without memory, or one that
    this process's cpuset does not have; EPERM, ENOSYS, ENOMEM.
    """
    address = _mmap(None, length, _PROT_NONE, _MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, "mmap of the store failed")
    try:
        if node is None:
            # The default alone changes nothing: the mapping is new, and has it already.
            _mbind(address, length, _MPOL_LOCAL, None, 0, 0)
            _mbind(address, length, _MPOL_DEFAULT, None, 0, 0)
        else:
            mask = (ctypes.c_uint64 * (MAX_NODES // 64))()
            mask[node // 64] = 1 << node % 64
            # The kernel takes one from the number of bits.
            _mbind(address, length, _MPOL_PREFERRED, ctypes.addressof(mask), MAX_NODES + 1, 0)
    finally:
        _munmap(address, length)
