"""Loops over columns of pages, compiled: picking exclusive pages, and numbering contents.

What numpy would need several passes and temporary arrays for; see `tracker.py` and `trees.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from gpuksm.hashing._jit import kernel
from gpuksm.scan.columns import MARKS

_PAGE_SHIFT = np.uint64(12)
_READ_ONLY_U64 = types.Array(types.uint64, 1, "C", readonly=True)
_READ_ONLY_I64 = types.Array(types.int64, 1, "C", readonly=True)
_READ_ONLY_U32 = types.Array(types.uint32, 1, "C", readonly=True)


@kernel(
    types.int64(
        _READ_ONLY_U64,
        _READ_ONLY_I64,
        _READ_ONLY_U64,
        _READ_ONLY_U64,
        types.uint64,
        types.uint64,
        types.uint64[::1],
        types.int64,
    )
)
def pick_entries(
    entries: Any, shifts: Any, low: Any, high: Any, mask: Any, wanted: Any, out: Any, count: Any
) -> Any:
    """Append to out[count:] the address of each page in [low, high) whose entry & mask is `wanted`.

    The entry of page number n of stretch i is entries[n - shifts[i]].  Returns the new count.
    """
    for part in range(low.size):
        shift = np.uint64(shifts[part])
        for page in range(low[part] >> _PAGE_SHIFT, high[part] >> _PAGE_SHIFT):
            if entries[page - shift] & mask == wanted:
                out[count] = page << _PAGE_SHIFT
                count += 1
    return count


@kernel(types.int64(_READ_ONLY_U64, types.boolean[::1], types.uint64, _READ_ONLY_U64, types.uint8[::1]))
def count_equal(digest: Any, known: Any, key: Any, wanted: Any, marks: Any) -> Any:
    """How many of the digests that are `known` are, changed by `key`, in `wanted`, which is sorted.

    `marks` is 1 at the lowest bits of each that is wanted: most digests need no more than a look there.
    """
    count = 0
    mask = np.uint64(MARKS - 1)
    for at in range(digest.size):
        mine = digest[at] ^ key
        if not marks[mine & mask] or not known[at]:
            continue
        low, high = 0, wanted.size
        while low < high:
            middle = (low + high) // 2
            if wanted[middle] < mine:
                low = middle + 1
            else:
                high = middle
        count += low < wanted.size and wanted[low] == mine
    return count


@kernel(
    types.int64(
        _READ_ONLY_U64,
        _READ_ONLY_U32,
        _READ_ONLY_U32,
        _READ_ONLY_U64,
        _READ_ONLY_U32,
        types.int64[::1],
        types.int64[::1],
        types.boolean[::1],
    )
)
def number_contents(
    ordered: Any,
    order: Any,
    target: Any,
    stable_ordered: Any,
    stable_order: Any,
    page: Any,
    slot: Any,
    repeats: Any,
) -> Any:
    """Number the digests that two pages have, or a page and a stable slot; returns how many there are.

    Both columns of digests are sorted, stably; `target` is that of each page.  Sets page[...] and
    slot[...] to the number or -1, and repeats[number] where one target has the digest twice.
    """
    count = 0
    stable = 0
    at = 0
    while at < ordered.size:
        digest = ordered[at]
        end = at + 1
        while end < ordered.size and ordered[end] == digest:
            end += 1
        while stable < stable_ordered.size and stable_ordered[stable] < digest:
            slot[stable_order[stable]] = -1
            stable += 1
        held = digest != 0 and stable < stable_ordered.size and stable_ordered[stable] == digest
        number = count if held or end - at > 1 else -1
        for index in range(at, end):
            page[order[index]] = number
        if number >= 0:
            again = False
            for index in range(at + 1, end):
                again |= target[order[index]] == target[order[index - 1]]
            repeats[number] = again
            count += 1
        while held and stable < stable_ordered.size and stable_ordered[stable] == digest:
            slot[stable_order[stable]] = number
            stable += 1
        at = end
    while stable < stable_ordered.size:
        slot[stable_order[stable]] = -1
        stable += 1
    return count
