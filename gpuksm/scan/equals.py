"""Which pages have an equal at all, told from their digests without a copy of them.

Digests are compared in parts, by their highest bits: what a scan holds of each page for this is its
part's number and a mark, and all that a comparison takes (20 bytes a page) only for one part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.protocol import KIND_ZERO
from gpuksm.scan.columns import U64, among
from gpuksm.scan.tracker import Tracker, user_key
from gpuksm.scan.trees import Sort, StableTree

# More parts would save little memory, and each looks at all part numbers.
_PART_PAGES, _MOST_PART_BITS = 1 << 19, 4
_PIECE = 1 << 18

Mask = NDArray[np.bool_]


def with_equals(trackers: Sequence[Tracker], stable: StableTree, sort: Sort) -> list[Mask]:
    """For each tracker a bool column: the page has a digest, and is zeros or equals another or a slot.

    Equal here means of equal digest, among pages of one user.
    """
    if not trackers:
        return []
    found = [each.columns.known & (each.columns.kind == KIND_ZERO) for each in trackers]
    pages = sum(len(mask) for mask in found)
    bits = min(_MOST_PART_BITS, max(0, (pages // _PART_PAGES).bit_length()))
    parts = [_parts(tracker, bits) for tracker in trackers]
    for part in range(1 << bits):
        index = [
            np.flatnonzero(tracker.columns.known & (number == part))
            for tracker, number in zip(trackers, parts, strict=True)
        ]
        digest = np.concatenate(
            [
                tracker.columns.digest[chosen] ^ user_key(tracker)
                for tracker, chosen in zip(trackers, index, strict=True)
            ]
        )
        ordered, order = sort(digest)
        equal = np.empty(len(ordered), np.bool_)
        equal[order] = _repeated(ordered) | (among(stable.ordered, ordered) & (ordered != 0))
        at = 0
        for mask, chosen in zip(found, index, strict=True):
            mask[chosen] |= equal[at : at + len(chosen)]
            at += len(chosen)
    return found


def _parts(tracker: Tracker, bits: int) -> NDArray[np.uint8]:
    """The number of each page's part: the highest `bits` of what its digest is compared by."""
    digest, key = tracker.columns.digest, user_key(tracker)
    number = np.zeros(len(digest), np.uint8)
    for at in range(0, len(digest) if bits else 0, _PIECE):
        number[at : at + _PIECE] = (digest[at : at + _PIECE] ^ key) >> np.uint64(64 - bits)
    return number


def _repeated(ordered: U64) -> Mask:
    """For each of these sorted digests whether it is there more than once."""
    same = ordered[1:] == ordered[:-1]
    found = np.zeros(len(ordered), np.bool_)
    found[1:] = same
    found[:-1] |= same
    return found
