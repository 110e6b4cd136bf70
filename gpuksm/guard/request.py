"""What a commit request asks for: its payload taken apart and checked.

The plan comes from the scanner, which is not trusted: a plan of which any number is out of bounds is refused
as a whole, before anything is done.  Nothing here touches a target or the store.
"""

from __future__ import annotations

import itertools
from array import array
from typing import NamedTuple

from gpuksm import wire
from gpuksm.errors import UsageError
from gpuksm.guard import chains
from gpuksm.guard.chains import Chain
from gpuksm.linux import numa
from gpuksm.linux._libc import PAGE_SIZE

_MAX_PAGES = 1 << 20

FILLS = (wire.OP_FILL, wire.OP_FILL_REPLICA)
_REPLACES = (wire.OP_FILL, wire.OP_MAP, wire.OP_ZERO, wire.OP_MAP_EACH)


class Planned(NamedTuple):
    """One plan record with its slots resolved."""

    record: int
    op: int
    target: int
    addr: int
    pages: int
    slot: int
    extent: int | None
    digest: int
    column_at: int
    continued: bool = False

    @property
    def end(self) -> int:
        return self.addr + self.pages * PAGE_SIZE


def parse(
    extents: int, count: int, payload: bytes | bytearray
) -> tuple[list[tuple[int, int]], list[tuple[int, ...]], bytes]:
    """(slots and node of each extent, plan records, column); UsageError when it is malformed."""
    at = extents * wire.EXTENT_RECORD.size
    end = at + count * wire.PLAN_RECORD.size
    if not (0 <= extents <= _MAX_PAGES and 0 <= count <= 4 * _MAX_PAGES and end <= len(payload)):
        raise UsageError("malformed plan: extents and records do not fit the payload")
    if (len(payload) - end) % 8:
        raise UsageError("malformed plan: the column is no multiple of 8 bytes")
    new = [(slots, node) for slots, node, _ in wire.EXTENT_RECORD.iter_unpack(payload[:at])]
    if any(not 0 < slots <= _MAX_PAGES for slots, _ in new):
        raise UsageError("malformed plan: extent size out of range")
    if any(node > numa.MAX_NODES for _, node in new):
        raise UsageError("malformed plan: there is no such NUMA node")
    records = list(wire.PLAN_RECORD.iter_unpack(payload[at:end]))
    column = bytes(payload[end:])
    in_column = len(column) // 8
    for op, flags, _, _, addr, pages, extent, slot, _, column_at in records:
        if (
            not wire.OP_FILL <= op <= wire.OP_MAP_EACH
            or not 0 < pages <= _MAX_PAGES
            or not _in_memory(addr, pages)
        ):
            raise UsageError("malformed plan: record out of range")
        if op == wire.OP_MAP_EACH:
            in_column -= pages  # each has a part of its own
            if (
                in_column < 0
                or column_at + pages > len(column) // 8
                or chains.outside(_slots(column, column_at, pages), new)
            ):
                raise UsageError("malformed plan: slots outside the column or their extents")
        elif flags & wire.FLAG_NEW_EXTENT:
            if extent >= len(new) or slot + pages > new[extent][0]:
                raise UsageError("malformed plan: record outside its extent")
        elif op in FILLS:
            raise UsageError("malformed plan: only new extents are filled")
    _check_disjoint(records)
    return new, records, column


def _in_memory(addr: int, pages: int) -> bool:
    return addr % PAGE_SIZE == 0 and addr + pages * PAGE_SIZE < 1 << 64


def _slots(column: bytes, first: int, count: int) -> array[int]:
    slots = array("Q")
    slots.frombytes(column[first * 8 : (first + count) * 8])
    return slots


def _check_disjoint(records: list[tuple[int, ...]]) -> None:
    """No page is replaced twice; no slot is filled twice, or the second content showed where the first is."""
    filled = sorted((record[6], record[7], record[5]) for record in records if record[0] in FILLS)
    for (extent, slot, pages), (next_extent, next_slot, _) in itertools.pairwise(filled):
        if extent == next_extent and next_slot < slot + pages:
            raise UsageError("malformed plan: a slot is filled twice")
    replaced = sorted((record[3], record[4], record[5]) for record in records if record[0] in _REPLACES)
    for (target, addr, pages), (next_target, next_addr, _) in itertools.pairwise(replaced):
        if target == next_target and next_addr < addr + pages * PAGE_SIZE:
            raise UsageError("malformed plan: a page is in two records")


def resolve(
    records: list[tuple[int, ...]], starts: list[int], column: bytes
) -> tuple[list[Planned], list[tuple[int, Chain]]]:
    """The records with slots of the store; chains with their targets come apart."""
    planned: list[Planned] = []
    found: list[tuple[int, Chain]] = []
    for index, (op, flags, _, target, addr, pages, extent, slot, digest, column_at) in enumerate(records):
        if op == wire.OP_MAP_EACH:
            slots = chains.resolved(_slots(column, column_at, pages), starts)
            found.append((target, Chain(index, addr, slots)))
            continue
        first = starts[extent] if flags & wire.FLAG_NEW_EXTENT else None
        planned.append(Planned(index, op, target, addr, pages, slot + (first or 0), first, digest, column_at))
    return planned, found
