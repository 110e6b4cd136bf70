"""Talking to the agent, the helper thread inside a target that performs our system calls.

What must hold (docs/hazards.md 9, 10):
- The agent performs an entry only after it has claimed it (one token of an
  eventfd semaphore) and has seen that our end of its socket is open.  A linked
  entry follows the one before it whatever has become of us, so that "replace,
  then register" cannot be cut in the middle by our death.  In a group that replaces in
  several entries and registers in one, each that replaces looks whether we are there; what is
  registered is what was replaced.  One that must not be performed
  when the one before it failed says so: mapping over memory that could not be unwatched
  would have the agent wait for us, who wait for it.
- We take back what is unclaimed by draining the tokens, and a target is thawed
  only when everything that was claimed is done.  Where that cannot be had (the
  target was stopped by SIGSTOP in mid-table), `AgentStuck` is raised and the
  target stays frozen until `settled()`.
- Our end of the socket is never duplicated and never handed on.
- An agent whose target may have merged memory does not end with its socket (`stay`): it
  waits, performing nothing, with the userfaultfds, the store and the ledger in its own
  descriptor table, for a word of ours or of a successor.  So events wait where guard and
  keeper have died together (hazard 14, waiting.py).
- An agent whose filters have become more (seccomp, another thread's TSYNC) does nothing that they might
  answer with a signal (sandbox.py): it is *muzzled*, every system call that it would make fails
  with EPERM, and only watching memory, which can be done from outside, is done.
- The control block is reached through the agent's own thread id: after exec the
  process id means another address space, the agent's thread is gone.

If we die at any line here: the socket closes before the target's threads are let
go, the agent finishes the entry that it is in (and what is linked to it) and waits or ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import select
import socket
import struct
import time
from array import array
from collections.abc import Iterator

from gpuksm.errors import TargetGone
from gpuksm.guard import arch, sandbox
from gpuksm.linux import census, uffd, vm
from gpuksm.linux.memory import PageBuffer

TABLE_OFFSET = 4096
TABLE_ENTRIES = 4000
AUX_OFFSET = 0x41000
AUX_BYTES = 0xE000
UNUSED_OFFSETS = (0x40000, 0x4F000)  # pages of the block that nothing uses; the agent needs no stack
_ENTRY_BYTES = 64
_ENTRY = struct.Struct("<IIqqqqqqq")
_LINKED, _AFTER_SUCCESS, _WHILE_GUARDED, _AS_FAR = 1, 2, 4, 8
_NO_ARGUMENTS = (0, 0, 0, 0, 0, 0)
_DONE_OFFSET = 32
STAY_OFFSET = 40
# What the agent has, from STAY_OFFSET on: its word, event userfaultfd, store, ledger and the attic's
# ends by their numbers in its table, and the id of its target.
STAY = struct.Struct("<iiiiiiI")
_SCRATCH = PageBuffer((TABLE_ENTRIES * _ENTRY_BYTES + 4096) // 4096 + 1)
WAIT_NS = 2_000_000_000
_STATUS = bytearray(1 << 20)  # for /proc/PID/status, which lists up to 65536 groups
_FILTERS = b"Seccomp_filters:"
_LATE_NS = 50_000_000  # an acknowledgement that a cancelled request still owes


class AgentStuck(Exception):
    """The agent holds a claimed entry and does not finish it; the target must stay frozen."""


class Table:
    """System calls for the agent, in order; `add` returns the index of the entry's result."""

    def __init__(self) -> None:
        self.entries = bytearray()
        self.aux = bytearray()
        self.unlinked = 0

    def __len__(self) -> int:
        return len(self.entries) // _ENTRY_BYTES

    def add(
        self,
        number: int,
        *arguments: int,
        linked: bool = False,
        after_success: bool = False,
        while_guarded: bool = False,
        as_far: bool = False,
    ) -> int:
        """One entry; the others' kinds follow the entry before whatever has become of us.

        `linked`: that is all; `after_success`: only if the entry before gave 0, else its own result is
        -ECANCELED (-125); `while_guarded`: only if we are there, else so; `as_far`: its third
        argument points to a range, of which then only what lies below the first argument of the first
        entry that was left out is meant.
        """
        flags = int(linked)
        flags |= _LINKED | _AFTER_SUCCESS if after_success else 0
        flags |= _LINKED | _WHILE_GUARDED if while_guarded else 0
        flags |= _LINKED | _AS_FAR if as_far else 0
        self.entries += _ENTRY.pack(0, flags, number, *arguments, *_NO_ARGUMENTS[len(arguments) :])
        self.unlinked += not flags
        return len(self.entries) // _ENTRY_BYTES - 1

    def add_each(self, number: int, *arguments: array[int] | int) -> int:
        """Entries for one call with each of the columns' values; all but the first `while_guarded`.

        An argument that is no column is the same in all of them.  Returns the index of the first's result.
        """
        count = max(len(argument) for argument in arguments if not isinstance(argument, int))
        words = array("Q", bytes(count * _ENTRY_BYTES))
        step = _ENTRY_BYTES // 8
        words[0::step] = array("Q", (0, *itertools.repeat((_LINKED | _WHILE_GUARDED) << 32, count - 1)))
        for at, argument in enumerate((number, *arguments), 1):
            words[at::step] = array("Q", (argument,)) * count if isinstance(argument, int) else argument
        self.entries += words.tobytes()
        self.unlinked += 1
        return len(self) - count

    def room(self, entries: int, aux_bytes: int) -> bool:
        """True when this many more entries and auxiliary bytes fit."""
        return len(self) + entries <= TABLE_ENTRIES and len(self.aux) + aux_bytes <= AUX_BYTES


class Agent:
    """The agent of one target: its thread id, control block and socket."""

    def __init__(self, pid: int, tid: int, block: int, sock: socket.socket, filters: int = 0) -> None:
        # seccomp filters that it had from the start, and those that let it go on since
        self.filters = filters
        self.pid = pid
        self.tid = tid
        self.block = block
        self.sock = sock
        self.tokens = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.claims = False  # true once the agent has the eventfd
        self.word = os.eventfd(0, os.EFD_CLOEXEC)  # lets an agent end that stays
        self._done = 0
        self._owed = 0  # requests whose acknowledgement has not been read
        self._pending: tuple[int, int] | None = None  # entries, claimable groups of a stuck request
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._ours: dict[int, int] = {}  # our duplicates of its userfaultfds, by their numbers in its table
        self._status: int | None = None  # its /proc status, from `count_filters` on
        self._muzzled = False

    def aux_address(self, table: Table, data: bytes) -> int:
        """Put `data` beside `table` in the control block; its address in the target."""
        address = self.block + AUX_OFFSET + len(table.aux)
        table.aux += data + bytes(-len(data) % 8)
        return address

    def call(self, number: int, *arguments: int) -> int:
        """One system call in the target; its result, OSError when it failed."""
        table = Table()
        table.add(number, *arguments)
        (result,) = self.perform(table)
        if result < 0:
            raise OSError(-result, f"system call {number} in process {self.pid}: {os.strerror(-result)}")
        return result

    def perform(self, table: Table, wait_ns: int = WAIT_NS) -> list[int]:
        """Run `table`; the results in order, -ECANCELED (-125) for entries taken back at the deadline.

        Raises TargetGone, AgentStuck.
        """
        if not len(table):
            return []
        if self.muzzled():
            return self._refuse(table)
        self.start(table)
        return self.finish(table, wait_ns)

    def count_filters(self) -> None:
        """From now on filters that come to those that it has are looked at before each use; TargetGone."""
        with self._errors():
            self._status = os.open(f"/proc/{self.pid}/task/{self.tid}/status", os.O_RDONLY | os.O_CLOEXEC)

    def equipped(self, ours: dict[int, int]) -> None:
        """It has what it needs, `ours` being our duplicates of its userfaultfds."""
        self._ours = ours

    def muzzled(self) -> bool:
        """Whether it must make no system call any more, for filters that came after it."""
        if self._status is None or self._muzzled:
            return self._muzzled
        count = self._filter_count()
        if count is not None and count != self.filters:
            verdict = sandbox.lets_agent_work(self.pid, self.tid, equipped=bool(self._ours))
            if verdict is None:
                return True  # this time
            self._muzzled = not verdict
            self.filters = count if verdict else self.filters
        return self._muzzled

    def _filter_count(self) -> int | None:
        """How many filters it has (told by Linux 5.9 and newer); None of an agent that is gone."""
        assert self._status is not None
        try:
            size = os.preadv(self._status, [_STATUS], 0)
        except ProcessLookupError:
            return None
        at = _STATUS.find(_FILTERS, 0, size)
        return int(_STATUS[at + len(_FILTERS) : _STATUS.index(b"\n", at)]) if at >= 0 else 0

    def _refuse(self, table: Table) -> list[int]:
        """The results of `table` when its calls must not be made: watching is done by us, all else fails."""
        results: list[int] = []
        for _, flags, number, fd, request, argument, *_ in _ENTRY.iter_unpack(table.entries):
            result = -errno.EPERM
            if number == arch.current().NR.IOCTL and request == uffd.UFFDIO_REGISTER and fd in self._ours:
                at = argument - self.block - AUX_OFFSET
                result = _ioctl(self._ours[fd], request, table.aux[at : at + uffd.REGISTER_BYTES])
            elif flags & _AFTER_SUCCESS and results and results[-1] != 0:
                result = -errno.ECANCELED
            results.append(result)
        return results

    def start(self, table: Table) -> None:
        """Hand `table` to the agent without waiting; `finish` must follow."""
        if not self.settled() or (self._owed and not self._acknowledged(_LATE_NS)):
            raise AgentStuck(f"the agent of process {self.pid} is still busy")
        self._write(table)
        if self.claims:
            os.eventfd_write(self.tokens, table.unlinked)
        try:
            self.sock.sendall(struct.pack("<Q", len(table)))
        except OSError:
            self._drain()
            raise TargetGone(f"the agent of process {self.pid} is gone") from None
        self._owed += 1

    def finish(self, table: Table, wait_ns: int = WAIT_NS) -> list[int]:
        """Wait for what `start` began; see `perform`."""
        count = performed = len(table)
        if not self._acknowledged(wait_ns):
            performed = self._cancel(table)
        return self._results(count, performed)

    def settled(self) -> bool:
        """True when nothing that the agent has claimed is still to be done."""
        if self._pending is None:
            return True
        if not census.thread_exists(self.pid, self.tid):
            self._pending = None
            return True
        target_done, _ = self._pending
        if self._read_done() < target_done:
            return False
        self._pending = None
        self._acknowledged(0)
        return True

    def exists(self) -> bool:
        """False once the process has exited or called exec."""
        return census.thread_exists(self.pid, self.tid)

    def ended(self) -> bool:
        """True when the agent has closed its end (the process exited or called exec)."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def stay(self, has: tuple[int, ...], target: int) -> None:
        """From now on the agent ends by word only; `has`: the numbers of `STAY`."""
        data = bytearray(STAY.pack(*has, target))
        with self._errors():
            vm.writev(self.tid, [(vm.address_of(data), len(data))], [(self.block + STAY_OFFSET, len(data))])

    def dismiss(self) -> None:
        """Let the agent end as soon as our end of its socket is closed."""
        os.eventfd_write(self.word, 1)

    def close(self) -> None:
        """Let the agent end: it unmaps its control block and exits."""
        self.dismiss()
        self.sock.close()
        os.close(self.tokens)
        os.close(self.word)
        if self._status is not None:
            os.close(self._status)
            self._status = None

    # -- inside ---------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """TargetGone where the control block cannot be reached: exit or exec has ended the agent."""
        try:
            yield
        except (ProcessLookupError, FileNotFoundError):
            raise TargetGone(f"the agent of process {self.pid} is gone") from None

    def _write(self, table: Table) -> None:
        data = _SCRATCH.data
        data[: len(table.entries)] = table.entries
        local = [(_SCRATCH.address, len(table.entries))]
        remote = [(self.block + TABLE_OFFSET, len(table.entries))]
        if table.aux:
            at = len(table.entries)
            if at + len(table.aux) > len(data):
                raise ValueError("table too large")
            data[at : at + len(table.aux)] = table.aux
            local.append((_SCRATCH.address + at, len(table.aux)))
            remote.append((self.block + AUX_OFFSET, len(table.aux)))
        with self._errors():
            vm.writev(self.tid, local, remote)

    def _acknowledged(self, wait_ns: int) -> bool:
        """Wait for the acknowledgement of the last request; False when it has not come in time."""
        deadline = time.monotonic_ns() + wait_ns
        while True:
            left = max(0, deadline - time.monotonic_ns())
            ready = self._poll.poll(left / 1e6)
            if ready:
                try:
                    data = self.sock.recv(8)
                except ConnectionResetError:  # it went without reading what we had sent
                    data = b""
                if len(data) < 8:
                    self._drain()
                    raise TargetGone(f"the agent of process {self.pid} is gone")
                self._owed -= 1
                self._done = int.from_bytes(data, "little")
                return True
            if not left:
                return False

    def _drain(self) -> int:
        taken = 0
        while True:
            try:
                taken += os.eventfd_read(self.tokens)
            except BlockingIOError:
                return taken

    def _cancel(self, table: Table) -> int:
        """Take back what is unclaimed; the number of entries done once all that was claimed is done."""
        claimed_groups = table.unlinked - self._drain()
        claimed = _entries_of_groups(table, claimed_groups)
        target_done = self._done + claimed
        for _ in range(200):
            if self._read_done() >= target_done:
                self._acknowledged(10_000_000)
                return claimed
            if not census.thread_exists(self.pid, self.tid):
                raise TargetGone(f"the agent of process {self.pid} is gone")
            time.sleep(0.0005)
        self._pending = (target_done, claimed_groups)
        raise AgentStuck(f"process {self.pid} was stopped in the middle of a commit")

    def _read_done(self) -> int:
        word = bytearray(8)
        with self._errors():
            vm.read_into(self.tid, self.block + _DONE_OFFSET, word)
        return int.from_bytes(word, "little")

    def _results(self, count: int, performed: int) -> list[int]:
        size = performed * _ENTRY_BYTES
        if size:
            with self._errors():
                vm.readv(self.tid, [(_SCRATCH.address, size)], [(self.block + TABLE_OFFSET, size)])
        words = array("q")
        words.frombytes(_SCRATCH.data[:size])
        return words[1 :: _ENTRY_BYTES // 8].tolist() + [-errno.ECANCELED] * (count - performed)


class Muzzled(Agent):
    """In the place of an agent where filters would not let one start: a forked child's."""

    EVENT = 0  # the number by which tables know its event userfaultfd

    def __init__(self, pid: int, uffd_event: int) -> None:
        ours, self._other = socket.socketpair()
        super().__init__(pid, 0, 0, ours)
        self._ours = {self.EVENT: uffd_event}
        self._muzzled = True

    def exists(self) -> bool:
        """Whether the process still has the memory that is watched."""
        return uffd.memory_exists(self._ours[self.EVENT])

    def settled(self) -> bool:
        """It never has anything to do."""
        return True

    def ended(self) -> bool:
        """Nobody closes a socket for it."""
        return not self.exists()

    def stay(self, has: tuple[int, ...], target: int) -> None:
        """There is nobody who could: with guard and keeper dead the attic holds its userfaultfd."""

    def close(self) -> None:
        self._other.close()
        super().close()


def _ioctl(fd: int, request: int, argument: bytes | bytearray) -> int:
    """The result of an ioctl as the system call gives it."""
    try:
        fcntl.ioctl(fd, request, bytearray(argument))
    except OSError as error:
        return -(error.errno or errno.EPERM)
    return 0


def _entries_of_groups(table: Table, groups: int) -> int:
    """How many entries the first `groups` unlinked entries and what is linked to them make."""
    seen = 0
    for index in range(len(table)):
        flags = int.from_bytes(table.entries[index * _ENTRY_BYTES + 4 : index * _ENTRY_BYTES + 8], "little")
        if not flags & _LINKED:
            seen += 1
            if seen > groups:
                return index
    return len(table)
