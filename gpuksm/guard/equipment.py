"""Giving a new agent what it works with: eventfds, store, ledger, attic, and the two userfaultfds.

What must hold: the agent has no capability left before it does anything else; it has every descriptor of ours
in its own table only; the device is closed again in there.

If we die: the agent's socket closes, it unmaps its block and ends, all that it has with it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from gpuksm.errors import FeatureMissing, TargetGone, Unsupported
from gpuksm.guard import arch
from gpuksm.guard.agent import UNUSED_OFFSETS, WAIT_NS, Agent, AgentStuck, Muzzled, Table
from gpuksm.linux import uffd, vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.descriptors import await_readable

_MADV_DONTDUMP = 16
_CAPABILITY_VERSION_3 = 0x20080522


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
    pause_us: int = 0  # how long attaching has stopped the process
    copy_place: int = 0  # where memory may be copied to, before it is moved; 0: not known

    def stay(self, target: int) -> None:
        """The agent stays with the target of this id until it has our word; TargetGone."""
        word, *gifts = self.agent_held
        self.agent.stay((word, self.agent_event, *gifts), target)

    def close(self, *, but_event: bool = False) -> None:
        """The agent ends, the userfaultfds (`but_event`: one) let the memory go.

        With the last descriptor of the tracking one the kernel walks over all that is registered, 13 ms a
        GiB, and with the other's it waits for that: let them be the agent's, which go with its end.
        """
        for fd in (self.uffd_track,) if but_event else (self.uffd_track, self.uffd_event):
            os.close(fd)
        self.agent.close()


def equip(
    agent: Agent, code: int, gifts: tuple[int, ...], fork_events: bool, inherited_event: int | None
) -> Attachment:
    """See the head of this module.  Unsupported, FeatureMissing, TargetGone, AgentStuck: it is let go."""
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
    # Whoever has it may make userfaultfds that the kernel's own faults wait for: only where there is need.
    device = uffd.open_device() if agent.filters else None
    fds = [agent.tokens, agent.word, *gifts, *(fd for fd in (device, inherited_event) if fd is not None)]
    try:
        tokens, *numbers = _send_descriptors(agent, nr, fds)
    finally:
        if device is not None:
            os.close(device)
    held, rest = tuple(numbers[: 1 + len(gifts)]), numbers[1 + len(gifts) :]
    _write_i32(agent, agent.block + 12, tokens)
    agent.claims = True
    maker = rest.pop(0) if device is not None else None
    track = _create_uffd(agent, nr, maker)
    event = rest[0] if rest else _create_uffd(agent, nr, maker)
    if maker is not None:
        _close(agent, nr, maker)
    if inherited_event is None:
        ours = _receive_descriptors(agent, nr, (track, event))
    else:
        ours = [*_receive_descriptors(agent, nr, (track,)), inherited_event]
    try:
        features = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED
        uffd.api(ours[0], features)
        if inherited_event is None:
            uffd.api(ours[1], features | event_features(fork_events))
    except OSError as error:
        for fd in set(ours) - {inherited_event}:
            os.close(fd)
        raise FeatureMissing(
            f"this kernel's userfaultfd cannot track writes ({error.strerror}); Linux 6.7 or newer is needed"
        ) from None
    agent.equipped({event: ours[1]})
    return Attachment(agent, ours[0], ours[1], track, event, held[1], held, code)


def without_agent(pid: int, uffd_event: int) -> Attachment:
    """For a forked child whose seccomp filters let no agent work: what can be done from outside is done."""
    muzzled = Muzzled(pid, uffd_event)
    track = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # nothing is tracked by that
    return Attachment(muzzled, track, uffd_event, -1, Muzzled.EVENT, -1, (-1,) * 5, 0)


def event_features(fork_events: bool) -> int:
    """Features of the userfaultfd that watches merged memory."""
    features = uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_REMAP | uffd.FEATURE_EVENT_UNMAP
    return features | (uffd.FEATURE_EVENT_FORK if fork_events else 0)


def _create_uffd(agent: Agent, nr: Any, device: int | None) -> int:
    """A userfaultfd of the agent's process, by the device where there is one: filters know the call only."""
    flags = uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY
    try:
        if device is not None:
            return agent.call(nr.IOCTL, device, uffd.NEW, flags)
        return agent.call(nr.USERFAULTFD, flags)
    except OSError as error:
        raise Unsupported(
            f"process {agent.pid} may not use userfaultfd ({error.strerror}); skipped"
        ) from None


def _close(agent: Agent, nr: Any, number: int) -> None:
    try:
        agent.call(nr.CLOSE, number)
    except OSError as error:
        raise Unsupported(
            f"process {agent.pid} could not close a device ({error.strerror}); skipped"
        ) from None


def _write_i32(agent: Agent, address: int, value: int) -> None:
    """Write one 32-bit word into the agent's control block."""
    word = bytearray(struct.pack("<i", value))
    vm.writev(agent.tid, [(vm.address_of(word), 4)], [(address, 4)])


def reserve_mappings(agent: Agent) -> None:
    """Have the control block be several mappings, where there is room for them.

    They go when the agent ends, so that our successor finds room in a process that is at vm.max_map_count.
    """
    table = Table()
    for offset in UNUSED_OFFSETS:
        table.add(arch.current().NR.MPROTECT, agent.block + offset, PAGE_SIZE, 0)
    # Nobody's data, so that it is not taken for the program's.
    table.add(arch.current().NR.MADVISE, agent.block, arch.current().BLOCK_BYTES, _MADV_DONTDUMP)
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
    _start(agent, table)
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
    _start(agent, table)
    if not await_readable([agent.sock.fileno()], WAIT_NS / 1e9):
        raise AgentStuck(f"process {agent.pid} was stopped just now")
    # Where sending failed, what comes first is the agent's acknowledgement.
    try:
        _, rights, _, _ = agent.sock.recvmsg(1, socket.CMSG_LEN(4 * len(fds)), socket.MSG_PEEK)
    except ConnectionResetError:
        raise TargetGone(f"process {agent.pid} has exited") from None
    received = list(array.array("i", b"".join(data for _, _, data in rights)))
    for fd in received:
        os.set_inheritable(fd, False)
    try:
        if received:
            agent.sock.recv(1)
        agent.finish(table)
    except BaseException:
        for fd in received:
            os.close(fd)
        raise
    if len(received) != len(fds):
        for fd in received:
            os.close(fd)
        raise Unsupported(f"process {agent.pid} could not hand over its userfaultfds (limit?); skipped")
    return received


def _start(agent: Agent, table: Table) -> None:
    """Hand `table` to the agent; Unsupported where a filter has come: `Agent.start` does not look."""
    if agent.muzzled():
        raise Unsupported(f"process {agent.pid} has just got a seccomp filter; skipped")
    agent.start(table)


def _agent_socket(agent: Agent) -> int:
    word = bytearray(4)
    vm.read_into(agent.tid, agent.block, word)
    return int.from_bytes(word, "little")
