"""Forked children of targets: found, adopted, guarded like their parents.

A child inherits the parent's merged mappings.  With CAP_SYS_PTRACE the kernel hands
us a userfaultfd for it with the fork event; without, the tether (tether.py) holds
the child at its first instruction.  Either way the child gets an agent of its own
before an event of it is answered, because only an agent can map zeros (hazard 2).

What must hold: a userfaultfd is served as a process's own only if it is (identity.py).
No MADV_DONTNEED of merged memory in a child shows old bytes.  The
child's own thread may already wait in such a call when we get to it.  That event has
to be read first, as the agent cannot start before the thread stops; it is zeroed
before the thread goes on.  Before it is read, the ledger notes the range, and a touch
of merged memory in it is made to wait (UFFDIO_REGISTER_MODE_MINOR).  The same holds for what a
move shows of the store, the tail that it has grown or the place that MREMAP_DONTUNMAP left; where
that is the event says, so that it is done right after reading it, before the caller, which is
being stopped, is back in its program.

If we die after reading such an event, the child goes on and waits where it touches the
range; our successor finds it in the ledger and puts zeros there.  Until then a system
call that touches it fails with EFAULT.  (Both hold for every target that a successor
takes over.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpuksm import writers
from gpuksm.errors import GpuksmError, TargetGone
from gpuksm.guard import arch, callers, events, faults, journal, places
from gpuksm.guard.advice import DONTFORK, Advice, Advised
from gpuksm.guard.equipment import Attachment
from gpuksm.guard.freeze import Freeze
from gpuksm.guard.inventory import Inventory, runs_in
from gpuksm.guard.restore import RestoreFailed, block_growth, drop_copy, fix_ends, is_loose
from gpuksm.guard.target import Target
from gpuksm.linux import census, mappings, pagemap, procfs, ptrace, uffd
from gpuksm.linux._libc import PAGE_SIZE

if TYPE_CHECKING:
    from gpuksm.guard.guard import Guard

_FORK_NS = 100_000_000
_NAP_SECONDS = 0.0001
_BOOTSTRAP_MAPPINGS = 2  # the agent's code page and its control block


class Read(NamedTuple):
    """An event that was read before there was an agent.

    `grown` is the size that a move asked for, in bytes; None where its call was not seen.
    """

    event: uffd.Event
    grown: int | None = None


class Inherited(NamedTuple):
    """What a child has of its parent, beside what it maps; see `Target`."""

    borders: set[int]
    coredump_filter: int | None
    advice: list[Advised]
    filters: int


@dataclass
class Orphan:
    """A forked child that has no agent yet; `uffd_event` is None for one that the tether holds."""

    parent: int
    uffd_event: int | None
    id: int
    pid: int | None = None
    borders: set[int] = field(default_factory=set)
    coredump_filter: int | None = None
    tethered: set[int] = field(default_factory=set)
    due: float = 0.0
    tries: int = 0
    guard: Guard | None = None
    read: list[Read] = field(default_factory=list)
    discards: list[tuple[int, int]] = field(default_factory=list)
    barred: set[tuple[int, int]] = field(default_factory=set)  # of these, what this guard has barred
    copy: tuple[int, int, int] | None = None  # see restore.drop_copy
    faults: list[int] = field(default_factory=list)
    guessed: bool = False  # the pid was searched for
    word: int | None = None  # what the agent of the guard before us waits for
    inventory: Inventory | None = None
    advice: list[Advised] = field(default_factory=list)  # see advice.py
    filters: int = 0  # seccomp filters under which it may be given an agent although they cannot be read

    # attach.ForkedChild

    def prepare(self) -> None:
        """Learn what it maps, as far as that stays so."""
        assert self.guard is not None
        assert self.pid is not None
        self.inventory = Inventory(self.pid, self.guard.store.inode)
        self.guard.pins.prepare(self.pid)

    def service(self) -> None:
        """Read what waits, so that the threads can stop; see the head of this module."""
        assert self.guard is not None
        assert self.pid is not None
        if self.uffd_event is None:
            return
        self._resolve_faults()
        while callers.readable(self.uffd_event):
            calls = callers.calls_of(self.pid)
            if calls is None or (self.guessed and not calls):
                return  # one may be on its way; or this is not its userfaultfd
            for call in calls:
                for start, end in callers.discarded(self.pid, call):
                    self._make_touches_wait(self.guard, self.uffd_event, self.pid, start, end)
            event = self.guard.read_event(self.uffd_event, self.id, calls)
            if event is None:
                return
            if event.kind == uffd.EVENT_PAGEFAULT:
                self.faults.append(event.b & ~(PAGE_SIZE - 1))
                self._resolve_faults()
                continue
            if event.kind == uffd.EVENT_FORK:
                # On its own from here on, whatever becomes of us: its events wait for somebody.
                has = Inherited(set(self.borders), self.coredump_filter, self.advice, self.filters)
                child = forked(self.guard, self.id, event.a, has)
                self.guard.orphans.append(child)
            else:
                self.read.append(Read(event, _size_asked_for(event, calls)))
                if event.kind == uffd.EVENT_REMAP:
                    self._bar_what_a_move_shows(self.guard, self.uffd_event, self.pid, calls)
            faults.point("child-event-read")

    def _bar_what_a_move_shows(
        self, guard: Guard, uffd_event: int, pid: int, calls: list[callers.Call]
    ) -> None:
        """After reading a move: what shows the store is like discarded, what was discarded moves along."""
        event, grown = self.read[-1]
        old, new, size = event.a, event.b, event.c
        end = new + (size if grown is None else max(size, grown))
        moved = [
            (max(start, old) + new - old, min(stop, old + size) + new - old)
            for start, stop in self.discards
            if start < old + size and old < stop
        ]
        self._keep_discards_outside(guard, new, end)  # whatever lay there is gone
        shown = [*moved, (new + size, end)]
        if any(call == arch.current().NR.MREMAP and _keeps(each, old) for call, each in calls):
            shown.append((old, old + size))
        for start, stop in shown:
            self._make_touches_wait(guard, uffd_event, pid, start, stop)

    def _keep_discards_outside(self, guard: Guard, low: int, high: int) -> None:
        """Forget of what was discarded the parts in [low, high)."""
        if not any(start < high and low < end for start, end in self.discards):
            return
        below = [(start, min(end, low)) for start, end in self.discards]
        above = [(max(start, high), end) for start, end in self.discards]
        self.discards = [(start, end) for start, end in below + above if start < end]
        self.barred.clear()
        guard.journal.append(journal.DISCARD, self.id)
        for start, end in self.discards:
            guard.journal.append(journal.DISCARD, self.id, start, end)

    def _make_touches_wait(self, guard: Guard, uffd_event: int, pid: int, start: int, end: int) -> None:
        """Note a discard that we cannot answer yet, once, and bar what is merged there.

        The guard before us may have died between the two, so that what it noted is barred again.
        """
        start, end = start & ~(PAGE_SIZE - 1), (end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        if start >= end or (start, end) in self.barred:
            return
        if (start, end) not in self.discards:
            self.discards.append((start, end))
            guard.journal.append(journal.DISCARD, self.id, start, end)
            faults.point("child-discard-noted")
        self.barred.add((start, end))
        room = procfs.max_map_count() - census.count_vmas(pid) - _BOOTSTRAP_MAPPINGS
        for run in runs_in(procfs.read(pid, "maps"), guard.store.inode):
            low, high = max(start, run.start), min(end, run.end)
            # Both ends may cost a mapping.  Getting in goes first: without this only our death can do harm.
            if low < high and room >= 2:
                room -= 2
                with contextlib.suppress(OSError):
                    uffd.register(uffd_event, low, high - low, uffd.MODE_WP | uffd.MODE_MINOR)

    def _resolve_faults(self) -> None:
        """Zeros for threads that wait where they touched what was discarded.

        None of them writes there before it has stopped, as all were asked to.  If the takeover is broken
        off it does: what has a page of its own from then on is not zeroed any more.  System calls do not
        wait, they fail (our userfaultfds are for user mode).
        """
        while self.faults and self.uffd_event is not None:
            try:
                uffd.zeropage(self.uffd_event, self.faults[-1], PAGE_SIZE)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return
            self.faults.pop()

    def check(self) -> None:
        """attach.ForkedChild: a child that has called exec is nobody's business any more."""
        assert self.guard is not None
        assert self.pid is not None
        if not maps_store(self.guard, self.pid):
            raise TargetGone(f"process {self.pid} has started another program")

    def inside(self, attachment: Attachment) -> None:
        """The agent is there and the child still frozen: make it a target, then do what was read."""
        assert self.guard is not None
        assert self.pid is not None
        try:
            self.service()
            target = Target.open(self.id, self.pid, attachment)
        except BaseException:
            attachment.close(but_event=self.uffd_event is not None)
            raise
        target.coredump_filter = self.coredump_filter
        target.tethered = self.tethered
        target.advice = Advice(self.advice)
        self.guard.adopt(target)
        self.guard.pins.review(target)
        if self.copy is not None:
            drop_copy(target, self.guard.store, self.guard.journal, self.copy)
        _take_runs(target, self.inventory, self.borders)
        for index, (event, grown) in enumerate(self.read):
            _late(self.guard, target, event, grown, [later.event for later in self.read[index + 1 :]])
        for start, end in self.discards:
            for low, high in _old_parts(target, start, end):
                events.zero(self.guard, target, low, high)
        # Nobody runs; what has not been replaced has the process's own pages, or gets zeros written (by us).
        for start, end in self.discards:
            for run in target.runs.overlapping(start, end):
                target.unbar(run.start, run.end)
        if target.unwiped:
            events.wipe(self.guard, target)
        # Also what was watched, as we think: the guard before us may have died with a mapping that was not.
        # Not before what was discarded is zeros, for it makes touches wait no more.
        with contextlib.nullcontext() if self.uffd_event is None else contextlib.suppress(OSError):
            _watch_all(target)
        if self.discards:
            self.guard.journal.append(journal.DISCARD, self.id)
        _settle_ends(self.guard, target)


def _settle_ends(guard: Guard, target: Target) -> None:
    """Border pages that are gone, and ends that the guard before us did not get to (frozen)."""
    for page in list(target.borders):
        try:
            if not _may_be_border(target, page):
                raise OSError
            uffd.register(target.link.uffd_event, page, PAGE_SIZE)
        except OSError:
            target.borders.discard(page)
    loose = [end for end in target.runs.loose_ends() if is_loose(target, guard.store, end)]
    try:
        fix_ends(target, guard.store, guard.journal, loose)
    except RestoreFailed:
        for end in loose:
            block_growth(target, guard.store, guard.journal, end)


def pid_of_fork(parent: Target, freeze: Freeze, held: list[int]) -> int | None:
    """Pid of the child whose fork event was just read: what fork returns in the thread that made it.

    That thread could not stop before, so it is one of `held`, and the next of them to
    stop at the end of a fork: events are read one by one.
    """
    deadline = time.monotonic_ns() + _FORK_NS
    left = set(held)
    while left and time.monotonic_ns() < deadline:
        freeze.collect()
        for tid in [tid for tid in left if tid in freeze.stops]:
            left.discard(tid)
            with contextlib.suppress(OSError):
                registers = ptrace.get_registers(tid)
                if registers.orig_rax in arch.current().NR.FORKS and 0 < registers.rax < 1 << 31:
                    return _in_our_namespace(parent.pid, registers.rax)
        if not left & freeze.waiting:
            break
        # It may have to come to its stop on this processor, on which we come before it.
        time.sleep(_NAP_SECONDS)
    return None


def _in_our_namespace(parent: int, number: int) -> int | None:
    """The pid by which we know the process that `parent` knows as `number`."""
    with contextlib.suppress(TargetGone, GpuksmError):
        if len(procfs.status(parent).get("NSpid", "").split()) <= 1:
            return number
        for child in procfs.children(parent):
            if procfs.status(child)["NSpid"].split()[-1] == str(number):
                return child
    return None


def maps_store(guard: Guard, pid: int) -> bool:
    """Whether process `pid` maps the store."""
    try:
        return mappings.maps_file(pid, guard.store.inode, writers.STORE_PATH)
    except (TargetGone, GpuksmError):
        return False


def _take_runs(target: Target, inventory: Inventory | None, borders: set[int]) -> None:
    """What the child really maps is what it has merged."""
    assert inventory is not None
    inventory.refresh()
    target.runs = inventory.runs
    target.borders = {page for page in borders if _may_be_border(target, page)}


def _may_be_border(target: Target, page: int) -> bool:
    """False where something else has come to lie: the ledger does not tell what was unmapped since."""
    vma = target.query(page)
    if vma is None or vma.inode or vma.flags & mappings.QUERY_EXEC:
        return False
    return not target.is_own(page, page + PAGE_SIZE)


def _watch_all(target: Target) -> None:
    """Have all merged memory, and border pages, raise events for the process's own userfaultfd."""
    for start, end in target.runs.stretches():
        uffd.register(target.link.uffd_event, start, end - start)
    for page in target.borders:
        with contextlib.suppress(OSError):
            uffd.register(target.link.uffd_event, page, PAGE_SIZE)


def _old_parts(
    target: Target, start: int, end: int, later: list[uffd.Event] | None = None
) -> list[tuple[int, int]]:
    """Parts of [start, end), discarded or new to the process, where it has nothing of its own (frozen).

    The call is over, and it has dropped every copy.  One that is there now is the zeros that we have given to
    who touched it, in a try that was broken off perhaps, and what the process has written there since.
    Nor is what events read `later` tell that it has moved there.
    """
    start, end = start & ~(PAGE_SIZE - 1), min(-(-end // PAGE_SIZE) * PAGE_SIZE, places.HIGHEST)
    if start >= end:
        return []
    private = pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_FILE
    copies = pagemap.scan(
        target.pagemap, start, end, inverted=pagemap.PAGE_IS_FILE, mask=private, ret=pagemap.PAGE_IS_PRESENT
    )
    own = [(low, high) for low, high, _ in copies]
    own += [(move.b, move.b + move.c) for move in later or () if move.kind == uffd.EVENT_REMAP]
    parts = []
    for low, high in sorted(own):
        if start < min(low, end):
            parts.append((start, min(low, end)))
        start = max(start, high)
    if start < end:
        parts.append((start, end))
    return parts


def _size_asked_for(event: uffd.Event, calls: list[callers.Call]) -> int | None:
    """The new size in the call that `event` tells of; None when it is none of `calls`, or moves no size."""
    if event.kind != uffd.EVENT_REMAP:
        return None
    for number, arguments in calls:
        old, old_size, new_size = arguments[:3]
        if number == arch.current().NR.MREMAP and old <= event.a < old + max(old_size, 1):
            # Of several mappings that move at once none grows.
            grows = old == event.a and old_size != new_size
            return -(-new_size // PAGE_SIZE) * PAGE_SIZE if grows else event.c
    return None


def _keeps(arguments: tuple[int, ...], old: int) -> bool:
    """Whether an mremap of [old, ...) leaves that mapped."""
    return bool(arguments[3] & events.MREMAP_DONTUNMAP) and arguments[0] == old


def _late(
    guard: Guard, target: Target, event: uffd.Event, grown: int | None, later: list[uffd.Event]
) -> None:
    """An event that had to be read before there was an agent; the child is still frozen."""
    if event.kind == uffd.EVENT_REMOVE:
        for low, high in _old_parts(target, event.a, event.b, later):
            events.zero(guard, target, low, high)
    elif event.kind == uffd.EVENT_REMAP:
        run = target.runs.at(event.b)
        if run is not None:
            # What lies behind may be one mapping with it, and the target's own all the same.
            end = run.end if grown is None else -(-(event.b + grown) // PAGE_SIZE) * PAGE_SIZE
            for low, high in _old_parts(target, event.b + event.c, end, later):
                events.forget_store(guard, target, low, high)
        # MREMAP_DONTUNMAP left the store mapped where the range was.
        for low, high in _old_parts(target, event.a, event.a + event.c, later):
            events.forget_store(guard, target, low, high)


def forked(guard: Guard, parent: int, uffd_event: int, has: Inherited) -> Orphan:
    """A child whose userfaultfd was just read, with what it has of its parent."""
    number = guard.held_as(uffd_event)
    if number is None:
        number = guard.new_id()
        guard.keep(f"event:{number}", uffd_event)
        guard.attic.put(number, uffd_event)
    os.set_inheritable(uffd_event, False)
    return Orphan(
        parent,
        uffd_event,
        number,
        borders=has.borders,
        coredump_filter=has.coredump_filter,
        advice=inherited(has.advice),
        filters=has.filters,
    )


def inherited(advice: Iterable[Advised]) -> list[Advised]:
    """What a child has of its parent's `advice`: that on memory which it has."""
    return [each for each in advice if not each[2] & DONTFORK]
