"""Which pages have an equal at all, told from their digests without a copy of them.

Digests are compared in parts, by their highest bits: what a scan holds of each page for this is its
part's number, which becomes a mark, and all that a comparison takes (some 40 bytes a page) only for one part
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuksm.scan.addresses import Mask
from gpuksm.scan.columns import I64, U64, among
from gpuksm.scan.tracker import Tracker, user_key
from gpuksm.scan.trees import Sort, StableTree

# More parts would save little memory, and each looks at all part numbers.
_PART_PAGES, _MOST_PART_BITS = 1 << 17, 4
_PIECE = 1 << 18
_NO_PART, _EQUAL = 255, 254  # instead of a part's number: has no digest; has an equal


def with_equals(trackers: Sequence[Tracker], stable: StableTree, sort: Sort) -> list[Mask]:
    """For each tracker a bool column: the page has a digest, and is zeros or equals another or a slot.

    Equal here means of equal digest, among pages of one user.
    """
    if not trackers:
        return []
    pages = sum(len(each.columns) for each in trackers)
    bits = min(_MOST_PART_BITS, max(0, (pages // _PART_PAGES).bit_length()))
    numbers = [_parts(tracker, bits) for tracker in trackers]
    for part in range(1 << bits):
        index = [np.flatnonzero(number == part) for number in numbers]
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
        for number, chosen in zip(numbers, index, strict=True):
            number[chosen[equal[at : at + len(chosen)]]] = _EQUAL
            at += len(chosen)
    return [_found(tracker, number) for tracker, number in zip(trackers, numbers, strict=True)]


def candidates_with_equals(
    trackers: Sequence[Tracker], stable: StableTree, sort: Sort
) -> tuple[list[I64], list[int]]:
    """For each tracker the indices of its candidates that have an equal, and how many have none."""
    some: list[I64] = []
    alone: list[int] = []
    for tracker, equal in zip(trackers, with_equals(trackers, stable, sort), strict=True):
        left = tracker.may_be_merged()
        some.append(np.flatnonzero(left & equal))
        alone.append(int(np.count_nonzero(left)) - len(some[-1]))
    return some, alone


def _parts(tracker: Tracker, bits: int) -> NDArray[np.uint8]:
    """The number of each page's part: the highest `bits` of what its digest is compared by."""
    columns, key = tracker.columns, user_key(tracker)
    number = np.zeros(len(columns), np.uint8)
    for at in range(0, len(columns), _PIECE):
        piece = slice(at, at + _PIECE)
        if bits:
            number[piece] = (columns.digest[piece] ^ key) >> np.uint64(64 - bits)
        number[piece][~columns.known(piece)] = _NO_PART
    return number


def _found(tracker: Tracker, number: NDArray[np.uint8]) -> Mask:
    """Of each page whether it is marked, or zeros; takes the place of `number`."""
    found = number.view(np.bool_)
    np.equal(number, _EQUAL, out=found)
    found |= tracker.columns.zeros()
    return found


def _repeated(ordered: U64) -> Mask:
    """For each of these sorted digests whether it is there more than once."""
    same = ordered[1:] == ordered[:-1]
    found = np.zeros(len(ordered), np.bool_)
    found[1:] = same
    found[:-1] |= same
    return found
