"""Addresses of buffers, checked against what the objects themselves say."""

from __future__ import annotations

import array
import ctypes
import mmap

import numpy as np
import pytest

from gpuksm.linux import buffers
from gpuksm.linux._libc import PAGE_SIZE


def test_address_and_length_of_numpy_arrays() -> None:
    values = np.arange(10_000, dtype=np.float64)
    assert buffers.span(values) == (values.ctypes.data, values.nbytes)
    values.flags.writeable = False
    assert buffers.span(values) == (values.ctypes.data, values.nbytes)
    matrix = np.asfortranarray(values.reshape(100, 100))
    assert buffers.span(matrix) == (matrix.ctypes.data, matrix.nbytes)


def test_other_objects_with_the_buffer_protocol() -> None:
    data = bytearray(3 * PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    assert buffers.span(data) == (address, len(data))
    assert buffers.span(memoryview(data)[100:200]) == (address + 100, 100)
    assert buffers.span(array.array("d", [1.0] * 7))[1] == 56
    assert buffers.span(b"")[1] == 0


def test_a_buffer_is_released_again() -> None:
    data = bytearray(PAGE_SIZE)
    buffers.span(data)
    data.append(0)  # BufferError while a view is held
    with mmap.mmap(-1, PAGE_SIZE) as mapped:
        buffers.span(mapped)


def test_only_whole_pages_inside_count() -> None:
    with mmap.mmap(-1, 4 * PAGE_SIZE) as mapped:
        address, _ = buffers.span(mapped)
        assert buffers.whole_pages(mapped) == (address, address + 4 * PAGE_SIZE)
        with memoryview(mapped)[1 : 3 * PAGE_SIZE + 5] as part:
            assert buffers.whole_pages(part) == (address + PAGE_SIZE, address + 3 * PAGE_SIZE)
        with memoryview(mapped)[1 : PAGE_SIZE - 1] as small:
            start, end = buffers.whole_pages(small)
            assert start == end


def test_what_has_no_contiguous_memory_is_refused() -> None:
    with pytest.raises(TypeError):
        buffers.span(object())
    with pytest.raises((BufferError, ValueError)):
        buffers.span(np.zeros((100, 100))[::2, ::2])
