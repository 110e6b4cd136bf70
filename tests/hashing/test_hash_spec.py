"""docs/hash_spec.md tells the truth: constants and vectors are the code's, and the text hashes rightly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import xxhash

from gpuksm.hashing import selftest, xxh3

SPEC = (Path(__file__).parents[2] / "docs" / "hash_spec.md").read_text()
M = xxh3.U64


def table_rows(heading, pattern):
    section = SPEC.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.findall(r"`(0x[0-9A-F]+)`", line) for line in section.splitlines() if re.match(pattern, line)]
    return [[int(number, 16) for number in row] for row in rows]


def test_vectors_are_the_known_answers():
    rows = table_rows("Test vectors", r"\| `0x")
    assert {row[0]: tuple(row[1:]) for row in rows} == selftest.KNOWN_DIGESTS


def test_constants():
    secret = [word for row in table_rows("Constants", r"\| \d") for word in row]
    assert secret == list(xxh3.SECRET)
    named = dict(re.findall(r"\| `(PRIME\w+)` \| `(0x[0-9A-F]+)` \|", SPEC))
    assert len(named) == 9
    assert all(int(value, 16) == getattr(xxh3, name) for name, value in named.items())


def as_the_text_says(page, seed):
    """A word by word transcription of the specification."""
    words = np.frombuffer(page, "<u8").tolist()
    s = [(k - seed if at % 2 else k + seed) & M for at, k in enumerate(xxh3.SECRET)]
    last = [(s[15 + j] >> 8 | s[16 + j] << 56) & M for j in range(8)]
    merge = [(s[1 + j] >> 24 | s[2 + j] << 40) & M for j in range(8)]
    acc = list(xxh3.ACCUMULATORS)
    for stripe in range(64):
        key = last if stripe == 63 else s[stripe % 16 : stripe % 16 + 8]
        for j, d in enumerate(words[stripe * 8 : stripe * 8 + 8]):
            x = d ^ key[j]
            acc[j ^ 1] = (acc[j ^ 1] + d) & M
            acc[j] = (acc[j] + (x & 0xFFFFFFFF) * (x >> 32)) & M
        if stripe in (15, 31, 47):
            acc = [(a ^ a >> 47 ^ s[16 + j]) * xxh3.PRIME32_1 & M for j, a in enumerate(acc)]
    m = [a ^ merge[j] for j, a in enumerate(acc)]
    r = 4096 * xxh3.PRIME64_1
    for i in range(4):
        product = m[2 * i] * m[2 * i + 1]
        r += (product & M) ^ (product >> 64)
    r &= M
    r = (r ^ r >> 37) * xxh3.PRIME_MX1 & M
    return r ^ r >> 32


@pytest.mark.parametrize("seed", [0, 1, xxh3.PRIME64_1, M])
def test_the_text_is_the_reference(seed):
    pages = np.random.default_rng(1).integers(0, 256, (4, 4096), np.uint8)
    for page in [*pages, *selftest.known_pages()]:
        assert as_the_text_says(page.tobytes(), seed) == xxhash.xxh3_64_intdigest(page.tobytes(), seed)
