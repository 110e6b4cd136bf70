"""Machine code in this process: which processor it is for, and calling what lies at an address.

Arguments are passed by the platform's C convention and the GIL is not held
meanwhile.  Nothing checks them: a wrong address or kind crashes the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

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


# Lines of /proc/cpuinfo that say which instructions there are, on x86 and on ARM.
_PROCESSOR = {
    *("vendor_id", "cpu family", "model", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
}


def processor() -> str:
    """What kind of processor runs us: code made for one of them runs on all that are described alike."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        first = file.read(4096).split(b"\n\n")[0]  # there are as many as processors
    lines = (line.partition(":") for line in first.decode(errors="replace").splitlines())
    return "\n".join(f"{name.strip()}:{value}" for name, _, value in lines if name.strip() in _PROCESSOR)


class Cell:
    """Eight bytes that a called function may write to, as any of KINDS."""

    def __init__(self, kind: str) -> None:
        self._cell = KINDS[kind]()
        self.address = ctypes.addressof(self._cell)

    @property
    def value(self) -> Any:
        return self._cell.value
