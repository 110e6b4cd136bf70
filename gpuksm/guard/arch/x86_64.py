"""x86-64: system call numbers, and how a stopped thread's registers become the bootstrap's data."""

from __future__ import annotations

import struct

from gpuksm.guard.arch.x86_64_code import AGENT, BOOTSTRAP, BOOTSTRAP_DATA
from gpuksm.linux.ptrace import Registers

__all__ = [
    "AGENT",
    "BLOCK_BYTES",
    "BOOTSTRAP",
    "CLONE_FLAGS",
    "CLONE_FLAGS_OF_LIBC",
    "CODE_BYTES",
    "NR",
    "REPEATABLE",
    "bootstrap_code",
    "is_native",
]

BLOCK_BYTES = 0x50000  # as in x86_64.S
# How an agent is started: CLONE_VM, FS, SIGHAND, THREAD, SYSVSEM, UNTRACED; or as the C library does it, with
# FILES, SETTLS, PARENT_SETTID and CHILD_CLEARTID and without UNTRACED.
CLONE_FLAGS, CLONE_FLAGS_OF_LIBC = 0x850B00, 0x3D0F00
CODE_BYTES = 4096


class NR:
    """System call numbers, arch/x86/entry/syscalls/syscall_64.tbl."""

    READ, CLOSE, MMAP, MPROTECT, MUNMAP, BRK, RT_SIGPROCMASK, IOCTL, MREMAP = 0, 3, 9, 10, 11, 12, 14, 16, 25
    WRITE, RECVFROM, EXIT, MLOCK, CLOSE_RANGE = 1, 45, 60, 149, 436
    MADVISE, SENDMSG, RECVMSG, SOCKETPAIR, CLONE = 28, 46, 47, 53, 56
    PRCTL, CAPSET, PROCESS_VM_READV, USERFAULTFD, PROCESS_MADVISE = 157, 126, 310, 323, 440
    RESTART_SYSCALL, FUTEX, SET_TID_ADDRESS = 219, 202, 218
    FORKS = (56, 57, 435)  # clone, fork, clone3


# Calls that are safe to repeat after EINTR, and where their time limit is:
# None (they have none), "ms" (milliseconds in r10), or the register of a struct timespec.
REPEATABLE: dict[int, str | None] = {
    232: "ms",  # epoll_wait
    281: "ms",  # epoll_pwait
    441: "r10",  # epoll_pwait2
    128: "rdx",  # rt_sigtimedwait
    65: None,  # semop
    220: "r10",  # semtimedop
    208: "r8",  # io_getevents
    0: None,  # read, of a socket with SO_RCVTIMEO or a signalfd
    45: None,  # recvfrom, likewise
    47: None,  # recvmsg
    43: None,  # accept
    288: None,  # accept4
    70: None,  # msgrcv
    69: None,  # msgsnd
}

# fmt: off
_SAVED = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip",
)
# fmt: on
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = -512, -513, -514, -516
_USER_CODE_SEGMENT = 0x33
_SYSCALL_BYTES = 2


def is_native(registers: Registers) -> bool:
    """False for a thread that executes 32-bit code."""
    return bool(registers.cs == _USER_CODE_SEGMENT)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _restarted(registers: Registers) -> Registers:
    """Registers that repeat an interrupted system call, as the kernel's signal code would set them."""
    result = registers.copy()
    if _signed(registers.orig_rax) < 0:
        return result
    outcome = _signed(registers.rax)
    if outcome in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND):
        result.rax = registers.orig_rax
        result.rip = registers.rip - _SYSCALL_BYTES
    elif outcome == _ERESTART_RESTARTBLOCK:
        result.rax = NR.RESTART_SYSCALL
        result.rip = registers.rip - _SYSCALL_BYTES
    return result


def bootstrap_code(registers: Registers, signal_mask: int, place: int, flags: int = CLONE_FLAGS) -> bytes:
    """The bootstrap with everything it restores filled in: `registers` of the thread, its mask.

    `place` is where it is to map the agent's code page, with the control block behind that; `flags` are those
    of the agent's clone.
    """
    back = _restarted(registers)
    overflow = back.eflags >> 11 & 1
    data = struct.pack("<QQQ", (1 << 64) - 1, signal_mask, overflow | (back.eflags & 0xFF) << 8)
    data += struct.pack("<16Q", *(getattr(back, name) for name in _SAVED))
    return BOOTSTRAP[:BOOTSTRAP_DATA] + data + struct.pack("<QQ", place, flags)
