"""What this kernel lets this user do: asked by trying, never by comparing versions."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path

from gpuksm.linux import pidfd, uffd
from gpuksm.linux._libc import syscall_function

_API = struct.Struct("<QQQ")
_userfaultfd = syscall_function("userfaultfd", uffd.SYS_USERFAULTFD, ctypes.c_int)


def userfaultfd_features() -> tuple[int, bool]:
    """(UFFD_FEATURE_* bits this kernel knows, whether faults of the kernel may be handled too).

    The second is False where only UFFD_USER_MODE_ONLY is allowed, which is
    enough for gpuksm.  Raises OSError: ENOSYS (no userfaultfd), EPERM.
    """
    try:
        fd, kernel_mode = _userfaultfd(uffd.CLOEXEC_NONBLOCK), True
    except PermissionError:
        fd, kernel_mode = _userfaultfd(uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY), False
    try:
        argument = bytearray(_API.pack(0xAA, 0, 0))  # asks for nothing: the kernel fills in what it has
        fcntl.ioctl(fd, uffd.UFFDIO_API, argument)
    finally:
        os.close(fd)
    return _API.unpack(argument)[1], kernel_mode


def has_fork_events() -> bool:
    """Whether a userfaultfd may tell this process of forks (CAP_SYS_PTRACE of the first user namespace).

    Root of another user namespace, a rootless container's for one, has the capability there and not here.
    """
    try:
        fd = _userfaultfd(uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    except OSError:
        return False
    try:
        uffd.api(fd, uffd.FEATURE_EVENT_FORK)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def has_thread_pidfds() -> bool:
    """Whether there are pidfds of single threads (PIDFD_THREAD, Linux 6.9)."""
    try:
        os.close(pidfd.open_thread(os.getpid()))
    except OSError:
        return False
    return True


def setting(path: str) -> str | None:
    """The text of a file below /proc/sys or /sys, or None where this kernel does not have it."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def chosen(path: str) -> str | None:
    """The word in brackets of a setting such as `always [never] advise`."""
    words = (setting(path) or "").split()
    return next((word.strip("[]") for word in words if word.startswith("[")), None)
