"""Our own process: its title, its end with its parent's; and reading a peer's credentials."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct

from gpuksm.linux._libc import function

_prctl = function(
    "prctl", ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong
)
_prctl_number = function("prctl", ctypes.c_int, ctypes.c_int, *[ctypes.c_ulong] * 4)
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def set_title(title: str) -> None:
    """Show this process as `title` in ps: name and command line (the argument area, proc(5) stat 48, 49)."""
    _prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), title.encode().ljust(end - start, b"\0")[: end - start], start)
    except (OSError, IndexError):
        return  # only the display suffers


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1])


def die_with_parent(parent: int) -> bool:
    """Have the kernel kill us when our parent's thread ends (PR_SET_PDEATHSIG); False: it is not `parent`."""
    _prctl_number(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent
