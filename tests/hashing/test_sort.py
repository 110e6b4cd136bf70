"""Sort, groups and join against numpy, on inputs that are as bad as they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuksm.hashing import sort

U64 = (1 << 64) - 1
# Few distinct words, words that differ in one byte only, and anything.
words = st.one_of(
    st.sampled_from([0, 1, 255, 256, 1 << 32, 1 << 63, U64]),
    st.integers(0, 255).map(lambda byte: byte << 24),
    st.integers(0, U64),
)
columns = hnp.arrays(np.uint64, st.integers(0, 100), elements=words)


def check(digests, threads=2):
    before = digests.copy()
    sorted_digests, order = sort.radix_sort(digests, threads)
    expected = np.argsort(digests, kind="stable")
    assert sorted_digests.dtype == np.uint64
    assert order.dtype == np.uint32
    assert (order == expected).all()
    assert (sorted_digests == digests[expected]).all()
    assert (digests == before).all()


@given(columns)
@settings(deadline=None)
def test_small_columns(digests):
    check(digests)


@given(columns, st.integers(1, 4))
@settings(deadline=None)
def test_small_columns_in_buckets(digests, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sort, "SMALL_PAIRS", 16)
        patch.setattr(sort, "BUCKET_PAIRS", 8)
        check(digests, threads)


def adversaries():
    rng = np.random.default_rng(0)
    count = 200_000
    random = rng.integers(0, U64, count, np.uint64, endpoint=True)
    yield "random", random
    yield "equal", np.full(count, 0x1234, np.uint64)
    yield "zeros", np.zeros(count, np.uint64)
    yield "sorted", np.sort(random)
    yield "reversed", np.sort(random)[::-1].copy()
    yield "two values", random & np.uint64(1)
    yield "few distinct", rng.choice(random[:5], count)
    yield "low bits only", random >> np.uint64(50)
    yield "high bits only", random & np.uint64(0x3FF << 54)
    yield "one bit high, the rest low", (random & np.uint64(1 << 63)) | (random >> np.uint64(44))
    yield "one outlier", np.concatenate([np.full(count, 7, np.uint64), np.array([U64], np.uint64)])
    yield "one bucket holds nearly all", np.where(random % 100 == 0, random, random >> np.uint64(40))
    yield "copies of six", rng.permutation(np.repeat(random[: count // 6], 6))
    yield "a strided view", random[::2]


@pytest.mark.parametrize(
    ("name", "digests"), list(adversaries()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_adversaries(name, digests, threads):
    check(digests, threads)


@pytest.mark.parametrize("count", [0, 1, 2, sort.SMALL_PAIRS - 1, sort.SMALL_PAIRS, sort.SMALL_PAIRS + 1])
def test_sizes(count):
    check(np.random.default_rng(count).integers(0, U64, count, np.uint64))


@given(columns)
@settings(deadline=None)
def test_group_bounds(digests):
    keys = np.sort(digests)
    starts, lengths = sort.group_bounds(keys)
    values, first, counts = np.unique(keys, return_index=True, return_counts=True)
    assert starts.tolist() == first[counts > 1].tolist()
    assert lengths.tolist() == counts[counts > 1].tolist()
    assert values[counts > 1].tolist() == keys[starts].tolist()


@given(columns, columns)
@settings(deadline=None)
def test_match_sorted(keys, table):
    keys, table = np.sort(keys), np.sort(table)
    found = sort.match_sorted(keys, table)
    at = np.searchsorted(table, keys)
    expected = [int(i) if i < len(table) and table[i] == key else -1 for i, key in zip(at, keys, strict=True)]
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_match_few_keys_in_a_long_table():
    table = np.arange(0, 3_000_000, 3, dtype=np.uint64)
    keys = np.array([0, 1, 3, 1_500_000, 1_500_001, 2_999_997, 2_999_998, U64], np.uint64)
    assert sort.match_sorted(keys, table).tolist() == [0, -1, 1, 500_000, -1, 999_999, -1, -1]
