"""Addresses of many pages, kept as stretches of pages that follow each other.

Where memory is dense that is next to nothing a page; where no page has a neighbour it is 16 bytes.
Addresses one by one are made when they are asked for, of those pages alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.scan.columns import COLUMN_KERNELS, I64, PAGE_BYTES, U64, ranges_within, stretches_of, subtract

_PAGE = np.uint64(PAGE_BYTES)
# A mask of all pages takes less memory than the indices of more than one page in so many.
_MASK_SHARE = 16

Mask = NDArray[np.bool_]
Part = I64 | slice | Mask


class Addresses:
    """Page addresses, ascending, without repetitions; not to be changed.

    starts u8: the first page of each stretch; bounds i8, one more: the index of that page among all
    pages, and at the end the number of pages.  No stretch follows right behind another.
    """

    def __init__(self, starts: U64, bounds: I64) -> None:
        self.starts = starts
        self.bounds = bounds

    @classmethod
    def of_pages(cls, pages: U64) -> Addresses:
        """The addresses `pages`, u8, ascending, without repetitions."""
        first, _ = stretches_of(pages)
        return cls(pages[first], np.append(first, np.int64(len(pages))))

    @classmethod
    def of_stretches(cls, low: U64, high: U64) -> Addresses:
        """All pages in the stretches [low, high), ascending and disjoint; empty ones do no harm."""
        some = low < high
        if not some.all():
            low, high = low[some], high[some]
        apart = low[1:] != high[:-1]
        if not apart.all():
            low, high = low[np.append(True, apart)], high[np.append(apart, True)]
        return cls(low, _bounds(((high - low) // _PAGE).astype(np.int64)))

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.starts.nbytes + self.bounds.nbytes

    def stretches(self) -> tuple[U64, U64]:
        """All pages as stretches [low, high)."""
        return self.starts, self.starts + np.diff(self.bounds).astype(np.uint64) * _PAGE

    def __getitem__(self, index: Part) -> U64:
        """The addresses of the pages `index`, u8."""
        if isinstance(index, slice):
            which: NDArray[Any] = np.arange(*index.indices(len(self)))
        else:
            which = np.flatnonzero(index) if index.dtype == np.bool_ else index
        out = np.empty(len(which), np.uint64)
        self.take(which, out)
        return out

    def take(self, index: I64, out: U64) -> None:
        """Set out[...] to the addresses of the pages `index`; quickest where they ascend.

        IndexError for a page that is not there, as all negative numbers are.
        """
        fill = library(COLUMN_KERNELS).fill_addresses
        if fill(self.starts, self.bounds, np.ascontiguousarray(index), out) < len(index):
            raise IndexError(f"an index beyond {len(self)} pages")

    def find(self, address: U64) -> I64:
        """How many pages lie below each `address`: the index of the page there, if it is one of these."""
        at = np.searchsorted(self.starts, address, "right") - 1
        found = np.zeros(len(at), np.int64)
        some = at >= 0
        at = at[some]
        pages = (address[some] - self.starts[at] + (_PAGE - np.uint64(1))) // _PAGE
        found[some] = np.minimum(self.bounds[at] + pages.astype(np.int64), self.bounds[at + 1])
        return found

    def count(self, low: U64, high: U64) -> int:
        """Pages in the stretches [low, high)."""
        return int((self.find(high) - self.find(low)).sum())

    def within(self, low: U64, high: U64) -> I64 | Mask:
        """Which pages lie in the stretches [low, high), ascending and disjoint.

        Their indices, ascending, or, where that takes less memory, a mask of all pages.
        """
        first = self.find(low)
        counts = self.find(high) - first
        if _MASK_SHARE * int(counts.sum()) > len(self):
            return self.covered(low, high)
        return np.repeat(first, counts) + ranges_within(counts)

    def covered(self, low: U64, high: U64) -> Mask:
        """For each page whether it lies in one of the stretches [low, high), ascending and disjoint."""
        first, end = self.find(low), self.find(high)
        some = first < end
        change = np.zeros(len(self) + 1, np.int8)
        change[first[some]] = 1
        change[end[some]] -= 1
        np.add.accumulate(change, dtype=np.int8, out=change)
        return change[:-1].view(np.bool_)

    def keep(self, mask: Mask) -> Addresses:
        """Those pages that `mask` holds true of."""
        first, end = mask.copy(), mask.copy()
        first[1:] &= ~mask[:-1]
        end[:-1] &= ~mask[1:]
        # Neighbours in the mask need not be neighbours in memory.
        if len(mask):
            first[self.bounds[:-1]] = mask[self.bounds[:-1]]
            end[self.bounds[1:] - 1] = mask[self.bounds[1:] - 1]
        begins = np.flatnonzero(first)
        return Addresses(self[begins], _bounds(np.flatnonzero(end) + 1 - begins))

    def joined(self, low: U64, high: U64) -> Addresses:
        """These, and all pages in the stretches [low, high), ascending and disjoint."""
        mine_low, mine_high = self.stretches()
        low, high = subtract(low, high, mine_low, mine_high)
        low, high = np.concatenate((mine_low, low)), np.concatenate((mine_high, high))
        order = np.argsort(low, kind="stable")
        return Addresses.of_stretches(low[order], high[order])


def _bounds(counts: I64) -> I64:
    """0, counts[0], counts[0] + counts[1], ..."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds
