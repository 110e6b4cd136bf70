"""Proof that the checks can fail: each wrong kernel is caught by its check, on PTX and on PoCL.

A mutation replaces one exact piece of the shipped source.  Missing barriers are
only asked of the interpreter, which looks for races; a CPU that runs a group's
threads one after the other may come out right by luck.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gpuksm.hashing import kernels
from tests.kernels import oracles
from tests.kernels.executors import Executor, make
from tests.ptx import PtxError


def _pages(run: Executor) -> None:
    oracles.check_pages(run, oracles.mixed_pages(201), 99, 3)


def _sort(run: Executor) -> None:
    oracles.check_sort(run, oracles.clumped_keys(4100), bits=8)


def _scan(run: Executor) -> None:
    oracles.check_scan(run, 4500)


def _match(run: Executor) -> None:
    table = np.sort(oracles.clumped_keys(100))
    oracles.check_match(run, np.concatenate([table, table ^ np.uint64(1)]), table)


def _candidates(run: Executor) -> None:
    keys = np.sort(oracles.clumped_keys(400))
    oracles.check_candidates(run, keys, np.where(np.arange(400) % 5, -1, 7).astype(np.int64))


# (name, check, text in the source, what replaces it wherever it stands)
WRONG: tuple[tuple[str, Callable[[Executor], None], str, str], ...] = (
    ("prime", _pages, "#define PRIME_MX1 0x165667919E3779F9ull", "#define PRIME_MX1 0x165667919E3779F8ull"),
    ("secret", _pages, "0x647378D9C97E9FC8ull", "0x647378D9C97E9FC9ull"),
    ("initial", _pages, "PRIME64_5, PRIME32_1 }", "PRIME32_1, PRIME64_5 }"),
    ("seed-sign", _pages, "SECRET[k] - seed : SECRET[k] + seed", "SECRET[k] + seed : SECRET[k] + seed"),
    ("last-key-shift", _pages, "secret_word(16u + lane, seed) << 56", "secret_word(16u + lane, seed) << 48"),
    ("last-key-missing", _pages, "(i < STRIPES - 1u ? key[i] : key_last)", "key[i]"),
    ("neighbour-sum", _pages, "acc += SHFL_XOR(sum, 1);", "acc += sum;"),
    ("shuffle-lane", _pages, "digest += SHFL_XOR(digest, 4);", "digest += SHFL_XOR(digest, 2);"),
    ("scramble-shift", _pages, "acc ^= acc >> 47;", "acc ^= acc >> 46;"),
    ("scramble-missing", _pages, "acc *= PRIME32_1;", ""),
    ("length", _pages, "PAGE_WORDS * 8u * PRIME64_1", "PAGE_WORDS * PRIME64_1"),
    ("high-half", _pages, "(mine * other) ^ MULHI64(mine, other)", "(mine * other)"),
    ("tail-write", _pages, "if (lane == 0u && wanted < n)", "if (lane == 0u && wanted + 1u < n)"),
    ("stride", _pages, "base += NBLOCKS * block_pages", "base += (NBLOCKS + 1u) * block_pages"),
    ("page-offset", _pages, "pages + (u64)page * PAGE_WORDS", "pages + (u64)(page ^ 1u) * PAGE_WORDS"),
    ("kind-block", _pages, "differs |= word ^ first;", ""),
    ("kind-lanes", _pages, "const u64 first = words[0];", "const u64 first = words[lane];"),
    ("kind-swapped", _pages, "first ? KIND_CONSTANT : KIND_ZERO", "first ? KIND_ZERO : KIND_CONSTANT"),
    ("digit", _sort, "keys[i] >> shift & (RADIX - 1u)", "keys[i] >> (shift ^ 4u) & (RADIX - 1u)"),
    (
        "unstable",
        _sort,
        "offsets[digit] + bins[digit * BLOCK + TID]++",
        "offsets[digit] + bins[digit * BLOCK + (TID ^ 1u)]++",
    ),
    ("last-digit", _sort, "bins[(TID + 1u) * BLOCK] : keys_here", "bins[(TID + 1u) * BLOCK] : tile"),
    ("carry", _scan, "carry += all;", ""),
    ("scan-step", _scan, "step <<= 1", "step <<= 2"),
    ("layout", _sort, "starts[TID * NBLOCKS + BID]", "starts[BID * RADIX + TID]"),
    ("bound", _match, "low = middle + 1u", "low = middle + 2u"),
    ("last-equal", _match, "table[middle] < key", "table[middle] <= key"),
    ("found", _match, "low < m && table[low] == key", "low < m"),
    ("group-start", _candidates, "keys[i - 1u] == key", "keys[i - 1u] != key"),
    ("neighbour", _candidates, "before || after ? MARK_EQUAL", "before ? MARK_EQUAL"),
    ("matched", _candidates, "match[i] >= 0", "match[i] > 7"),
    ("gather-order", _candidates, "order_out[place] = order[i];", "order_out[place] = i;"),
    ("gather-place", _candidates, "starts[BID] + group_scan", "starts[0] + group_scan"),
)

RACES: tuple[tuple[str, Callable[[Executor], None], str, str], ...] = (
    ("scan-before", _scan, "BARRIER(); /* what the last call left", "/* what the last call left"),
    ("scan-first", _scan, "sums[TID] = value;\n  BARRIER();", "sums[TID] = value;"),
    ("scan-read", _scan, "sums[TID - step] : 0u;\n    BARRIER();", "sums[TID - step] : 0u;"),
    ("scan-written", _scan, "sums[TID] += below;\n    BARRIER();", "sums[TID] += below;"),
    ("bins", _sort, "* BLOCK + TID]++;\n  BARRIER();", "* BLOCK + TID]++;"),
    ("ranks", _sort, "run += count;\n  }\n  BARRIER();", "run += count;\n  }"),
    ("offsets", _sort, "bins[TID * BLOCK];\n  BARRIER();", "bins[TID * BLOCK];"),
    (
        "divergent",
        _sort,
        "bins[TID * BLOCK];\n  BARRIER();",
        "bins[TID * BLOCK];\n  if (first < n) BARRIER();",
    ),
    (
        "misaligned",
        _match,
        "const u64 key = keys[i];",
        "const u64 key = *(const u64 *)((const u8 *)keys + i);",
    ),
    ("tail", _pages, "wanted < n ? wanted : n - 1u", "wanted"),
    ("beyond", _match, "for (u32 i = BID * BLOCK + TID; i < n;", "for (u32 i = BID * BLOCK + TID; i <= n;"),
    (
        "lane-left-out",
        _pages,
        "const int varied = ANY8(differs) != 0;",
        "int varied = 0; if (wanted < n) varied = ANY8(differs) != 0;",
    ),
)


def _mutated(text: str, replacement: str) -> str:
    source = kernels.source()
    assert text in source, "the mutation no longer fits the kernel"
    return source.replace(text, replacement)


@pytest.mark.parametrize("kind", ["ptx75", "pocl"])
@pytest.mark.parametrize(("name", "check", "text", "replacement"), WRONG, ids=[one[0] for one in WRONG])
def test_wrong_kernels_are_caught(
    kind: str, name: str, check: Callable[[Executor], None], text: str, replacement: str
) -> None:
    run = make(kind, _mutated(text, replacement))
    with pytest.raises((AssertionError, PtxError)):
        check(run)


@pytest.mark.parametrize("kind", ["ptx75", "ptx75-reverse"])
@pytest.mark.parametrize(("name", "check", "text", "replacement"), RACES, ids=[one[0] for one in RACES])
def test_undefined_kernels_are_caught(
    kind: str, name: str, check: Callable[[Executor], None], text: str, replacement: str
) -> None:
    run = make(kind, _mutated(text, replacement))
    with pytest.raises(PtxError):
        check(run)
