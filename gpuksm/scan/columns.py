"""Address columns: stretches of pages as (start, end) pairs, and pages one by one.

Stretches are uint64 arrays of equal length, page-aligned bytes, ascending and
disjoint; page columns are uint64 addresses, ascending.  All of it is vectorised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
COLUMN_KERNELS = "gpuksm.scan._column_kernels"  # for `gpuksm.hashing.compiled.library`
MARKS = 1 << 16  # of digests that are looked for: one for each value of their lowest bits
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def ranges_within(counts: I64) -> I64:
    """0 .. counts[0]-1, 0 .. counts[1]-1, ... in one int64 array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)


def pages_of(starts: U64, ends: U64) -> U64:
    """The address of every page in the stretches [starts, ends)."""
    counts = ((ends - starts) // PAGE_BYTES).astype(np.int64)
    return np.repeat(starts, counts) + ranges_within(counts).astype(np.uint64) * np.uint64(PAGE_BYTES)


def cut_stretches(starts: U64, ends: U64, pages: int) -> tuple[U64, U64]:
    """The same stretches in pieces of at most `pages`."""
    size = np.uint64(pages * PAGE_BYTES)
    if not len(starts) or int((ends - starts).max()) <= size:
        return starts, ends
    counts = -(-(ends - starts).astype(np.int64) // int(size))
    low = np.repeat(starts, counts) + ranges_within(counts).astype(np.uint64) * size
    return low, np.minimum(low + size, np.repeat(ends, counts))


def windows(starts: U64, ends: U64, gap: int, size: int) -> Iterator[tuple[int, int]]:
    """Groups first .. end-1 of stretches less than `gap` bytes apart, that begin within `size` bytes."""
    if not len(starts):
        return
    new = np.concatenate(([True], starts[1:] - ends[:-1] >= gap))
    group = starts[np.flatnonzero(new)][np.cumsum(new) - 1]
    part = (starts - group) // np.uint64(size)
    firsts = np.flatnonzero(np.concatenate(([True], (part[1:] != part[:-1]) | new[1:])))
    yield from itertools.pairwise([*firsts.tolist(), len(starts)])


def windows_of(starts: U64, ends: U64, pages: int) -> Iterator[tuple[U64, U64]]:
    """The same stretches in groups of `pages` pages, cut where a group ends; the last may be smaller."""
    counts = ((ends - starts) // PAGE_BYTES).astype(np.int64)
    first = np.cumsum(counts) - counts
    group = first // pages
    pieces = (first + counts - 1) // pages - group + 1
    number = np.repeat(group, pieces) + ranges_within(pieces)
    origin = np.repeat(starts, pieces) - np.repeat(first, pieces).astype(np.uint64) * np.uint64(PAGE_BYTES)
    begin = np.maximum(np.repeat(first, pieces), number * pages)
    end = np.minimum(np.repeat(first + counts, pieces), (number + 1) * pages)
    low = origin + begin.astype(np.uint64) * np.uint64(PAGE_BYTES)
    high = origin + end.astype(np.uint64) * np.uint64(PAGE_BYTES)
    cuts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    for at, stop in itertools.pairwise([*cuts, len(number)]):
        yield low[at:stop], high[at:stop]


def count_pages(starts: U64, ends: U64) -> int:
    """Pages in the stretches [starts, ends)."""
    return int((ends - starts).sum()) // PAGE_BYTES


def intersect(starts: U64, ends: U64, low: U64, high: U64) -> tuple[U64, U64]:
    """The parts of the stretches [starts, ends) that lie in the stretches [low, high)."""
    first = np.searchsorted(high, starts, "right")
    counts = np.maximum(np.searchsorted(low, ends, "left") - first, 0)
    of = np.repeat(np.arange(len(starts)), counts)
    region = np.repeat(first, counts) + ranges_within(counts)
    return np.maximum(starts[of], low[region]), np.minimum(ends[of], high[region])


def subtract(starts: U64, ends: U64, low: U64, high: U64) -> tuple[U64, U64]:
    """The parts of the stretches [starts, ends) that lie in no stretch [low, high)."""
    if not len(low) or not len(starts):
        return starts, ends
    last = np.uint64(2**64 - 1)
    first, end = intersect(starts, ends, np.append(np.uint64(0), high), np.append(low, last))
    some = first < end
    return first[some], end[some]


def inside(pages: U64, starts: U64, ends: U64) -> NDArray[np.bool_]:
    """For each page address whether it lies in one of the stretches [starts, ends)."""
    at = np.searchsorted(starts, pages, "right") - 1
    found = at >= 0
    found[found] = pages[found] < ends[at[found]]
    return found


def among(table: U64, values: U64) -> NDArray[np.bool_]:
    """For each of `values` whether it is in `table`, which is sorted."""
    at = np.searchsorted(table, values)
    found = at < len(table)
    found[found] = table[at[found]] == values[found]
    return found


def stretches_of(pages: U64) -> tuple[I64, I64]:
    """(index of the first page, number of pages) of every stretch of consecutive page addresses."""
    if not len(pages):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    breaks = np.flatnonzero(np.diff(pages) != PAGE_BYTES) + 1
    first = np.concatenate(([0], breaks)).astype(np.int64)
    return first, np.diff(np.append(first, len(pages)))


def heads(ordered: NDArray[Any]) -> I64:
    """Where each value of a column that ascends comes first (np.unique loads numpy.ma for that: 10 ms)."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
