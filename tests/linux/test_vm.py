"""vm: reading and writing this process through process_vm_readv/writev."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from gpuksm.linux import vm

PAGE = 4096


def test_readv_gathers_and_writev_scatters():
    area = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = b"".join(bytes([page]) * PAGE for page in range(16))
    start = vm.address_of(area)
    local = bytearray(3 * PAGE)
    remote = [(start + 5 * PAGE, PAGE), (start + PAGE, 2 * PAGE)]
    assert vm.readv(os.getpid(), [(vm.address_of(local), len(local))], remote) == 3 * PAGE
    assert bytes(local[::PAGE]) == bytes([5, 1, 2])
    local[:] = b"\x77" * len(local)
    assert vm.writev(os.getpid(), [(vm.address_of(local), len(local))], remote) == 3 * PAGE
    assert area[5 * PAGE] == area[PAGE] == area[2 * PAGE] == 0x77


def test_numpy_arrays_are_iovecs():
    source = np.arange(4 * PAGE, dtype=np.uint8)
    target = np.zeros(2 * PAGE, np.uint8)
    remote = np.array([[source.ctypes.data + 3 * PAGE, PAGE], [source.ctypes.data, PAGE]], np.uint64)
    local = np.array([[target.ctypes.data, 2 * PAGE]], np.uint64)
    assert vm.readv_at(os.getpid(), local.ctypes.data, 1, remote.ctypes.data, 2) == 2 * PAGE
    assert np.array_equal(target[:PAGE], source[3 * PAGE :])
    assert np.array_equal(target[PAGE:], source[:PAGE])


def test_a_transfer_stops_where_memory_ends():
    area = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = vm.address_of(area)
    buffer = bytearray(2 * PAGE)
    assert vm.read_into(os.getpid(), start, buffer) == 2 * PAGE
    mine = vm.address_of(buffer)
    assert vm.readv(os.getpid(), [(mine, 2 * PAGE)], [(start, PAGE), (PAGE, PAGE)]) == PAGE
    with pytest.raises(OSError, match="Bad address"):
        vm.readv(os.getpid(), [(mine, PAGE)], [(PAGE, PAGE)])
