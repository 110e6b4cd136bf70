"""Loops over columns of pages, compiled: picking exclusive pages, addresses, digests, numbering contents.

What numpy would need several passes and temporary arrays for; see `page_map.py`, `addresses.py`, `state.py`,
`tracker.py` and `trees.py`.
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
_READ_ONLY_U8 = types.Array(types.uint8, 1, "C", readonly=True)
_READ_ONLY_U16 = types.Array(types.uint16, 1, "C", readonly=True)
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
        types.uint64[::1],
    )
)
def pick_stretches(
    entries: Any, shifts: Any, low: Any, high: Any, mask: Any, wanted: Any, starts: Any, ends: Any
) -> Any:
    """Find the stretches of pages in [low, high) whose entry & mask is `wanted`; returns how many there are.

    The entry of page number n of stretch i is entries[n - shifts[i]].  Sets starts[...] and ends[...],
    addresses, which have room for as many as there are pages.
    """
    count = 0
    for part in range(low.size):
        shift = np.uint64(shifts[part])
        within = False
        for page in range(low[part] >> _PAGE_SHIFT, high[part] >> _PAGE_SHIFT):
            if entries[page - shift] & mask == wanted:
                if not within:
                    within = True
                    if not count or ends[count - 1] != page << _PAGE_SHIFT:
                        starts[count] = page << _PAGE_SHIFT
                        count += 1
            elif within:
                within = False
                ends[count - 1] = page << _PAGE_SHIFT
        if within:
            ends[count - 1] = high[part]
    return count


@kernel(types.int64(_READ_ONLY_U64, _READ_ONLY_I64, _READ_ONLY_I64, types.uint64[::1]))
def fill_addresses(starts: Any, bounds: Any, index: Any, out: Any) -> Any:
    """Set out[...] to the addresses of the pages `index`; returns how many come before the first wrong one.

    Stretch i is the pages bounds[i] to bounds[i + 1] - 1, the first of which is at starts[i].
    """
    pages = bounds[bounds.size - 1]
    at = -1
    first = end = 0
    origin = np.uint64(0)
    for number in range(index.size):
        page = index[number]
        if page < first or page >= end:
            if page < 0 or page >= pages:
                return number
            at += 1
            # Mostly it is in the next stretch.
            if at >= starts.size or page < bounds[at] or page >= bounds[at + 1]:
                at, high = 0, starts.size
                while high - at > 1:
                    middle = (at + high) // 2
                    if bounds[middle] <= page:
                        at = middle
                    else:
                        high = middle
            first, end = bounds[at], bounds[at + 1]
            origin = starts[at] - (np.uint64(first) << _PAGE_SHIFT)
        out[number] = origin + (np.uint64(page) << _PAGE_SHIFT)
    return index.size


@kernel(
    types.void(
        _READ_ONLY_I64,
        _READ_ONLY_I64,
        _READ_ONLY_I64,
        _READ_ONLY_U64,
        _READ_ONLY_U8,
        _READ_ONLY_U16,
        types.uint64[::1],
        types.uint8[::1],
        types.uint16[::1],
        types.uint64,
        types.uint64,
        types.uint64,
    )
)
def carry_pages(
    source: Any,
    goal: Any,
    counts: Any,
    old_digest: Any,
    old_state: Any,
    old_node: Any,
    digest: Any,
    state: Any,
    node: Any,
    known: Any,
    kept: Any,
    more: Any,
) -> None:
    """Copy counts[i] pages from index source[i] of the old columns to goal[i] of the new ones.

    Their state becomes its bits `kept`, and `more`.  Only those with the bit `known` have a digest and
    a node; one of the columns of nodes may be empty.
    """
    by_node = old_node.size > 0 and node.size > 0
    for part in range(counts.size):
        for page in range(counts[part]):
            old, new = source[part] + page, goal[part] + page
            state[new] = (np.uint64(old_state[old]) & kept) | more
            if np.uint64(old_state[old]) & known:
                digest[new] = old_digest[old]
                if by_node:
                    node[new] = old_node[old]


@kernel(
    types.int64(_READ_ONLY_U64, _READ_ONLY_U8, types.uint64, types.uint64, _READ_ONLY_U64, types.uint8[::1])
)
def count_equal(digest: Any, state: Any, known: Any, key: Any, wanted: Any, marks: Any) -> Any:
    """How many of the digests are, changed by `key`, in `wanted`, which is sorted.

    Of pages whose state has the bit `known` alone.  `marks` is 1 at the lowest bits of each that is
    wanted: most digests need no more than a look there.
    """
    count = 0
    mask = np.uint64(MARKS - 1)
    for at in range(digest.size):
        mine = digest[at] ^ key
        if not marks[mine & mask] or not np.uint64(state[at]) & known:
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
    types.void(
        _READ_ONLY_U64,
        _READ_ONLY_U8,
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint64[::1],
        types.uint64[::1],
    )
)
def note_digests(digest: Any, state: Any, known: Any, key: Any, shift: Any, once: Any, twice: Any) -> None:
    """Set the bit that stands for each digest, changed by `key`, in `once`; in `twice` where it was set.

    The highest bits, from `shift` on, say which it is.  Of pages whose state has the bit `known` alone.
    """
    for at in range(digest.size):
        if np.uint64(state[at]) & known:
            place = (digest[at] ^ key) >> shift
            bit = np.uint64(1) << (place & np.uint64(63))
            word = place >> np.uint64(6)
            twice[word] |= once[word] & bit
            once[word] |= bit


@kernel(
    types.void(
        _READ_ONLY_U64,
        _READ_ONLY_U8,
        types.uint64,
        types.uint64,
        types.uint64,
        _READ_ONLY_U64,
        types.boolean[::1],
    )
)
def find_noted(digest: Any, state: Any, known: Any, key: Any, shift: Any, twice: Any, out: Any) -> None:
    """Set out[i]: whether the state of page i has the bit `known`, and its digest's bit is set in `twice`."""
    for at in range(digest.size):
        place = (digest[at] ^ key) >> shift
        here = twice[place >> np.uint64(6)] >> (place & np.uint64(63))
        out[at] = np.uint64(state[at]) & known != 0 and here & np.uint64(1) != 0


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
