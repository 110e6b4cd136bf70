"""One target: its agent, userfaultfds, what is merged in it and what must not be."""

from __future__ import annotations

import bisect
import operator
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.guard import arch
from gpuksm.guard.advice import DONTFORK, Advice, Advised, outside
from gpuksm.guard.agent import Table
from gpuksm.guard.equipment import Attachment
from gpuksm.guard.freeze import Freeze
from gpuksm.guard.journal import ADVICE, COREDUMP, Journal
from gpuksm.guard.runs import Runs
from gpuksm.linux import mappings, pagemap, procfs, uffd
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.page_references import Copies, PageReferences
from gpuksm.writers import NOTHING, Allowed

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 2, 0x10, 0x20, 0x4000
MAP_FIXED_NOREPLACE = 0x100000  # Linux 4.17
MADV_DONTNEED, MADV_DONTFORK = 4, 10


class Review(NamedTuple):
    """When (monotonic) it was looked at who may write to a target's memory; why it is left alone, or None."""

    at: float
    refusal: str | None


@dataclass
class Target:
    """A process with an agent in it.

    `regions`: [start, end) ranges whose writes are tracked; `spans`: ranges of merged
    memory whose pages may be merged again once they were written.  Locked memory is in
    neither; `known_locked_kib` is how much of it there was then.  `borders`: pages that
    are kept unmerged behind a run that ends inside an extent, watched like merged
    memory; `placeholders`: those of them that we mapped.  `tainted`: ranges whose
    tracking bits cannot be trusted until the next arm (something was moved there).
    `allowed`: what its user knows to do no harm.
    `calm_from`: when (of the monotonic clock) what was armed last and is unwritten counts as calm.
    `unwiped`: merged ranges that are being discarded and could not be replaced by zeros.
    `advice`: of the memory that is tracked or merged, see advice.py.  `references` tells which of its
    pages somebody else holds, where somebody may (pins.py); `reviewed` is None once it was armed anew.
    """

    id: int
    pid: int
    start_time: int
    name: str
    user: int
    link: Attachment
    pagemap: int
    memory: int
    maps: int
    regions: list[tuple[int, int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    known_locked_kib: int = 0
    runs: Runs = field(default_factory=Runs)
    borders: set[int] = field(default_factory=set)
    placeholders: set[int] = field(default_factory=set)
    tainted: list[tuple[int, int]] = field(default_factory=list)
    unwiped: list[tuple[int, int]] = field(default_factory=list)
    tethered: set[int] = field(default_factory=set)
    coredump_filter: int | None = None
    parked: Freeze | None = None
    pauses_us: list[int] = field(default_factory=list)
    closed: bool = False
    allowed: Allowed = NOTHING
    calm_from: float = 0.0
    advice: Advice = field(default_factory=Advice)
    references: PageReferences | Copies | None = None
    reviewed: Review | None = None

    @classmethod
    def open(cls, number: int, pid: int, link: Attachment) -> Target:
        """Open what a target needs; TargetGone, NotPermitted."""
        fds: list[int] = []
        try:
            stat = procfs.stat(pid)
            fds.append(pagemap.open_pagemap(pid))
            with procfs.errors_of(pid):
                fds.append(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
            fds.append(mappings.open_maps(pid))
        except (TargetGone, NotPermitted):
            for fd in fds:
                os.close(fd)
            raise
        return cls(number, pid, stat.start_time, stat.comm, procfs.user(pid), link, fds[0], fds[1], fds[2])

    def freeze(self) -> Freeze:
        """A freeze of this target, not begun."""
        return Freeze(self.pid, self.link.agent.tid or None, self.tethered)

    def has_agent(self) -> bool:
        """False once the process has exited or called exec: then all we know of it is void."""
        return not self.closed and self.link.agent.exists()

    def query(self, address: int) -> mappings.VmaQuery | None:
        """The VMA that covers `address`, or None."""
        return mappings.query_vma(self.maps, address, or_next=False)

    def held(self, start: int, pages: int) -> bytearray | None:
        """For each page from `start` whether somebody else holds it; None where nobody may."""
        return None if self.references is None else self.references.held(self.pagemap, start, pages)

    def is_own(self, start: int, end: int) -> bool:
        """True when the agent's code page or control block lies in [start, end)."""
        machine, block, code = arch.current(), self.link.agent.block, self.link.code
        own = ((block, block + machine.BLOCK_BYTES), (code, code + machine.CODE_BYTES))
        return any(start < high and low < end for low, high in own)

    def is_watched_behind(self, address: int) -> bool:
        """True when the page at `address` raises events: merged, or a border page."""
        return address in self.borders or self.runs.at(address) is not None

    def has_border_in(self, start: int, end: int) -> bool:
        """True when a border page lies in [start, end)."""
        if end - start == PAGE_SIZE:
            return start in self.borders
        if (end - start) // PAGE_SIZE <= len(self.borders):
            return any(page in self.borders for page in range(start, end, PAGE_SIZE))
        return any(start <= page < end for page in self.borders)

    # -- entries for the agent -------------------------------------------------

    def add_register(self, table: Table, start: int, length: int) -> int:
        """Watch [start, start + length), as far as it was mapped; linked.  The index of its result."""
        argument = self.link.agent.aux_address(table, uffd.register_argument(start, length))
        return table.add(
            arch.current().NR.IOCTL, self.link.agent_event, uffd.UFFDIO_REGISTER, argument, as_far=True
        )

    def add_unregister(
        self, table: Table, start: int, length: int, *, tracking: bool = False, linked: bool = False
    ) -> None:
        """Stop watching (or tracking) [start, start + length)."""
        argument = self.link.agent.aux_address(table, uffd.range_argument(start, length))
        fd = self.link.agent_track if tracking else self.link.agent_event
        table.add(arch.current().NR.IOCTL, fd, uffd.UFFDIO_UNREGISTER, argument, linked=linked)

    def add_border(self, table: Table, page: int) -> None:
        """Make the tracked page at `page` a border page."""
        self.add_unregister(table, page, PAGE_SIZE, tracking=True)
        self.add_register(table, page, PAGE_SIZE)

    def add_map_store(
        self,
        table: Table,
        start: int,
        length: int,
        prot: int,
        slot: int,
        *,
        merged: bool = False,
        joins: bool = False,
    ) -> int:
        """Replace [start, start + length) by the store from `slot` on; `add_register` must follow.

        What is `merged` there already is unwatched first, or mmap would wait for us.  With `joins` it
        belongs to the group of the entry before.  The index of its result.
        """
        if merged:
            self.add_unregister(table, start, length)
        return table.add(
            arch.current().NR.MMAP,
            start,
            length,
            prot,
            MAP_PRIVATE | MAP_FIXED,
            self.link.agent_store,
            slot * PAGE_SIZE,
            while_guarded=joins,
            after_success=merged,
        )

    def add_map_each(
        self, table: Table, starts: array[int], ends: array[int], slots: array[int], prot: int
    ) -> int:
        """Replace runs behind each other by the store, as one group; `add_register` must follow.

        The index of the first one's result.
        """
        return table.add_each(
            arch.current().NR.MMAP,
            starts,
            array("Q", map(operator.sub, ends, starts)),
            prot,
            MAP_PRIVATE | MAP_FIXED,
            self.link.agent_store,
            array("Q", [slot * PAGE_SIZE for slot in slots]),
        )

    def add_unforked(self, table: Table, start: int, length: int) -> None:
        """What was mapped within [start, start + length) is not inherited if what was there was not; linked.

        That must be one mapping of the target, or several alike.
        """
        if self.advice.at(start) & DONTFORK:
            table.add(arch.current().NR.MADVISE, start, length, MADV_DONTFORK, linked=True)

    def unbar(self, start: int, end: int) -> None:
        """Have touches of merged [start, end) wait no more (children.py); it stays watched.

        Done from outside.  Registering alone would change no mode.  OSError: it could not be watched again.
        """
        try:
            uffd.unregister(self.link.uffd_event, start, end - start)
        except OSError:
            return  # at vm.max_map_count: a part of a mapping, which was never barred
        uffd.register(self.link.uffd_event, start, end - start)

    def locked(self, start: int) -> bool:
        """True when the VMA that begins at `start` is locked; cheap where nothing is."""
        return bool(mappings.locked_kib(self.pid)) and "lo" in mappings.smaps_flags(self.pid).get(start, ())

    def add_map_zeros(self, table: Table, start: int, length: int, prot: int) -> int:
        """Replace merged [start, start + length) by fresh anonymous memory."""
        self.add_unregister(table, start, length)
        return table.add(
            arch.current().NR.MMAP,
            start,
            length,
            prot,
            MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS,
            -1,
            0,
            after_success=True,
        )

    def track(
        self, regions: list[tuple[int, int]], limits: list[tuple[int, int]] | None
    ) -> list[tuple[int, int]]:
        """Register plain anonymous memory for write tracking; the ranges that are tracked now.

        Merged memory (within `limits`) is noted as `spans`: it is watched, and its writes
        are tracked by that.
        """
        tracked = []
        borders = sorted(self.borders)  # as many as regions, where merged pages are scattered
        for start, end in regions:
            for low, high in self._unmerged(start, end, borders):
                try:
                    uffd.register(self.link.uffd_track, low, high - low)
                except OSError:
                    continue  # unmapped meanwhile, or another userfaultfd's
                tracked.append((low, high))
        self.regions = tracked
        self.spans = self._unlocked(self._merged_within(limits))
        return tracked

    def _unlocked(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """`ranges` (sorted, disjoint) without locked memory, of which there is `known_locked_kib` now."""
        self.known_locked_kib = mappings.locked_kib(self.pid)
        if not self.known_locked_kib:
            return ranges
        left = []
        locked = [entry.vma for entry in mappings.smaps(self.pid) if "lo" in entry.flags]
        for start, end in ranges:
            at = start
            for vma in locked:
                if vma.start < end and vma.end > at:
                    left.append((at, vma.start))
                    at = vma.end
            left.append((at, end))
        return [(low, high) for low, high in left if low < high]

    def _merged_within(self, limits: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
        """Stretches of merged memory inside `limits` (sorted, disjoint) where given."""
        joined = self.runs.stretches()
        if limits is None:
            return joined
        inner = [(-(-low // PAGE_SIZE) * PAGE_SIZE, high // PAGE_SIZE * PAGE_SIZE) for low, high in limits]
        return [
            (max(start, low), min(end, high))
            for start, end in joined
            for low, high in inner
            if max(start, low) < min(end, high)
        ]

    def _unmerged(self, start: int, end: int, borders: list[int]) -> list[tuple[int, int]]:
        """The parts of [start, end) without merged memory and `borders`, the border pages, ascending."""
        busy = [(run.start, run.end) for run in self.runs.overlapping(start, end)]
        within = borders[bisect.bisect_left(borders, start) : bisect.bisect_left(borders, end)]
        busy += [(page, page + PAGE_SIZE) for page in within]
        free, at = [], start
        for low, high in sorted(busy):
            if low > at:
                free.append((at, low))
            at = max(at, high)
        if at < end:
            free.append((at, end))
        return free

    # -- advice ------------------------------------------------------------------

    def note_advice(self, journal: Journal, advice: Advice) -> None:
        """From now on that is the advice on this memory."""
        if advice == self.advice:
            return
        self.advice = advice
        journal.append(ADVICE, self.id)
        for start, end, bits in advice:
            journal.append(ADVICE, self.id, start, end, bits)

    def learn_advice(self, journal: Journal, told: Iterable[Advised]) -> None:
        """Note what smaps has `told` of the target's own memory; of merged memory what was known stays.

        Merged memory may have been moved to a place that was told of.
        """
        merged = self.runs.stretches()
        self.note_advice(journal, Advice([*outside(told, merged), *self.advice.within(merged)]))

    # -- core dumps ------------------------------------------------------------

    def keep_in_core_dumps(self, journal: Journal) -> None:
        """Merged memory is private file memory, which core dumps leave out unless bit 2 is set."""
        if self.coredump_filter is not None:
            return
        try:
            with open(f"/proc/{self.pid}/coredump_filter") as file:
                self.coredump_filter = int(file.read(), 16)
        except (OSError, ValueError):
            return
        journal.append(COREDUMP, self.id, self.coredump_filter)
        set_coredump_filter(self.pid, self.coredump_filter | 4)

    def restore_core_dumps(self) -> None:
        """As it was before `keep_in_core_dumps`."""
        if self.coredump_filter is not None:
            set_coredump_filter(self.pid, self.coredump_filter)
        self.coredump_filter = None

    def close(self, *, but_event: bool = False) -> None:
        """Close every descriptor: the agent ends, the userfaultfds (`but_event`: one) let the memory go."""
        self.closed = True
        self.link.close(but_event=but_event)
        for fd in (self.pagemap, self.memory, self.maps):
            os.close(fd)


def set_coredump_filter(pid: int, value: int) -> None:
    """Write what core dumps of `pid` contain; one that is gone needs nothing."""
    try:
        with open(f"/proc/{pid}/coredump_filter", "w") as file:
            file.write(hex(value))
    except OSError:
        return


def protection(vma: mappings.VmaQuery) -> int:
    """PROT_* bits of a VMA (QUERY_READ, WRITE, EXEC are the same bits)."""
    return vma.flags & (PROT_READ | PROT_WRITE | PROT_EXEC)
