"""What Python scripts that act as victims have in common."""

from __future__ import annotations

# The C library's memory calls with their prototypes, as `libc`; `void` and `size` are its types.
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = libc.mremap.restype = void
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [void, size, size, ctypes.c_int, void]
libc.madvise.argtypes = libc.mprotect.argtypes = [void, size, ctypes.c_int]
libc.munmap.argtypes = [void, size]
"""
