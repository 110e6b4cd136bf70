"""Giving merged pages back as private anonymous memory.

What must hold: after a restore the target reads exactly what it read before,
pages it had written since the merge included, with the same protection.  A page of its own that somebody
else holds (pins.py) stays where it is: what a device writes to it would be lost in a copy.

Done while the target is frozen, piece by piece: the agent maps fresh memory at a place
of our choice, we copy the piece's present content into it (through /proc/PID/mem, so
that PROT_NONE ranges can be read too), then the agent moves it over the piece in
one mremap.

If we die: before the move nothing has changed but that there may be a copy, of which the
journal tells our successor, having told it before there was one; the move itself is
linked to its unregistration, so the agent performs both or neither.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from gpuksm.errors import TargetGone
from gpuksm.guard import arch, faults, places
from gpuksm.guard.advice import DONTFORK, calls_for
from gpuksm.guard.agent import AgentStuck, Table
from gpuksm.guard.freeze import Freeze
from gpuksm.guard.journal import BORDER, COPY, Journal
from gpuksm.guard.pace import Pace
from gpuksm.guard.runs import Run, marked
from gpuksm.guard.store import Store
from gpuksm.guard.target import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    Target,
    protection,
)
from gpuksm.linux import mappings, vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import PageBuffer
from gpuksm.linux.page_references import HELD

_CHUNK_PAGES = 512
_LEAST_PAGES = 16  # fewer are left to the next pause, and so many are not what makes one long
_PAGE_US = 10.0  # what restoring a page takes, a first guess
_BUFFER = PageBuffer(_CHUNK_PAGES)
_MREMAP_MAYMOVE_FIXED = 3
_PLACES = 8  # that are tried

FrozenContext = Callable[[Target], AbstractContextManager[Freeze]]  # Guard.frozen


class RestoreFailed(Exception):
    """The target could not get fresh memory (limits); what is merged stays merged and right."""


class Held(RestoreFailed):
    """Somebody else holds pages of [start, end), and may write to them: they must stay where they are."""

    def __init__(self, target: Target, start: int, end: int) -> None:
        super().__init__(
            f"a device or the kernel may hold memory of process {target.pid} ({start:#x}: direct I/O, "
            "io_uring?); unmerge again when that is done"
        )
        self.start, self.end = start, end


def restore_piece(target: Target, journal: Journal, start: int, end: int, *, border: bool = False) -> None:
    """Make merged [start, end) (at most `_CHUNK_PAGES`) of a frozen target private again.

    It may be of several runs, and the target may have cut it into VMAs of different protection; each
    keeps its own, and its lock, unless the target could lock more than its limit allows (CAP_IPC_LOCK).
    With `border` its pages become border pages.  Raises RestoreFailed, TargetGone.
    """
    while start < end:
        vma = target.query(start)
        if vma is None:
            stop = start + PAGE_SIZE  # how long the hole is is not known, and what is behind it may be merged
            target.runs.remove(start, stop)
        elif not vma.inode:
            # In our books only: an error came between noting it and mapping it.
            stop = min(end, vma.end)
            target.runs.remove(start, stop)
            for page in range(start, stop if border else start, PAGE_SIZE):
                table = Table()
                target.add_border(table, page)
                target.link.agent.perform(table)
                target.borders.add(page)
                journal.append(BORDER, target.id, page)
        else:
            any_locked = mappings.locked_kib(target.pid) != 0
            locked = any_locked and target.locked(vma.start)
            stop = min(end, vma.end) if any_locked else _end_of_alike(target, vma, end)
            stop = min(stop, target.advice.until(start))
            _restore_part(target, journal, start, stop, protection(vma), locked, border)
        start = stop


def _end_of_alike(target: Target, vma: mappings.VmaQuery, end: int) -> int:
    """Where the merged memory ends that can be given back with that of `vma`, `end` at most."""
    at = vma.end
    while at < end:
        after = target.query(at)
        if after is None or after.inode != vma.inode or protection(after) != protection(vma):
            return at
        at = after.end
    return min(at, end)


def _restore_part(
    target: Target, journal: Journal, start: int, end: int, prot: int, locked: bool, border: bool
) -> None:
    """Restore [start, end), all of it of protection `prot`."""
    size = end - start
    _check_not_held(target, start, size)
    try:
        fresh = _map_copy(target, journal, start, size)
        _fill_copy(target, start, size, fresh, prot)
        _put_copy(target, start, size, fresh, locked, border)
        faults.point("restore-moved")
    finally:
        # As long as we live we know ourselves what has become of it.
        journal.append(COPY, target.id)
    target.runs.remove(start, end)
    if border:
        for page in range(start, end, PAGE_SIZE):
            target.borders.add(page)
            journal.append(BORDER, target.id, page)


def _check_not_held(target: Target, start: int, size: int) -> None:
    """Raise Held where somebody else holds pages of a piece (target frozen)."""
    found = target.held(start, size // PAGE_SIZE)
    if found is None or HELD not in found:
        return
    os.preadv(target.memory, [_BUFFER.view[:size]], start)  # what is swapped out comes back
    found = target.held(start, size // PAGE_SIZE)
    held = None if found is None else next(marked(found, HELD), None)
    if held is not None:
        raise Held(target, start + held[0] * PAGE_SIZE, start + held[1] * PAGE_SIZE)


def _map_copy(target: Target, journal: Journal, goal: int, size: int) -> int:
    """Map memory for a copy of what is at `goal`, noted before that; its address."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    for _ in range(_PLACES):
        place = target.link.copy_place or places.largest_gap(target.pid).place()
        journal.append(COPY, target.id, place, size, goal)
        faults.point("restore-noted")
        try:
            target.link.agent.call(arch.current().NR.MMAP, place, size, PROT_READ | PROT_WRITE, flags, -1, 0)
        except OSError as error:
            target.link.copy_place = 0
            if error.errno == errno.EEXIST:
                continue  # something has come to lie there
            raise RestoreFailed(f"process {target.pid} cannot map memory: {error}") from None
        faults.point("restore-mapped")
        target.link.copy_place = place
        return place
    raise RestoreFailed(f"process {target.pid} has no place for a copy of {size} bytes")


def _fill_copy(target: Target, start: int, size: int, fresh: int, prot: int) -> None:
    """Copy a piece's present content to `fresh`, made alike in the rest; it is unmapped when that fails."""
    agent, nr = target.link.agent, arch.current().NR
    try:
        _copy(target, start, fresh, size)
        faults.point("restore-copied")
        _advise(target, fresh, size, target.advice.at(start))
        if prot != PROT_READ | PROT_WRITE:
            agent.call(nr.MPROTECT, fresh, size, prot)
    except Exception:
        with contextlib.suppress(OSError, TargetGone, AgentStuck):
            agent.call(nr.MUNMAP, fresh, size)
        raise


def _advise(target: Target, start: int, size: int, bits: int) -> None:
    """Say again what was said of memory; only what a child would inherit has to be heard."""
    table = Table()
    for call in calls_for(bits):
        table.add(arch.current().NR.MADVISE, start, size, call)
    results = target.link.agent.perform(table)
    if bits & DONTFORK and results[0] != 0:
        raise RestoreFailed(f"process {target.pid} cannot keep {size} bytes from its children ({results[0]})")


def _put_copy(target: Target, start: int, size: int, fresh: int, locked: bool, border: bool) -> None:
    """Move the copy at `fresh` over a piece; RestoreFailed, with the piece as it was, when it cannot be."""
    agent, nr = target.link.agent, arch.current().NR
    table = Table()
    target.add_unregister(table, start, size)
    moved = table.add(nr.MREMAP, fresh, size, size, _MREMAP_MAYMOVE_FIXED, start, after_success=True)
    if locked:
        table.add(nr.MLOCK, start, size, linked=True)
    if border:
        target.add_register(table, start, size)
    result = agent.perform(table)[moved]
    if result != start:
        # A failed move leaves the merged piece mapped; watch it again, give the copy back.
        undo = Table()
        undo.add(nr.MUNMAP, fresh, size)
        target.add_register(undo, start, size)
        agent.perform(undo)
        raise RestoreFailed(f"process {target.pid} cannot move memory ({result})")


def drop_copy(target: Target, store: Store, journal: Journal, copy: tuple[int, int, int]) -> None:
    """Unmap the copy (start, size, where it was to go) that a dead guard was making (target frozen).

    As long as the store is mapped where it was to go, it has not been moved, and what lies at
    its start, if it is just of that size, is ours; otherwise it may be the target's by now.
    """
    start, size, goal = copy
    vma, there = target.query(goal), target.query(start)
    is_copy = there is not None and not there.inode and (there.start, there.end) == (start, start + size)
    if is_copy and vma is not None and vma.inode == store.inode:
        with contextlib.suppress(OSError):
            target.link.agent.call(arch.current().NR.MUNMAP, start, size)
    journal.append(COPY, target.id)


def _copy(target: Target, source: int, destination: int, size: int) -> None:
    view = _BUFFER.view[:size]
    got = faults.read("restore-read", os.preadv(target.memory, [view], source))
    if got != size:
        raise TargetGone(f"process {target.pid} has exited")
    vm.writev(target.link.agent.tid, [(_BUFFER.address, size)], [(destination, size)])


class _Unmerging:
    """How far the unmerging of a target has come; `held` tells of what was passed over.

    What is passed over stays merged: the page behind it becomes a border page, or growth would show other
    slots.
    """

    def __init__(self, target: Target, journal: Journal) -> None:
        self.target, self.journal = target, journal
        self.held: Held | None = None
        self._at = self._before = 0  # from where to go on, and up to where at first
        self._largest = _CHUNK_PAGES

    def next(self) -> tuple[int, int] | None:
        """Where the next piece lies, and how many pages it may have; None at the end."""
        stretch = self.target.runs.first_stretch(self._largest, self._at)
        if stretch is None:
            return None
        low, high = stretch
        if low < self._before < high:
            high = self._before
        return low, 1 if self._is_behind_held(low) else (high - low) // PAGE_SIZE

    def _is_behind_held(self, page: int) -> bool:
        return self.held is not None and page == self._at

    def restore(self, low: int, pages: int) -> None:
        """Make a piece private again, if that can be; else the next will be another."""
        border = self._is_behind_held(low)
        try:
            restore_piece(self.target, self.journal, low, low + pages * PAGE_SIZE, border=border)
        except Held as error:
            if error.start > low:
                self._before = error.start
            else:
                self.held, self._at = self.held or error, error.end
        except RestoreFailed:
            if pages == 1:
                raise
            self._largest = pages // 2  # RLIMIT_AS: the copy is address space, too, for a moment


def restore_all(
    target: Target, journal: Journal, frozen: FrozenContext, max_pause_us: int
) -> Iterator[tuple[int, int]]:
    """Unmerge a whole target in steps; of each the pages, and the microseconds for which it stood.

    What somebody holds is passed over; `Held` in the end.
    """
    work = _Unmerging(target, journal)
    # Half of the time is room for a page that takes longer than those before it.
    pace = Pace(aim=0.5, least_weight=_LEAST_PAGES * _PAGE_US / 2)
    while work.next() is not None:
        started = time.monotonic_ns()
        merged, tried = target.runs.pages, False
        with frozen(target) as freeze:
            stopped = time.monotonic_ns()
            end = stopped + pace.work_us(max_pause_us) * 1000
            while (piece := work.next()) is not None:
                low, most = piece
                left_us = max(0.0, (end - time.monotonic_ns()) / 1000)
                fitting, least = int(left_us / pace.ratio() / _PAGE_US), min(most, _LEAST_PAGES)
                if tried and fitting < least:
                    break
                tried = True
                length = min(most, max(least, fitting))
                began, before = time.monotonic_ns(), target.runs.pages
                work.restore(low, length)
                if before - target.runs.pages == length:
                    pace.learn_work(length * _PAGE_US, (time.monotonic_ns() - began) / 1000)
            if not target.runs.pages and target.placeholders:
                remove_placeholders(target)
            worked = time.monotonic_ns()
        pause_us = (freeze.thawed_ns - started) // 1000
        pace.learn_stop(pause_us - (worked - stopped) / 1000)
        yield merged - target.runs.pages, pause_us
    if work.held is not None:
        raise work.held


def is_loose(target: Target, store: Store, end: int) -> bool:
    """True when a run ends at `end` inside its extent and nothing watched lies behind it."""
    if target.is_watched_behind(end):
        return False
    run = target.runs.at(end - PAGE_SIZE)
    return run is not None and run.end == end and not store.ends_at_hole(run.slot_end)


def fix_ends(target: Target, store: Store, journal: Journal, ends: list[int]) -> None:
    """Make growth of runs that end at the addresses `ends` safe (docs/hazards.md, 3).

    A run that ends inside its extent, with nothing watched behind it, gives up its
    last page: it becomes a private border page.  The target must be frozen.  RestoreFailed in the end where
    that could not be done for some of them.
    """
    failed: RestoreFailed | None = None
    for end in ends:
        run = target.runs.at(end - PAGE_SIZE)
        if run is not None and is_loose(target, store, end):
            try:
                restore_piece(target, journal, end - PAGE_SIZE, end, border=True)
            except RestoreFailed as error:
                failed = failed or error
    if failed is not None:
        raise failed


def block_growth(target: Target, store: Store, journal: Journal, end: int) -> None:
    """Where `fix_ends` cannot be had: an inaccessible page behind the run, watched like a border page.

    Needs no stopped thread.  A call that grows the run then has to move it.  Where something of the target's
    own lies, growth is impossible as well; it is watched from then on, if it can be: it may be unmapped.
    """
    if not is_loose(target, store, end):
        return
    table = Table()
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    mapped = table.add(arch.current().NR.MMAP, end, PAGE_SIZE, 0, flags, -1, 0)
    target.add_register(table, end, PAGE_SIZE)
    results = target.link.agent.perform(table)
    if results[mapped] == end:
        target.placeholders.add(end)
    elif results[mapped + 1] != 0:
        table = Table()
        target.add_border(table, end)
        results = [0, target.link.agent.perform(table)[-1]]
    if results[-1] == 0:
        target.borders.add(end)
        journal.append(BORDER, target.id, end)


def remove_placeholders(target: Target) -> None:
    """Unmap what `block_growth` mapped, once nothing is merged any more (target frozen)."""
    for page in target.placeholders & target.borders:
        vma = target.query(page)
        if vma is not None and not vma.inode and not protection(vma):
            table = Table()
            target.add_unregister(table, page, PAGE_SIZE)  # or the agent would wait for us
            table.add(arch.current().NR.MUNMAP, page, PAGE_SIZE, after_success=True)
            target.link.agent.perform(table)
    target.placeholders.clear()


def fill_hole(target: Target, store: Store, run: Run, prot: int) -> None:
    """Map anonymous memory into an unmapped `run` and write its slots' bytes there (target frozen)."""
    agent, nr = target.link.agent, arch.current().NR
    size = run.end - run.start
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    for _ in range(100):
        try:
            agent.call(nr.MMAP, run.start, size, PROT_READ | PROT_WRITE, flags, -1, 0)
            break
        except OSError:
            time.sleep(0.01)  # the freeze is kept: a target without its memory must not run
    else:
        raise RestoreFailed(f"process {target.pid} cannot get back {size} bytes at {run.start:#x}")
    for done in range(0, run.pages, _CHUNK_PAGES):
        count = min(_CHUNK_PAGES, run.pages - done)
        store.read(run.slot + done, _BUFFER.view[: count * PAGE_SIZE])
        where = run.start + done * PAGE_SIZE
        vm.writev(agent.tid, [(_BUFFER.address, count * PAGE_SIZE)], [(where, count * PAGE_SIZE)])
    for low, high, bits in target.advice.within([(run.start, run.end)]):
        _advise(target, low, high - low, bits)
    if prot != PROT_READ | PROT_WRITE:
        agent.call(nr.MPROTECT, run.start, size, prot)
