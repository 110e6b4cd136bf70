"""What equal address layouts would bring: pages that differ only in where they point.

Address randomisation moves whole areas of a process: the program, its heap, all
that mmap gave it, its stack.  Within an area places stay as they are.  So a word
that points into one of the process's mappings is replaced by its area and the
offset from the area's base, and the page is hashed anew; pages that are equal
then would be equal had the processes been started with one layout.  For
estimates only: nothing is ever merged by these digests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import KIND_UNREADABLE, KIND_ZERO, Hasher
from gpuksm.linux import mappings
from gpuksm.scan.columns import PAGE_BYTES, U64
from gpuksm.scan.nodes import apart, taken
from gpuksm.scan.planner import Plan
from gpuksm.scan.reader import LivePages
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.types import Progress

# No user address has these bits: what replaces a pointer never looks like one.
_TAG = 1 << 63
_AREA_SHIFT = 56
_PROGRAM, _HEAP, _STACK, _MMAP, _KERNEL = range(5)


class Areas:
    """The mappings of a process as columns, each with its area's tag and base."""

    def __init__(self, mappings: list[mappings.Vma]) -> None:
        mapped = [vma for vma in mappings if vma.path != "[vsyscall]"]
        program = next((vma.path for vma in mapped if vma.path.startswith("/")), "")
        stack = next((vma for vma in mapped if vma.path == "[stack]"), None)
        top = max((vma.end for vma in mapped if _given_by_mmap(vma, stack)), default=0)
        areas: list[int] = []
        bases = {_MMAP: top}
        end = 0
        for vma in mapped:
            area = _area_of(vma, program)
            if area == _MMAP and areas and areas[-1] == _PROGRAM and vma.start == end:
                area = _PROGRAM  # its zeroed data
            areas.append(area)
            end = vma.end
            # A stack hangs from its end, all else stands on its start.
            bases.setdefault(area, vma.end if area == _STACK else vma.start)
        self.starts = np.array([vma.start for vma in mapped], np.uint64)
        self.ends = np.array([vma.end for vma in mapped], np.uint64)
        self.tags = np.array([_TAG | area << _AREA_SHIFT for area in areas], np.uint64)
        self.bases = np.array([bases[area] for area in areas], np.uint64)


def _given_by_mmap(vma: mappings.Vma, stack: mappings.Vma | None) -> bool:
    return not vma.path.startswith("[v") and (stack is None or vma.end <= stack.start)


def _area_of(vma: mappings.Vma, program: str) -> int:
    if program and vma.path == program:
        return _PROGRAM
    if vma.path.startswith("[v"):
        return _KERNEL
    return {"[heap]": _HEAP, "[stack]": _STACK}.get(vma.path, _MMAP)


class RelocatedPages:
    """A `PageSource`: pages of one process, with pointers made comparable."""

    def __init__(self, pages: LivePages, areas: Areas) -> None:
        self._pages = pages
        self._areas = areas

    @property
    def pages(self) -> int:
        return self._pages.pages

    def read(self, first: int, count: int, out: NDArray[np.uint8], ok: NDArray[np.bool_]) -> None:
        """See `PageSource.read`."""
        relocate = library("gpuksm.scan._relocate_kernel").relocate

        self._pages.read(first, count, out, ok)
        areas = self._areas
        if len(areas.starts):
            words = out[: count * PAGE_BYTES].view(np.uint64)
            relocate(words, areas.starts, areas.ends, areas.tags, areas.bases)


def same_layout_pages(
    living: list[Tracker], plan: Plan, hasher: Hasher, batch_pages: int, progress: Progress
) -> int:
    """Pages that nothing equals now, and that could be saved if layouts were the same."""
    pages = plan.pages
    alone = _without_equal(pages.digest, hasher) & (pages.kind != KIND_ZERO)
    total = int(alone.sum())
    found: list[U64] = []
    done = 0
    for number, tracker in enumerate(living):
        try:
            areas = Areas(mappings.maps(tracker.pid))
        except (TargetGone, NotPermitted):
            continue
        index = np.flatnonzero(alone & (pages.target == number))
        for at in range(0, len(index), batch_pages):
            progress.update("same layout", done, total)
            part = index[at : at + batch_pages]
            part = part[_present(tracker, pages.address[part])]
            source = LivePages([(tracker.pid, pages.address[part])])
            digests, kinds = np.zeros(len(part), np.uint64), np.zeros(len(part), np.uint8)
            try:
                hasher.digest(RelocatedPages(source, areas), digests, kinds)
            finally:
                source.close()
            digests = apart(digests, taken(pages.node, part))
            found.append(digests[kinds != KIND_UNREADABLE])
            done += len(part)
    digests = np.concatenate([np.empty(0, np.uint64), *found])
    return len(digests) - len(np.unique(digests))


def _present(tracker: Tracker, address: U64) -> NDArray[np.bool_]:
    try:
        return tracker.map.exclusive(address)
    except TargetGone:
        return np.zeros(len(address), np.bool_)


def _without_equal(digest: U64, hasher: Hasher) -> NDArray[np.bool_]:
    """For each page whether no other has its digest."""
    ordered, order = hasher.sort(digest)
    differs = np.ones(len(ordered) + 1, np.bool_)
    differs[1:-1] = ordered[1:] != ordered[:-1]
    alone = np.empty(len(digest), np.bool_)
    alone[order] = differs[:-1] & differs[1:]
    return alone
