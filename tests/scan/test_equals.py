"""equals: which pages have an equal, against counting them one by one."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuksm.hashing.protocol import KIND_NORMAL, KIND_ZERO
from gpuksm.scan.addresses import Addresses
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.equals import Repeats, candidates_with_equals, repeats_of, with_equals
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

    def may_be_merged(first: int = 0, end: int | None = None) -> Any:
        return candidate[first:end].copy()

    return SimpleNamespace(columns=columns, user=user, may_be_merged=may_be_merged)


def store_of(digests: list[int]) -> StableTree:
    count = len(digests)
    return StableTree(
        np.arange(count, dtype=np.uint64), np.array(digests, np.uint64), np.ones(count, np.bool_)
    )


def most_that_pass(alone: int, pages: int) -> float:
    """Of pages that are alone, one in eight and a few."""
    return alone * min(1.0, pages / (8 * max(pages, 1 << 9)) + 0.05) + 10


@pytest.mark.parametrize("seed", range(4))
def test_none_that_has_an_equal_is_left_out_and_few_others_pass(seed: int) -> None:
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
    found = with_equals(trackers, store)
    more = pages = 0
    for each, mask in zip(trackers, found, strict=True):
        columns = each.columns
        for at, digest in enumerate(compared_by(each)):
            equal = count[digest] > 1 or columns.kind()[at] == KIND_ZERO
            assert mask[at] or not (columns.known()[at] and equal), at
            assert not mask[at] or columns.known()[at], at
            more += int(mask[at]) and not equal
            pages += int(columns.known()[at] and not equal)
    assert sum(mask.sum() for mask in found) > 300
    assert pages > 500
    assert more < most_that_pass(pages, 2400)
    some, alone = candidates_with_equals(trackers, repeats_of(trackers, store))
    for each, mask, index, count_alone in zip(trackers, found, some, alone, strict=True):
        left = each.may_be_merged()
        assert index.tolist() == np.flatnonzero(left & mask).tolist()
        assert count_alone == (left & ~mask).sum()
    assert with_equals([], store) == []


def test_parts_that_come_one_after_the_other_find_what_all_at_once_find() -> None:
    chance = np.random.default_rng(5)
    trackers = [tracker_of(chance, 900, 700, 0) for _ in range(2)]
    store = store_of([trackers[1].columns.digest[3] ^ user_key(trackers[1])])
    whole = repeats_of(trackers, store)
    repeats = Repeats(1801, store.digest)
    for first in range(0, 900, 100):
        for each in trackers:
            before = repeats.find(each, 0, first)
            repeats.add(each, first, first + 100)
            assert not (before & ~repeats.find(each, 0, first)).any()
            index = repeats.candidates(each, first, first + 100)
            assert (
                each.may_be_merged(first, first + 100) & repeats.find(each, first, first + 100)
            ).sum() == (len(index))
            assert ((first <= index) & (index < first + 100)).all()
    for each in trackers:
        assert repeats.find(each).tolist() == whole.find(each).tolist()
