"""Descriptors of other processes: pidfd_getfd(2), Linux 5.6, and kcmp(2)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator

from gpuksm.linux._libc import libc, syscall_function

_KCMP_VM = 1
_pidfd_getfd = syscall_function("pidfd_getfd", 438, ctypes.c_int, ctypes.c_int, ctypes.c_uint)
_KCMP = 312
_kcmp = syscall_function(
    "kcmp", _KCMP, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong
)

_compare = libc["syscall"]
_compare.restype = ctypes.c_long


def steal(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of descriptor `fd` of the process behind `pidfd`."""
    return int(_pidfd_getfd(pidfd, fd, 0))


def open_process(pid: int) -> int:
    """A pidfd of process `pid`; ProcessLookupError when it is gone."""
    return os.pidfd_open(pid)


def open_thread(tid: int) -> int:
    """A pidfd of thread `tid` alone, whose descriptor table may be its own; OSError before Linux 6.9."""
    return os.pidfd_open(tid, os.O_EXCL)  # PIDFD_THREAD


def sharing_memory(pid: int, others: Iterable[int]) -> Iterator[int]:
    """Those of `others` that share the address space of `pid`, itself included; OSError as kcmp(2).

    Those of which it cannot be told (gone, not permitted) are left out.
    """
    # Without prototype and error check a call takes half of the time; all but 0 means no, as long as
    # kcmp works at all, which `pid` and itself show.
    if _compare(_KCMP, pid, pid, _KCMP_VM, 0, 0) == 0:
        return (other for other in others if _compare(_KCMP, pid, other, _KCMP_VM, 0, 0) == 0)
    return (other for other in others if same_memory(pid, other))


def same_memory(pid: int, other: int) -> bool | None:
    """True when both share one address space, None when that cannot be told (gone, not permitted)."""
    try:
        return bool(_kcmp(pid, other, _KCMP_VM, 0, 0) == 0)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EPERM, errno.EACCES):
            return None
        raise
