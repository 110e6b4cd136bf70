"""trees: joining digests, against dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuksm.scan.trees import join, no_stable_tree, stable_tree

digests = st.lists(st.integers(0, 8), max_size=30)


def store(counts, values):
    words = [word for number, count in enumerate(counts) for word in (100 * (number + 1), count)]
    return stable_tree(len(counts), np.array(words + values, "<u8").tobytes())


@settings(deadline=None)  # the first call compiles
@given(digests, st.lists(st.integers(0, 8), max_size=10))
def test_pages_and_slots_with_one_digest_get_one_number(pages, slots):
    tree = store([1] * len(slots), slots)
    target = np.arange(len(pages), dtype=np.uint32) // 7
    got = join(np.array(pages, np.uint64), target, tree)
    number = {}
    for digest, content in zip(pages, got.page.tolist(), strict=True):
        worth = pages.count(digest) > 1 or (digest != 0 and digest in slots)  # 0: none remembered
        assert (content >= 0) == worth
        assert number.setdefault(digest, content) == content
    assert len({c for c in number.values() if c >= 0}) == got.count == sum(c >= 0 for c in number.values())
    for digest, content in zip(slots, got.slot.tolist(), strict=True):
        assert content == (number.get(digest, -1) if digest else -1)
    for digest, content in number.items():
        if content >= 0:
            here = [owner for page, owner in zip(pages, target.tolist(), strict=True) if page == digest]
            assert got.repeats[content] == (len(set(here)) < len(here))


def test_slots_are_numbered_extent_by_extent():
    tree = store([2, 3], [11, 12, 13, 0, 15])
    assert tree.slot.tolist() == [100, 101, 200, 201, 202]
    assert tree.last.tolist() == [False, True, False, False, True]
    assert len(no_stable_tree().slot) == 0


@pytest.mark.parametrize("words", [[100, 2, 5], [100, 0], [100, 1, 5, 6]])
def test_a_reply_that_does_not_add_up_is_refused(words):
    with pytest.raises(ValueError, match="not consistent"):
        stable_tree(1, np.array(words, "<u8").tobytes())
