"""The store: holes behind extents, seals, who may write, what is freed."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuksm.guard import store as module
from gpuksm.guard.store import Store, hole_behind
from gpuksm.linux import numa, vm
from gpuksm.linux._libc import PAGE_SIZE
from tests.support.numa import DEFAULT, PREFERRED, nodes, policy


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


@pytest.mark.parametrize("at_a_time", [None, 7])
def test_frees_exactly_what_is_not_mapped(at_a_time: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_a_time is not None:
        monkeypatch.setattr(module, "_PUNCHED_SLOTS", at_a_time)
    store = Store()
    page = memoryview(b"\x55" * PAGE_SIZE)
    a, b = store.allocate(4, 0), store.allocate(600, 0)
    store.write(a, [page] * 4)
    store.write(b, [page] * 600)
    store.set_digests(a, 0, b"\x01" * 32)
    store.set_digests(b, 0, b"\x02" * 4800)
    before = store.used_bytes()
    used: list[int] = []
    assert store.free([(a + 1, a + 2)], lambda: used.append(store.used_bytes())) == 603
    assert len(used) == (0 if at_a_time is None else 2 + 86), "not after each small hole"
    assert sorted(set(used), reverse=True) == used
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


needs_nodes = pytest.mark.skipif(not nodes(), reason="no NUMA nodes")


def _policy_at(store: Store, slot: int) -> int:
    with mmap.mmap(store.fd, PAGE_SIZE, offset=slot * PAGE_SIZE) as page:
        return policy(vm.address_of(page))


@needs_nodes
def test_extents_with_a_node_and_no_others_have_its_policy() -> None:
    """All of an extent, from the first byte of its first huge page on."""
    store = Store()
    node = min(nodes()) + 1
    wanted = [(600, node), (3, 0), (5, node), (7, node), (700, 0), (1, node), (900, node)]
    starts = [store.allocate(slots, 0, 77, of) for slots, of in wanted]
    assert store.place(starts) == set()
    for start, (slots, of) in zip(starts, wanted, strict=True):
        expected = PREFERRED if of else DEFAULT
        for slot in (start // 512 * 512, start, start + slots - 1, (start + slots - 1) // 512 * 512 + 511):
            assert _policy_at(store, slot) == expected, (start, slots, slot)
    assert [(start, slots, of) for start, slots, _, of in store.owners()] == [
        (start, *each) for start, each in zip(starts, wanted, strict=True)
    ]


@needs_nodes
def test_extents_close_together_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    node = min(nodes()) + 1
    calls: list[tuple[int, int | None]] = []
    real = numa.prefer

    def prefer(fd: int, offset: int, length: int, to: int | None) -> None:
        calls.append((length, to))
        real(fd, offset, length, to)

    monkeypatch.setattr(numa, "prefer", prefer)
    store.place([store.allocate(2, 0, 0, 0) for _ in range(100)])
    assert calls == [], "no node, no call"
    store.place([store.allocate(2, 0, 0, node) for _ in range(300)])
    assert len(calls) <= 6
    assert all(length < 1 << 37 for length, _ in calls)


@needs_nodes
def test_a_node_that_cannot_be_had_is_told_of_its_extents_alone() -> None:
    store = Store()
    node, missing = min(nodes()) + 1, max(nodes()) + 2
    starts = [store.allocate(2, 0, 0, of) for of in (node, missing, missing, 0, node)]
    assert store.place(starts) == {starts[1], starts[2]}
    assert [_policy_at(store, start) for start in starts] == [PREFERRED, DEFAULT, DEFAULT, DEFAULT, PREFERRED]


@needs_nodes
def test_what_is_freed_has_no_policy_any_more() -> None:
    """The kernel would keep some 340 bytes for each."""
    store = Store()
    node = min(nodes()) + 1
    starts = [store.allocate(2, 0, 0, node) for _ in range(6)]
    starts += [store.allocate(2, 0, 0, 0), store.allocate(2, 0, 0, node)]
    store.place(starts)
    kept = [starts[0], starts[3]]
    store.free([(start, start + 2) for start in kept])
    for start in starts:
        assert _policy_at(store, start) == (PREFERRED if start in kept else DEFAULT)
    assert _policy_at(store, starts[3] // 512 * 512 - 1) == DEFAULT, "the hole in front of one that is kept"
    store.free([])
    for start in starts:
        assert _policy_at(store, start) == _policy_at(store, start + 600) == DEFAULT
    assert store.owners() == []


def test_nodes_stay_with_their_extents_when_others_are_freed() -> None:
    store = Store()
    for start, node in ((512, 3), (1 << 20, 0), (1 << 21, 7)):
        store.adopt(start, 4, 11, node)
    store.free([(512, 513), (1 << 21, (1 << 21) + 1)])
    assert store.owners() == [(512, 4, 11, 3), (1 << 21, 4, 11, 7)]
