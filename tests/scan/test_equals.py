"""equals: which pages have an equal, against counting them one by one."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuksm.hashing.protocol import KIND_NORMAL, KIND_ZERO
from gpuksm.hashing.sort import radix_sort
from gpuksm.scan import equals
from gpuksm.scan.addresses import Addresses
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.equals import candidates_with_equals, with_equals
from gpuksm.scan.state import columns_of
from gpuksm.scan.tracker import user_key
from gpuksm.scan.trees import StableTree


def tracker_of(chance: np.random.Generator, pages: int, contents: int, user: int) -> Any:
    """Pages of random contents, of which some are zeros and some have no digest."""
    digest = chance.integers(0, contents, pages).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    kind = np.where(chance.random(pages) < 0.01, KIND_ZERO, KIND_NORMAL).astype(np.uint8)
    known = chance.random(pages) < 0.8
    columns = columns_of(Addresses.of_pages(np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_BYTES)))
    columns.learn(np.arange(pages), digest, kind, known)
    candidate = known & (chance.random(pages) < 0.5)
    return SimpleNamespace(columns=columns, user=user, may_be_merged=candidate.copy)


def store_of(digests: list[int]) -> StableTree:
    count = len(digests)
    return StableTree(
        np.arange(count, dtype=np.uint64), np.array(digests, np.uint64), np.ones(count, np.bool_)
    )


@pytest.mark.parametrize("part_pages", [1 << 19, 500, 1])
@pytest.mark.parametrize("seed", range(4))
def test_as_counted(monkeypatch: pytest.MonkeyPatch, part_pages: int, seed: int) -> None:
    monkeypatch.setattr(equals, "_PART_PAGES", part_pages)
    monkeypatch.setattr(equals, "_PIECE", 77)
    chance = np.random.default_rng(seed)
    trackers = [
        tracker_of(chance, pages, 4000, user) for pages, user in ((900, 0), (0, 0), (700, 0), (800, 1))
    ]
    mine = trackers[0].columns.digest[:5] ^ user_key(trackers[0])
    store = store_of([0, 0, *mine.tolist(), 12345])

    def compared_by(tracker: Any) -> list[int]:
        return (tracker.columns.digest ^ user_key(tracker)).tolist()

    count = Counter(store.digest.tolist())
    count[0] = 0  # not remembered
    for each in trackers:
        count.update(d for d, known in zip(compared_by(each), each.columns.known(), strict=True) if known)
    found = with_equals(trackers, store, radix_sort)
    for each, mask in zip(trackers, found, strict=True):
        columns = each.columns
        for at, digest in enumerate(compared_by(each)):
            equal = count[digest] > 1 or columns.kind()[at] == KIND_ZERO
            assert mask[at] == (columns.known()[at] and equal), at
    assert sum(mask.sum() for mask in found) > 300
    some, alone = candidates_with_equals(trackers, store, radix_sort)
    for each, mask, index, count_alone in zip(trackers, found, some, alone, strict=True):
        left = each.may_be_merged()
        assert index.tolist() == np.flatnonzero(left & mask).tolist()
        assert count_alone == (left & ~mask).sum()
    assert with_equals([], store, radix_sort) == []
