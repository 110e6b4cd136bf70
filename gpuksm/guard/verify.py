"""Filling slots and comparing every page with its slot, byte for byte.

What must hold (docs/hazards.md, 13): no page is ever mapped to a slot whose bytes
were not compared with it here, after its last arming.  A page that is written
while or after it is read here is marked by the kernel and drops out at the
commit's validation, so torn reads harm nobody.  Targets run on meanwhile; they are
only read.

If we die here: slots may be filled that nobody maps; the next reclaim frees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpuksm.guard.store import Store
from gpuksm.linux import vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import PageBuffer, equal, first_difference

CHUNK_PAGES = 256  # 1 MiB: both sides of a comparison stay in the second-level cache
_MAX_SEGMENTS = 512
_A, _B, _ZEROS = PageBuffer(CHUNK_PAGES), PageBuffer(CHUNK_PAGES), PageBuffer(CHUNK_PAGES)


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
            store.write(slot + done, [_A.view[: got * PAGE_SIZE]])
        done += got
        if got < count:
            break
        breathe()
    return done


def fill_replica(store: Store, tid: int, addr: int, pages: int, slot: int) -> int:
    """Write `pages` copies of the page at `addr`; 0 when it could not be read."""
    if _read(tid, [(addr, PAGE_SIZE)]) != PAGE_SIZE:
        return 0
    page = _A.view[:PAGE_SIZE]
    for done in range(0, pages, CHUNK_PAGES):
        store.write(slot + done, [page] * min(CHUNK_PAGES, pages - done))
    return pages


def verify(store: Store, tid: int, pieces: list[Piece], breathe: Callable[[], None]) -> Iterator[Piece]:
    """The parts of `pieces` whose every byte equals their slots (or is zero), in order."""
    for group in _groups(pieces):
        yield from _verify_group(store, tid, group)
        breathe()


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


def _verify_group(store: Store, tid: int, group: list[Piece]) -> Iterator[Piece]:
    while group:
        got = _read(tid, [(piece.addr, piece.pages * PAGE_SIZE) for piece in group]) // PAGE_SIZE
        readable, rest = _readable(group, got)
        _read_slots(store, readable)
        total = sum(piece.pages for piece in readable)
        if equal(_A.address, _B.address, total * PAGE_SIZE):
            yield from readable
        else:
            at = 0
            for piece in readable:
                yield from _equal_parts(piece, at)
                at += piece.pages
        # What could not be read is dropped with its page; the rest is tried again.
        group = rest


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
    try:
        return vm.readv(tid, [(_A.address, size)], remote)
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
        if piece.slot is None:
            _B.view[at * PAGE_SIZE : (at + count) * PAGE_SIZE] = _ZEROS.view[: count * PAGE_SIZE]
        else:
            while index < len(pieces) and pieces[index].slot == piece.slot + count:
                count += pieces[index].pages
                index += 1
            store.read(piece.slot, _B.view[at * PAGE_SIZE : (at + count) * PAGE_SIZE])
        at += count


def _equal_parts(piece: Piece, at: int) -> Iterator[Piece]:
    """Runs of equal pages of `piece`, whose bytes start at page `at` of both buffers."""
    done = 0
    while done < piece.pages:
        offset = (at + done) * PAGE_SIZE
        same = first_difference(_A.address + offset, _B.address + offset, piece.pages - done)
        if same:
            slot = None if piece.slot is None else piece.slot + done
            yield Piece(piece.record, piece.addr + done * PAGE_SIZE, same, slot)
        done += same + 1
