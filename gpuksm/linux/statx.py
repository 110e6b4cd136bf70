"""statx(2) without asking anybody: what the kernel knows of a file, though its server may not answer.

Source: statx(2), include/uapi/linux/stat.h (Linux 4.11).  Python's os.stat waits for a network file system,
or a FUSE one, that does not answer, and whoever waits for us then waits as well.
"""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from gpuksm.linux._libc import function

_AT_FDCWD, _AT_STATX_DONT_SYNC = -100, 0x4000
_BASIC = 0x7FF  # STATX_BASIC_STATS
_BYTES = 256
_MODE, _INODE, _DEVICES = 28, 32, 128  # where in struct statx: u16, u64, 4 u32

_statx = function(
    "statx",
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)


class Known(NamedTuple):
    """st_mode, st_ino, and (major, minor) of the device a file is, and of the one it lies on."""

    mode: int
    inode: int
    device: tuple[int, int]
    on: tuple[int, int]


def known(path: str) -> Known:
    """What is known of the file at `path`, symbolic links followed; OSError as stat(2)."""
    found = ctypes.create_string_buffer(_BYTES)
    _statx(_AT_FDCWD, path.encode(), _AT_STATX_DONT_SYNC, _BASIC, ctypes.addressof(found))
    (mode,) = struct.unpack_from("<H", found, _MODE)
    (inode,) = struct.unpack_from("<Q", found, _INODE)
    major, minor, on_major, on_minor = struct.unpack_from("<4I", found, _DEVICES)
    return Known(mode, inode, (major, minor), (on_major, on_minor))
