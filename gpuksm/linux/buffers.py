"""Where the memory of a Python object lies: PyObject_GetBuffer (PEP 3118).

Works for whatever has the buffer protocol, read-only included: bytearray, mmap,
array, memoryview, numpy arrays, torch storages.
"""

from __future__ import annotations

import ctypes
from typing import Any

from gpuksm.linux._libc import PAGE_SIZE

# PyBUF_ANY_CONTIGUOUS of cpython's Include/cpython/object.h (it includes PyBUF_STRIDES).
_ANY_CONTIGUOUS = 0x0080 | 0x0010 | 0x0008


class _PyBuffer(ctypes.Structure):
    """Py_buffer; `obj` is a counted reference that PyBuffer_Release gives back."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = (ctypes.POINTER(_PyBuffer),)
_release.restype = None


def span(buffer: Any) -> tuple[int, int]:
    """(address, bytes) of the memory of `buffer`.

    Raises TypeError when it has no buffer protocol, BufferError or ValueError
    when its memory is not contiguous.
    """
    view = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(view), _ANY_CONTIGUOUS)
    try:
        return int(view.buf or 0), int(view.len)
    finally:
        _release(ctypes.byref(view))


def whole_pages(buffer: Any) -> tuple[int, int]:
    """[start, end) of the pages that lie wholly inside of `buffer`; start == end when there is none."""
    address, length = span(buffer)
    start = -(-address // PAGE_SIZE) * PAGE_SIZE
    end = (address + length) // PAGE_SIZE * PAGE_SIZE
    return start, max(start, end)
