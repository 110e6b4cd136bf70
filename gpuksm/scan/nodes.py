"""NUMA nodes of pages, and digests that differ between nodes (`merge_across_nodes` 0).

A page's digest is changed by its node as soon as it is known, and a slot's when the stable tree is
read: so pages of different nodes are different contents for all that compares digests.  The
guard is told, and remembers, digests as they were.  Where nodes make no difference, columns of nodes are
empty and nothing is changed.

A page may move to another node after it was asked for.  That costs locality alone: what is
equal is equal on every node.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuksm.linux import numa
from gpuksm.scan.columns import I64, U64

Nodes = NDArray[np.uint16]  # NUMA node + 1, 0: none

_FACTOR = np.uint64(0xC2B2AE3D27D4EB4F)  # odd: no two nodes have the same key


def no_nodes() -> Nodes:
    """The column where nodes make no difference."""
    return np.empty(0, np.uint16)


def wanted(merge_across_nodes: bool) -> bool:
    """Whether pages are to be told apart by node; FeatureMissing where they are and that cannot be."""
    return not merge_across_nodes and numa.probe()


def apart(digest: U64, node: Nodes) -> U64:
    """`digest` changed by the `node` of each (applied again: as it was); 0, no digest, stays 0."""
    if not len(node):
        return digest
    return np.where(digest != 0, digest ^ node.astype(np.uint64) * _FACTOR, digest)


def taken(node: Nodes, index: I64 | NDArray[np.bool_]) -> Nodes:
    """The nodes of the pages `index`; empty where nodes make no difference."""
    return node[index] if len(node) else node


def parted(joins: NDArray[np.bool_], node: Nodes) -> NDArray[np.bool_]:
    """`joins`, which of the pages follow their predecessor, without those that lie on another node than it.

    An extent belongs to one node, so a run does.
    """
    if len(node):
        joins[1:] &= node[1:] == node[:-1]
    return joins


def nodes_of(pid: int, address: U64) -> Nodes:
    """The node + 1 of each page of a process, 0 where it is gone; TargetGone, NotPermitted."""
    address = np.ascontiguousarray(address)
    status = np.full(len(address), -1, np.int32)
    if len(address):
        numa.nodes_at(pid, len(address), address.ctypes.data, status.ctypes.data)
    return np.maximum(status + 1, 0).astype(np.uint16)
