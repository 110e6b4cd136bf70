"""Events of merged memory: DONTNEED, munmap, mremap and fork, before they can do harm.

What must hold (docs/hazards.md 1, 2, 3, 5, 18):
- MADV_DONTNEED or MADV_FREE of merged memory reads zeros afterwards: the range is
  taken from the blocked thread's system call, mapped as zeros, and only then is
  the event read, which lets the thread go on.
- That also holds where the target can have no mapping more (vm.max_map_count) and zeros
  cannot be mapped: they are written into copies of the pages instead.  The call discards
  such copies, so this has to be after the event was read; every other thread is stopped
  before that, and the caller before it is back from its call.
- An event is read only when the call it belongs to was seen (callers.py).
- After munmap and mremap no run that ends inside its extent borders free space, and
  this too before the event is read: the thread could grow the run right after.
- After mremap nothing of the store shows in a grown tail, or in the old place
  after MREMAP_DONTUNMAP.
- A moved range never passes as "unwritten".

The target is frozen meanwhile, except for the threads that wait for us; they
stop as soon as their event was read.  Where all of them wait for us, in calls that
discard memory, that is as good as a freeze.

If we die: before an event is read, it waits for our successor (the keeper holds
the userfaultfd).  After zeros were mapped and before the event is read, the
successor finds nothing merged there and reads it.  At the limit of mappings, and only
there, something is left: between reading the event and writing zeros the range is in
the ledger, and shows old bytes until our successor has written them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from gpuksm.errors import TargetGone
from gpuksm.guard import arch, callers, faults
from gpuksm.guard.advice import calls_for
from gpuksm.guard.agent import Table
from gpuksm.guard.freeze import Freeze, FreezeFailed
from gpuksm.guard.journal import BORDER, DISCARD, Journal
from gpuksm.guard.restore import RestoreFailed, block_growth, fix_ends, is_loose
from gpuksm.guard.runs import Run
from gpuksm.guard.store import Store
from gpuksm.guard.target import MAP_FIXED, Target, protection
from gpuksm.linux import mappings, uffd
from gpuksm.linux._libc import PAGE_SIZE

_MREMAP_FIXED, MREMAP_DONTUNMAP = 2, 4
_CALLER_NS = 5_000_000_000  # for a caller to get from its event to its stop; microseconds of its own time
_ZEROS = bytes(64 * PAGE_SIZE)


class Host(Protocol):
    """What event handling needs of the guard."""

    store: Store
    journal: Journal
    event_counts: dict[str, int]

    def read_event(self, uffd_event: int, number: int, calls: Iterable[callers.Call]) -> uffd.Event | None:
        """The next event of target `number`, whose threads wait in `calls`."""

    def forked(self, parent: Target, uffd_event: int, freeze: Freeze, held: list[int]) -> None:
        """A fork event was read: `uffd_event` watches the child; one of the threads `held` forked."""


def pump(host: Host, target: Target, freeze: Freeze) -> None:
    """Handle the events that wait now; `freeze` has asked all threads to stop.

    An event is left for later while its caller is not seen waiting for us.  With a freeze
    that holds nobody (a debugger does, hazard 18) the thread whose event is read goes on at
    once.  Events are read oldest first.
    """
    while callers.readable(target.link.uffd_event):
        calls = callers.waiting_calls(target, freeze)
        if calls is None:
            return
        _forget_unwiped(host, target)
        for number, arguments in calls:
            _before_reading(host, target, number, arguments, freeze)
        if target.unwiped and not freeze.holds:
            return  # a debugger has the threads: nobody could be kept from reading what is not wiped yet
        if target.unwiped:
            callers.wait_for_others(target, freeze)
        held = list(freeze.waiting)
        faults.point("event-prepared")
        event = host.read_event(target.link.uffd_event, target.id, calls)
        if event is None:
            return
        _apply(host, target, event, freeze, held)
        if target.unwiped:
            faults.point("event-unwiped")
            _await_callers(target, freeze, held)
            wipe(host, target)


def serve_still(host: Host, target: Target) -> None:
    """Handle discarding calls while every thread of `target` waits for us: nothing has to be frozen then.

    Stops at whatever needs a freeze: a thread that is elsewhere, or another call.
    """
    while callers.readable(target.link.uffd_event):
        calls = callers.still_calls(target)
        if calls is None or not all(map(callers.discards, calls)):
            return
        _forget_unwiped(host, target)
        for call in calls:
            for start, end in callers.discarded(target.pid, call):
                zero(host, target, start, end)
        if target.unwiped:
            return
        faults.point("event-prepared")
        event = uffd.read_event(target.link.uffd_event)
        if event is not None:
            _apply(host, target, event, target.freeze(), [])


def _before_reading(
    host: Host, target: Target, number: int, arguments: tuple[int, ...], freeze: Freeze
) -> None:
    nr = arch.current().NR
    for start, end in callers.discarded(target.pid, (number, arguments)):
        zero(host, target, start, end)
    if number == nr.MREMAP:
        _moved(host, target, *arguments[:5])
        old, old_size, new_size, flags, fixed = arguments[:5]
        _unmapped(host, target, old, old + _round_up(old_size), freeze)
        if flags & _MREMAP_FIXED:
            _unmapped(host, target, fixed, fixed + _round_up(new_size), freeze)
    elif number == nr.MUNMAP or (number == nr.MMAP and arguments[3] & MAP_FIXED):
        _unmapped(host, target, arguments[0], arguments[0] + _round_up(arguments[1]), freeze)
    elif number == nr.BRK:
        start = _round_up(arguments[0])
        behind = mappings.query_vma(target.maps, start)
        _unmapped(host, target, start, behind.start if behind is not None else start + PAGE_SIZE, freeze)


def _unmapped(host: Host, target: Target, start: int, end: int, freeze: Freeze) -> None:
    """A call that unmaps within [start, end) is done and its caller waits: settle the ends it left.

    Only what really is unmapped leaves the ledger; the call may have failed half-way.
    """
    merged = target.runs.overlapping(start, end)
    gone = [stretch for run in merged for stretch in _absent(host, target, run)]
    borders = {page for page in target.borders if start <= page < end}
    if not gone and not borders:
        return
    for low, high in gone:
        target.runs.remove(low, high)
    # One that is still there is only no longer counted on: its run gives up one more page.
    target.borders -= borders
    ends = [start, *(low for low, _ in gone), *borders]
    loose = sorted({end for end in ends if is_loose(target, host.store, end)})
    if loose:
        _settle(host, target, loose, freeze)


def _settle(host: Host, target: Target, ends: list[int], freeze: Freeze) -> None:
    """Make growth of runs that end at `ends` safe while a caller waits; nothing is read before."""
    try:
        callers.wait_for_others(target, freeze)
        fix_ends(target, host.store, host.journal, ends)
    except (FreezeFailed, RestoreFailed):
        # A debugger holds the threads, or the target may not have a page more.
        for end in ends:
            block_growth(target, host.store, host.journal, end)


def _absent(host: Host, target: Target, run: Run) -> Iterator[tuple[int, int]]:
    """Parts of `run` where the store is not mapped any more."""
    at = run.start
    while at < run.end:
        vma = mappings.query_vma(target.maps, at)
        stop = min(run.end, _next_change(vma, at))
        if not _maps(host, vma, at, run.slot + (at - run.start) // PAGE_SIZE):
            yield at, stop
        at = stop


def zero(host: Host, target: Target, start: int, end: int) -> None:
    """Replace what is merged in [start, end) by fresh zero memory.

    What cannot be replaced stays merged and watched, and is noted as `target.unwiped`.
    """
    start &= ~(PAGE_SIZE - 1)
    end = (end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
    pieces = target.runs.overlapping(start, end)
    while pieces:
        table = Table()
        done: list[tuple[Run, int]] = []
        while pieces and table.room(9, 96):
            piece = pieces.pop(0)
            vma = target.query(piece.start)
            index = -1
            if vma is not None and vma.inode == host.store.inode:
                stop = min(piece.end, vma.end, target.advice.until(piece.start))
                if stop < piece.end:
                    pieces.insert(0, piece.cut(stop, piece.end))
                    piece = piece.cut(piece.start, stop)
                index = _add_zeros(target, table, piece.start, piece.end, vma)
                if piece.start == start and _left_end_is_inside(host, target, start):
                    target.add_register(table, piece.start, PAGE_SIZE)
                    target.borders.add(piece.start)
                    host.journal.append(BORDER, target.id, piece.start)
            done.append((piece, index))
        results = target.link.agent.perform(table)
        failed = [piece for piece, index in done if index >= 0 and results[index] != piece.start]
        zeroed = [piece for piece, _ in done if piece not in failed]
        for piece in zeroed:
            target.runs.remove(piece.start, piece.end)
        _let_go_of_ends(target, zeroed)
        if failed:
            _keep_watched(host, target, failed)


def _let_go_of_ends(target: Target, zeroed: Iterable[Run]) -> None:
    """Border pages behind runs that are zeros now are watched no longer: they would be for ever."""
    for page in {piece.end for piece in zeroed} & target.borders:
        if page not in target.placeholders and target.runs.at(page - PAGE_SIZE) is None:
            with contextlib.suppress(OSError):  # at vm.max_map_count: it stays one
                uffd.unregister(target.link.uffd_event, page, PAGE_SIZE)
                target.borders.discard(page)


def _add_zeros(target: Target, table: Table, start: int, end: int, vma: mappings.VmaQuery) -> int:
    """Replace [start, end), in the merged mapping `vma`, by zeros with its protection, lock and advice."""
    index = target.add_map_zeros(table, start, end - start, protection(vma))
    if target.locked(vma.start):
        table.add(arch.current().NR.MLOCK, start, end - start, linked=True)
    for call in calls_for(target.advice.at(start)):
        table.add(arch.current().NR.MADVISE, start, end - start, call, linked=True)
    return index


def _keep_watched(host: Host, target: Target, failed: list[Run]) -> None:
    """Pieces that could not be replaced by zeros: watched still, or again, and to be wiped."""
    table = Table()
    for piece in failed:
        target.borders.discard(piece.start)
        target.add_register(table, piece.start, piece.end - piece.start)
        if (piece.start, piece.end) not in target.unwiped:
            target.unwiped.append((piece.start, piece.end))
            host.journal.append(DISCARD, target.id, piece.start, piece.end)
    target.link.agent.perform(table)


def _await_callers(target: Target, freeze: Freeze, held: list[int]) -> None:
    """Wait until the thread whose event was just read has stopped, or waits with its next event.

    Reading has made it runnable, so that one that still waits is another.
    """
    deadline = time.monotonic_ns() + _CALLER_NS
    while time.monotonic_ns() < deadline:
        freeze.collect()
        if not any(tid in freeze.waiting and callers.runs(target.pid, tid) for tid in held):
            return
        time.sleep(0.0001)


def wipe(host: Host, target: Target) -> None:
    """Write zeros where they could not be mapped; no thread of the target runs."""
    for start, end in target.unwiped:
        for piece in target.runs.overlapping(start, end):
            _write_zeros(target, piece.start, piece.end)
    _forget_unwiped(host, target)


def _forget_unwiped(host: Host, target: Target) -> None:
    """Drop the notes of an attempt that is done or came to nothing: then its caller waits still."""
    if target.unwiped:
        target.unwiped.clear()
        host.journal.append(DISCARD, target.id)


def _write_zeros(target: Target, start: int, end: int) -> None:
    for at in range(start, end, len(_ZEROS)):
        size = min(len(_ZEROS), end - at)
        try:
            written = os.pwrite(target.memory, _ZEROS[:size], at)
        except OSError:
            written = 0
        if written != size:
            raise TargetGone(f"process {target.pid} has exited")


def _left_end_is_inside(host: Host, target: Target, end: int) -> bool:
    """True when a run would end at `end`, inside its extent."""
    before = target.runs.at(end - PAGE_SIZE)
    return before is not None and not host.store.ends_at_hole(before.cut(before.start, end).slot_end)


def _moved(
    host: Host, target: Target, old: int, old_size: int, new_size: int, flags: int, fixed: int
) -> None:
    """mremap has been done and its caller waits: cure tail and old place, follow it in the ledger."""
    old_end = old + _round_up(old_size)
    moved = target.runs.overlapping(old, old_end)
    if not moved:
        return
    new = fixed if flags & _MREMAP_FIXED else _find_moved(host, target, moved[0], old)
    if new is None:
        return
    keeps = bool(flags & MREMAP_DONTUNMAP)
    if new != old:
        kept = min(_round_up(old_size), _round_up(new_size))
        arrived = list(_arrived(host, target, moved, old, old + kept, new - old, keeps))
        _follow(host, target, arrived, new - old)
        if keeps:
            for piece in arrived:
                forget_store(host, target, piece.start, piece.end)
        if not arrived or arrived[-1].end != old_end:
            return
    tail, tail_end = new + _round_up(old_size), new + _round_up(new_size)
    if tail < tail_end:
        forget_store(host, target, tail, tail_end)


def _arrived(
    host: Host, target: Target, moved: list[Run], old: int, kept_end: int, delta: int, keeps: bool
) -> Iterator[Run]:
    """The parts of `moved`, by their old addresses, that are `delta` further on now.

    A call over several VMAs may fail after some have moved.  MREMAP_DONTUNMAP leaves
    them where they were too; of watched memory it moves none but the first.
    """
    first = mappings.query_vma(target.maps, old) if keeps else None
    for run in moved:
        at, end = run.start, min(run.end, kept_end)
        while at < end:
            slot = run.slot + (at - run.start) // PAGE_SIZE
            there = mappings.query_vma(target.maps, at + delta)
            here = mappings.query_vma(target.maps, at)
            stop = min(end, *(_next_change(vma, x) - x + at for vma, x in ((there, at + delta), (here, at))))
            left = not _maps(host, here, at, slot)
            if keeps:
                left = first is not None and first.start <= at < first.end
                stop = min(stop, first.end) if left and first is not None else stop
            if left and _maps(host, there, at + delta, slot):
                yield run.cut(at, stop)
            at = stop


def _maps(host: Host, vma: mappings.VmaQuery | None, at: int, slot: int) -> bool:
    """Whether `vma`, the first that ends behind `at`, maps `slot` of the store there."""
    if vma is None or vma.start > at or vma.inode != host.store.inode:
        return False
    return vma.offset + at - vma.start == slot * PAGE_SIZE


def _next_change(vma: mappings.VmaQuery | None, at: int) -> int:
    """Where something else begins behind `at`, `vma` being the first that ends behind it."""
    if vma is None:
        return 1 << 63
    return vma.end if vma.start <= at else vma.start


def _round_up(size: int) -> int:
    return (size + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def _find_moved(host: Host, target: Target, first: Run, old: int) -> int | None:
    """Where the range that began at `old` is now: the place that maps its slots and is not in the ledger."""
    offset = first.slot * PAGE_SIZE
    for vma in mappings.maps(target.pid, inode=host.store.inode):
        if not vma.offset <= offset < vma.offset + vma.end - vma.start:
            continue
        at = vma.start + offset - vma.offset
        if target.runs.at(at) is None:
            return at - (first.start - old)
    return None


def _follow(host: Host, target: Target, arrived: list[Run], delta: int) -> None:
    """Move runs and advice by `delta` in the ledger.  Border pages stay behind: ends are settled anew."""
    if not arrived:
        return
    there = [Run(run.start + delta, run.end + delta, run.slot) for run in arrived]
    for low, high, _ in (*arrived, *there):
        target.runs.remove(low, high)
        target.borders -= {page for page in target.borders if low <= page < high}
    moved = [(run.start, run.end) for run in arrived]
    target.note_advice(host.journal, target.advice.moved(moved, delta))
    for run in there:
        target.runs.add(run)
        target.tainted.append((run.start, run.end))


def _is_followed(target: Target, run: Run, delta: int) -> bool:
    """Whether the ledger has the slots of `run`, or the first of them, `delta` further on already."""
    there = target.runs.at(run.start + delta)
    return there is not None and there.slot + (run.start + delta - there.start) // PAGE_SIZE == run.slot


def forget_store(host: Host, target: Target, start: int, end: int) -> None:
    """Replace store mappings in [start, end), in the ledger or not, by zeros."""
    table = Table()
    mapped: list[tuple[int, Run]] = []
    at = start
    while at < end and table.room(7, 32):
        vma = mappings.query_vma(target.maps, at)
        if vma is None or vma.start >= end:
            break
        low, high = max(at, vma.start), min(end, vma.end)
        high = min(high, target.advice.until(low))
        if vma.inode == host.store.inode:
            piece = Run(low, high, (vma.offset + low - vma.start) // PAGE_SIZE)
            mapped.append((_add_zeros(target, table, low, high, vma), piece))
        at = high
    results = target.link.agent.perform(table)
    if target.runs.overlapping(start, end):
        target.runs.remove(start, end)
    failed = [piece for index, piece in mapped if results[index] != piece.start]
    if failed:
        _cover_with_zeros(target, failed)


def _cover_with_zeros(target: Target, failed: list[Run]) -> None:
    """Store mappings that could not be replaced after a call that is done: copies with zeros stay."""
    table = Table()
    for piece in failed:
        with contextlib.suppress(OSError):  # it is registered once more below
            target.unbar(piece.start, piece.end)  # or we could not write there
        _write_zeros(target, piece.start, piece.end)
        target.add_register(table, piece.start, piece.end - piece.start)
        target.runs.add(piece)
    target.link.agent.perform(table)


def _apply(host: Host, target: Target, event: uffd.Event, freeze: Freeze, held: list[int]) -> None:
    names = {uffd.EVENT_FORK: "fork", uffd.EVENT_REMAP: "remap", uffd.EVENT_REMOVE: "remove"}
    name = names.get(event.kind, "unmap")
    host.event_counts[name] = host.event_counts.get(name, 0) + 1
    if event.kind == uffd.EVENT_FORK:
        host.forked(target, event.a, freeze, held)
    elif event.kind == uffd.EVENT_REMOVE:
        # Zeroed already when the caller was seen waiting; if not, the freeze still holds it.
        zero(host, target, event.a, event.b)
    elif event.kind == uffd.EVENT_REMAP:
        old, new, size = event.a, event.b, event.c
        # What is at its new place in the ledger, too, shows zeros at the old one, which stayed mapped.
        runs = target.runs.overlapping(old, old + size)
        _follow(host, target, [run for run in runs if not _is_followed(target, run, new - old)], new - old)
        target.tainted.append((new, new + size))
        _settle(host, target, [old, new + size], freeze)
    elif event.kind == uffd.EVENT_UNMAP:
        # A move to a fixed place is told of before what it unmapped there: merged memory that
        # is there now has come since, and stays in the ledger.
        _unmapped(host, target, event.a, event.b, freeze)
        _settle(host, target, [event.a], freeze)
