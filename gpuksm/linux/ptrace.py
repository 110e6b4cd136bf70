"""ptrace(2) as the guard uses it: SEIZE, INTERRUPT, registers, waits that leave the status in place.

Source: ptrace(2), include/uapi/linux/ptrace.h, arch/x86/include/asm/user_64.h.
Stops are peeked at with WNOWAIT and never consumed: a tracee whose
signal-delivery-stop was consumed loses the signal when its tracer dies, one
that was only peeked at keeps it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import NamedTuple

from gpuksm.linux._libc import function

PTRACE_CONT, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH, PTRACE_SYSCALL = 7, 12, 13, 17, 24
PTRACE_SETOPTIONS, PTRACE_GETEVENTMSG = 0x4200, 0x4201
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 0x4206, 0x4207, 0x4208
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_GETSIGMASK, PTRACE_SETSIGMASK, PTRACE_GET_RSEQ_CONFIGURATION = 0x420A, 0x420B, 0x420F
O_TRACESYSGOOD, O_TRACEFORK, O_TRACEVFORK, O_TRACECLONE, O_TRACEEXEC = 1, 2, 4, 8, 16
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_STOP = 1, 2, 3, 4, 128
SIGTRAP = 5
WALL = 0x40000000  # __WALL: wait for threads too

# fmt: off
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)
# fmt: on


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64; all fields unsigned 64 bits."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)


class _RseqConfiguration(ctypes.Structure):
    _fields_ = [
        ("abi_pointer", ctypes.c_uint64),
        ("abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


_ptrace = function("ptrace", ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Stop(NamedTuple):
    """What a traced thread last reported.

    `kind` is "stop" (PTRACE_EVENT_STOP or another event), "signal" (it is about to
    take `signal`), "syscall" or "gone" (it has exited).
    """

    kind: str
    signal: int
    event: int


def seize(tid: int, options: int = 0) -> None:
    """Become the tracer of thread `tid` without stopping it.  Linux 3.4."""
    _ptrace(PTRACE_SEIZE, tid, None, options)


def interrupt(tid: int) -> None:
    _ptrace(PTRACE_INTERRUPT, tid, None, None)


def cont(tid: int, signal: int = 0) -> None:
    _ptrace(PTRACE_CONT, tid, None, signal)


def listen(tid: int) -> None:
    """Let a thread in group-stop stay stopped and tell about SIGCONT."""
    _ptrace(PTRACE_LISTEN, tid, None, None)


def cont_to_syscall(tid: int) -> None:
    """Run until the next system call entry or exit."""
    _ptrace(PTRACE_SYSCALL, tid, None, None)


def set_options(tid: int, options: int) -> None:
    _ptrace(PTRACE_SETOPTIONS, tid, None, options)


def detach(tid: int, signal: int = 0) -> bool:
    """Let a stopped thread go, delivering `signal`; False when it is not stopped (it is being killed).

    A thread that dies while it is traced stays a zombie, and its parent waits, until
    its tracer has reaped it.
    """
    try:
        _ptrace(PTRACE_DETACH, tid, None, signal)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: the new thread's id after a fork, vfork or clone event."""
    message = ctypes.c_ulong()
    _ptrace(PTRACE_GETEVENTMSG, tid, None, ctypes.addressof(message))
    return int(message.value)


def get_registers(tid: int) -> Registers:
    registers = Registers()
    _ptrace(PTRACE_GETREGS, tid, None, ctypes.addressof(registers))
    return registers


def set_registers(tid: int, registers: Registers) -> None:
    _ptrace(PTRACE_SETREGS, tid, None, ctypes.addressof(registers))


def get_signal_mask(tid: int) -> int:
    mask = ctypes.c_uint64()
    _ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return int(mask.value)


def set_signal_mask(tid: int, mask: int) -> None:
    word = ctypes.c_uint64(mask)
    _ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(word))


def rseq_area(tid: int) -> int:
    """Address of the thread's struct rseq, 0 when it has none.  Linux 5.13; OSError before."""
    configuration = _RseqConfiguration()
    size = ctypes.sizeof(configuration)
    _ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ctypes.addressof(configuration))
    return int(configuration.abi_pointer)


def seccomp_filter(tid: int, index: int) -> bytes:
    """The seccomp filter of a stopped thread that `index` others are older than: struct sock_filter each.

    OSError: ENOENT (there are not so many), EINVAL (it has none), EACCES, EPERM.
    """
    count = _ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index, None)
    program = ctypes.create_string_buffer(8 * count)
    _ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index, ctypes.addressof(program))
    return program.raw


def peek_stop(tid: int) -> Stop | None:
    """The stop or end that thread `tid` reports, left in place; None while it runs."""
    try:
        info = os.waitid(os.P_PID, tid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WALL)
    except ChildProcessError:
        return Stop("gone", 0, 0)
    if info is None:
        return None
    if info.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        return Stop("gone", 0, 0)
    signal, event = info.si_status & 0xFF, info.si_status >> 8
    if event:
        return Stop("stop", signal, event)
    if signal == SIGTRAP | 0x80:
        return Stop("syscall", 0, 0)
    return Stop("signal", signal, 0)


def reap(tid: int) -> None:
    """Consume the end of a traced thread that has exited."""
    try:
        os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)
    except ChildProcessError:
        return
