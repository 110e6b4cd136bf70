"""Arming write tracking, which only the guard does.

What must hold (docs/hazards.md, 5): a commit can rely on "unwritten" meaning unwritten
since before its own comparison, because arming and commits are requests of one
single-threaded guard and nobody else arms.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from gpuksm import eligibility
from gpuksm.errors import TargetGone
from gpuksm.guard import advice
from gpuksm.guard.journal import Journal
from gpuksm.guard.target import Target
from gpuksm.linux import mappings, pagemap

_ARM = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC
_WRITTEN = pagemap.PAGE_IS_WRITTEN | pagemap.PAGE_IS_WPALLOWED
# Where there is no page there is nothing to track: arming it would fill page tables with markers.
_POPULATED = pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED

Range = tuple[int, int]


class Armed(NamedTuple):
    """What had been written (or never armed) since the last time; `changed` when a region is not
    tracked as a whole any more, so that attaching again may find more."""

    written: list[Range]
    changed: bool


def arm(target: Target, breathe: Callable[[], None], ranges: list[Range] | None = None) -> Armed:
    """Re-arm the regions of `target`, or those parts of them that lie in `ranges` (sorted, disjoint).

    Of merged memory only pages that the target has written, and so has copies of, are armed.
    """
    written: list[Range] = []
    changed = False
    target.reviewed = None  # whoever holds a page now may have written to it unseen
    target.tainted = [] if ranges is None else [piece for piece in target.tainted if not _held(piece, ranges)]
    parts = [(start, end, 0) for start, end in _within(target.regions, ranges)]
    parts += [(start, end, pagemap.PAGE_IS_FILE) for start, end in _within(target.spans, ranges)]
    for start, end, without in parts:
        try:
            for found in _arming(target, start, end, without):
                written += found
                _serve_others(target, breathe)
        except PermissionError:
            # Part of the region is not tracked any more (unmapped, moved over): arm the rest piecewise.
            written += _arm_piecewise(target, start, end, without)
            changed = True
    return Armed(sorted(written), changed)


def _serve_others(target: Target, breathe: Callable[[], None]) -> None:
    """In the midst of something long.  `target` may be gone then, and its descriptors be others'."""
    breathe()
    if target.closed:
        raise TargetGone(f"process {target.pid} has exited")


def _within(regions: list[Range], ranges: list[Range] | None) -> list[Range]:
    """The parts of `regions` inside `ranges`; both are sorted and disjoint."""
    if ranges is None:
        return regions
    parts: list[Range] = []
    at = 0
    for start, end in regions:
        while at < len(ranges) and ranges[at][1] <= start:
            at += 1
        for low, high in itertools.islice(ranges, at, None):
            if low >= end:
                break
            parts.append((max(start, low), min(end, high)))
    return parts


def _held(piece: Range, ranges: list[Range]) -> bool:
    return any(low <= piece[0] and piece[1] <= high for low, high in ranges)


def _arming(target: Target, start: int, end: int, without: int) -> Iterator[list[Range]]:
    """Arm [start, end) by and by; what each step found to be written, which the next would not find."""
    for found in pagemap.calls(
        target.pagemap,
        start,
        end,
        pagemap.Stride(),
        inverted=without,
        mask=_WRITTEN | without,
        anyof=_POPULATED,
        ret=pagemap.PAGE_IS_WRITTEN,
        flags=_ARM,
    ):
        yield [(low, high) for low, high, _ in found]


def _arm_piecewise(target: Target, start: int, end: int, without: int) -> list[Range]:
    found: list[Range] = []
    at = start
    while at < end:
        vma = mappings.query_vma(target.maps, at)
        if vma is None or vma.start >= end:
            break
        low, high = max(at, vma.start), min(end, vma.end)
        with contextlib.suppress(PermissionError):
            for more in _arming(target, low, high, without):
                found += more
        at = high
    return found


def begin(
    target: Target, journal: Journal, breathe: Callable[[], None], ranges: list[Range] | None
) -> tuple[list[eligibility.Region], dict[str, int]]:
    """Track what of `target` may be merged, within `ranges` if given; that, and pages left out by reason.

    TargetGone.
    """
    entries = mappings.smaps(target.pid, partial(_serve_others, target, breathe))
    regions, skipped = eligibility.regions(
        target.pid, ranges, tracked=True, allowed=target.allowed, entries=entries
    )
    regions = [region for region in regions if not target.is_own(region.start, region.end)]
    tracked = target.track([(region.start, region.end) for region in regions], eligibility.united(ranges))
    told = list(advice.told_by(entries))
    if any(bits & advice.DONTFORK and not target.is_own(start, end) for start, end, bits in told):
        # Now that it is tracked: what has come to lie there since the first look is not, and stays unmerged.
        # Nobody is served: what moves from here on corrects what is told.
        told = list(advice.told_by(mappings.smaps(target.pid)))
    target.learn_advice(journal, told)
    return _cut_regions(regions, tracked), skipped


def _cut_regions(regions: list[eligibility.Region], tracked: list[Range]) -> list[eligibility.Region]:
    """The tracked ranges with the protection of the region that holds them."""
    result, index = [], 0
    for low, high in tracked:
        while regions[index].end <= low:
            index += 1
        result.append(eligibility.Region(low, high, regions[index].prot))
    return result
