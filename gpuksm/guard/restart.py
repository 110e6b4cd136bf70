"""System calls that a freeze broke off although the program would never have noticed.

Most interrupted system calls are restarted by the kernel.  Some are not: epoll_wait,
sigtimedwait, semop and a few others return EINTR when their thread is stopped by a
tracer (signal(7), "Interruption of system calls ... by stop signals"), and programs
may take that for an error.  For those the thread's result is changed, while it is
stopped, from -EINTR to -ERESTARTNOHAND: the kernel then restarts the call, or, when a
handler runs for a signal that really arrived, returns EINTR as it always would.  None
of them has done anything when it returns EINTR.

A restarted call waits its whole time again.  So that freezes in a row cannot keep one
from its timeout, epoll_wait's time is shortened by what has passed since the first of
them, and a call whose time lies in memory is restarted only for as long as that time.

If we die: the change has been made while the thread was stopped, or not at all.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass

from gpuksm.guard import arch
from gpuksm.linux import ptrace

_EINTR, _ERESTARTNOHAND = 4, 514
_U64 = (1 << 64) - 1
_KEEP_NS = 60_000_000_000


@dataclass
class _Wait:
    call: tuple[int, int, int]  # number, instruction, stack: tells one call of a thread from the next
    first_ns: int
    limit_ms: int
    seen_ns: int


_waits: dict[int, _Wait] = {}


def mend(tid: int) -> None:
    """Undo the EINTR that our stop caused in thread `tid`, which is in PTRACE_EVENT_STOP."""
    registers = ptrace.get_registers(tid)
    number = registers.orig_rax
    calls = arch.current().REPEATABLE
    if number not in calls or registers.rax != -_EINTR & _U64:
        return
    now = time.monotonic_ns()
    call = (number, registers.rip, registers.rsp)
    wait = _waits.get(tid)
    if wait is None or wait.call != call:
        wait = _waits[tid] = _Wait(call, now, _signed32(registers.r10), now)
    wait.seen_ns = now
    limit = calls[number]
    if limit == "ms" and wait.limit_ms >= 0:
        registers.r10 = max(0, wait.limit_ms - (now - wait.first_ns) // 1_000_000)
    elif limit not in (None, "ms") and now - wait.first_ns > _timespec_ns(
        tid, getattr(registers, str(limit))
    ):
        return
    registers.rax = -_ERESTARTNOHAND & _U64
    ptrace.set_registers(tid, registers)
    _forget_old(now)


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _timespec_ns(tid: int, address: int) -> int:
    """The struct timespec at `address` of the thread's memory; without end for NULL."""
    if not address:
        return 1 << 62
    try:
        with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            seconds, nanoseconds = struct.unpack("<qq", os.pread(memory.fileno(), 16, address))
    except (OSError, struct.error):
        return 0
    return int(seconds * 1_000_000_000 + nanoseconds)


def _forget_old(now: int) -> None:
    if len(_waits) > 10_000:
        for tid in [tid for tid, wait in _waits.items() if now - wait.seen_ns > _KEEP_NS]:
            del _waits[tid]
