"""seccomp filters of other threads: how many there are, and what they would say to a system call.

Source: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, ptrace(2) (PTRACE_SECCOMP_GET_FILTER,
Linux 4.4, for CAP_SYS_ADMIN), Documentation/networking/filter.rst (classic BPF),
include/uapi/linux/seccomp.h.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Sequence

from gpuksm.linux import procfs, ptrace

ALLOW, LOG = 0x7FFF0000, 0x7FFC0000
KILL_PROCESS = 0x80000000
_ACTION = 0xFFFF0000
_AUDIT_ARCH_X86_64 = 0xC000003E
_CAP_SYS_ADMIN = 21
_DATA = struct.Struct("<iIQ6Q")  # struct seccomp_data: number, architecture, instruction pointer, arguments
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter: code, jump if true, if false, constant
_WORDS = 16  # of a filter's scratch memory
_U32, _U64 = 0xFFFFFFFF, (1 << 64) - 1


def readable() -> bool:
    """Whether this process may read the filters of others: all capabilities, and no filter of its own."""
    status = procfs.status(os.getpid())
    capable = int(status["CapEff"], 16) >> _CAP_SYS_ADMIN & 1
    return bool(capable) and status.get("Seccomp", "0") == "0" and procfs.in_first_user_namespace()


def filters(tid: int) -> tuple[bytes, ...]:
    """The filters of a thread that we trace and that has stopped, the oldest first; () where it has none.

    OSError: EACCES or EPERM where `readable` is false.
    """
    found: list[bytes] = []
    while True:
        try:
            found.append(ptrace.seccomp_filter(tid, len(found)))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):  # no more; no filters at all
                return tuple(found)
            raise


@functools.lru_cache(maxsize=4096)
def allows(programs: tuple[bytes, ...], number: int, arguments: tuple[int, ...]) -> bool:
    """Whether all of `programs` let a system call with these (up to six) arguments pass."""
    return all(run(program, number, arguments) & _ACTION in (ALLOW, LOG) for program in programs)


def run(program: bytes, number: int, arguments: Sequence[int] = ()) -> int:
    """What one filter returns for a system call of x86-64; KILL_PROCESS for a program that is none."""
    padded = [*(argument & _U64 for argument in arguments), 0, 0, 0, 0, 0, 0][:6]
    data = _DATA.pack(number, _AUDIT_ARCH_X86_64, 0, *padded)
    code = list(_INSTRUCTION.iter_unpack(program))
    memory = [0] * _WORDS
    a = x = at = 0
    while at < len(code):
        op, if_true, if_false, k = code[at]
        at += 1
        kind, operand = op & 7, x if op & 8 else k
        if kind in (0, 1):  # BPF_LD, BPF_LDX
            value = _loaded(op & 0xE0, k, data, memory)
            if value is None:
                return KILL_PROCESS
            a, x = (value, x) if kind == 0 else (a, value)
        elif kind in (2, 3):  # BPF_ST, BPF_STX
            memory[k % _WORDS] = a if kind == 2 else x
        elif kind == 4:
            a = _computed(op & 0xF0, a, operand)
        elif kind == 5:
            at += k if op & 0xF0 == 0 else if_true if _holds(op & 0xF0, a, operand) else if_false
        elif kind == 6:
            return a if op & 0x18 == 0x10 else k
        elif op & 0xF8 == 0:  # BPF_TAX
            x = a
        else:  # BPF_TXA
            a = x
    return KILL_PROCESS


def _loaded(mode: int, k: int, data: bytes, memory: list[int]) -> int | None:
    if mode == 0x20:  # BPF_ABS: a word of struct seccomp_data
        return int.from_bytes(data[k : k + 4], "little") if k + 4 <= len(data) else None
    if mode == 0x60:
        return memory[k % _WORDS]
    return len(data) if mode == 0x80 else k


def _computed(operation: int, a: int, b: int) -> int:
    if operation in (0x60, 0x70):  # shifts by more than there is
        return (a << b if operation == 0x60 else a >> b) & _U32 if b < 32 else 0
    results = {
        0x00: a + b,
        0x10: a - b,
        0x20: a * b,
        0x30: a // b if b else 0,
        0x40: a | b,
        0x50: a & b,
        0x80: -a,
        0x90: a % b if b else 0,
        0xA0: a ^ b,
    }
    return results[operation] & _U32


def _holds(comparison: int, a: int, b: int) -> bool:
    return {0x10: a == b, 0x20: a > b, 0x30: a >= b, 0x40: bool(a & b)}[comparison]
