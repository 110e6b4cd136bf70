"""Calling machine code at an address: what a compiler in this process has left there.

Arguments are passed by the platform's C convention and the GIL is not held
meanwhile.  Nothing checks them: a wrong address or kind crashes the process.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

from gpuksm.linux._libc import function, libc

# One letter an argument: a pointer (an address or None), int64, uint64, float64.
KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "u": ctypes.c_uint64,
    "d": ctypes.c_double,
}


def function_at(address: int, kinds: str) -> Callable[..., int]:
    """The function at `address`, which takes arguments of `kinds` and returns an int32."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, *(KINDS[kind] for kind in kinds))
    return prototype(address)


class Cell:
    """Eight bytes that a called function may write to, as any of KINDS."""

    def __init__(self, kind: str) -> None:
        self._cell = KINDS[kind]()
        self.address = ctypes.addressof(self._cell)

    @property
    def value(self) -> Any:
        return self._cell.value


# Functions of the C library that machine code of ours may call.
_FROM_LIBC = frozenset({"memcpy", "memmove", "memset", "memcmp"})
_mprotect = function("mprotect", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_executables: list[Any] = []  # never given back: there is no telling who still has an address in them


def libc_function(name: str) -> int | None:
    """Address of a function of the C library that machine code may call; None for any other."""
    return ctypes.cast(libc[name], ctypes.c_void_p).value if name in _FROM_LIBC else None


class Executable:
    """`size` bytes for machine code at `address`, from a page on; first written, then executed, never both.

    Raises OSError where that is not allowed.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def fill(self, image: bytes | bytearray) -> None:
        """Write the code, and make it executable."""
        self._memory[: len(image)] = bytes(image)
        _executables.append(self._memory)
        _mprotect(self.address, len(self._memory), mmap.PROT_READ | mmap.PROT_EXEC)
