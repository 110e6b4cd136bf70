"""libc with declared prototypes and one errno checker; nothing else loads it.

Every foreign function is declared once through `function` or `syscall_function`,
which set `argtypes`, `restype` and the checker, so that a failed call is always
an `OSError` with the right errno and the name of the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
U64_MASK = (1 << 64) - 1


def _checker(name: str) -> Any:
    def check(result: int, _function: Any, _arguments: Any) -> int:
        if result == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        return result

    return check


def function(name: str, restype: Any, *argtypes: Any, checked: bool = True) -> Any:
    """Declare libc function `name`; a result of -1 raises OSError unless `checked` is false."""
    # Indexing gives a fresh object each time, so prototypes of one name never mix.
    declared = libc[name]
    declared.restype = restype
    declared.argtypes = argtypes
    if checked:
        declared.errcheck = _checker(name)
    return declared


def syscall_function(name: str, number: int, *argtypes: Any) -> Any:
    """Declare system call `number` through syscall(2); -1 raises OSError named after `name`."""
    declared = libc["syscall"]
    declared.restype = ctypes.c_long
    declared.argtypes = (ctypes.c_long, *argtypes)
    declared.errcheck = _checker(name)

    def call(*arguments: Any) -> int:
        return int(declared(number, *arguments))

    call.__name__ = name
    return call


def unsupported(error: OSError) -> bool:
    """True when an errno means that this kernel does not have the feature asked for."""
    return error.errno in (errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP)


def supported(call: Callable[[], object]) -> bool:
    """Whether this kernel has what `call` asks for; other errors are raised."""
    try:
        call()
    except OSError as error:
        if unsupported(error):
            return False
        raise
    return True
