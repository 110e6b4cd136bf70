"""The stable and the unstable tree, as sorted columns.

The stable tree is what the store holds: the digest of every slot, as the guard
remembers it.  The unstable tree is the round's digests, sorted: built anew each
round.  Joining the two gives every page a content number; pages with the same
number are candidates for one slot, no more: only the guard compares bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpuksm import wire
from gpuksm.hashing.compiled import library
from gpuksm.hashing.sort import radix_sort
from gpuksm.scan.columns import COLUMN_KERNELS, I64, U64, among, ranges_within
from gpuksm.scan.nodes import apart

SLOTS_DTYPE = np.dtype([("first", "<u8"), ("slots", "<u4"), ("node", "<u4")])
assert SLOTS_DTYPE.itemsize == wire.SLOTS_RECORD.size

Sort = Callable[[U64], tuple[U64, NDArray[np.uint32]]]


@dataclass(frozen=True)
class StableTree:
    """The store's live slots in the order of their extents; all columns have one entry per slot.

    slot u8: absolute slot; digest u8, 0 where none is remembered (with `by_node` as
    `nodes.apart` has them); last bool: whether its extent ends here.
    """

    slot: U64
    digest: U64
    last: NDArray[np.bool_]

    @cached_property
    def ordered(self) -> U64:
        """Its digests, sorted."""
        return np.sort(self.digest)

    def holds_any(self, digest: U64) -> bool:
        """Whether any of `digest` is that of a slot; takes no longer for a large store."""
        return bool(among(self.ordered, digest).any())


def stable_tree(reply_extents: int, payload: bytes | bytearray, by_node: bool = False) -> StableTree:
    """Decode the reply to `slots`: extents x (first slot, slots, node + 1), then a digest per slot.

    With `by_node` slots equal pages of their own node only; those that were filled without a node
    equal none.  Raises ValueError when lengths do not add up.
    """
    words = np.frombuffer(payload, "<u8")
    extents = words[: 2 * reply_extents].view(SLOTS_DTYPE)
    digest = words[2 * reply_extents :].astype(np.uint64)
    counts = extents["slots"].astype(np.int64)
    if len(extents) != reply_extents or (counts < 1).any() or int(counts.sum()) != len(digest):
        raise ValueError("the guard's reply to 'slots' is not consistent")
    if by_node:
        digest = apart(digest, np.repeat(extents["node"], counts).astype(np.uint16))
    slot = np.repeat(extents["first"], counts).astype(np.uint64) + ranges_within(counts).astype(np.uint64)
    last = np.zeros(len(digest), np.bool_)
    last[np.cumsum(counts) - 1] = True
    return StableTree(slot, digest, last)


def no_stable_tree() -> StableTree:
    """The stable tree of an empty store."""
    return stable_tree(0, b"")


@dataclass(frozen=True)
class Contents:
    """Which pages and slots may be equal.

    page i8[pages]: content number of every page, -1 where it equals nothing
    else; slot i8[slots]: content number of every stable slot, -1 where no page
    of the round has it; repeats bool[contents]: some target has it twice;
    count: number of contents.
    """

    page: I64
    slot: I64
    repeats: NDArray[np.bool_]
    count: int


def join(digest: U64, target: NDArray[np.uint32], stable: StableTree, sort: Sort = radix_sort) -> Contents:
    """Number the contents of the pages with `digest` (any order; `target` tells whose they are).

    A content gets a number when two pages have it, or a page and a stable slot.
    """
    ordered, order = sort(digest)
    stable_ordered, stable_order = sort(stable.digest)
    page, slot = np.empty(len(digest), np.int64), np.empty(len(stable.digest), np.int64)
    repeats = np.empty(len(digest), np.bool_)
    # The sort is stable and pages come target by target: equal neighbours are of one target
    # exactly where a target has a content twice.
    count = library(COLUMN_KERNELS).number_contents(
        ordered, order, target, stable_ordered, stable_order, page, slot, repeats
    )
    return Contents(page, slot, repeats[:count].copy(), count)
