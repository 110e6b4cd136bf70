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
  the guard's books it waits instead (agent.py).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Protocol

from gpuksm.errors import FeatureMissing, NotPermitted, TargetGone, Unsupported
from gpuksm.guard import arch, faults
from gpuksm.guard.agent import UNUSED_OFFSETS, Agent, AgentStuck, Table
from gpuksm.guard.freeze import Freeze, FreezeFailed, ProcessCensus
from gpuksm.linux import pidfd, procfs, ptrace, uffd, vm
from gpuksm.linux._libc import PAGE_SIZE

_ATTACH_DEADLINE_NS = 200_000_000
_PR_SET_NAME = 15
AGENT_NAME = "gpuksm-agent"
_CAPABILITY_VERSION_3 = 0x20080522
_RSEQ_CS_OFFSET = 8
_GO = struct.pack("<Ii24xi", 1, -1, -1)  # go, no eventfd to claim by, none to wait for
_FAULTS = (4, 5, 7, 8, 11)  # SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV


class ForkedChild(Protocol):
    """A forked child of a target, which has merged memory before it has an agent."""

    uffd_event: int | None  # the userfaultfd that the fork gave it, None when it has none yet

    def service(self) -> None:
        """Read its events while it is being frozen."""

    def check(self) -> None:
        """Raise TargetGone when it has called exec and nothing merged is left of it; it is frozen."""

    def inside(self, attachment: Attachment) -> None:
        """Called once the agent is there and before the child goes on."""


@dataclass
class Attachment:
    """What an attach leaves us with; every descriptor is ours to close."""

    agent: Agent
    uffd_track: int
    uffd_event: int
    agent_track: int  # the same userfaultfds by their numbers in the agent's table
    agent_event: int
    agent_store: int
    agent_held: tuple[int, ...]  # word, store, ledger, both ends of the attic
    code: int

    def stay(self, target: int) -> None:
        """The agent stays with the target of this id until it has our word; TargetGone."""
        word, *gifts = self.agent_held
        self.agent.stay((word, self.agent_event, *gifts), target)


def attach(
    pid: int,
    gifts: tuple[int, ...],
    census: ProcessCensus,
    *,
    fork_events: bool,
    tethered: set[int],
    child: ForkedChild | None = None,
) -> Attachment:
    """Put an agent into process `pid`, give it store, ledger and attic and take its two userfaultfds.

    Raises TargetGone, FreezeFailed (try later), NotPermitted, Unsupported,
    FeatureMissing.  The target goes on whatever happens.
    """
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
        agent, code = _bootstrap(pid, freeze, memory, place)
        if child is not None:
            attachment = _equipped(agent, code, gifts, fork_events, child.uffd_event)
            child.inside(attachment)
            _reserve_mappings(agent)
            return attachment
    finally:
        freeze.thaw()
        if memory is not None:
            os.close(memory)
    attachment = _equipped(agent, code, gifts, fork_events, None)
    _reserve_mappings(agent)
    return attachment


def _open_memory(pid: int) -> int:
    with procfs.errors_of(pid):
        return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)


def _find_slack(pid: int, memory: int, size: int) -> int:
    """Address of `size` unused (zero) bytes at the end of an executable page; Unsupported when none."""
    for vma in procfs.maps(pid):
        if vma.perms[2:] != "xp" or not (vma.inode or vma.path == "[vdso]"):
            continue
        try:
            page = os.pread(memory, PAGE_SIZE, vma.end - PAGE_SIZE)
        except OSError:
            continue
        # 16 zero bytes stay before us: the last instruction may end in zeros.
        if len(page) == PAGE_SIZE and not any(page[-size - 32 :]):
            return (vma.end - size) & ~15
    raise Unsupported(f"process {pid} has no executable page with {size} unused bytes at its end; skipped")


def _usable(tid: int, memory: int, stop: ptrace.Stop) -> bool:
    """True for a thread whose registers may be borrowed: stopped by us, not in an rseq section."""
    if stop.kind != "stop" or stop.event != ptrace.EVENT_STOP or stop.signal != ptrace.SIGTRAP:
        return False
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
    while time.monotonic_ns() < deadline:
        stop = ptrace.peek_stop(tid)
        if stop is not None:
            if stop.kind == "gone":
                raise TargetGone(f"process {pid} has exited")
            return stop
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


def _bootstrap(pid: int, freeze: Freeze, memory: int, place: int) -> tuple[Agent, int]:
    """Run the bootstrap on a frozen thread; the agent, ready for its first table, and its code page."""
    x86 = arch.current()
    nr = x86.NR
    tid = _borrow(pid, freeze, memory)
    registers = ptrace.get_registers(tid)
    if not x86.is_native(registers):
        raise Unsupported(f"process {pid} runs 32-bit code; skipped")
    signal_mask = ptrace.get_signal_mask(tid)
    code = x86.bootstrap_code(registers, signal_mask)
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
        os.pwrite(memory, _GO, block + 8)
        started = stepper.next_result(nr.CLONE).rax
        if started >> 63:
            own.close()
            raise Unsupported(f"process {pid} cannot start a thread (process limit?); skipped")
        freeze.spare = _thread_known_inside_as(pid, started)
        agent = Agent(pid, freeze.spare, block, own)
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


def _equipped(
    agent: Agent, code: int, gifts: tuple[int, ...], fork_events: bool, inherited_event: int | None
) -> Attachment:
    try:
        return _equip(agent, code, gifts, fork_events, inherited_event)
    except BaseException:
        agent.close()
        raise


def _equip(
    agent: Agent, code: int, gifts: tuple[int, ...], fork_events: bool, inherited_event: int | None
) -> Attachment:
    """Give the agent its eventfds and `gifts`, drop its capabilities, take the userfaultfds."""
    nr = arch.current().NR
    _drop_capabilities(agent, nr)
    fds = [agent.tokens, agent.word, *gifts] + ([inherited_event] if inherited_event is not None else [])
    tokens, *numbers = _send_descriptors(agent, nr, fds)
    held, event = tuple(numbers[: 1 + len(gifts)]), numbers[1 + len(gifts) :]
    _write_i32(agent, agent.block + 12, tokens)
    agent.claims = True
    track = _create_uffd(agent, nr)
    if not event:
        event = [_create_uffd(agent, nr)]
    if inherited_event is None:
        ours = _receive_descriptors(agent, nr, (track, event[0]))
    else:
        ours = [*_receive_descriptors(agent, nr, (track,)), inherited_event]
    try:
        features = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED
        uffd.api(ours[0], features)
        if inherited_event is None:
            uffd.api(ours[1], features | event_features(fork_events))
    except OSError as error:
        for fd in ours:
            os.close(fd)
        raise FeatureMissing(
            f"this kernel's userfaultfd cannot track writes ({error.strerror}); Linux 6.7 or newer is needed"
        ) from None
    return Attachment(agent, ours[0], ours[1], track, event[0], held[1], held, code)


def event_features(fork_events: bool) -> int:
    """Features of the userfaultfd that watches merged memory."""
    features = uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_REMAP | uffd.FEATURE_EVENT_UNMAP
    return features | (uffd.FEATURE_EVENT_FORK if fork_events else 0)


def _create_uffd(agent: Agent, nr: Any) -> int:
    try:
        return agent.call(nr.USERFAULTFD, uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    except OSError as error:
        raise Unsupported(
            f"process {agent.pid} may not use userfaultfd ({error.strerror}); skipped"
        ) from None


def _write_i32(agent: Agent, address: int, value: int) -> None:
    """Write one 32-bit word into the agent's control block."""
    word = bytearray(struct.pack("<i", value))
    vm.writev(agent.tid, [(vm.address_of(word), 4)], [(address, 4)])


def _reserve_mappings(agent: Agent) -> None:
    """Have the control block be several mappings, where there is room for them.

    They go when the agent ends, so that our successor finds room in a process that is at vm.max_map_count.
    """
    table = Table()
    for offset in UNUSED_OFFSETS:
        table.add(arch.current().NR.MPROTECT, agent.block + offset, PAGE_SIZE, 0)
    with contextlib.suppress(TargetGone, AgentStuck):  # whoever uses the agent next finds that out
        agent.perform(table)


def _drop_capabilities(agent: Agent, nr: Any) -> None:
    table = Table()
    header = agent.aux_address(table, struct.pack("<II", _CAPABILITY_VERSION_3, 0))
    data = agent.aux_address(table, bytes(24))
    table.add(nr.CAPSET, header, data)
    (result,) = agent.perform(table)
    if result < 0:
        raise Unsupported(f"the agent in process {agent.pid} could not drop its capabilities; skipped")


def _message(agent: Agent, table: Table, control: bytes) -> tuple[int, int]:
    """A struct msghdr with one data byte and `control` in the block; (its address, control's address)."""
    data = agent.aux_address(table, b"x" + bytes(7))
    vector = agent.aux_address(table, struct.pack("<QQ", data, 1))
    at = agent.aux_address(table, control)
    header = struct.pack("<QIIQQQQII", 0, 0, 0, vector, 1, at, len(control), 0, 0)
    return agent.aux_address(table, header), at


def _send_descriptors(agent: Agent, nr: Any, fds: list[int]) -> list[int]:
    """Send descriptors to the agent; their numbers in its table."""
    table = Table()
    message, control = _message(agent, table, bytes(64))
    table.add(nr.RECVMSG, _agent_socket(agent), message, 0)
    agent.start(table)
    socket.send_fds(agent.sock, [b"x"], fds)
    (result,) = agent.finish(table)
    length = 16 + 4 * len(fds)
    received = bytearray(length)
    vm.read_into(agent.tid, control, received)
    if result != 1 or int.from_bytes(received[:8], "little") != length:
        raise Unsupported(f"process {agent.pid} could not receive descriptors (limit?); skipped")
    return list(struct.unpack_from(f"<{len(fds)}i", received, 16))


def _receive_descriptors(agent: Agent, nr: Any, fds: tuple[int, ...]) -> list[int]:
    """Duplicates of descriptors of the agent's table."""
    table = Table()
    numbers = array.array("i", fds).tobytes()
    control = struct.pack("<Qii", 16 + len(numbers), socket.SOL_SOCKET, socket.SCM_RIGHTS) + numbers
    message, _ = _message(agent, table, control + bytes(-len(control) % 8))
    table.add(nr.SENDMSG, _agent_socket(agent), message, 0)
    agent.start(table)
    # Where sending failed, what comes first is the agent's acknowledgement.
    _, rights, _, _ = agent.sock.recvmsg(1, socket.CMSG_LEN(4 * len(fds)), socket.MSG_PEEK)
    received = list(array.array("i", b"".join(data for _, _, data in rights)))
    if received:
        agent.sock.recv(1)
    agent.finish(table)
    for fd in received:
        os.set_inheritable(fd, False)
    if len(received) != len(fds):
        for fd in received:
            os.close(fd)
        raise Unsupported(f"process {agent.pid} could not hand over its userfaultfds (limit?); skipped")
    return received


def _agent_socket(agent: Agent) -> int:
    word = bytearray(4)
    vm.read_into(agent.tid, agent.block, word)
    return int.from_bytes(word, "little")
