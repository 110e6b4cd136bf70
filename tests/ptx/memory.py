"""Global and shared memory in which every access is checked.

Checked: bounds, alignment, writing to what is read-only, reading what was never
written, two threads touching one byte of which one writes without a barrier
between, and `ld.global.nc` of memory this launch writes.
"""

from __future__ import annotations

from bisect import bisect_right
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import PtxError

Addresses = NDArray[np.uint64]
Threads = NDArray[np.int64]

_BASE = 0x7F00_0000_0000
_GUARD_BYTES = 1 << 16


def some(flags: NDArray[np.generic]) -> bool:
    """Whether one of them is not zero; a third of what `any` takes for a few hundred lanes."""
    return bool(np.count_nonzero(flags))


def every(flags: NDArray[np.generic]) -> bool:
    """Whether none of them is zero."""
    return np.count_nonzero(flags) == flags.size


class Allocation:
    """One allocation: its bytes, which of them hold a value, and who wrote them in this launch."""

    def __init__(self, octets: NDArray[np.uint8], writable: bool, initialised: bool) -> None:
        self.base = 0
        self.octets, self.writable = octets, writable
        self.valid = None if initialised else np.zeros(octets.size, np.bool_)
        self.writer: NDArray[np.int64] | None = None  # thread + 1, only while a launch runs
        self.reader: NDArray[np.int64] | None = None  # thread + 1, or -1 for several

    def begin_launch(self) -> None:
        self.writer = None
        self.reader = None


class GlobalMemory:
    """A device's memory: allocations far apart in one address space."""

    def __init__(self) -> None:
        self._next = _BASE
        self._bases: list[int] = []
        self._allocations: list[Allocation] = []
        self._lock = Lock()  # streams of a fake device copy and launch beside each other

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes that hold no value yet; aligned to 256 as cudaMalloc does."""
        return self._add(Allocation(np.zeros(size, np.uint8), True, False))

    def place(self, array: NDArray[np.generic], writable: bool = True) -> int:
        """Address at which the device sees the host array's own bytes."""
        octets = array.reshape(-1).view(np.uint8)
        return self._add(Allocation(octets, writable, True))

    def _add(self, allocation: Allocation) -> int:
        with self._lock:
            allocation.base = self._next
            self._bases.append(allocation.base)
            self._allocations.append(allocation)
            self._next += -(-(allocation.octets.size + _GUARD_BYTES) // 256) * 256
        return allocation.base

    def free(self, base: int) -> None:
        """Give an allocation back; its addresses are never used again."""
        with self._lock:
            at = bisect_right(self._bases, base) - 1
            if at < 0 or self._bases[at] != base:
                raise PtxError(f"free of {base:#x}, which is no allocation")
            del self._bases[at], self._allocations[at]

    def find(self, low: int, high: int) -> Allocation:
        """The allocation that holds addresses low to high - 1."""
        with self._lock:
            at = bisect_right(self._bases, low) - 1
            one = self._allocations[at] if at >= 0 else None
        if one is not None and high <= one.base + one.octets.size:
            return one
        raise PtxError(f"illegal address {low:#x}..{high:#x}")

    def write(self, address: int, octets: NDArray[np.uint8]) -> None:
        """A copy from the host."""
        one = self.find(address, address + octets.size)
        start = address - one.base
        one.octets[start : start + octets.size] = octets
        if one.valid is not None:
            one.valid[start : start + octets.size] = True

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """A copy to the host; bytes never written come back as they are, as on a device."""
        one = self.find(address, address + size)
        start = address - one.base
        return one.octets[start : start + size].copy()

    def begin_launch(self) -> None:
        """Forget who touched what: launches of one stream are ordered."""
        with self._lock:
            for one in self._allocations:
                one.begin_launch()

    def load(
        self, addresses: Addresses, dtype: np.dtype, threads: Threads, read_only: bool
    ) -> NDArray[np.generic]:
        """Values at `addresses` for `threads`; `read_only` for ld.global.nc."""
        one, index = self._locate(addresses, dtype)
        words = one.octets[: one.octets.size // dtype.itemsize * dtype.itemsize].view(dtype)
        if not one.writable:
            return words[index]
        each = index[:, None] * dtype.itemsize + np.arange(dtype.itemsize)
        if one.valid is not None and not every(one.valid[each]):
            raise PtxError(f"read of bytes never written in the allocation at {one.base:#x}")
        mine = _owner(each, threads)
        if one.writer is not None:
            writers = one.writer[each]
            if some((writers != 0) & (read_only | (writers != mine))):
                raise PtxError(f"read of bytes that a thread of this launch writes, at {one.base:#x}")
        if one.reader is None:
            one.reader = np.zeros(one.octets.size, np.int64)
        _note_readers(one.reader, (each,), mine, read_only)
        return words[index]

    def store(self, addresses: Addresses, values: NDArray[np.generic], threads: Threads) -> None:
        """Store values at addresses."""
        one, index = self._locate(addresses, values.dtype)
        if not one.writable:
            raise PtxError(f"write to the read-only allocation at {one.base:#x}")
        if one.writer is None:
            one.writer = np.zeros(one.octets.size, np.int64)
        each = index[:, None] * values.dtype.itemsize + np.arange(values.dtype.itemsize)
        mine = _owner(each, threads)
        before = one.writer[each]
        if some((before != 0) & (before != mine)):
            raise PtxError(f"two threads of one launch write the same byte, at {one.base:#x}")
        if one.reader is not None and some((one.reader[each] != 0) & (one.reader[each] != mine)):
            raise PtxError(f"write of bytes another thread of this launch reads, at {one.base:#x}")
        one.writer[each] = mine
        if some(one.writer[each] != mine):
            raise PtxError(f"two threads write the same byte at once, at {one.base:#x}")
        words = one.octets[: one.octets.size // values.dtype.itemsize * values.dtype.itemsize].view(
            values.dtype
        )
        words[index] = values
        if one.valid is not None:
            one.valid[each] = True

    def _locate(self, addresses: Addresses, dtype: np.dtype) -> tuple[Allocation, NDArray[np.int64]]:
        if some(addresses % np.uint64(dtype.itemsize)):
            raise PtxError(f"misaligned access of {dtype.itemsize} bytes")
        one = self.find(int(addresses.min()), int(addresses.max()) + dtype.itemsize)
        return one, ((addresses - np.uint64(one.base)) // np.uint64(dtype.itemsize)).astype(np.int64)


def _note_readers(
    reader: NDArray[np.int64],
    at: tuple[NDArray[np.int64], ...],
    mine: NDArray[np.int64],
    shared: bool = False,
) -> None:
    """Note `mine` as readers of reader[at]; -1 for several threads, or (`shared`) where nobody may write."""
    before = reader[at]
    wanted = np.full_like(before, -1) if shared else np.where((before == 0) | (before == mine), mine, -1)
    reader[at] = wanted
    # Lanes that read one place at once: the last of them would stand for all.
    several = reader[at] != wanted
    if some(several):
        reader[tuple(index[several] for index in at)] = -1


def _owner(each: NDArray[np.int64], threads: Threads) -> NDArray[np.int64]:
    return np.broadcast_to((threads + 1)[:, None], each.shape)


class SharedMemory:
    """Shared memory of several blocks at once: row b belongs to block b; words of 4 bytes are tracked.

    `writer` and `reader` hold thread + 1 (-1: several readers) for the current interval between barriers.
    """

    def __init__(self, blocks: int, size: int, variables: dict[str, tuple[int, int]]) -> None:
        words = -(-size // 4)
        self.octets = np.zeros((blocks, words * 4), np.uint8)
        self.allowed = np.zeros(words * 4, np.bool_)
        for start, length in variables.values():
            self.allowed[start : start + length] = True
        self.valid = np.zeros((blocks, words), np.bool_)
        self.writer = np.zeros((blocks, words), np.int64)
        self.reader = np.zeros((blocks, words), np.int64)

    def barrier(self, blocks: NDArray[np.bool_]) -> None:
        """A barrier of the blocks marked: what was written before is everybody's now."""
        self.writer[blocks] = 0
        self.reader[blocks] = 0

    def load(
        self, blocks: NDArray[np.int64], addresses: Addresses, dtype: np.dtype, threads: Threads
    ) -> NDArray[np.generic]:
        """Values at the blocks' addresses."""
        row, column = self._locate(blocks, addresses, dtype)
        mine = (threads + 1)[:, None]
        if not every(self.valid[row, column]):
            raise PtxError("read of shared memory never written")
        writers = self.writer[row, column]
        if some((writers != 0) & (writers != mine)):
            raise PtxError("read of shared memory another thread wrote, without a barrier")
        _note_readers(self.reader, (row, column), mine)
        view = self.octets.view(dtype)
        return view[blocks, (addresses // np.uint64(dtype.itemsize)).astype(np.int64)]

    def store(
        self, blocks: NDArray[np.int64], addresses: Addresses, values: NDArray[np.generic], threads: Threads
    ) -> None:
        """Store values at the blocks' addresses."""
        row, column = self._locate(blocks, addresses, values.dtype)
        mine = (threads + 1)[:, None]
        writers, readers = self.writer[row, column], self.reader[row, column]
        if some((writers != 0) & (writers != mine)):
            raise PtxError("two threads write the same shared word, without a barrier")
        if some((readers != 0) & (readers != mine)):
            raise PtxError("write of shared memory another thread has read, without a barrier")
        self.writer[row, column] = mine
        if some(self.writer[row, column] != mine):
            raise PtxError("two threads write the same shared word at once")
        self.octets.view(values.dtype)[
            blocks, (addresses // np.uint64(values.dtype.itemsize)).astype(np.int64)
        ] = values
        self.valid[row, column] = True

    def _locate(
        self, blocks: NDArray[np.int64], addresses: Addresses, dtype: np.dtype
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if dtype.itemsize < 4:
            raise PtxError("shared memory is only tracked in words of 4 bytes")
        if some(addresses % np.uint64(dtype.itemsize)):
            raise PtxError(f"misaligned shared access of {dtype.itemsize} bytes")
        end = addresses + np.uint64(dtype.itemsize)
        # An address below zero wraps around and is far too large.
        if some(addresses >= self.allowed.size) or some(end > self.allowed.size):
            raise PtxError("shared access out of bounds")
        start = addresses.astype(np.int64)
        if not (every(self.allowed[start]) and every(self.allowed[end.astype(np.int64) - 1])):
            raise PtxError("shared access out of bounds of its variables")
        column = start[:, None] // 4
        if dtype.itemsize == 4:
            return blocks[:, None], column
        column = column + np.arange(dtype.itemsize // 4)
        return np.broadcast_to(blocks[:, None], column.shape), column
