"""Arming write tracking, which only the guard does.

What must hold (docs/hazards.md, 5): a commit can rely on "unwritten" meaning unwritten
since before its own comparison, because arming and commits are requests of one
single-threaded guard and nobody else arms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from gpuksm.guard.target import Target
from gpuksm.linux import pagemap, procfs

_ARM = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC

Region = tuple[int, int, int]


def arm(target: Target, breathe: Callable[[], None]) -> list[tuple[int, int]]:
    """Re-arm the regions of `target`; what had been written (or never armed) since the last time."""
    written: list[tuple[int, int]] = []
    target.tainted.clear()
    for start, end in target.regions:
        try:
            found = _arm(target, start, end)
        except PermissionError:
            # Part of the region is not tracked any more (unmapped, moved over): arm the rest piecewise.
            found = _arm_piecewise(target, start, end)
        written.extend((low, high) for low, high, _ in found)
        breathe()
    return written


def _arm(target: Target, start: int, end: int) -> list[Region]:
    return pagemap.scan(
        target.pagemap,
        start,
        end,
        mask=pagemap.PAGE_IS_WRITTEN | pagemap.PAGE_IS_WPALLOWED,
        ret=pagemap.PAGE_IS_WRITTEN,
        flags=_ARM,
    )


def _arm_piecewise(target: Target, start: int, end: int) -> list[Region]:
    found: list[Region] = []
    at = start
    while at < end:
        vma = procfs.query_vma(target.maps, at)
        if vma is None or vma.start >= end:
            break
        low, high = max(at, vma.start), min(end, vma.end)
        with contextlib.suppress(PermissionError):
            found += _arm(target, low, high)
        at = high
    return found
