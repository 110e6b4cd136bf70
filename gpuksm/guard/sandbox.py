"""seccomp filters: what they would say to our system calls in a target, asked before any is made (hazard 17).

What must hold: no system call is made in a target that a filter of it answers with a signal or death, or
refuses where we count on it.  The agent's filters are those of the thread that started it, and those that
another thread lays on all of them later (SECCOMP_FILTER_FLAG_TSYNC), so their number is looked at again
before each use (agent.py).

Nothing here changes anything in a target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpuksm.errors import TargetGone
from gpuksm.guard import advice, arch, freeze
from gpuksm.linux import procfs, ptrace, seccomp, uffd

MUZZLED = (  # said of a process
    "has got a seccomp filter since it was merged that does not let gpuksm work in it; what is merged stays "
    "merged, and right, until it ends"
)
_STOP_NS = 50_000_000
_STRICT = "1"  # of Seccomp in /proc/PID/status


class Forbidden(Exception):
    """The filters of a process do not let gpuksm work in it; the message says what to do."""


class Passed(NamedTuple):
    """How many filters a thread has; whether an agent may start only as the C library starts threads."""

    filters: int
    like_libc: bool = False


def check_attach(pid: int, tid: int, *, device: bool, believed: int | None, tethered: bool = False) -> Passed:
    """What filters the frozen thread `tid` has; Forbidden when they do not let an agent start, or work.

    `device`: userfaultfds can be made without the call of that name; `believed`: see `attach`; `tethered`: a
    thread that the C library's way is started in would be traced from the start.
    """
    status = procfs.thread_status(pid, tid)
    mode = status.get("Seccomp", "0")
    if mode == "0":
        return Passed(0)
    if mode == _STRICT:
        raise Forbidden(f"process {pid} is in seccomp's strict mode; leave it out")
    count = int(status.get("Seccomp_filters", "1"))
    programs = _read(tid, status)
    if programs is None:
        if believed in (None, count):
            return Passed(count)
        raise Forbidden(
            f"process {pid} has seccomp filters that only root can read, and that could kill it when gpuksm "
            "attaches; if you know that they let mmap and clone pass: --allow-seccomp"
        )
    call = _first_refused(programs, _calls_to_attach(arch.current().NR, device) + calls_of_agent())
    if call == "clone" and not tethered:
        calls = _calls_to_attach(arch.current().NR, device, like_libc=True)
        if _first_refused(programs, calls + calls_of_agent()) is None:
            return Passed(count, like_libc=True)
    if call is not None:
        raise Forbidden(f"process {pid} has a seccomp filter that does not let {call} pass; leave it out")
    return Passed(count)


def lets_agent_work(pid: int, tid: int, *, equipped: bool) -> bool | None:
    """Whether the filters that the idle agent `tid` has now let it go on; False where they cannot be read.

    `equipped`: it has all that it is given (equipment.py), and makes no call for that any more.
    None where that cannot be found out now: it does not stop in time, or somebody else traces it.
    """
    nr = arch.current().NR
    calls = calls_of_agent()
    if not equipped:
        calls += _calls_to_attach(nr, True) + _calls_to_attach(nr, False)
    try:
        ptrace.seize(tid)
    except OSError:
        return None
    try:
        ptrace.interrupt(tid)
        deadline = time.monotonic_ns() + _STOP_NS
        while (stop := ptrace.peek_stop(tid)) is None:
            if time.monotonic_ns() > deadline:
                return None
        if stop.kind == "gone":
            return None
        programs = _read(tid, procfs.thread_status(pid, tid))
        return programs is not None and _first_refused(programs, calls) is None
    except (OSError, TargetGone):
        return None
    finally:
        freeze.let_go(tid)


def _read(tid: int, status: Mapping[str, str]) -> tuple[bytes, ...] | None:
    """The filters of a stopped thread with this /proc status; None where they cannot be read, or not all."""
    try:
        programs = seccomp.filters(tid)
    except OSError:
        return None
    # A kernel without CONFIG_CHECKPOINT_RESTORE says of every thread that it has none.
    return programs if status.get("Seccomp_filters", str(len(programs))) == str(len(programs)) else None


def _first_refused(programs: tuple[bytes, ...], calls: list[tuple[str, int, tuple[int, ...]]]) -> str | None:
    for name, number, arguments in calls:
        if not seccomp.allows(programs, number, arguments):
            return name
    return None


def _calls_to_attach(
    nr: Any, device: bool, *, like_libc: bool = False
) -> list[tuple[str, int, tuple[int, ...]]]:
    """System calls of the bootstrap and of an agent that is being equipped, by name."""
    making = (0, uffd.NEW, uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    flags = uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY
    machine = arch.current()
    starting: list[tuple[str, int, tuple[int, ...]]] = [("clone", nr.CLONE, (machine.CLONE_FLAGS,))]
    if like_libc:
        starting = [
            ("clone", nr.CLONE, (machine.CLONE_FLAGS_OF_LIBC,)),
            ("futex", nr.FUTEX, (0, 128, 0, 0)),
            ("futex", nr.FUTEX, (0, 129, 1)),
            ("close_range", nr.CLOSE_RANGE, (0x7FFFFFFE, 0x7FFFFFFE, 2)),
            ("set_tid_address", nr.SET_TID_ADDRESS, (0,)),
        ]
    return [
        ("restart_syscall", nr.RESTART_SYSCALL, ()),  # of its own threads, when they were stopped
        ("rt_sigprocmask", nr.RT_SIGPROCMASK, (2, 0, 0, 8)),
        ("mmap of code", nr.MMAP, (0, 4096, 5, 0x22, -1)),
        ("mmap", nr.MMAP, (0, 4096, 3, 0x22, -1)),
        ("madvise", nr.MADVISE, (0, 4096, 10)),
        ("socketpair", nr.SOCKETPAIR, (1, 0x80001)),
        *starting,
        ("close", nr.CLOSE, ()),
        ("close_range", nr.CLOSE_RANGE, ()),
        ("prctl", nr.PRCTL, (15,)),
        ("capset", nr.CAPSET, ()),
        ("recvmsg", nr.RECVMSG, ()),
        ("sendmsg", nr.SENDMSG, ()),
        ("userfaultfd", nr.IOCTL, making) if device else ("userfaultfd", nr.USERFAULTFD, (flags,)),
    ]


def calls_of_agent() -> list[tuple[str, int, tuple[int, ...]]]:
    """System calls of an agent at work, and at its end."""
    nr = arch.current().NR
    mappings = [(0, 4096, prot, flags) for prot in (0, 1, 3) for flags in (0x12, 0x32, 0x104022)]
    return [
        ("read", nr.READ, ()),
        ("write", nr.WRITE, ()),
        ("recvfrom", nr.RECVFROM, (0, 0, 1, 0x42)),
        *(("mmap", nr.MMAP, each) for each in mappings),
        ("mremap", nr.MREMAP, (0, 4096, 4096, 3)),
        ("mprotect", nr.MPROTECT, (0, 4096, 1)),
        ("munmap", nr.MUNMAP, ()),
        ("mlock", nr.MLOCK, ()),
        *(("madvise", nr.MADVISE, (0, 4096, call)) for call in advice.CALLS),
        *(("ioctl", nr.IOCTL, (0, request)) for request in (uffd.UFFDIO_REGISTER, uffd.UFFDIO_UNREGISTER)),
        ("exit", nr.EXIT, ()),
    ]
