"""Filters of other threads are read and judged as the kernel judges them."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable

import pytest

from gpuksm.linux import ptrace, seccomp
from tests import requirements_env

_libc = ctypes.CDLL(None, use_errno=True)
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_GETPID, _GETPPID, _GETPRIORITY = 39, 110, 140


def _program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


def _refuses(number: int, errno: int) -> bytes:
    """Refuses one system call with an error, allows all others."""
    return _program((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | errno), (6, 0, 0, _ALLOW))


def _install(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("at", ctypes.c_void_p)]

    header = Program(len(program) // 8, ctypes.addressof(buffer))
    assert _libc.prctl(38, 1, 0, 0, 0) == 0
    assert _libc.syscall(317, 1, 0, ctypes.byref(header)) == 0


def _in_child(work: Callable[[], int]) -> int:
    """What `work` returns, below 256, in a child of its own."""
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_filters_of_a_stopped_thread_are_read_oldest_first() -> None:
    requirements_env.need("root")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _install(_refuses(_GETPID, 1))
        _install(_refuses(_GETPPID, 2))
        os.write(writing, b"x")
        os.read(os.pipe()[0], 1)
    try:
        os.read(reading, 1)
        ptrace.seize(child)
        ptrace.interrupt(child)
        while ptrace.peek_stop(child) is None:
            pass
        assert seccomp.readable()
        found = seccomp.filters(child)
        assert found == (_refuses(_GETPID, 1), _refuses(_GETPPID, 2))
        assert not seccomp.allows(found, _GETPID, ())
        assert not seccomp.allows(found, _GETPPID, ())
        assert seccomp.allows(found, _GETPRIORITY, ())
        ptrace.detach(child)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def _random_program(chance: random.Random) -> bytes:
    """A valid filter whose result depends on arguments: an error number below 200, or 0."""
    instructions = [(0x20, 0, 0, 16), (0x07, 0, 0, 0), (0x20, 0, 0, 24)]  # x = first, a = second argument
    for _ in range(12):
        kind = chance.randrange(7)
        k = chance.choice([0, 1, 3, 31, 255, 0xFFFFFFFF, chance.randrange(1 << 32)])
        if kind == 0:
            operation = chance.choice([0x00, 0x10, 0x20, 0x40, 0x50, 0xA0])
            instructions.append((0x04 | operation | chance.choice([0, 8]), 0, 0, k))
        elif kind == 1:
            instructions.append((0x34, 0, 0, k or 1))
        elif kind == 2:
            instructions.append((chance.choice([0x64, 0x74]), 0, 0, k % 32))
        elif kind == 3:
            instructions += [(0x02, 0, 0, k % 16), (0x61, 0, 0, k % 16)]
        elif kind == 4:
            instructions.append((chance.choice([0x07, 0x87, 0x84, 0x80]), 0, 0, 0))
        elif kind == 5:
            jump = 0x05 | chance.choice([0x10, 0x20, 0x30, 0x40]) | chance.choice([0, 8])
            instructions += [(jump, 0, 1, k), (0x04, 0, 0, 77)]
        else:
            instructions += [(0x05, 0, 0, 1), (0x04, 0, 0, 5)]
    instructions += [(0x54, 0, 0, 127), (0x44, 0, 0, 0x50000)]  # a & 127 as an error
    result = [(0x02, 0, 0, 3), (0x20, 0, 0, 0), (0x15, 1, 0, _GETPRIORITY), (6, 0, 0, _ALLOW)]
    return _program(*instructions, *result, (0x60, 0, 0, 3), (0x16, 0, 0, 0))


@pytest.mark.parametrize("seed", range(25))
def test_it_says_what_the_kernel_says(seed: int) -> None:
    """Random filters, installed for real, and one call with random arguments each."""
    chance = random.Random(seed)
    program = _random_program(chance)
    arguments = (chance.randrange(1 << 32), chance.randrange(1 << 32))

    def kernel() -> int:
        _install(program)
        ctypes.set_errno(0)
        values = [ctypes.c_long(value) for value in (_GETPRIORITY, *arguments)]
        result = _libc.syscall(*values)
        return ctypes.get_errno() if result == -1 else 0

    said = seccomp.run(program, _GETPRIORITY, arguments)
    assert said & 0xFFFF0000 == 0x50000
    assert _in_child(kernel) == said & 0xFFFF


@pytest.mark.parametrize(
    ("program", "action"),
    [
        (b"", _KILL),
        (_program((6, 0, 0, _ALLOW)), _ALLOW),
        (_program((0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (6, 0, 0, _KILL), (6, 0, 0, _ALLOW)), _ALLOW),
        (_program((0x80, 0, 0, 0), (0x16, 0, 0, 0)), 64),  # BPF_LEN
        (_program((0x20, 0, 0, 64), (6, 0, 0, _ALLOW)), _KILL),  # behind the end
    ],
)
def test_programs_at_their_edges(program: bytes, action: int) -> None:
    assert seccomp.run(program, 0) == action
