"""Sorting digests, finding equal ones, and joining them with a sorted table.

The sort is a stable radix sort of (digest, index) pairs.  The threads first
move slices of the input into buckets by the highest bits that differ, each
slice to its own places so that order is kept; then every bucket, small enough
for a core's L2 cache, is sorted by one thread.  Random digests need no more
than that; whatever the keys are, no step is worse than linear in their number
times the eight bytes of a digest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuksm.hashing.compiled import library
from gpuksm.hashing.crew import Crew, usable_cpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Buckets of about this many pairs: 12 bytes each, twice, fit an L2 cache.
BUCKET_PAIRS = 16384
MAX_BUCKET_BITS = 11
# Below this many pairs starting threads costs more than they bring.
SMALL_PAIRS = 65536
# Counters that sorting one bucket takes: a part's, and behind them eight passes' of 256.
PART_BITS, LSD_BITS = 11, 8
SCRATCH_COUNTS = (1 << PART_BITS) + 64 // LSD_BITS * (1 << LSD_BITS)
KERNELS = "gpuksm.hashing._sort_kernels"


def radix_sort(
    digests: NDArray[np.uint64], threads: int = 0
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """(sorted digests, order uint32) with sorted == digests[order]; stable.

    `threads` 0 means one for each CPU this process may use.  Raises ValueError
    for 2^32 digests or more.
    """
    kernels = library(KERNELS)

    keys = np.ascontiguousarray(digests, np.uint64)
    count = len(keys)
    if count >= 1 << 32:
        raise ValueError(f"{count} digests are too many for 32-bit indices")
    bits = int(kernels.varying_bits(keys)).bit_length()
    if count <= SMALL_PAIRS or bits == 0:
        sorted_keys, order = keys.copy(), np.arange(count, dtype=np.uint32)
        bounds = np.array([0, count], np.uint32)
        if bits:
            counts = np.empty(SCRATCH_COUNTS, np.uint32)
            kernels.sort_buckets(
                sorted_keys, order, np.empty_like(sorted_keys), np.empty_like(order), bounds, bits, counts
            )
        return sorted_keys, order
    crew = Crew(min(threads or usable_cpus(), -(-count // SMALL_PAIRS)))
    try:
        return _sort_in_buckets(keys, bits, crew)
    finally:
        crew.close()


def _sort_in_buckets(
    keys: NDArray[np.uint64], bits: int, crew: Crew
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    kernels = library(KERNELS)

    count, slices = len(keys), crew.threads
    bucket_bits = min(bits, MAX_BUCKET_BITS, max(1, (count // BUCKET_PAIRS).bit_length()))
    shift = bits - bucket_bits
    cuts = [count * at // slices for at in range(slices + 1)]
    counts = np.empty((slices, 1 << bucket_bits), np.uint32)

    def count_slice(_worker: int, at: int) -> None:
        kernels.histogram(keys[cuts[at] : cuts[at + 1]], shift, counts[at])

    crew.run(count_slice, slices)
    # Bucket by bucket and, within one, slice by slice: that keeps equal keys in order.
    ends = np.cumsum(counts.T.reshape(-1), dtype=np.int64).reshape(-1, slices).T
    next_of = (ends - counts).astype(np.uint32, order="C")
    bounds = np.append(next_of[0], np.uint32(count))

    sorted_keys, order = np.empty(count, np.uint64), np.empty(count, np.uint32)

    def scatter_slice(_worker: int, at: int) -> None:
        kernels.scatter(keys[cuts[at] : cuts[at + 1]], cuts[at], shift, next_of[at], sorted_keys, order)

    crew.run(scatter_slice, slices)
    if shift == 0:
        return sorted_keys, order
    longest = int((bounds[1:] - bounds[:-1]).max())
    scratch_keys, scratch_order = (
        np.empty((slices, longest), np.uint64),
        np.empty((slices, longest), np.uint32),
    )
    part_counts = np.empty((slices, SCRATCH_COUNTS), np.uint32)
    share = max(1, (1 << bucket_bits) // (slices * 16))

    def sort_share(worker: int, at: int) -> None:
        kernels.sort_buckets(
            sorted_keys,
            order,
            scratch_keys[worker],
            scratch_order[worker],
            bounds[at * share : (at + 1) * share + 1],
            shift,
            part_counts[worker],
        )

    crew.run(sort_share, -(-(1 << bucket_bits) // share))
    return sorted_keys, order


def group_bounds(sorted_digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts int64, lengths int64) of every run of two or more equal digests, in order."""
    kernels = library(KERNELS)

    keys = np.ascontiguousarray(sorted_digests, np.uint64)
    starts, lengths = np.empty(len(keys) // 2, np.int64), np.empty(len(keys) // 2, np.int64)
    found = kernels.equal_runs(keys, starts, lengths)
    return starts[:found].copy(), lengths[:found].copy()


def match_sorted(sorted_keys: NDArray[np.uint64], sorted_table: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each key the index of the first equal entry of the table, or -1; both sorted ascending."""
    kernels = library(KERNELS)

    found = np.empty(len(sorted_keys), np.int64)
    kernels.merge_join(
        np.ascontiguousarray(sorted_keys, np.uint64), np.ascontiguousarray(sorted_table, np.uint64), found
    )
    return found
