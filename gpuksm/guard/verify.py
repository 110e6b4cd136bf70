"""Filling slots and comparing every page with its slot, byte for byte.

What must hold (docs/hazards.md, 13): no page is ever mapped to a slot whose bytes
were not compared with it here, after its last arming.  A page that is written
while or after it is read here is marked by the kernel and drops out at the
commit's validation, so torn reads harm nobody.  Targets run on meanwhile; they are
only read.

If we die here: slots may be filled that nobody maps; the next reclaim frees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from gpuksm.guard import faults
from gpuksm.guard.store import Store
from gpuksm.linux import vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import PageBuffer, equal, first_difference

CHUNK_PAGES = 128  # 512 KiB: both sides of a comparison stay in the second-level cache
_MAX_SEGMENTS = 512
# What was read of a target, and what it is compared with.
THEIRS, SLOTS, _ZEROS = PageBuffer(CHUNK_PAGES), PageBuffer(CHUNK_PAGES), PageBuffer(CHUNK_PAGES)


class Piece(NamedTuple):
    """Part of a plan record: `pages` at `addr`, equal to the store from `slot` on (None: all zeros)."""

    record: int
    addr: int
    pages: int
    slot: int | None

    @property
    def end(self) -> int:
        return self.addr + self.pages * PAGE_SIZE


def fill(store: Store, tid: int, addr: int, pages: int, slot: int, breathe: Callable[[], None]) -> int:
    """Copy `pages` at `addr` of the target into slots; how many could be read, from the front."""
    done = 0
    while done < pages:
        count = min(CHUNK_PAGES, pages - done)
        got = _read(tid, [(addr + done * PAGE_SIZE, count * PAGE_SIZE)]) // PAGE_SIZE
        if got:
            store.write(slot + done, [THEIRS.view[: got * PAGE_SIZE]])
        done += got
        if got < count:
            break
        breathe()
    return done


def fill_replica(store: Store, tid: int, addr: int, pages: int, slot: int) -> int:
    """Write `pages` copies of the page at `addr`; 0 when it could not be read."""
    if _read(tid, [(addr, PAGE_SIZE)]) != PAGE_SIZE:
        return 0
    page = THEIRS.view[:PAGE_SIZE]
    for done in range(0, pages, CHUNK_PAGES):
        store.write(slot + done, [page] * min(CHUNK_PAGES, pages - done))
    return pages


def verify(
    store: Store, tids: Mapping[int, int], wanted: Mapping[int, list[Piece]], breathe: Callable[[], None]
) -> dict[int, list[Piece] | None]:
    """The parts of `wanted` (pieces by target) whose every byte equals their slots, or is zero.

    `tids` are the threads through which each target is read; None for a target that is gone.
    Slots that several targets want are read once and compared with each while they
    are in the cache.
    """
    equal_parts: dict[int, list[Piece] | None] = {number: [] for number in wanted}
    for window in _windows(wanted):
        base, span = _extent_of(window)
        dense = span <= CHUNK_PAGES and span <= 2 * sum(
            piece.pages for pieces in window.values() for piece in pieces
        )
        if dense:
            store.read(base, SLOTS.view[: span * PAGE_SIZE])
        for number, pieces in window.items():
            found = equal_parts[number]
            if found is None:
                continue
            try:
                found.extend(_compare(store, tids[number], pieces, base if dense else None))
            except ProcessLookupError:
                equal_parts[number] = None
        breathe()
    return equal_parts


def _windows(wanted: Mapping[int, list[Piece]]) -> Iterator[dict[int, list[Piece]]]:
    """Pieces of all targets, cut and grouped by what slots they want; what must be zero comes apart."""
    windows: dict[int, dict[int, list[Piece]]] = {}
    for number, pieces in wanted.items():
        for group in _groups([piece for piece in pieces if piece.slot is None]):
            yield {number: group}
        for piece in sorted(pieces, key=lambda piece: piece.slot or 0):
            at = 0
            while piece.slot is not None and at < piece.pages:
                window, behind = divmod(piece.slot + at, CHUNK_PAGES)
                count = min(CHUNK_PAGES - behind, piece.pages - at)
                part = Piece(piece.record, piece.addr + at * PAGE_SIZE, count, piece.slot + at)
                windows.setdefault(window, {}).setdefault(number, []).append(part)
                at += count
    for window in sorted(windows):
        for number, pieces in windows[window].items():
            # A slot may be wanted more often than the buffers have room.
            whole = sum(piece.pages for piece in pieces) <= CHUNK_PAGES and len(pieces) <= _MAX_SEGMENTS
            if not whole:
                for group in _groups(pieces):
                    yield {number: group}
                windows[window][number] = []
        shared = {number: pieces for number, pieces in windows[window].items() if pieces}
        if shared:
            yield shared


def _extent_of(window: dict[int, list[Piece]]) -> tuple[int, int]:
    """(first slot, slots) that cover what `window` wants; (0, more than a buffer) for zeros."""
    slots = [
        (piece.slot, piece.pages) for pieces in window.values() for piece in pieces if piece.slot is not None
    ]
    if not slots:
        return 0, CHUNK_PAGES + 1
    base = min(slot for slot, _ in slots)
    return base, max(slot + pages for slot, pages in slots) - base


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces so that each group fits the buffers and one system call."""
    group: list[Piece] = []
    room = CHUNK_PAGES
    for piece in pieces:
        at = 0
        while at < piece.pages:
            count = min(room, piece.pages - at)
            slot = None if piece.slot is None else piece.slot + at
            group.append(Piece(piece.record, piece.addr + at * PAGE_SIZE, count, slot))
            at += count
            room -= count
            if not room or len(group) == _MAX_SEGMENTS:
                yield group
                group, room = [], CHUNK_PAGES
    if group:
        yield group


def _compare(store: Store, tid: int, group: list[Piece], base: int | None) -> Iterator[Piece]:
    """Equal parts of `group`; slots from `base` on are in the second buffer, None: they are to be read."""
    while group:
        got = _read(tid, [(piece.addr, piece.pages * PAGE_SIZE) for piece in group]) // PAGE_SIZE
        readable, rest = _readable(group, got)
        if base is None:
            _read_slots(store, readable)
        at = 0
        for part in _in_line(readable):
            pages = sum(piece.pages for piece in part)
            if part[0].slot is None:
                other = _ZEROS.address
            else:
                other = SLOTS.address + (at if base is None else part[0].slot - base) * PAGE_SIZE
            if equal(THEIRS.address + at * PAGE_SIZE, other, pages * PAGE_SIZE):
                yield from part
                at += pages
                continue
            for piece in part:
                yield from _equal_parts(piece, THEIRS.address + at * PAGE_SIZE, other)
                at, other = at + piece.pages, other + piece.pages * PAGE_SIZE
        # What could not be read is dropped with its page; the rest is tried again.
        group = rest


def _in_line(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces that follow each other in both buffers, to be compared at once."""
    line: list[Piece] = []
    for piece in pieces:
        last = line[-1] if line else None
        if last is not None and (
            (last.slot is None) != (piece.slot is None)
            or (last.slot is not None and last.slot + last.pages != piece.slot)
        ):
            yield line
            line = []
        line.append(piece)
    if line:
        yield line


def _readable(group: list[Piece], got: int) -> tuple[list[Piece], list[Piece]]:
    readable: list[Piece] = []
    for index, piece in enumerate(group):
        if piece.pages <= got:
            readable.append(piece)
            got -= piece.pages
            continue
        if got:
            readable.append(piece._replace(pages=got))
        left = piece.pages - got - 1
        rest = group[index + 1 :]
        if left:
            slot = None if piece.slot is None else piece.slot + got + 1
            rest = [Piece(piece.record, piece.addr + (got + 1) * PAGE_SIZE, left, slot), *rest]
        return readable, rest
    return readable, []


def _read(tid: int, remote: list[tuple[int, int]]) -> int:
    size = sum(length for _, length in remote)
    return bytes_read(lambda: vm.readv(tid, [(THEIRS.address, size)], remote))


def bytes_read(read: Callable[[], int]) -> int:
    """What `read`ing a target's memory gave; ProcessLookupError when it is gone."""
    try:
        return faults.read("memory-read", read())
    except OSError as error:
        if error.errno == 14:  # EFAULT: not even the first page
            return 0
        raise


def _read_slots(store: Store, pieces: list[Piece]) -> None:
    at, index = 0, 0
    while index < len(pieces):
        piece = pieces[index]
        count = piece.pages
        index += 1
        if piece.slot is not None:
            while index < len(pieces) and pieces[index].slot == piece.slot + count:
                count += pieces[index].pages
                index += 1
            store.read(piece.slot, SLOTS.view[at * PAGE_SIZE : (at + count) * PAGE_SIZE])
        at += count


def _equal_parts(piece: Piece, mine: int, other: int) -> Iterator[Piece]:
    """Runs of equal pages of `piece`, whose bytes are at `mine` and what they should be at `other`."""
    done = 0
    while done < piece.pages:
        behind = done * PAGE_SIZE
        same = first_difference(mine + behind, other + behind, piece.pages - done)
        if same:
            slot = None if piece.slot is None else piece.slot + done
            yield Piece(piece.record, piece.addr + done * PAGE_SIZE, same, slot)
        done += same + 1
