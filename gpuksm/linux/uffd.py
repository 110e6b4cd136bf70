"""userfaultfd ioctls and messages.

Source: include/uapi/linux/userfaultfd.h, Documentation/admin-guide/mm/userfaultfd.rst.
WP_ASYNC needs Linux 6.7, the events 4.11, USER_MODE_ONLY 5.11.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from gpuksm.linux._libc import PAGE_SIZE

SYS_USERFAULTFD = 323  # x86-64
USER_MODE_ONLY = 1
CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK

FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_EVENT_UNMAP = 1 << 6
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

MODE_WP, MODE_MINOR = 2, 4

DEVICE = "/dev/userfaultfd"  # Linux 6.1
NEW = 0xAA00  # USERFAULTFD_IOC_NEW: makes one for whoever calls ioctl, whoever has opened the device
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_WRITEPROTECT = 0xC018AA06

EVENT_PAGEFAULT, EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_MESSAGE = struct.Struct("<B7xQQQ")
FORKED = slice(8, 12)  # of a fork event's message: the child's userfaultfd, an int of C
_API = struct.Struct("<QQQ")
_REGISTER = struct.Struct("<QQQQ")
REGISTER_BYTES = _REGISTER.size
_RANGE = struct.Struct("<QQ")
_ZEROPAGE = struct.Struct("<QQQq")
_PROTECT = struct.Struct("<QQQ")
_NEVER_MAPPED = 1 << 20  # above mmap_min_addr, below every program


class Event(NamedTuple):
    """One struct uffd_msg.

    PAGEFAULT: flags, address.  FORK: `a` is the new descriptor.  REMAP: from, to, old length.  REMOVE and
    UNMAP: start, end.
    """

    kind: int
    a: int
    b: int
    c: int


def api(fd: int, features: int) -> None:
    """Handshake; OSError EINVAL when a feature is missing, EPERM for FORK without CAP_SYS_PTRACE."""
    fcntl.ioctl(fd, UFFDIO_API, bytearray(_API.pack(0xAA, features, 0)))


def open_device() -> int | None:
    """The device that makes userfaultfds, where this user may open it."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None


def register(fd: int, start: int, length: int, mode: int = MODE_WP) -> None:
    """Register [start, start + length); EBUSY when another userfaultfd has part of it."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, length, mode, 0)))


def unregister(fd: int, start: int, length: int) -> None:
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, bytearray(_RANGE.pack(start, length)))


def zeropage(fd: int, start: int, length: int) -> None:
    """Put private zeros where a thread waits in a fault, and wake it.  OSError(EAGAIN): try again."""
    fcntl.ioctl(fd, UFFDIO_ZEROPAGE, bytearray(_ZEROPAGE.pack(start, length, 0, 0)))


def memory_exists(fd: int) -> bool:
    """False when the address space that `fd` watches is gone: its last process ended, or called exec.

    Asks for a page to be write-protected that is never mapped: ESRCH without an address
    space, else ENOENT or, with an event under way, EAGAIN (mm/userfaultfd.c, fs/userfaultfd.c).
    """
    try:
        fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(_PROTECT.pack(_NEVER_MAPPED, PAGE_SIZE, 1)))
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def register_argument(start: int, length: int, mode: int = MODE_WP) -> bytes:
    """struct uffdio_register, 32 bytes, for an ioctl that another process performs."""
    return _REGISTER.pack(start, length, mode, 0)


def range_argument(start: int, length: int) -> bytes:
    """struct uffdio_range, 16 bytes."""
    return _RANGE.pack(start, length)


def is_one(fd: int) -> bool:
    """Whether `fd` is a userfaultfd."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"


def read_message(fd: int) -> bytes:
    """What the next event reads as, for `parse`; nothing when there is none (the descriptor is non-blocking).

    Reading a fork event opens the child's userfaultfd in this process: see `FORKED`.
    """
    try:
        return os.read(fd, _MESSAGE.size)
    except BlockingIOError:
        return b""


def parse(data: bytes) -> Event | None:
    """The event that `read_message` gave, or None."""
    if len(data) < _MESSAGE.size:
        return None
    kind, a, b, c = _MESSAGE.unpack(data)
    return Event(kind, a & 0xFFFFFFFF if kind == EVENT_FORK else a, b, c)


def read_event(fd: int) -> Event | None:
    """The next event, or None when there is none."""
    return parse(read_message(fd))
