"""Chains and their columns, by themselves: what becomes a run, what parts are left, what a slice takes."""

from __future__ import annotations

import itertools
import mmap
import os
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpuksm.guard import chain_commit, comparing
from gpuksm.guard.chain_commit import _Todo, _within, _without_last_page
from gpuksm.guard.chains import Chain
from gpuksm.guard.commit import Outcome
from gpuksm.guard.pace import Pace
from gpuksm.guard.runs import Run, Runs
from gpuksm.guard.store import Store
from gpuksm.guard.verify import Piece
from gpuksm.linux import vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.memory import PageBuffer
from tests.support.comparing import Host, target

SLOTS = st.lists(st.integers(0, 12), min_size=1, max_size=40).map(lambda slots: array("Q", slots))
ADDR = 1 << 20


def _pages(start: int, end: int, slot: int) -> list[tuple[int, int]]:
    return [(at, slot + (at - start) // PAGE_SIZE) for at in range(start, end, PAGE_SIZE)]


@given(SLOTS)
def test_runs_are_what_follows_each_other(slots: array[int]) -> None:
    runs = Chain(3, ADDR, slots).runs()
    pages = [page for run in runs.each() for page in _pages(*run)]
    assert pages == [(ADDR + index * PAGE_SIZE, slot) for index, slot in enumerate(slots)]
    assert all(end > start for start, end, _ in runs.each())
    for (begin, end, slot), (start, _, next_slot) in itertools.pairwise(runs.each()):
        assert end == start
        assert next_slot != slot + (end - begin) // PAGE_SIZE


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_parts_are_the_stretches_that_are_chosen(chosen: list[bool]) -> None:
    chain = Chain(1, ADDR, array("Q", range(len(chosen))))
    found = {
        (part.addr // PAGE_SIZE + at - ADDR // PAGE_SIZE, slot)
        for part in chain.parts(bytearray(chosen))
        for at, slot in enumerate(part.slots)
    }
    assert found == {(index, index) for index, one in enumerate(chosen) if one}
    ends = [part.end for part in chain.parts(bytearray(chosen))]
    assert not {part.addr for part in chain.parts(bytearray(chosen))} & set(ends)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(0, 99)), max_size=12),
    st.integers(0, 30),
    SLOTS,
)
def test_columns_are_added_as_runs_are(
    there: list[tuple[int, int, int]], first: int, slots: array[int]
) -> None:
    columns = Chain(0, first * PAGE_SIZE, slots).runs()
    quick, slow = Runs(), Runs()
    for start, pages, slot in there:
        for runs in (quick, slow):
            runs.add(Run(start * PAGE_SIZE, (start + pages) * PAGE_SIZE, slot))
    quick.add_columns(columns.starts, columns.ends, columns.slots)
    for start, end, slot in columns.each():
        slow.add(Run(start, end, slot))
    assert list(quick) == list(slow)
    assert quick.pages == slow.pages == sum(run.pages for run in slow)


@given(st.lists(SLOTS, min_size=1, max_size=5), st.floats(0, 400), st.integers(1, 9))
def test_slices_take_all_in_order(each: list[array[int]], weight: float, most: int) -> None:
    some = [Chain(index, ADDR + (index << 20), slots) for index, slots in enumerate(each)]
    todo, taken = _Todo(some), []
    while todo:
        start, _ = todo.next_chain()
        part = todo.take(weight, most, at_least=True)
        assert part is not None
        assert part.runs.starts[0] == start
        assert 0 < len(part.runs) <= most
        if part.behind is not None:
            assert part.behind.addr == part.last().end
            assert todo.next_chain()[0] == part.behind.addr
        taken += [(part.record, *run) for run in part.runs.each()]
    assert taken == [(chain.record, *run) for chain in some for run in chain.runs().each()]
    assert todo.take(1e9, 9, at_least=False) is None


@given(SLOTS)
def test_without_its_last_page(slots: array[int]) -> None:
    chain = Chain(0, ADDR, slots)
    left = [page for run in _without_last_page(chain.runs()).each() for page in _pages(*run)]
    assert left == [page for run in chain.runs().each() for page in _pages(*run)][:-1]


@given(st.lists(SLOTS, min_size=1, max_size=5), st.integers(-3, 60))
def test_a_budget_is_kept_and_what_is_left_out_is_told(each: list[array[int]], room: int) -> None:
    todo = _Todo([Chain(index, ADDR + (index << 20), slots) for index, slots in enumerate(each)])
    parts = []
    while todo:
        part = todo.take(1e9, 100, at_least=True)
        assert part is not None
        parts.append(part)
    kept, left_out = _within(parts, room)
    assert sum(len(part.runs) + 2 for part in kept) <= max(0, room)
    assert left_out + sum(part.runs.pages for part in kept) == sum(len(slots) for slots in each)
    whole = {part.record: len(part.runs) for part in parts}
    assert all(part.behind is None for part in kept if len(part.runs) < whole[part.record])


def test_a_long_run_is_cut_as_pieces_are() -> None:
    """A scanner never sends one; whoever does must not have a process stand for longer than it may."""
    taken: list[Piece] = []

    def by_pieces(_target: Any, pieces: list[Piece]) -> Iterator[float]:
        taken.extend(pieces)
        yield 0.0

    committer: Any = SimpleNamespace(pace=Pace(), max_pause_us=100, steps=by_pieces)
    target: Any = SimpleNamespace(query=lambda _address: None)
    assert list(chain_commit.steps(committer, target, [Chain(3, ADDR, array("Q", range(500)))])) == [0.0]
    assert taken == [Piece(3, ADDR, 500, 0)]


def _content(key: int) -> bytes:
    return key.to_bytes(8, "little") * (PAGE_SIZE // 8)


def test_each_page_is_compared_with_its_own_slot(store: Store) -> None:
    """In our own memory: 300 pages in another order than their slots, of which some differ."""
    count = 300
    first, foreign = store.allocate(count, 7), store.allocate(4, 8)
    for index in range(count):
        store.write(first + index, [memoryview(_content(index))])
    memory = PageBuffer(count)
    order = [(index * 7) % count for index in range(count)]
    for page, index in enumerate(order):
        memory.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = _content(index)
    for page in (0, 5, 130, 299):
        memory.view[page * PAGE_SIZE + PAGE_SIZE - 1] ^= 1
    slots = array("Q", [first + index for index in order])
    slots[17], slots[200], slots[201] = foreign, foreign + 4, 1 << 60
    host = Host(store, {1: target(os.getpid(), 7)})
    outcome = Outcome()
    parts = comparing.begin_chains(host, {1: [Chain(4, memory.address, slots)]}, outcome)()[1]
    left_out = {0, 5, 17, 130, 200, 201, 299}
    found = {
        (part.addr - memory.address) // PAGE_SIZE + at: slot
        for part in parts
        for at, slot in enumerate(part.slots)
    }
    assert found == {page: slots[page] for page in range(count) if page not in left_out}
    assert outcome.skipped == {"differs": 4, "other-user": 1, "slot-freed": 2}


def test_what_cannot_be_read_is_passed_over(store: Store) -> None:
    first = store.allocate(8, 7)
    file = os.memfd_create("shrinks")
    os.ftruncate(file, 8 * PAGE_SIZE)
    memory = mmap.mmap(file, 8 * PAGE_SIZE)
    order = [0, 4, 6, 1, 7, 2, 3, 5]  # those of pages 2, 4 and 5 are neither first nor last
    for page, index in enumerate(order):
        store.write(first + index, [memoryview(_content(index))])
        memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = _content(index)
    os.ftruncate(file, 6 * PAGE_SIZE)  # pages 6 and 7, of slots 3 and 5, cannot be read any more
    host, outcome = Host(store, {1: target(os.getpid(), 7)}), Outcome()
    chain = Chain(0, vm.address_of(memory), array("Q", [first + index for index in order]))
    parts = comparing.begin_chains(host, {1: [chain]}, outcome)()[1]
    assert [(part.addr, part.slots) for part in parts] == [(chain.addr, chain.slots[:6])]
    assert outcome.skipped == {"differs": 2}
    os.close(file)
