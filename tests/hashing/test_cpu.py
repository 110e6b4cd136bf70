"""The CPU backend against the xxhash package, which wraps the reference implementation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuksm.errors import BackendUnavailable
from gpuksm.hashing import KIND_CONSTANT, KIND_NORMAL, KIND_UNREADABLE, KIND_ZERO, selftest, xxh3
from gpuksm.hashing.cpu import CpuHasher, digest_pages
from gpuksm.hashing.source import ArraySource

SEEDS = (0, 1, 99, 1 << 31, 1 << 32, 1 << 63, xxh3.PRIME64_1, (1 << 64) - 1)
seeds = st.integers(0, (1 << 64) - 1)


def oracle(pages, seed):
    return [xxhash.xxh3_64_intdigest(page.tobytes(), seed) for page in pages]


def agree(pages, seed):
    """The kinds, once the digests have been compared."""
    digests, kinds = digest_pages(pages, seed)
    assert digests.tolist() == oracle(pages, seed)
    return kinds.tolist()


def page_of(words):
    return np.array(words, np.uint64).view(np.uint8).reshape(1, 4096)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_pages(seed):
    pages = np.random.default_rng(seed).integers(0, 256, (64, 4096), np.uint8)
    assert set(agree(pages, seed)) == {KIND_NORMAL}


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_and_constant_pages(seed):
    words = [0, 1, 1 << 63, (1 << 64) - 1, 0x8080808080808080, 1 << 60]
    pages = np.concatenate([page_of([word] * 512) for word in words])
    assert agree(pages, seed) == [KIND_ZERO] + [KIND_CONSTANT] * 5


def test_every_single_bit_matters():
    base = np.random.default_rng(2).integers(0, 256, 4096, np.uint8)
    pages = np.repeat(base[None], 4096 * 8 // 16, axis=0)
    # A bit in every other byte, each position within a byte in turn: 2048 pages.
    for row in range(len(pages)):
        pages[row, 2 * row + row // 8 % 2] ^= 1 << (row % 8)
    digests, _ = digest_pages(pages, 5)
    assert digests.tolist() == oracle(pages, 5)
    assert len(set(digests.tolist())) == len(pages)


@pytest.mark.parametrize("at", [0, 1, 7, 8, 127, 128, 383, 384, 503, 504, 511])
@pytest.mark.parametrize("background", [0, 0xDEADBEEF00C0FFEE])
def test_one_different_word_is_not_constant(at, background):
    words = np.full(512, background, np.uint64)
    words[at] ^= np.uint64(1 << (at % 64))
    assert agree(page_of(words), 7) == [KIND_NORMAL]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_that_cancel_the_secret(seed):
    """Every product is zero, or as large as it gets, or only one half of the word cancels."""
    keys = xxh3.page_keys(seed)
    stripe_keys = np.concatenate([keys[stripe : stripe + 8] for stripe in range(16)])
    page_keys = np.tile(stripe_keys, 4)
    page_keys[504:512] = keys[24:32]
    low = np.uint64(0xFFFFFFFF)
    pages = np.concatenate(
        [page_of(page_keys ^ np.uint64(mask)) for mask in (0, (1 << 64) - 1, 0xFFFFFFFF, 0xFFFFFFFF00000000)]
        + [page_of(page_keys & low), page_of(page_keys & ~low)]
    )
    agree(pages, seed)


def test_pages_whose_sums_look_constant():
    """Lane sums of each block are 16 times the first word, as in a constant page, yet it is not one."""
    words = np.full((4, 512), 5, np.uint64)
    words[0, 8] += np.uint64(1)
    words[0, 16] -= np.uint64(1)
    words[1, 504] += np.uint64(3)
    words[1, 496] -= np.uint64(3)
    words[2, :] = 0
    words[2, 8 : 8 + 16] = 1 << 63  # two carries out of the top, lane by lane
    words[3, :] = 1 << 60
    words[3, 128:136] = 0
    words[3, 136:144] = 1 << 61
    assert agree(words.view(np.uint8).reshape(4, 4096), 0) == [KIND_NORMAL] * 4


@given(
    hnp.arrays(
        np.uint64,
        (3, 512),
        elements=st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, 0xB8FE6C39]),
        fill=st.just(0),
    ),
    seeds,
)
@settings(max_examples=50, deadline=None)
def test_any_page_any_seed(words, seed):
    kinds = agree(words.view(np.uint8).reshape(3, 4096), seed)
    for page, kind in zip(words, kinds, strict=True):
        same = bool((page == page[0]).all())
        assert kind == (KIND_NORMAL if not same else KIND_CONSTANT if page[0] else KIND_ZERO)


class PatchySource(ArraySource):
    """Every third page cannot be read and leaves rubbish behind."""

    def read(self, first, count, out, ok):
        super().read(first, count, out, ok)
        for at in range(count):
            if (first + at) % 3 == 2:
                ok[at] = False
                out[at * 4096 : (at + 1) * 4096] = 0xAA


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    return request.param


@pytest.mark.parametrize("pages", [0, 1, 15, 16, 17, 100])
def test_digest_in_chunks(threads, pages):
    octets = np.random.default_rng(pages).integers(0, 256, pages * 4096 + 100, np.uint8)
    hasher = CpuHasher(3, threads, chunk_pages=16)
    # Room beyond the last page stays as it was.
    digests, kinds = np.full(pages + 1, 42, np.uint64), np.full(pages + 1, 42, np.uint8)
    hasher.digest(ArraySource(octets), digests, kinds)
    hasher.close()
    assert digests[:pages].tolist() == oracle(octets[: pages * 4096].reshape(-1, 4096), 3)
    assert not kinds[:pages].any()
    assert digests[pages] == kinds[pages] == 42


def test_unreadable_pages(threads):
    octets = np.random.default_rng(0).integers(0, 256, 50 * 4096, np.uint8)
    hasher = CpuHasher(3, threads, chunk_pages=7)
    digests, kinds = np.full(50, 42, np.uint64), np.full(50, 42, np.uint8)
    hasher.digest(PatchySource(octets), digests, kinds)
    hasher.close()
    expected = np.array(oracle(octets.reshape(-1, 4096), 3), np.uint64)
    gone = np.arange(50) % 3 == 2
    assert (digests == np.where(gone, 0, expected)).all()
    assert (kinds == np.where(gone, KIND_UNREADABLE, KIND_NORMAL)).all()


class FailingSource(ArraySource):
    def read(self, first, count, out, ok):
        if first >= 32:
            raise OSError("gone")
        super().read(first, count, out, ok)


def test_a_failing_read_comes_through_and_the_hasher_stays_usable(threads):
    octets = np.zeros(64 * 4096, np.uint8)
    hasher = CpuHasher(0, threads, chunk_pages=8)
    digests, kinds = np.empty(64, np.uint64), np.empty(64, np.uint8)
    with pytest.raises(OSError, match="gone"):
        hasher.digest(FailingSource(octets), digests, kinds)
    hasher.digest(ArraySource(octets), digests, kinds)
    hasher.close()
    assert set(kinds.tolist()) == {KIND_ZERO}


def test_two_callers_at_once_get_their_own_digests():
    octets = np.random.default_rng(0).integers(0, 256, (2, 300 * 4096), np.uint8)
    hasher = CpuHasher(11, 2, chunk_pages=4)
    digests, kinds = np.empty((2, 300), np.uint64), np.empty((2, 300), np.uint8)
    callers = [
        threading.Thread(target=hasher.digest, args=(ArraySource(octets[at]), digests[at], kinds[at]))
        for at in range(2)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    hasher.close()
    for at in range(2):
        assert digests[at].tolist() == oracle(octets[at].reshape(-1, 4096), 11)


def test_too_little_room_for_the_digests():
    hasher = CpuHasher(0, 1)
    with pytest.raises(ValueError, match="2 pages"):
        hasher.digest(ArraySource(np.zeros(8192, np.uint8)), np.empty(1, np.uint64), np.empty(2, np.uint8))
    hasher.close()


@pytest.mark.parametrize(
    ("asked", "cpus", "there"), [(0, 1, 1), (0, 4, 4), (0, 64, 6), (9, 4, 9), (1, 64, 1)]
)
def test_how_many_threads_there_are(monkeypatch, asked, cpus, there):
    monkeypatch.setattr("gpuksm.hashing.cpu.usable_cpus", lambda: cpus)
    hasher = CpuHasher(0, asked)
    assert hasher.threads == there
    hasher.close()


def test_close_ends_every_thread():
    before = threading.active_count()
    hasher = CpuHasher(0, 4, chunk_pages=1)
    hasher.digest(ArraySource(np.zeros(64 * 4096, np.uint8)), np.empty(64, np.uint64), np.empty(64, np.uint8))
    hasher.close()
    assert threading.active_count() == before


def test_a_wrong_kernel_does_not_start(monkeypatch):
    keys = xxh3.page_keys
    monkeypatch.setattr(xxh3, "page_keys", lambda seed: keys(seed) ^ np.uint64(1))
    with pytest.raises(BackendUnavailable, match="self-test"):
        CpuHasher(0)


def test_known_answers_are_those_of_the_reference():
    for seed, digests in selftest.KNOWN_DIGESTS.items():
        assert list(digests) == oracle(selftest.known_pages(), seed)


def test_a_wrong_kind_fails_the_self_test():
    def all_normal(pages, seed):
        digests, kinds = digest_pages(pages, seed)
        return digests, np.zeros_like(kinds)

    with pytest.raises(BackendUnavailable, match="kind"):
        selftest.check("test", all_normal)
