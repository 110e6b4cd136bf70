"""Chains: pages behind each other in a target, each with a slot of its own; and comparing them.

Where equal pages are scattered, a run is a page or a few, and there are tens of thousands of them.  They come
and are kept as columns, and Python does next to nothing for one of them: a chain is read, compared, mapped
(chain_commit.py) and entered as a whole.

What must hold is what verify.py says: no page is mapped to a slot whose bytes were not compared with it
here, after its last arming.  If we die here, nothing has happened.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gpuksm import wire
from gpuksm.guard.runs import marked
from gpuksm.guard.store import Store
from gpuksm.guard.verify import CHUNK_PAGES, SLOTS, THEIRS, bytes_read
from gpuksm.linux import vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import equal

_SLOT = (1 << wire.EACH_EXTENT_SHIFT) - 1
_EXTENT = (wire.EACH_NEW_EXTENT - 1) >> wire.EACH_EXTENT_SHIFT


@dataclass(frozen=True, slots=True)
class Columns:
    """Runs behind each other: addresses where they start and end, and their first slots."""

    starts: array[int]
    ends: array[int]
    slots: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def pages(self) -> int:
        return (self.ends[-1] - self.starts[0]) // PAGE_SIZE

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, slot) of each run."""
        return zip(self.starts, self.ends, self.slots, strict=True)

    def part(self, first: int, end: int) -> Columns:
        """The runs from index `first` to `end` - 1."""
        return Columns(self.starts[first:end], self.ends[first:end], self.slots[first:end])


class Chain(NamedTuple):
    """The pages from `addr` on of plan record `record`, equal to `slots` (u8), one each."""

    record: int
    addr: int
    slots: array[int]

    @property
    def end(self) -> int:
        return self.addr + len(self.slots) * PAGE_SIZE

    def runs(self) -> Columns:
        """Pages whose slots follow each other as one run each."""
        slots = self.slots
        heads = [0, *_breaks(slots)]
        starts = array("Q", [self.addr + head * PAGE_SIZE for head in heads])
        ends = starts[1:]
        ends.append(self.end)
        return Columns(starts, ends, array("Q", [slots[head] for head in heads]))

    def parts(self, chosen: bytearray) -> Iterator[Chain]:
        """The stretches of pages that are 1 in `chosen`."""
        for at, end in marked(chosen, 1):
            yield Chain(self.record, self.addr + at * PAGE_SIZE, self.slots[at:end])


def outside(slots: array[int], new: list[tuple[int, int]]) -> bool:
    """Whether any of `slots`, as a plan has them, lies outside of its `new` extents (slots, node)."""
    return any(
        each >> wire.EACH_EXTENT_SHIFT & _EXTENT >= len(new)
        or each & _SLOT >= new[each >> wire.EACH_EXTENT_SHIFT & _EXTENT][0]
        for each in slots
        if each & wire.EACH_NEW_EXTENT
    )


def resolved(slots: array[int], starts: list[int]) -> array[int]:
    """`slots`, as a plan has them, as slots of the store; `starts` are the first ones of its new extents."""
    return array(
        "Q",
        [
            starts[slot >> wire.EACH_EXTENT_SHIFT & _EXTENT] + (slot & _SLOT)
            if slot & wire.EACH_NEW_EXTENT
            else slot
            for slot in slots
        ],
    )


def allowed(
    store: Store, user: int, chain: Chain, skip: Callable[[str, int], None]
) -> tuple[array[int], array[int]]:
    """Pages of `chain`, counted from its first, that processes of `user` may map, and their slots, ascending.

    `skip` is told why others are left out, and how many.
    """
    by_slot = sorted(range(len(chain.slots)), key=chain.slots.__getitem__)
    slots = array("Q", [chain.slots[page] for page in by_slot])
    numbers, kept = array("I"), array("Q")
    for first, end in _allowed(store, user, slots, skip):
        numbers.extend(by_slot[first:end])
        kept.extend(slots[first:end])
    return numbers, kept


def compare(
    store: Store, tid: int, addr: int, numbers: array[int], slots: array[int], breathe: Callable[[], None]
) -> bytearray:
    """For each of the pages `numbers`, counted from `addr`, 1 where it equals its slot; slots ascend.

    `tid` is the thread through which the target is read.  Raises ProcessLookupError when it is gone.
    """
    same = bytearray()
    for low in range(0, len(numbers), CHUNK_PAGES):
        high = min(len(numbers), low + CHUNK_PAGES)
        same += _compare(store, tid, addr, numbers[low:high], slots[low:high])
        breathe()
    return same


def _allowed(
    store: Store, user: int, slots: array[int], skip: Callable[[str, int], None]
) -> Iterator[tuple[int, int]]:
    """Where in `slots`, ascending, those lie that processes of `user` may map, as far as each extent goes."""
    at = 0
    while at < len(slots):
        extent = store.extent_of(slots[at])
        if extent is None:
            skip("slot-freed", 1)  # its last mapping went after the plan was made
            at += 1
            continue
        end = bisect.bisect_left(slots, sum(extent), at)
        if store.user_of(slots[at]) == user:
            yield at, end
        else:
            skip("other-user", end - at)
        at = end


def _compare(store: Store, tid: int, addr: int, numbers: array[int], slots: array[int]) -> bytearray:
    """`compare` for a chunk at most."""
    _read_slots(store, slots)
    same = bytearray(len(numbers))
    done = 0
    while done < len(numbers):
        wanted = [addr + page * PAGE_SIZE for page in numbers[done:]]
        got = bytes_read(lambda wanted=wanted: vm.read_pages(tid, THEIRS.address, wanted)) // PAGE_SIZE  # type: ignore[misc]
        theirs, other = THEIRS.address, SLOTS.address + done * PAGE_SIZE
        if equal(theirs, other, got * PAGE_SIZE):
            same[done : done + got] = b"\1" * got
        else:
            for at in range(got):
                same[done + at] = equal(theirs + at * PAGE_SIZE, other + at * PAGE_SIZE, PAGE_SIZE)
        done += got + 1  # what cannot be read is passed over
    return same


def _read_slots(store: Store, slots: array[int]) -> None:
    """Read `slots`, ascending, into the buffer for them, those that follow each other at once."""
    breaks = _breaks(slots)
    for first, end in zip([0, *breaks], [*breaks, len(slots)], strict=True):
        store.read(slots[first], SLOTS.view[first * PAGE_SIZE : end * PAGE_SIZE])


def _breaks(slots: array[int]) -> list[int]:
    """Where a slot is not the one behind the slot before it."""
    return [at for at, (before, slot) in enumerate(itertools.pairwise(slots), 1) if slot - before != 1]
