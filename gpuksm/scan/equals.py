"""Which pages may have an equal at all, told from their digests without sorting them.

Two bits for each of 8 to 16 times as many values as there are pages say which digests came once and which
came again.  A page whose digest came once has no equal; of the others a few have none either (one in 8
to 16), which a plan tells.  So most pages that are alone never get into the planner's columns, which
take some 40 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.scan.addresses import Mask
from gpuksm.scan.columns import COLUMN_KERNELS, I64, U64
from gpuksm.scan.state import KNOWN
from gpuksm.scan.tracker import Tracker, user_key
from gpuksm.scan.trees import StableTree

_LEAST_BITS = 12  # of a digest
_VALUES_PER_PAGE = 8


class Repeats:
    """What digests came more than once, of slots and of pages as they become known.

    `pages` is how many there will be of both, about: of more, more pass that have no equal.  Digests of
    pages of different users differ.
    """

    def __init__(self, pages: int, slots: U64) -> None:
        bits = max(_LEAST_BITS, (_VALUES_PER_PAGE * pages).bit_length())
        self._shift = 64 - bits
        self._once, self._twice = np.zeros((2, 1 << bits - 6), np.uint64)
        self.note(slots[slots != 0])

    def note(self, digest: U64) -> None:
        """More digests, as they are compared between users."""
        self._note(digest, np.full(len(digest), KNOWN, np.uint8), np.uint64(0))

    def hold(self, digest: U64) -> Mask:
        """For each of these digests, which were noted, whether it may have come more than once so far."""
        return self._find(digest, np.full(len(digest), KNOWN, np.uint8), np.uint64(0))

    def add(self, tracker: Tracker, first: int = 0, end: int | None = None) -> None:
        """The pages `first` to `end` - 1 of `tracker` that have a digest; a page may come only once."""
        columns, part = tracker.columns, slice(first, end)
        self._note(columns.digest[part], columns.state[part], user_key(tracker))

    def find(self, tracker: Tracker, first: int = 0, end: int | None = None) -> Mask:
        """For each of the pages `first` to `end` - 1 whether it is zeros or may have an equal so far.

        Never without a digest.
        """
        columns, part = tracker.columns, slice(first, end)
        found = self._find(columns.digest[part], columns.state[part], user_key(tracker))
        found |= columns.zeros(part)
        return found

    def candidates(self, tracker: Tracker, first: int = 0, end: int | None = None) -> I64:
        """Indices (of `first` to `end` - 1) of the candidates of `tracker` that may have an equal so far."""
        return np.flatnonzero(tracker.may_be_merged(first, end) & self.find(tracker, first, end)) + first

    def _find(self, digest: U64, state: NDArray[np.uint8], key: np.uint64) -> Mask:
        found = np.empty(len(digest), np.bool_)
        library(COLUMN_KERNELS).find_noted(digest, state, KNOWN, key, self._shift, self._twice, found)
        return found

    def _note(self, digest: U64, state: NDArray[np.uint8], key: np.uint64) -> None:
        note = library(COLUMN_KERNELS).note_digests
        note(digest, state, KNOWN, key, self._shift, self._once, self._twice)


def repeats_of(trackers: Sequence[Tracker], stable: StableTree) -> Repeats:
    """The digests of all pages of `trackers` that have one, and of all slots."""
    repeats = Repeats(sum(len(each.columns) for each in trackers) + len(stable.digest), stable.digest)
    for tracker in trackers:
        repeats.add(tracker)
    return repeats


def with_equals(trackers: Sequence[Tracker], stable: StableTree) -> list[Mask]:
    """For each tracker a bool column: the page has a digest, and is zeros or may equal another or a slot.

    Equal here means of equal digest, among pages of one user.
    """
    repeats = repeats_of(trackers, stable)
    return [repeats.find(tracker) for tracker in trackers]


def candidates_with_equals(trackers: Sequence[Tracker], repeats: Repeats) -> tuple[list[I64], list[int]]:
    """For each tracker the indices of its candidates that may have an equal, and how many have none."""
    some = [repeats.candidates(tracker) for tracker in trackers]
    left = [int(np.count_nonzero(tracker.may_be_merged())) for tracker in trackers]
    return some, [count - len(index) for count, index in zip(left, some, strict=True)]
