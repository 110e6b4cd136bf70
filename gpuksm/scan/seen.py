"""Digests of all contents that were seen: a sorted set that grows by little at a time.

What is new goes into a small set of its own, which joins the large one when it is no
longer small: so adding costs by what is added, not by what is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.scan.columns import U64, among

# The small set may have this share of the large one.
_SHARE = 8


class Seen:
    """A set of digests."""

    def __init__(self) -> None:
        self._large = self._small = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._large) + len(self._small)

    def replace(self, ordered: U64) -> None:
        """From now on it holds these, sorted; repetitions do no harm."""
        self._large, self._small = ordered, np.empty(0, np.uint64)

    def add(self, ordered: U64) -> None:
        """Add digests that it does not hold, sorted."""
        self._small = np.insert(self._small, np.searchsorted(self._small, ordered), ordered)
        if _SHARE * len(self._small) > len(self._large):
            at = np.searchsorted(self._large, self._small)
            self.replace(np.insert(self._large, at, self._small))

    def holds(self, ordered: U64) -> NDArray[np.bool_]:
        """For each digest whether it is one of them."""
        return among(self._large, ordered) | among(self._small, ordered)
