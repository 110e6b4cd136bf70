"""What a process sets for itself before it runs a command: address layout, tracers.

Sources: include/uapi/linux/personality.h, include/uapi/linux/prctl.h,
Documentation/admin-guide/LSM/Yama.rst.  Both settings survive execve of a
program that is not set-user-id; the kernel drops them for one that is.
"""

from __future__ import annotations

import ctypes
import errno

from gpuksm.linux._libc import function

_ADDR_NO_RANDOMIZE = 0x0040000
_PERSONALITY_QUERY = 0xFFFFFFFF
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_personality = function("personality", ctypes.c_int, ctypes.c_ulong)
_prctl = function(
    "prctl", ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong
)


def disable_address_randomisation() -> None:
    """Give the program this process executes next, and its children, the same addresses every time."""
    _personality(_personality(_PERSONALITY_QUERY) | _ADDR_NO_RANDOMIZE)


def address_randomisation_disabled() -> bool:
    """Whether ADDR_NO_RANDOMIZE is set for this process."""
    return bool(_personality(_PERSONALITY_QUERY) & _ADDR_NO_RANDOMIZE)


def allow_any_tracer() -> bool:
    """Let every process of this user trace this one under Yama; False where there is no Yama.

    The guard's pid changes when its keeper starts a successor, so no single pid
    can be named.
    """
    try:
        _prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
