"""The store: holes behind extents, seals, who may write, what is freed."""

from __future__ import annotations

import fcntl
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm.guard.store import Store, hole_behind
from gpuksm.linux._libc import PAGE_SIZE


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=50))
def test_every_extent_is_followed_by_its_hole(sizes: list[int]) -> None:
    store = Store()
    try:
        starts = [store.allocate(size, 0) for size in sizes]
        for (start, size), following in zip(zip(starts, sizes, strict=True), starts[1:], strict=False):
            assert following >= start + size + hole_behind(size)
            assert hole_behind(size) * PAGE_SIZE >= 1 << 30
            assert store.extent_of(start + size) is None
            assert store.ends_at_hole(start + size)
            assert not store.ends_at_hole(start + size - 1) or size == 1
    finally:
        os.close(store.fd)
        os.close(store.read_only)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 1 << 36)), min_size=1, max_size=20))
def test_large_extents_are_congruent_to_the_pages_that_fill_them(wanted: list[tuple[int, int]]) -> None:
    store = Store()
    try:
        end = 0
        for slots, page in wanted:
            start = store.allocate(slots, 0, page)
            assert start >= end
            assert slots < 512 or start % 512 == page % 512
            end = start + slots + hole_behind(slots)
    finally:
        os.close(store.fd)
        os.close(store.read_only)


def test_what_was_allocated_around_small_extents_is_given_back() -> None:
    """As if each of them had been given a huge page (docs/performance.md)."""
    store = Store()
    sizes = [3, 8, 40, 1, 700, 9]
    starts = [store.allocate(size, 0, 77) for size in sizes]
    page = memoryview(b"\x55" * PAGE_SIZE)
    for start, size in zip(starts, sizes, strict=True):
        store.write(start // 512 * 512, [page] * (-(-(start + size) // 512) * 512 - start // 512 * 512))
    assert store.used_bytes() > sum(sizes) * PAGE_SIZE
    store.trim(starts)
    assert store.used_bytes() == sum(sizes) * PAGE_SIZE
    got = bytearray(PAGE_SIZE)
    for start, size in zip(starts, sizes, strict=True):
        for slot in (start, start + size - 1):
            store.read(slot, memoryview(got))
            assert got == page


def test_cannot_be_resized_or_unsealed() -> None:
    store = Store()
    for size in (0, 1 << 61, (1 << 62) + 4096):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(store.fd, size)
    with pytest.raises(OSError, match="not permitted"):
        fcntl.fcntl(store.fd, 1033, 8)


def test_the_descriptor_for_targets_cannot_write() -> None:
    store = Store()
    slot = store.allocate(1, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(store.read_only, b"x", slot * PAGE_SIZE)
    assert os.fstat(store.fd).st_mode & 0o777 == 0o400


def test_frees_exactly_what_is_not_mapped() -> None:
    store = Store()
    page = memoryview(b"\x55" * PAGE_SIZE)
    a, b = store.allocate(4, 0), store.allocate(600, 0)
    store.write(a, [page] * 4)
    store.write(b, [page] * 600)
    store.set_digests(a, 0, b"\x01" * 32)
    store.set_digests(b, 0, b"\x02" * 4800)
    before = store.used_bytes()
    assert store.free([(a + 1, a + 2)]) == 603
    assert store.used_bytes() == before - 603 * PAGE_SIZE
    got = bytearray(PAGE_SIZE)
    store.read(a + 1, memoryview(got))
    assert got == page
    assert [(start, slots) for start, slots, _ in store.extents()] == [(a, 4)]
    assert store.digests_of(a) == bytes(8) + b"\x01" * 8 + bytes(16)
    assert store.free([(a + 1, a + 2)]) == 0
    assert store.free([]) == 4
    assert store.used_bytes() == before - 604 * PAGE_SIZE
    # An offset is never handed out twice.
    assert store.allocate(4, 0) > b + 600
