"""Small BPF programs that only read kernel memory: written here, checked by the kernel, run on demand.

Source: include/uapi/linux/bpf.h, Documentation/bpf/standardization/instruction-set.rst.  Programs of the type
SYSCALL (Linux 5.14) run when they are asked to, and are attached to nothing.  Needs CAP_BPF and CAP_PERFMON.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from gpuksm.linux._libc import PAGE_SIZE, syscall_function

# Registers: R0 is a call's result, R1 to R5 are its arguments and lost by it, R10 is the end of the stack.
R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)
PROBE_READ_KERNEL, GET_CURRENT_TASK = 113, 35

_bpf = syscall_function("bpf", 321, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)  # x86-64
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN = 0, 5, 10
_MAP_ARRAY, _MAP_MMAPABLE = 2, 1 << 10
_PROG_SYSCALL, _PROG_SLEEPABLE = 31, 1 << 4
_PSEUDO_MAP_VALUE = 2
_LICENSE = ctypes.create_string_buffer(b"GPL")  # the helper that reads the kernel's memory wants that

_INSTRUCTION = struct.Struct("<BBhi")
_LOADS = {4: 0x61, 8: 0x79}
_STORES = {1: 0x73, 8: 0x7B}
JUMPS = {"==": 0x15, "!=": 0x55, "<": 0xA5, ">=": 0x35, "&": 0x45}
_BY_REGISTER = 0x08


def _call(command: int, attributes: bytes) -> tuple[int, bytes]:
    data = ctypes.create_string_buffer(attributes, max(len(attributes), 128))
    result = _bpf(command, ctypes.addressof(data), len(data))
    return result, data.raw


class Area:
    """Memory that programs and this process share: `data`, at least `size` bytes."""

    def __init__(self, size: int) -> None:
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self.fd, _ = _call(_MAP_CREATE, struct.pack("<5I", _MAP_ARRAY, 4, size, 1, _MAP_MMAPABLE))
        os.set_inheritable(self.fd, False)
        self.data = mmap.mmap(self.fd, size)

    def close(self) -> None:
        self.data.close()
        os.close(self.fd)


class Code:
    """A program as it is written: instructions and where they jump to."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def _add(self, op: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        self._code += _INSTRUCTION.pack(op, to | source << 4, offset, value)

    def label(self, name: str) -> None:
        """Here is what is called `name`."""
        self._labels[name] = len(self._code)

    def set(self, to: int, value: int) -> None:
        """A register becomes a number, 64 bits."""
        low, high = struct.unpack("<ii", struct.pack("<Q", value))
        self._add(0x18, to, 0, 0, low)
        self._add(0, value=high)

    def set_area(self, to: int, area: Area) -> None:
        """A register becomes the address of `area`."""
        self._add(0x18, to, _PSEUDO_MAP_VALUE, 0, area.fd)
        self._add(0)

    def copy(self, to: int, source: int) -> None:
        self._add(0xBF, to, source)

    def add(self, to: int, value: int) -> None:
        self._add(0x07, to, value=value)

    def add_register(self, to: int, source: int) -> None:
        self._add(0x0F, to, source)

    def shift_left(self, to: int, bits: int) -> None:
        self._add(0x67, to, value=bits)

    def shift_right(self, to: int, bits: int) -> None:
        self._add(0x77, to, value=bits)

    def load(self, to: int, at: int, offset: int, size: int) -> None:
        """A register becomes the `size` bytes at register `at` + `offset`, without a sign."""
        self._add(_LOADS[size], to, at, offset)

    def store(self, at: int, offset: int, source: int, size: int) -> None:
        self._add(_STORES[size], at, source, offset)

    def jump(self, name: str) -> None:
        self._jumps.append((len(self._code), name))
        self._add(0x05)

    def jump_if(self, register: int, how: str, value: int, name: str) -> None:
        """Jump where `register` compares so with a number of 31 bits; `&` is any bit in common."""
        self._jumps.append((len(self._code), name))
        self._add(JUMPS[how], register, value=value)

    def jump_if_register(self, register: int, how: str, other: int, name: str) -> None:
        self._jumps.append((len(self._code), name))
        self._add(JUMPS[how] | _BY_REGISTER, register, other)

    def call(self, helper: int) -> None:
        self._add(0x85, value=helper)

    def read_kernel(self, stack: int, size: int, at: int, offset: int) -> None:
        """Read `size` bytes of the kernel at `at` + `offset` to R10 + `stack`; R0 is 0 if that went well."""
        self.copy(R1, R10)
        self.add(R1, stack)
        self.set(R2, size)
        self.copy(R3, at)
        self.add(R3, offset)
        self.call(PROBE_READ_KERNEL)

    def end(self) -> None:
        self.set(R0, 0)
        self._add(0x95)

    def finished(self) -> bytes:
        for at, name in self._jumps:
            distance = (self._labels[name] - at) // _INSTRUCTION.size - 1
            struct.pack_into("<h", self._code, at + 2, distance)
        return bytes(self._code)


class Program:
    """A loaded program.  OSError: EPERM without the capabilities, EINVAL where the kernel refuses it."""

    def __init__(self, code: Code) -> None:
        text = code.finished()
        data = ctypes.create_string_buffer(text, len(text))
        attributes = struct.pack(
            "<IIQQIIQII",
            _PROG_SYSCALL,
            len(text) // _INSTRUCTION.size,
            ctypes.addressof(data),
            ctypes.addressof(_LICENSE),
            0,
            0,
            0,
            0,
            _PROG_SLEEPABLE,
        )
        self.fd, _ = _call(_PROG_LOAD, attributes)
        os.set_inheritable(self.fd, False)
        self._run = struct.pack("<I", self.fd)

    def run(self) -> None:
        """Run it once, here and now."""
        _call(_PROG_TEST_RUN, self._run)

    def close(self) -> None:
        os.close(self.fd)
