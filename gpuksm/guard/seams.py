"""Long mappings are cut into parts where the kernel would walk over all of one in one go.

What a process has said of its memory is told by /proc/PID/smaps only, and to make the lines of a mapping
the kernel walks over all its pages, 9 ms a GiB, with the lock of the address space held: a thread that maps
or unmaps anything waits for that long (docs/hazards.md, 59).  Between two mappings the lock is free.  So
every second part of a long mapping is registered with the target's tracking userfaultfd before it is looked
at, which makes each part a mapping of its own.  Once all that is to be tracked is registered the kernel
joins them.

The same holds for its end: a userfaultfd that is closed has the kernel walk over all that is registered, in
one go and with the lock held for writing, 13 ms a GiB.  So that is unregistered part by part before.

What must hold: nothing is armed here, so that memory is written as before, and what is not tracked in the end
is registered no longer.  What was one mapping is one in what is told of it.  If we die, the keeper's copy of
the userfaultfd is closed by our successor when it leaves a process in which nothing is merged, and by the
kernel when the keeper dies too: registrations end with it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Sequence

from gpuksm.guard import faults
from gpuksm.guard.target import Target
from gpuksm.linux import mappings, procfs, uffd
from gpuksm.linux._libc import PAGE_SIZE

Range = tuple[int, int]

# Half a millisecond of looking.  A multiple of what a huge page maps, or that would be split.
PART_BYTES = 64 << 20
_MOST_PARTS = 4096
_TRACKED = frozenset({"uw"})


def cut(target: Target, room: int) -> list[Range]:
    """Register parts of the long mappings of `target`, which is not tracked yet; the parts, ascending.

    No more than `room` mappings are added.
    """
    resident = procfs.resident_size(target.pid) * PAGE_SIZE
    if resident < 2 * PART_BYTES:
        return []
    # Of a large reservation little is there: its parts may be longer.
    most = min(_MOST_PARTS, room, 4 * resident // PART_BYTES)
    long = [
        vma
        for vma in mappings.maps(target.pid, perms="..-p", inode=0)
        if vma.end - vma.start >= 2 * PART_BYTES and not vma.path.startswith("[stack")
    ]
    total = sum(vma.end - vma.start for vma in long)
    if most < 2 or not long:
        return []
    part = -(-max(PART_BYTES, total // most) // PART_BYTES) * PART_BYTES
    parts = []
    for vma in long:
        first = -(-vma.start // PART_BYTES) * PART_BYTES
        for low in range(first, vma.end - part, 2 * part):
            with contextlib.suppress(OSError):  # unmapped meanwhile, or another userfaultfd's
                uffd.register(target.link.uffd_track, low, part)
                parts.append((low, low + part))
    faults.point("seams-cut")
    return parts


def joined(entries: Iterable[mappings.SmapsVma], parts: Sequence[Range]) -> list[mappings.SmapsVma]:
    """`entries` with those put together that `cut` has made of one; pages that it registered are not told."""
    seams = {address for part in parts for address in part}
    result: list[mappings.SmapsVma] = []
    for entry in entries:
        last = result[-1] if result else None
        if last is not None and entry.vma.start in seams and _are_one(last, entry):
            result[-1] = mappings.SmapsVma(
                last.vma._replace(end=entry.vma.end),
                last.flags & entry.flags,
                last.rss + entry.rss,
                last.anonymous + entry.anonymous,
                last.hugetlb + entry.hugetlb,
                last.protection_key,
            )
        else:
            result.append(entry)
    return result


def _are_one(last: mappings.SmapsVma, entry: mappings.SmapsVma) -> bool:
    return (
        last.vma.end == entry.vma.start
        and last.vma[2:] == entry.vma[2:]
        and last.flags - _TRACKED == entry.flags - _TRACKED
        and last.protection_key == entry.protection_key
    )


def let_go(target: Target, parts: Iterable[Range]) -> None:
    """Unregister what of `parts` is not tracked."""
    tracked = iter(target.regions)
    region = next(tracked, None)
    for low, high in parts:
        at = low
        while region is not None and region[1] <= at:
            region = next(tracked, None)
        while at < high:
            if region is None or region[0] >= high:
                _unregister(target, at, high)
                break
            if at < region[0]:
                _unregister(target, at, region[0])
            at = region[1]
            if at < high:
                region = next(tracked, None)


def take_apart(target: Target, breathe: Callable[[], None] = lambda: None) -> None:
    """Track nothing of `target` any more, which is left; it may be gone after `breathe`."""
    for start, end in target.regions:
        for at in range(start, end, PART_BYTES):
            try:
                uffd.unregister(target.link.uffd_track, at, min(end - at, PART_BYTES))
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    return  # the process has gone, or can have no mapping more
            faults.point("seams-part")
            breathe()
            if target.closed:
                return
    target.regions = []


def _unregister(target: Target, low: int, high: int) -> None:
    with contextlib.suppress(OSError):  # unmapped meanwhile
        uffd.unregister(target.link.uffd_track, low, high - low)
