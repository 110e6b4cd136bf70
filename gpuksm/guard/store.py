"""The store: one memfd of stable pages, shared by every merged mapping.

What must hold:
- Only the guard writes it; targets hold a read-only descriptor; its mode 0400
  keeps other users from reopening it for writing; it is sealed against
  shrinking and growing.
- An offset is used once and never again, so no stale mapping or digest can ever
  mean other content (offsets are free, the file is sparse).
- Behind every extent lies a hole that is never allocated: growing a merged
  mapping in place reads zeros (docs/hazards.md, 3).
- One store holds memory of one user's processes at a time: each of their agents
  holds a descriptor that reads all of it, and how fast a write to a page is would
  tell one process whether another has the same page.
- A slot is punched only when no mapping of it is left anywhere (reclaim.py).

An extent may belong to a NUMA node, written as node + 1 here (0: to none): its memory is then taken from
that node as long as there is some.  Wrong or missing, that costs time, never a byte.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence

from gpuksm.errors import FeatureMissing
from gpuksm.linux import numa
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import punch_hole

STORE_BYTES = 1 << 62
STORE_NAME = "gpuksm-store"
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_FAR_HOLE = 1 << 28  # pages: 1 TiB behind a large extent
_NEAR_HOLE = 1 << 18  # 1 GiB behind every other
_HUGE = 512  # pages of a huge page
_PUNCHED_SLOTS = 1 << 13  # at a time, some 3 ms
_HOLE_SLOTS = 16  # a hole takes as long as so many slots of it
_LARGE_EXTENT = _HUGE
NOBODY = (1 << 32) - 1  # the user of an extent that nothing fills
# Extents of one node this close to each other (pages: 64 GiB) share a policy, and what it costs to set it.
_TOGETHER = 1 << 24
_MOST_MAPPED = 1 << 34  # pages that are mapped at once to set a policy: half of an address space


def hole_behind(slots: int) -> int:
    """Pages never allocated behind an extent of `slots`.

    A mapping that grows in place shows what is behind its hole, so the hole has to be
    larger than a mapping of such a size grows.  The page cache index pays for it: an extent
    that shares no node of it with another takes about 1.2 KiB there (seen: 20 % of a
    single slot, 3 % of 8, 0.3 % of 64).
    """
    return _FAR_HOLE if slots >= _LARGE_EXTENT else _NEAR_HOLE


class Store:
    """The memfd and what is allocated in it; slots are page numbers in the file."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = _create() if fd is None else fd
        self.read_only = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.fd)
        self.device, self.inode = status.st_dev, status.st_ino
        self._starts: list[int] = []
        self._punched = 0  # slots, since others were served
        self._slots: list[int] = []
        self._digests: list[bytes] = []
        self._users: list[int] = []
        self._nodes: list[int] = []
        self.generation = 0  # goes up whenever what `extents` tells has changed
        self._next = _LARGE_EXTENT  # slot 0 is never used: offset 0 is what careless code maps

    def allocate(self, slots: int, user: int, page: int = 0, node: int = 0) -> int:
        """First slot of a new extent for processes of `user`; its digests are all unknown (0).

        `place` has to follow where it belongs to a `node`.

        A large one is congruent, by huge pages, to the page number `page` that fills it: where
        shared memory gets huge pages, the run is then mapped by huge page table entries.
        """
        start = self._next
        if slots >= _HUGE:
            start += (page - start) % _HUGE
        self.adopt(start, slots, user, node)
        return start

    def adopt(self, start: int, slots: int, user: int, node: int = 0) -> None:
        """Note an extent that exists already (ledger replay)."""
        if (start + slots + _FAR_HOLE) * PAGE_SIZE >= STORE_BYTES:
            raise FeatureMissing(
                "the store's offsets are used up: run `gpuksm unmerge --all`, then scan again"
            )
        self.generation += 1
        self._starts.append(start)
        self._slots.append(slots)
        self._digests.append(bytes(8 * slots))
        self._users.append(user)
        self._nodes.append(node)
        # Alignment keeps index nodes shared.
        self._next = start + slots + hole_behind(slots)
        if slots >= _LARGE_EXTENT:
            self._next = -(-self._next // _LARGE_EXTENT) * _LARGE_EXTENT

    def place(self, starts: Iterable[int]) -> set[int]:
        """Have the memory of the new extents at `starts`, ascending, taken from their nodes.

        Returns the starts of those for which the kernel does not allow that.
        """
        refused: set[int] = set()
        group: list[int] = []
        for start in starts:
            node = self._nodes[self._index(start)]
            if group and (node != self._nodes[self._index(group[0])] or start - group[0] > _TOGETHER):
                refused.update(self._place_together(group))
                group = []
            if node:
                group.append(start)
        return refused.union(self._place_together(group))

    def _place_together(self, group: list[int]) -> list[int]:
        if not group:
            return []
        first, last = self._index(group[0]), self._index(group[-1])
        begin, end = _huge_floor(group[0]), -_huge_floor(-group[-1] - self._slots[last])
        try:
            numa.prefer(self.fd, begin * PAGE_SIZE, (end - begin) * PAGE_SIZE, self._nodes[first] - 1)
        except OSError:
            return group
        return []

    def _displace(self, begin: int, end: int) -> None:
        """No node any more for the slots [begin, end), all of them free: the kernel keeps nothing of it."""
        for at in range(begin, end, _MOST_MAPPED):
            with contextlib.suppress(OSError):
                numa.prefer(self.fd, at * PAGE_SIZE, min(_MOST_MAPPED, end - at) * PAGE_SIZE, None)

    @property
    def next_slot(self) -> int:
        """The first slot that no extent has had yet."""
        return self._next

    def reserve(self, next_slot: int) -> None:
        """Allocate nothing below `next_slot` (ledger replay)."""
        self._next = max(self._next, next_slot)

    def set_digests(self, start: int, first: int, digests: bytes) -> None:
        """Remember digests of the extent at `start` from its slot `first` on."""
        self.generation += 1
        index = self._index(start)
        old = self._digests[index]
        self._digests[index] = old[: first * 8] + digests + old[first * 8 + len(digests) :]

    def digests_of(self, start: int) -> bytes:
        return self._digests[self._index(start)]

    def extent_of(self, slot: int) -> tuple[int, int] | None:
        """(first slot, slots) of the live extent that holds `slot`."""
        index = bisect.bisect_right(self._starts, slot) - 1
        if index < 0 or slot >= self._starts[index] + self._slots[index]:
            return None
        return self._starts[index], self._slots[index]

    def user_of(self, slot: int) -> int | None:
        """The user whose processes may map `slot`; None for a slot of no live extent."""
        if self.extent_of(slot) is None:
            return None
        return self._users[bisect.bisect_right(self._starts, slot) - 1]

    def users(self) -> set[int]:
        """The users whose memory the store holds."""
        return set(self._users)

    def ends_at_hole(self, slot_end: int) -> bool:
        """True when slot `slot_end` - 1 is the last of its extent."""
        extent = self.extent_of(slot_end - 1)
        return extent is not None and extent[0] + extent[1] == slot_end

    def extents(self) -> list[tuple[int, int, bytes]]:
        """Every live extent: first slot, slots, digest column."""
        return list(zip(self._starts, self._slots, self._digests, strict=True))

    def owners(self) -> list[tuple[int, int, int, int]]:
        """Every live extent: first slot, slots, the user whose processes may map it, its node."""
        return list(zip(self._starts, self._slots, self._users, self._nodes, strict=True))

    def write(self, slot: int, data: Sequence[memoryview]) -> None:
        """Fill slots from `slot` on; raises OSError (ENOSPC) when memory is short."""
        want = sum(part.nbytes for part in data)
        if os.pwritev(self.fd, data, slot * PAGE_SIZE) != want:
            raise OSError(28, "the store could not be filled: out of memory")

    def read(self, slot: int, into: memoryview) -> None:
        """Read slots from `slot` on; holes read as zeros."""
        got = os.preadv(self.fd, [into], slot * PAGE_SIZE)
        if got != into.nbytes:
            raise OSError(5, "short read of the store")

    def trim(self, starts: Iterable[int]) -> None:
        """Give back what filling the extents at `starts` allocated around them.

        Where the kernel gives shared memory huge pages by itself, each small extent would take one.
        """
        for start in starts:
            index = self._index(start)
            end = start + self._slots[index]
            before = self._starts[index - 1] + self._slots[index - 1] if index else 0
            after = self._starts[index + 1] if index + 1 < len(self._starts) else end + _HUGE
            low, high = max(before, start // _HUGE * _HUGE), min(after, -(-end // _HUGE) * _HUGE)
            for first, last in ((low, start), (end, high)):
                if first < last:
                    punch_hole(self.fd, first * PAGE_SIZE, (last - first) * PAGE_SIZE)

    def free(self, mapped: Sequence[tuple[int, int]], breathe: Callable[[], None] = lambda: None) -> int:
        """Punch every allocated slot outside `mapped` (sorted, disjoint [start, end)); slots freed.

        That takes a while for many: `breathe` is called in between, which must allocate none.
        """
        freed = 0
        keep: list[tuple[int, int, bytes, int, int]] = []
        starts = [piece[0] for piece in mapped]
        placed: int | None = None  # from where on all that had a node is free
        for (start, slots, user, node), digests in zip(self.owners(), self._digests, strict=True):
            gaps = _gaps(start, start + slots, mapped, starts)
            if gaps == [(start, start + slots)]:
                self._punch(start, start + slots, breathe)
                freed += slots
                if node and placed is None:
                    placed = _huge_floor(start)
                continue
            if placed is not None:
                self._displace(placed, _huge_floor(start))
                placed = None
            for low, high in gaps:
                first, last = (low - start) * 8, (high - start) * 8
                if digests[first:last].count(0) == last - first:
                    continue  # punched before
                self._punch(low, high, breathe)
                digests = digests[:first] + bytes(last - first) + digests[last:]
                freed += high - low
            keep.append((start, slots, digests, user, node))
        if placed is not None:
            self._displace(placed, self._next)
        self._starts = [item[0] for item in keep]
        self._slots = [item[1] for item in keep]
        self._digests = [item[2] for item in keep]
        self._users = [item[3] for item in keep]
        self._nodes = [item[4] for item in keep]
        self.generation += bool(freed)
        return freed

    def _punch(self, start: int, end: int, breathe: Callable[[], None]) -> None:
        """Punch the slots [start, end)."""
        for at in range(start, end, _PUNCHED_SLOTS):
            slots = min(end - at, _PUNCHED_SLOTS)
            punch_hole(self.fd, at * PAGE_SIZE, slots * PAGE_SIZE)
            self._punched += slots + _HOLE_SLOTS
            if self._punched > _PUNCHED_SLOTS:
                self._punched = 0
                breathe()

    def used_bytes(self) -> int:
        """Bytes of memory (or swap) that the store really takes."""
        return os.fstat(self.fd).st_blocks * 512

    def slots(self) -> int:
        return sum(self._slots)

    def _index(self, start: int) -> int:
        index = bisect.bisect_left(self._starts, start)
        if index == len(self._starts) or self._starts[index] != start:
            raise KeyError(start)
        return index


def _huge_floor(slot: int) -> int:
    """The first slot of a huge page that has `slot`: the kernel looks there for the policy of all of it."""
    return slot // _HUGE * _HUGE


def _gaps(
    start: int, end: int, mapped: Sequence[tuple[int, int]], starts: Sequence[int]
) -> list[tuple[int, int]]:
    """Parts of [start, end) that no piece of `mapped` covers."""
    gaps = []
    at = start
    index = max(0, bisect.bisect_right(starts, start) - 1)
    while at < end and index < len(mapped):
        low, high = mapped[index]
        index += 1
        if high <= at:
            continue
        if low >= end:
            break
        if low > at:
            gaps.append((at, low))
        at = high
    if at < end:
        gaps.append((at, end))
    return gaps


def _create() -> int:
    fd = os.memfd_create(STORE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, STORE_BYTES)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        os.fchmod(fd, 0o400)
    except OSError as error:
        os.close(fd)
        raise FeatureMissing(
            f"cannot make the store ({error.strerror}); is there a file size limit (ulimit -f)?"
        ) from None
    return fd
