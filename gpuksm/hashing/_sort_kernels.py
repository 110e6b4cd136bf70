"""Compiled inner loops of `gpuksm.hashing.sort`; the algorithm is told there.

Written for a short compilation as much as for speed: plain loops where a slice
assignment would cost a second each, and counters that the caller allocates.
Counters are uint32, so that numba sees indices that cannot be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from gpuksm.hashing._jit import kernel
from gpuksm.hashing.sort import LSD_BITS, PART_BITS

_READ_ONLY_KEYS = types.Array(types.uint64, 1, "C", readonly=True)
_KEYS = types.uint64[::1]
_ORDER = types.uint32[::1]
_COUNTS = types.uint32[::1]
_OFFSETS = types.int64[::1]

_ZERO, _ONE = np.uint64(0), np.uint64(1)  # uint64 with a plain 1 would become float64
_INSERTION_LIMIT = 32
_PART_BITS, _LSD_BITS = PART_BITS, LSD_BITS
_LSD_RADIX = 1 << _LSD_BITS
_LSD_COUNTS = np.uint64(1 << _PART_BITS)  # where the counters of `_lsd_sort` begin


@kernel(types.uint64(_READ_ONLY_KEYS))
def varying_bits(keys: Any) -> Any:
    """The bits in which any key differs from the first."""
    found = _ZERO
    if keys.size:
        first = keys[0]
        for key in keys:
            found |= key ^ first
    return found


@kernel(types.void(_READ_ONLY_KEYS, types.uint64, _COUNTS))
def histogram(keys: Any, shift: Any, counts: Any) -> None:
    """counts[d] = number of keys with digit d; a digit is (key >> shift) & (counts.size - 1)."""
    mask = np.uint64(counts.size - 1)
    for digit in range(counts.size):
        counts[digit] = 0
    for key in keys:
        counts[(key >> shift) & mask] += 1


@kernel(types.void(_READ_ONLY_KEYS, types.uint64, types.uint64, _COUNTS, _KEYS, _ORDER))
def scatter(keys: Any, base: Any, shift: Any, next_of: Any, out_keys: Any, out_order: Any) -> None:
    """Move keys[i], index base + i, to the place next_of[digit]++ of the output."""
    mask = np.uint64(next_of.size - 1)
    for at in range(np.uint64(keys.size)):
        key = keys[at]
        digit = (key >> shift) & mask
        place = next_of[digit]
        next_of[digit] = place + 1
        out_keys[place] = key
        out_order[place] = base + at


@kernel(types.void(_KEYS, _ORDER, _KEYS, _ORDER, types.uint64, types.uint64))
def _insertion_sort(keys: Any, order: Any, out_keys: Any, out_order: Any, low: Any, high: Any) -> None:
    """Stable sort of [low, high) into the output arrays."""
    for at in range(low, high):
        key, index = keys[at], order[at]
        place = np.uint64(at)
        while place > low and out_keys[place - _ONE] > key:
            out_keys[place] = out_keys[place - _ONE]
            out_order[place] = out_order[place - _ONE]
            place -= _ONE
        out_keys[place] = key
        out_order[place] = index


@kernel(
    types.void(
        _KEYS,
        _ORDER,
        _KEYS,
        _ORDER,
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint64,
        _COUNTS,
    )
)
def _digit_pass(
    keys: Any,
    order: Any,
    out_keys: Any,
    out_order: Any,
    low: Any,
    high: Any,
    shift: Any,
    mask: Any,
    first: Any,
    counts: Any,
) -> None:
    """Move the pairs [low, high) to the places counts[first + digit]++ of the output."""
    for at in range(low, high):
        key = keys[at]
        digit = first + ((key >> shift) & mask)
        place = counts[digit]
        counts[digit] = place + 1
        out_keys[place] = key
        out_order[place] = order[at]


@kernel(types.void(_COUNTS, types.uint64, types.uint64, types.uint64))
def _counts_to_places(counts: Any, first: Any, end: Any, place: Any) -> None:
    """Replace counts[first:end] by where each digit's pairs begin, the first of them at `place`."""
    for digit in range(first, end):
        count = counts[digit]
        counts[digit] = place
        place += count


@kernel(
    types.void(_KEYS, _ORDER, _KEYS, _ORDER, types.uint64, types.uint64, types.uint64, types.uint64, _COUNTS)
)
def _lsd_sort(
    keys: Any,
    order: Any,
    out_keys: Any,
    out_order: Any,
    low: Any,
    high: Any,
    bits: Any,
    first: Any,
    counts: Any,
) -> None:
    """Stable sort of [low, high) by the lowest `bits` bits into the output arrays; the input is scratch.

    Digits that are the same in every key cost no pass, so that long runs of
    one digest are only counted.  Uses counts[first:].
    """
    mask = np.uint64(_LSD_RADIX - 1)
    passes = (bits + np.uint64(_LSD_BITS - 1)) // np.uint64(_LSD_BITS)
    for slot in range(first, first + passes * np.uint64(_LSD_RADIX)):
        counts[slot] = 0
    for at in range(low, high):
        key = keys[at]
        for digit in range(passes):
            counts[
                first + digit * np.uint64(_LSD_RADIX) + ((key >> (digit * np.uint64(_LSD_BITS))) & mask)
            ] += 1
    in_output = False
    for digit in range(passes):
        shift = digit * np.uint64(_LSD_BITS)
        row = first + digit * np.uint64(_LSD_RADIX)
        if counts[row + ((keys[low] >> shift) & mask)] == high - low:
            continue
        _counts_to_places(counts, row, row + np.uint64(_LSD_RADIX), low)
        if in_output:
            _digit_pass(out_keys, out_order, keys, order, low, high, shift, mask, row, counts)
        else:
            _digit_pass(keys, order, out_keys, out_order, low, high, shift, mask, row, counts)
        in_output = not in_output
    if not in_output:
        for at in range(low, high):
            out_keys[at] = keys[at]
            out_order[at] = order[at]


@kernel(types.void(_KEYS, _ORDER, _KEYS, _ORDER, _COUNTS, types.uint64, _COUNTS))
def sort_buckets(
    keys: Any, order: Any, scratch_keys: Any, scratch_order: Any, bounds: Any, bits: Any, counts: Any
) -> None:
    """Stable sort of every bucket [bounds[b], bounds[b + 1]) in place by its lowest `bits` bits.

    One counting pass leaves a handful of keys to a part when they are random,
    and inserting those is quickest; parts that stay long are sorted by
    `_lsd_sort`.  The scratch has room for the longest bucket and stays in
    cache from one to the next; `counts` is uint32[SCRATCH_COUNTS].
    """
    for bucket in range(bounds.size - 1):
        mine = keys[bounds[bucket] : bounds[bucket + 1]]
        my_order = order[bounds[bucket] : bounds[bucket + 1]]
        size = np.uint64(mine.size)
        part_bits = _ZERO
        while part_bits < min(bits, np.uint64(_PART_BITS)) and size >> (part_bits + np.uint64(3)):
            part_bits += _ONE
        shift = bits - part_bits
        parts = _ONE << part_bits
        mask = parts - _ONE
        for part in range(parts):
            counts[part] = 0
        for key in mine:
            counts[(key >> shift) & mask] += 1
        _counts_to_places(counts, _ZERO, parts, _ZERO)
        _digit_pass(mine, my_order, scratch_keys, scratch_order, _ZERO, size, shift, mask, _ZERO, counts)
        start = _ZERO
        for part in range(parts):
            # The pass has moved counts[part] on to where the part ends.
            end = np.uint64(counts[part])
            if end - start <= _INSERTION_LIMIT:
                _insertion_sort(scratch_keys, scratch_order, mine, my_order, start, end)
            else:
                _lsd_sort(scratch_keys, scratch_order, mine, my_order, start, end, shift, _LSD_COUNTS, counts)
            start = end


@kernel(types.int64(_READ_ONLY_KEYS, _OFFSETS, _OFFSETS))
def equal_runs(keys: Any, starts: Any, lengths: Any) -> Any:
    """Fill in start and length of each run of two or more equal keys; returns how many there are."""
    found = 0
    at = 0
    while at < keys.size:
        end = at + 1
        while end < keys.size and keys[end] == keys[at]:
            end += 1
        if end - at > 1:
            starts[found] = at
            lengths[found] = end - at
            found += 1
        at = end
    return found


@kernel(types.void(_READ_ONLY_KEYS, _READ_ONLY_KEYS, _OFFSETS))
def merge_join(keys: Any, table: Any, found: Any) -> None:
    """found[i] = first index of keys[i] in `table`, or -1; both are sorted.

    Each search starts where the last one ended and doubles its stride, so that
    few keys in a long table cost few steps and many keys cost one pass.
    """
    low = 0  # every table entry before it is smaller than the key
    for at in range(keys.size):
        key = keys[at]
        stride = 1
        while low + stride <= table.size and table[low + stride - 1] < key:
            low += stride
            stride *= 2
        high = min(low + stride - 1, table.size)
        while low < high:
            middle = (low + high) // 2
            if table[middle] < key:
                low = middle + 1
            else:
                high = middle
        found[at] = low if low < table.size and table[low] == key else -1
