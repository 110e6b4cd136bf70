"""Getting into a target: the bootstrap on one stopped thread, then the agent.

What must hold: every register, the vector state, the signal mask and pending
signals of the thread that is borrowed are exactly as before, an interrupted
system call is restarted as the kernel would, no descriptor number of the target
changes, nothing of ours is inherited by a fork.

How: all threads are frozen, so that no fork can copy our two descriptors
(hazard 11).  The bootstrap stands in unused bytes at the end of an executable
page, never touches the thread's stack and ends by restoring every register
itself.  While we live we watch it by PTRACE_SYSCALL and, at the end, put the
original registers back at a stop inside the kernel's signal code, which then
restarts the system call natively (hazard 16).

If we die:
- before `set_registers`: nothing has happened; the threads go on.
- after it: the bootstrap runs to its end by itself and the thread goes on where
  it was, its system call restarted; the bytes of the bootstrap stay behind in
  the unused end of the page.  What it has mapped it unmaps, unless it was let to start an agent.
- after clone: the agent finds the socket closed, unmaps its block and ends; once the target is in
  the guard's books it waits instead (agent.py).  One that shares the target's descriptors at first
  (sandbox.py) gets its own before it, or the bootstrap, closes any.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Protocol

from gpuksm.errors import NotPermitted, TargetGone, Unsupported
from gpuksm.guard import arch, faults, places, sandbox, urgency
from gpuksm.guard.agent import Agent, Table
from gpuksm.guard.equipment import Attachment, equip, reserve_mappings, without_agent
from gpuksm.guard.freeze import Freeze, FreezeFailed, ProcessCensus
from gpuksm.linux import mappings, pidfd, procfs, ptrace, uffd
from gpuksm.linux._libc import PAGE_SIZE

_ATTACH_DEADLINE_NS = 200_000_000
_PR_SET_NAME = 15
AGENT_NAME = "gpuksm-agent"
_RSEQ_CS_OFFSET = 8
# Go, or go and share the descriptors at first; no eventfd to claim by, none to wait for.
_GO, _GO_SHARED = (struct.pack("<Ii24xi", go, -1, -1) for go in (1, 2))
_APART_OFFSET, _APART = 72, 1
_FAULTS = (4, 5, 7, 8, 11)  # SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV


class ForkedChild(Protocol):
    """A forked child of a target, which has merged memory before it has an agent."""

    uffd_event: int | None  # the userfaultfd that the fork gave it, None when it has none yet

    def prepare(self) -> None:
        """Do before it is frozen what need not be done within.  TargetGone, NotPermitted."""

    def service(self) -> None:
        """Read its events while it is being frozen."""

    def check(self) -> None:
        """Raise TargetGone when it has called exec and nothing merged is left of it; it is frozen."""

    def inside(self, attachment: Attachment) -> None:
        """Called once the agent is there and before the child goes on."""


def attach(
    pid: int,
    gifts: tuple[int, ...],
    census: ProcessCensus,
    *,
    fork_events: bool,
    tethered: set[int],
    believed: int | None,
    child: ForkedChild | None = None,
) -> Attachment:
    """Put an agent into process `pid`, give it store, ledger and attic and take its two userfaultfds.

    `believed`: seccomp filters that cannot be read are believed to let us work if there are so many of
    them, or any number (None).  A child whose filters do not let us is served without an agent, as far as
    that goes: sandbox.Forbidden where it has no userfaultfd.
    Raises TargetGone, FreezeFailed (try later), NotPermitted, Unsupported,
    FeatureMissing.  The target goes on whatever happens.
    """
    # Not in the freeze, which it would prolong: what this says is a wish, and the census is told what is new.
    gap = places.largest_gap(pid)
    far = gap.place()
    census.sharer_of(pid)
    if child is not None:
        child.prepare()
        faults.point("takeover-prepared")
    with urgency.urgent(pid, 0):
        began = time.monotonic_ns()
        freeze = Freeze(pid, None, tethered)
        freeze.complete(child.service if child else None, _ATTACH_DEADLINE_NS)
        memory = None
        try:
            faults.point("attach-frozen")
            # Only now: before the freeze the process might still have called exec.
            memory = _open_memory(pid)
            place = _find_slack(pid, memory, len(arch.current().BOOTSTRAP))
            freeze.check_unshared(census)
            if child is not None:
                child.check()
            try:
                agent, code = _bootstrap(pid, freeze, memory, place, far, believed)
            except sandbox.Forbidden as error:
                if child is None:
                    raise Unsupported(str(error)) from None
                if child.uffd_event is None:
                    raise
                attachment = without_agent(pid, child.uffd_event)
                attachment.copy_place = gap.place()
                child.inside(attachment)
                return attachment
            if child is not None:
                attachment = equip(agent, code, gifts, fork_events, child.uffd_event)
                attachment.copy_place = gap.place()
                child.inside(attachment)
                reserve_mappings(agent)
                return attachment
        finally:
            freeze.thaw()
            if memory is not None:
                os.close(memory)
        pause_us = (time.monotonic_ns() - began) // 1000
    attachment = equip(agent, code, gifts, fork_events, None)
    attachment.pause_us = pause_us
    attachment.copy_place = gap.place()
    reserve_mappings(agent)
    return attachment


def _open_memory(pid: int) -> int:
    with procfs.errors_of(pid):
        return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)


def _find_slack(pid: int, memory: int, size: int) -> int:
    """Address of `size` unused (zero) bytes at the end of an executable page; Unsupported when none."""
    for end in mappings.private_code(pid):
        try:
            page = os.pread(memory, PAGE_SIZE, end - PAGE_SIZE)
        except OSError:
            continue
        # 16 zero bytes stay before us: the last instruction may end in zeros.
        if len(page) == PAGE_SIZE and not any(page[-size - 32 :]):
            return (end - size) & ~15
    raise Unsupported(f"process {pid} has no executable page with {size} unused bytes at its end; skipped")


def _usable(tid: int, memory: int, stop: ptrace.Stop) -> bool:
    """True for a thread whose registers may be borrowed: stopped by us, not in an rseq section."""
    if stop.kind != "stop" or stop.event != ptrace.EVENT_STOP or stop.signal != ptrace.SIGTRAP:
        return False
    if procfs.stat(tid).flags & procfs.PF_USER_WORKER:
        return False  # never runs the program's code: vhost, KVM, io_uring
    try:
        area = ptrace.rseq_area(tid)
    except OSError:
        return True  # before Linux 5.13 nothing tells; glibc registers rseq since 2.35
    if not area:
        return True
    try:
        return not any(os.pread(memory, 8, area + _RSEQ_CS_OFFSET))
    except OSError:
        return False


def _borrow(pid: int, freeze: Freeze, memory: int) -> int:
    """A frozen thread to run the bootstrap; delivers pending signals first where that is needed."""
    for tid, stop in freeze.stops.items():
        if _usable(tid, memory, stop):
            return tid
    for tid, stop in list(freeze.stops.items()):
        if stop.kind != "signal":
            continue
        # The interrupt is still pending: with its signal frame set up the thread stops again at once.
        ptrace.cont(tid, stop.signal)
        freeze.stops[tid] = _await_stop(pid, tid)
        if _usable(tid, memory, freeze.stops[tid]):
            return tid
    raise FreezeFailed(f"no thread of process {pid} can be borrowed just now")


def _await_stop(pid: int, tid: int) -> ptrace.Stop:
    deadline = time.monotonic_ns() + _ATTACH_DEADLINE_NS
    for _ in urgency.glances():
        stop = ptrace.peek_stop(tid)
        if stop is not None:
            if stop.kind == "gone":
                raise TargetGone(f"process {pid} has exited")
            return stop
        if time.monotonic_ns() > deadline:
            break
    raise FreezeFailed(f"thread {tid} of process {pid} did not stop again")


class _BootstrapFault(FreezeFailed):
    """The borrowed thread faulted: its registers must be put back, it cannot cure itself."""


class _Stepper:
    """The borrowed thread, from one system call of the bootstrap to the next."""

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid

    def next_result(self, number: int) -> ptrace.Registers:
        """Run to the exit of the next system call, which must be `number`; the registers there."""
        self._to_syscall_stop()  # entry
        self._to_syscall_stop()  # exit
        registers = ptrace.get_registers(self.tid)
        if registers.orig_rax != number:
            raise FreezeFailed(f"process {self.pid}: system call {registers.orig_rax} where {number} was due")
        return registers

    def _to_syscall_stop(self) -> None:
        while True:
            ptrace.cont_to_syscall(self.tid)
            stop = _await_stop(self.pid, self.tid)
            if stop.kind == "syscall":
                return
            if stop.kind == "signal" and stop.signal in _FAULTS:
                raise _BootstrapFault(f"process {self.pid} cannot run the bootstrap (signal {stop.signal})")


def _bootstrap(
    pid: int, freeze: Freeze, memory: int, place: int, far: int, believed: int | None
) -> tuple[Agent, int]:
    """Run the bootstrap on a frozen thread; the agent, ready for its first table, and its code page."""
    x86 = arch.current()
    nr = x86.NR
    tid = _borrow(pid, freeze, memory)
    urgency.go_beside(pid, tid)
    registers = ptrace.get_registers(tid)
    if not x86.is_native(registers):
        raise Unsupported(f"process {pid} runs 32-bit code; skipped")
    filters, like_libc = sandbox.check_attach(
        pid,
        tid,
        device=os.access(uffd.DEVICE, os.R_OK | os.W_OK),
        believed=believed,
        tethered=bool(freeze.tethered),
    )
    signal_mask = ptrace.get_signal_mask(tid)
    flags = x86.CLONE_FLAGS_OF_LIBC if like_libc else x86.CLONE_FLAGS
    code = x86.bootstrap_code(registers, signal_mask, far, flags)
    unused = os.pread(memory, len(code), place)
    os.pwrite(memory, code, place)
    hijacked = registers.copy()
    hijacked.rip = place
    hijacked.orig_rax = (1 << 64) - 1
    hijacked.rax = 0
    faults.point("attach-hijack")
    stepper = _Stepper(pid, tid)
    agent: Agent | None = None
    try:
        # Both values only take effect when the thread runs; from here on the bootstrap cures itself.
        ptrace.set_registers(tid, hijacked)
        ptrace.set_signal_mask(tid, (1 << 64) - 1)
        stepper.next_result(nr.RT_SIGPROCMASK)
        code_page = _mapped(pid, stepper.next_result(nr.MMAP).rax)
        os.pwrite(memory, x86.AGENT, code_page)
        faults.point("attach-code")
        block = _mapped(pid, stepper.next_result(nr.MMAP).rax)
        stepper.next_result(nr.MADVISE)
        stepper.next_result(nr.MADVISE)
        if stepper.next_result(nr.SOCKETPAIR).rax != 0:
            raise Unsupported(f"process {pid} cannot open a socket pair (descriptor limit?); skipped")
        own = _steal_socket(pid, memory, block)
        faults.point("attach-socket")
        os.pwrite(memory, _GO_SHARED if like_libc else _GO, block + 8)
        started = stepper.next_result(nr.CLONE).rax
        if started >> 63:
            own.close()
            raise Unsupported(f"process {pid} cannot start a thread (process limit?); skipped")
        apart = 0 if like_libc else _APART
        while not apart:
            stepper.next_result(nr.FUTEX)
            apart = int.from_bytes(os.pread(memory, 4, block + _APART_OFFSET), "little")
        if apart != _APART:
            own.close()
            raise Unsupported(f"process {pid} cannot copy its descriptors (memory, fs.nr_open?); skipped")
        freeze.spare = _thread_known_inside_as(pid, started)
        agent = Agent(pid, freeze.spare, block, own, filters)
        agent.count_filters()
        faults.point("attach-clone")
        stepper.next_result(nr.CLOSE)
        stepper.next_result(nr.CLOSE)
        stepper.next_result(nr.RT_SIGPROCMASK)
        # All done: the agent's first answer says that it has left the unused bytes for its own page.
        name = Table()
        address = agent.aux_address(name, AGENT_NAME.encode() + b"\0")
        name.add(nr.PRCTL, _PR_SET_NAME, address)
        agent.perform(name)
        _hand_back(pid, tid, registers, freeze)
        os.pwrite(memory, unused, place)
        return agent, code_page
    except _BootstrapFault:
        ptrace.set_registers(tid, registers)
        ptrace.set_signal_mask(tid, signal_mask)
        freeze.stops[tid] = ptrace.Stop("stop", ptrace.SIGTRAP, ptrace.EVENT_STOP)
        if agent is not None:
            agent.close()
        raise
    except BaseException:
        # Let go, the thread runs the bootstrap to its end by itself; the bytes must stay for that.
        freeze.stops[tid] = ptrace.Stop("stop", ptrace.SIGTRAP, ptrace.EVENT_STOP)
        if agent is not None:
            agent.close()
        raise


def _thread_known_inside_as(pid: int, number: int) -> int:
    """Our id of the thread of process `pid` that has the id `number` in its own pid namespace."""
    if len(procfs.status(pid).get("NSpid", "").split()) <= 1:
        return number
    for tid in procfs.threads(pid):
        with contextlib.suppress(TargetGone):
            if procfs.thread_status(pid, tid)["NSpid"].split()[-1] == str(number):
                return tid
    raise TargetGone(f"process {pid} has exited")


def _mapped(pid: int, result: int) -> int:
    if result > (1 << 64) - 4096:
        raise Unsupported(f"process {pid} cannot map memory (address space limit?); skipped")
    return result


def _steal_socket(pid: int, memory: int, block: int) -> socket.socket:
    (theirs,) = struct.unpack("<i", os.pread(memory, 4, block + 4))
    process = pidfd.open_process(pid)
    try:
        return socket.socket(fileno=pidfd.steal(process, theirs))
    except PermissionError:
        raise NotPermitted(f"descriptors of process {pid} may not be taken by this user") from None
    except OSError as error:
        raise FreezeFailed(f"descriptor {theirs} of process {pid} cannot be taken: {error}") from None
    finally:
        os.close(process)


def _hand_back(pid: int, tid: int, registers: ptrace.Registers, freeze: Freeze) -> None:
    """Put the thread's own registers back at a stop where the kernel restarts its system call."""
    ptrace.set_registers(tid, registers)
    ptrace.interrupt(tid)
    ptrace.cont(tid)
    freeze.stops[tid] = _await_stop(pid, tid)
