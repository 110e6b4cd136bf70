"""What a child discards is barred until zeros are there, also by a successor."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import children
from gpuksm.linux import mappings, uffd, vm
from gpuksm.linux._libc import PAGE_SIZE
from tests import requirements_env

PAGES = 8


@pytest.fixture
def merged() -> Iterator[tuple[Any, int, int]]:
    """A stand-in for the guard with its store, a userfaultfd of ours, and where it watches the store."""
    requirements_env.need("uffd")
    store = os.memfd_create("gpuksm-store")
    os.write(store, b"x" * PAGES * PAGE_SIZE)
    memory = mmap.mmap(store, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE)
    fd = ctypes.CDLL(None).syscall(uffd.SYS_USERFAULTFD, uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    uffd.api(fd, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_EVENT_REMOVE)
    start = vm.address_of(memory)
    uffd.register(fd, start, PAGES * PAGE_SIZE)
    noted: list[Any] = []
    guard = SimpleNamespace(
        store=SimpleNamespace(inode=os.fstat(store).st_ino),
        journal=SimpleNamespace(append=lambda *record: noted.append(record)),
        noted=noted,
    )
    yield guard, fd, start
    os.close(fd)
    os.close(store)


def _barred(start: int) -> bool:
    return "ui" in mappings.smaps_flags(os.getpid())[start]


@pytest.mark.parametrize("by_the_guard_before", [False, True])
def test_a_discard_is_noted_once_and_barred(merged: tuple[Any, int, int], by_the_guard_before: bool) -> None:
    guard, fd, start = merged
    orphan = children.Orphan(0, fd, 5, os.getpid())
    if by_the_guard_before:  # which died before it had barred what it noted
        orphan.discards = [(start, start + PAGES * PAGE_SIZE)]
    assert not _barred(start)
    for _ in range(2):
        orphan._make_touches_wait(guard, fd, os.getpid(), start, start + PAGES * PAGE_SIZE)
        assert _barred(start)
    assert len(guard.noted) == (not by_the_guard_before)
    assert orphan.discards == [(start, start + PAGES * PAGE_SIZE)]
