"""Pages and runs of pages: the columns the planner's parts hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuksm.scan.columns import I64, U64, ranges_within
from gpuksm.scan.nodes import Nodes, no_nodes

KERNELS = "gpuksm.scan._layout_kernels"  # for `gpuksm.hashing.compiled.library`

# A VMA takes 192 bytes and its share of a maple tree node (/proc/slabinfo).
VMA_PAGES = 1 / 16
# What one mapping is worth when layouts are weighed: it also costs time at commit, fork and exit.
TRADE_PAGES = 1 / 4
MAX_COPIES = 512  # slots per content, as stable_node_dups of KSM
MAX_EXTENT_PAGES = 1 << 20  # 4 GiB: the guard carries out what is larger than its window in portions


@dataclass(frozen=True)
class Pages:
    """The round's candidates in order of target and address, one entry a page.

    target u4: index of the target; address u8; digest u8; kind u1; joins bool:
    the page follows its predecessor within one region; watched bool: right behind
    it lies memory that is merged already, so a run may end there at no cost; node u2: NUMA node + 1, 0 for
    zeros, empty where nodes make no difference.  Where it is not, the digests of nodes differ
    (`nodes.apart`), and no page joins one of another node.
    """

    target: NDArray[np.uint32]
    address: U64
    digest: U64
    kind: NDArray[np.uint8]
    joins: NDArray[np.bool_]
    watched: NDArray[np.bool_]
    node: Nodes = field(default_factory=no_nodes)


@dataclass(frozen=True)
class Runs:
    """Consecutive pages mapped to consecutive slots; columns of int64.

    first: index of the first page; pages; slot: dense slot number of the first.
    """

    first: I64
    pages: I64
    slot: I64

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: I64 | NDArray[np.bool_]) -> Runs:
        return Runs(self.first[index], self.pages[index], self.slot[index])


def followed(runs: Runs, joins: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each run whether another begins right behind it, in the same region."""
    begins = np.zeros(len(joins) + 1, np.bool_)
    begins[runs.first] = True
    begins[:-1] &= joins
    return np.asarray(begins[runs.first + runs.pages])


def ends_well(runs: Runs, pages: Pages) -> NDArray[np.bool_]:
    """For each run whether merged memory lies right behind it, or will."""
    return np.asarray(followed(runs, pages.joins) | pages.watched[runs.first + runs.pages - 1])


@dataclass
class Layout:
    """Slots by dense number: the stable tree's first, then replicas, then the rest.

    last bool: the slot's extent ends here; first_new: number of stable slots;
    first_cuttable: first slot behind the replicas.
    """

    last: NDArray[np.bool_]
    first_new: int
    first_cuttable: int


def stretches_in(member: NDArray[np.bool_], joined: NDArray[np.bool_]) -> Runs:
    """Runs of pages in `member`, broken where a page is not `joined` to its predecessor; slots are 0."""
    index = np.flatnonzero(member)
    starts = np.ones(len(index), np.bool_)
    starts[1:] = (np.diff(index) != 1) | ~joined[index[1:]]
    at = np.flatnonzero(starts)
    lengths = np.diff(np.append(at, len(index)))
    return Runs(index[at], lengths, np.zeros(len(at), np.int64))


def cut_long(runs: Runs) -> Runs:
    """The same runs in pieces of at most MAX_EXTENT_PAGES."""
    counts = -(-runs.pages // MAX_EXTENT_PAGES)
    within = ranges_within(counts) * MAX_EXTENT_PAGES
    pages = np.minimum(np.repeat(runs.pages, counts) - within, MAX_EXTENT_PAGES)
    return Runs(np.repeat(runs.first, counts) + within, pages, np.repeat(runs.slot, counts) + within)
