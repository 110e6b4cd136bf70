"""Drives each kernel the way the backends do and checks the outcome against independent code.

Each check raises AssertionError (or PtxError) when the kernel is wrong; the
mutation tests rely on that.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from gpuksm.hashing.kernels import BLOCK, DIGIT_BITS, LANES, SORT_KEYS
from tests.kernels.executors import Executor

U32, U64 = np.uint32, np.uint64
SEEDS = (0, 1, 0xDEADBEEFCAFEBABE, (1 << 64) - 1)


def mixed_pages(count: int, seed: int = 1) -> NDArray[np.uint64]:
    """count x 512 words: random pages with zero, constant and almost constant ones among them."""
    pages = np.random.default_rng(seed).integers(0, 1 << 64, (count, 512), dtype=U64)
    pages[3::16] = 0
    pages[5::16] = 0x0123456789ABCDEF
    pages[7::16] = 0
    for row, page in enumerate(range(7, count, 16)):
        pages[page, (row * 37) % 512] = 1 << (row % 64)  # zero but for one bit, wherever it is
    pages[9::16] = np.resize(np.array([1, 2], U64), 512)
    pages[11::16] = np.repeat(np.arange(64, dtype=U64), 8)  # each stripe constant, the page is not
    pages[13::16] = np.tile(np.arange(8, dtype=U64), 64)  # each lane constant, the page is not
    return pages


def expected_kinds(pages: NDArray[np.uint64]) -> NDArray[np.uint8]:
    constant = (pages == pages[:, :1]).all(1)
    return np.where(constant, np.where(pages[:, 0] == 0, 1, 2), 0).astype(np.uint8)


def check_pages(run: Executor, pages: NDArray[np.uint64], seed: int, groups: int | None = None) -> None:
    """hash_pages over any grid equals xxhash, and kinds equal numpy."""
    count = len(pages)
    grid = -(-count // (BLOCK // LANES)) if groups is None else groups
    source, digests, kinds = run.constant(pages), run.allocate(count * 8), run.allocate(count)
    run.launch("hash_pages", grid, source, U64(seed), U32(count), digests, kinds)
    expected = np.array([xxhash.xxh3_64_intdigest(page, seed) for page in pages], U64)
    np.testing.assert_array_equal(run.read(digests, U64, count), expected)
    np.testing.assert_array_equal(run.read(kinds, np.uint8, count), expected_kinds(pages))


def check_sort(run: Executor, keys: NDArray[np.uint64], bits: int = 64) -> None:
    """All passes over the low `bits` equal numpy's stable argsort of them."""
    count = keys.size
    tiles = -(-count // (BLOCK * SORT_KEYS))
    a, b = run.place(keys), run.allocate(count * 8)
    order_a, order_b = run.allocate(count * 4), run.allocate(count * 4)
    counts, total = run.allocate(tiles * (4 << DIGIT_BITS)), run.allocate(4)
    run.launch("number_pages", 2, order_a, U32(count))
    for shift in range(0, bits, DIGIT_BITS):
        run.launch("sort_count", tiles, a, U32(count), U32(shift), counts)
        run.launch("scan_counts", 1, counts, U32(tiles << DIGIT_BITS), total)
        run.launch("sort_scatter", tiles, a, order_a, U32(count), U32(shift), counts, b, order_b)
        assert run.read(total, U32, 1)[0] == count
        a, b, order_a, order_b = b, a, order_b, order_a
    expected = np.argsort(keys & U64((1 << bits) - 1), kind="stable")
    np.testing.assert_array_equal(run.read(order_a, U32, count), expected)
    np.testing.assert_array_equal(run.read(a, U64, count), keys[expected])


def check_scan(run: Executor, count: int) -> None:
    """scan_counts is an exclusive sum modulo 2^32, and gives the total."""
    counts = np.random.default_rng(count).integers(0, 1 << 32, count, dtype=U32)
    held, total = run.place(counts), run.allocate(4)
    run.launch("scan_counts", 1, held, U32(count), total)
    sums = np.cumsum(counts, dtype=U32)
    np.testing.assert_array_equal(run.read(held, U32, count), sums - counts)
    assert run.read(total, U32, 1)[0] == sums[-1]


def check_match(run: Executor, keys: NDArray[np.uint64], table: NDArray[np.uint64]) -> None:
    """match_table finds the first equal entry."""
    count = keys.size
    out = run.allocate(count * 8)
    held = run.constant(table if table.size else np.zeros(1, U64))  # an empty buffer cannot be made
    run.launch("match_table", 3, run.constant(keys), U32(count), held, U32(table.size), out)
    np.testing.assert_array_equal(run.read(out, np.int64, count), expected_match(keys, table))


def expected_match(keys: NDArray[np.uint64], table: NDArray[np.uint64]) -> NDArray[np.int64]:
    at = {}
    for index, key in reversed(list(enumerate(table.tolist()))):
        at[key] = index
    return np.array([at.get(key, -1) for key in keys.tolist()], np.int64)


def expected_marks(keys: NDArray[np.uint64], match: NDArray[np.int64]) -> NDArray[np.uint8]:
    listed = keys.tolist()
    marks = np.zeros(keys.size, np.uint8)
    for i, key in enumerate(listed):
        before = i > 0 and listed[i - 1] == key
        after = i + 1 < len(listed) and listed[i + 1] == key
        marks[i] = (0 if before else 1) | (2 if before or after else 0) | (4 if match[i] >= 0 else 0)
    return marks


def check_candidates(run: Executor, keys: NDArray[np.uint64], match: NDArray[np.int64]) -> None:
    """mark_equal, scan_counts and gather_marked give the candidates of sorted keys, in order."""
    count = keys.size
    groups = -(-count // BLOCK)
    order = np.random.default_rng(2).permutation(count).astype(U32)
    held_keys, held_match, held_order = run.constant(keys), run.constant(match), run.constant(order)
    marks, counts, total = run.allocate(count), run.allocate(groups * 4), run.allocate(4)
    run.launch("mark_equal", groups, held_keys, held_match, U32(count), marks, counts)
    run.launch("scan_counts", 1, counts, U32(groups), total)
    outs = [run.allocate(count * width) for width in (8, 4, 8, 1)]
    run.launch("gather_marked", groups, held_keys, held_order, held_match, marks, U32(count), counts, *outs)
    expected = expected_marks(keys, match)
    np.testing.assert_array_equal(run.read(marks, np.uint8, count), expected)
    chosen = np.flatnonzero(expected & 6)
    assert int(run.read(total, U32, 1)[0]) == chosen.size
    for out, column in zip(outs, (keys, order, match, expected), strict=True):
        np.testing.assert_array_equal(run.read(out, column.dtype.type, chosen.size), column[chosen])


def clumped_keys(count: int, seed: int = 3) -> NDArray[np.uint64]:
    """Keys with many equal ones, and many that differ in one bit only."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 64, count, dtype=U64)
    keys[rng.random(count) < 0.5] = keys[0]
    twins = rng.random(count) < 0.2
    keys[twins] = keys[0] ^ U64(1) << rng.integers(0, 64, count, dtype=U64)[twins]
    return keys
