"""source: what is read without the interpreter, and parts of a source, are what `read` gives."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuksm.hashing import source as source_module
from gpuksm.hashing.cpu import CpuHasher
from gpuksm.hashing.protocol import MAX_SEGMENTS, PAGE_BYTES, RemoteSource
from gpuksm.hashing.source import ArraySource, OwnMemory, part_of, reader_of
from gpuksm.scan.reader import LivePages

PAGES = 3000
Got = tuple[NDArray[np.uint8], NDArray[np.bool_]]


@pytest.fixture
def pages() -> NDArray[np.uint8]:
    """uint8[PAGES, 4096] at a page boundary, each page different."""
    room = np.zeros((PAGES + 1) * PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % PAGE_BYTES
    held = room[start : start + PAGES * PAGE_BYTES].reshape(PAGES, PAGE_BYTES)
    held.view(np.uint64)[:] = np.arange(PAGES, dtype=np.uint64)[:, None]
    return held


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that has none of our pages."""
    child = subprocess.Popen(["sleep", "60"])
    yield child.pid
    child.kill()
    child.wait()


def scattered(pages: NDArray[np.uint8], stranger: int) -> LivePages:
    """Every second page, which takes several calls; some that are not there; the rest in one stretch."""
    at = pages.ctypes.data + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_BYTES)
    mine = os.getpid()
    return LivePages([(mine, at[::2]), (stranger, at[:5]), (mine, at[:700]), (stranger, at[9:10])])


def taken(read: Any, first: int, count: int) -> Got:
    out, ok = np.zeros(count * PAGE_BYTES, np.uint8), np.zeros(count, np.bool_)
    read(first, count, out, ok)
    return out.reshape(count, PAGE_BYTES), ok


def assert_same(got: Got, wanted: Got) -> None:
    np.testing.assert_array_equal(got[1], wanted[1])
    assert (got[0][got[1]] == wanted[0][wanted[1]]).all()


def test_the_compiled_reader_reads_what_the_source_does(pages: NDArray[np.uint8], stranger: int) -> None:
    live = scattered(pages, stranger)
    assert len(live.stretches.pid) > MAX_SEGMENTS
    read, chosen = reader_of(live), random.Random(3)
    spans = [(0, live.pages), (1499, 8), (1500, 5), (live.pages - 1, 1)]
    spans += [
        (first, chosen.randint(1, live.pages - first)) for first in chosen.sample(range(live.pages), 20)
    ]
    for first, count in spans:
        assert_same(taken(read, first, count), taken(live.read, first, count))
    assert taken(read, 0, live.pages)[1].sum() == live.pages - 6


def test_the_compiled_reader_asks_only_for_what_it_could_not_read(
    pages: NDArray[np.uint8], stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = scattered(pages, stranger)
    monkeypatch.setattr(source_module, "_CALL_PAGES", 4)
    asked: list[int] = []
    slow = live.read

    def ask(first: int, *rest: Any) -> None:
        asked.append(first)
        slow(first, *rest)

    monkeypatch.setattr(live, "read", ask)
    taken(reader_of(live), 0, live.pages)
    # Calls are of one process each: a new one begins at page 1505.
    assert asked == [1500, 1504, 2205]


@pytest.mark.parametrize("first", [0, 1, 700, 1497, 1500, 1502, 1505, 2205])
def test_parts(pages: NDArray[np.uint8], stranger: int, first: int) -> None:
    live = scattered(pages, stranger)
    hasher = CpuHasher(3, 2)
    for end in {first + 1, min(first + 300, live.pages), live.pages}:
        part = part_of(live, first, end)
        assert isinstance(part, RemoteSource)
        assert part.pages == end - first
        for read in (part.read, reader_of(part)):
            assert_same(taken(read, 0, part.pages), taken(live.read, first, end - first))
        digests, kinds = np.empty(live.pages, np.uint64), np.empty(live.pages, np.uint8)
        hasher.digest(live, digests, kinds)
        hasher.digest(part, digests[: part.pages], kinds[: part.pages])
        whole = np.empty(live.pages, np.uint64), np.empty(live.pages, np.uint8)
        hasher.digest(live, *whole)
        np.testing.assert_array_equal(digests[: part.pages], whole[0][first:end])
        np.testing.assert_array_equal(kinds[: part.pages], whole[1][first:end])
    hasher.close()


def test_parts_of_what_can_only_be_asked(pages: NDArray[np.uint8]) -> None:
    held = ArraySource(pages)
    part = part_of(held, 5, 9)
    assert not isinstance(part, RemoteSource)
    assert_same(taken(reader_of(part), 1, 2), taken(held.read, 6, 2))


def test_own_memory_is_read_as_anothers(pages: NDArray[np.uint8]) -> None:
    own = OwnMemory(pages)
    assert isinstance(own, RemoteSource)
    assert_same(taken(reader_of(own), 3, 900), taken(own.read, 3, 900))
