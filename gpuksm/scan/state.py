"""What is known of each page of a target: its digest, and one byte of marks.

A scan holds this for every page that it looks at, so that it counts here: 9 bytes a page and the stretches
of addresses, and two more where nodes matter.  Marks are set and read through methods, and what they
return is a new column of the pages asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import KIND_ZERO
from gpuksm.scan.addresses import Addresses, Mask, Part
from gpuksm.scan.columns import COLUMN_KERNELS, I64, PAGE_BYTES, U64, count_pages, intersect
from gpuksm.scan.nodes import Nodes, no_nodes, taken

KIND = 3  # its bits are the page's kind, which means nothing without a digest
KNOWN, CALM, PLANNED = 4, 8, 16

_ALL = slice(None)


@dataclass(frozen=True)
class Columns:
    """Pages of one target, ascending: address, digest u8, state u1 (KIND, KNOWN, CALM, PLANNED), node u2.

    known: the digest holds; calm: the page was, when it was looked at last; planned: it is no candidate
    any more.  Pages that are not calm keep their place, as most come back: what was written costs no copy of
    all columns.  node: empty where nodes make no difference.
    """

    address: Addresses
    digest: U64
    state: NDArray[np.uint8]
    node: Nodes = field(default_factory=no_nodes)

    def __len__(self) -> int:
        return len(self.address)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.address.nbytes + self.digest.nbytes + self.state.nbytes + self.node.nbytes

    # -- what is marked, of the pages `part` --------------------------------------

    def marked(self, bits: int, wanted: int, part: Part = _ALL) -> Mask:
        """Whether of the marks `bits` exactly those of `wanted` are set."""
        found: Mask = (self.state[part] & np.uint8(bits)) == np.uint8(wanted)
        return found

    def known(self, part: Part = _ALL) -> Mask:
        """Whether the page has a digest."""
        return self.marked(KNOWN, KNOWN, part)

    def calm(self, part: Part = _ALL) -> Mask:
        """Whether the page was calm when it was looked at last."""
        return self.marked(CALM, CALM, part)

    def zeros(self, part: Part = _ALL) -> Mask:
        """Whether the page has a digest and holds nothing but zeros."""
        return self.marked(KNOWN | KIND, KNOWN | KIND_ZERO, part)

    def kind(self, part: Part = _ALL) -> NDArray[np.uint8]:
        """The kind of page, a KIND_ constant; means nothing of a page that has no digest."""
        found: NDArray[np.uint8] = self.state[part] & np.uint8(KIND)
        return found

    # -- marking ------------------------------------------------------------------

    def learn(self, index: I64, digest: U64, kind: NDArray[np.uint8], known: Mask) -> None:
        """Enter digest and kind of the pages `index`, for those that are `known`; the others have none."""
        self.digest[index] = digest
        state = self.state[index] & np.uint8(CALM | PLANNED)
        self.state[index] = state | (kind & np.uint8(KIND)) | known * np.uint8(KNOWN)

    def mark(self, bits: int, part: Part) -> None:
        """Set the marks `bits` of the pages `part`."""
        self.state[part] |= np.uint8(bits)

    def unmark(self, bits: int, part: Part) -> None:
        """Take the marks `bits` from the pages `part`."""
        self.state[part] &= np.uint8(~bits & 0xFF)

    # -- other pages --------------------------------------------------------------

    def keep(self, mask: Mask) -> Self:
        """The pages that `mask` holds true of; none is planned any more if that leaves any out."""
        if mask.all():
            return self
        state = self.state[mask] & np.uint8(~PLANNED & 0xFF)
        return type(self)(self.address.keep(mask), self.digest[mask], state, taken(self.node, mask))

    def joined(self, low: U64, high: U64, by_node: bool) -> Self:
        """These and all pages in the stretches [low, high), of which nothing is known but that they are calm.

        None is planned any more if that brings any in.
        """
        if self.address.count(low, high) == count_pages(low, high):
            return self
        address = self.address.joined(low, high)
        new = type(self)(address, *_nothing_known(len(address), by_node))
        _carry(self, new, KNOWN | KIND | CALM, 0)
        return new


def columns_of(address: Addresses, by_node: bool = False) -> Columns:
    """Columns of calm pages of which nothing is known."""
    return Columns(address, *_nothing_known(len(address), by_node))


def empty_columns() -> Columns:
    return columns_of(Addresses.of_pages(np.empty(0, np.uint64)))


def carry_over(old: Columns, address: Addresses, by_node: bool = False) -> Columns:
    """Columns for `address`, all calm, with the digests that `old` knows of the same pages."""
    new = columns_of(address, by_node)
    _carry(old, new, KNOWN | KIND, CALM)
    return new


def _nothing_known(count: int, by_node: bool) -> tuple[U64, NDArray[np.uint8], Nodes]:
    # The digests take memory only as they are entered, where the system gives fresh zeros.
    node = np.zeros(count, np.uint16) if by_node else no_nodes()
    return np.zeros(count, np.uint64), np.full(count, CALM, np.uint8), node


def _carry(old: Columns, new: Columns, kept: int, more: int) -> None:
    """Give pages of `new` that `old` has its digests, its marks `kept`, and the marks `more`."""
    if not len(old) or not len(new):
        return
    low, high = intersect(*old.address.stretches(), *new.address.stretches())
    counts = ((high - low) // np.uint64(PAGE_BYTES)).astype(np.int64)
    library(COLUMN_KERNELS).carry_pages(
        old.address.find(low),
        new.address.find(low),
        counts,
        old.digest,
        old.state,
        old.node,
        new.digest,
        new.state,
        new.node,
        KNOWN,
        kept,
        more,
    )
