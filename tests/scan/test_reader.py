"""reader: this process's own memory, with holes, protections and a process that is gone."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess

import numpy as np
import pytest

from gpuksm.hashing.cpu import CpuHasher, digest_pages
from gpuksm.hashing.protocol import KIND_UNREADABLE, RemoteSource
from gpuksm.linux import vm
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.reader import LivePages

PAGES = 64
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def area():
    memory = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, np.uint8).reshape(PAGES, PAGE_BYTES)
    view[:] = np.arange(PAGES, dtype=np.uint8)[:, None]
    yield memory
    libc.mprotect(ctypes.c_void_p(vm.address_of(memory)), ctypes.c_size_t(PAGES * PAGE_BYTES), 3)
    del view


def read(source, first, count):
    out = np.full(count * PAGE_BYTES, 255, np.uint8)
    ok = np.zeros(count, np.bool_)
    source.read(first, count, out, ok)
    return out.reshape(count, PAGE_BYTES), ok


def test_any_slice_of_scattered_pages(area):
    start = vm.address_of(area)
    chosen = [0, 1, 2, 5, 9, 10, 30, 31, 32, 33, 63]
    column = np.array([start + page * PAGE_BYTES for page in chosen], np.uint64)
    source = LivePages([(os.getpid(), column[:6]), (os.getpid(), column[6:])])
    assert source.pages == len(chosen)
    for first in range(len(chosen)):
        for count in range(1, len(chosen) - first + 1):
            pages, ok = read(source, first, count)
            assert ok.all()
            assert (pages == np.array(chosen[first : first + count], np.uint8)[:, None]).all()


def test_more_stretches_than_one_call_takes():
    pages = 5000
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, np.uint64).reshape(pages, 512)
    view[:] = np.arange(pages, dtype=np.uint64)[:, None]
    column = np.arange(0, pages, 2, dtype=np.uint64) * PAGE_BYTES + vm.address_of(memory)
    got, ok = read(LivePages([(os.getpid(), column)]), 0, len(column))
    assert ok.all()
    assert np.array_equal(got.view(np.uint64)[:, 0], np.arange(0, pages, 2, dtype=np.uint64))
    del view


def test_vanished_pages_are_marked_and_the_rest_is_read(area):
    start = vm.address_of(area)
    for page in (3, 4, 20, 63):
        libc.munmap(ctypes.c_void_p(start + page * PAGE_BYTES), ctypes.c_size_t(PAGE_BYTES))
    column = np.arange(PAGES, dtype=np.uint64) * PAGE_BYTES + np.uint64(start)
    got, ok = read(LivePages([(os.getpid(), column)]), 0, PAGES)
    assert np.flatnonzero(~ok).tolist() == [3, 4, 20, 63]
    assert (got[ok] == np.arange(PAGES, dtype=np.uint8)[ok][:, None]).all()


def test_memory_without_any_access_is_read_too(area):
    start = vm.address_of(area)
    libc.mprotect(ctypes.c_void_p(start + 4 * PAGE_BYTES), ctypes.c_size_t(4 * PAGE_BYTES), 0)
    column = np.arange(12, dtype=np.uint64) * PAGE_BYTES + np.uint64(start)
    before = len(os.listdir("/proc/self/fd"))
    source = LivePages([(os.getpid(), column)])
    got, ok = read(source, 0, 12)
    source.close()
    assert ok.all()
    assert (got == np.arange(12, dtype=np.uint8)[:, None]).all()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_is_gone_gives_no_pages():
    child = subprocess.Popen(["true"])
    child.wait()
    _, ok = read(LivePages([(child.pid, np.arange(4, dtype=np.uint64) * PAGE_BYTES)]), 0, 4)
    assert not ok.any()


class Plain:
    """A source that backends may only ask."""

    def __init__(self, source):
        self.pages, self.read = source.pages, source.read


@pytest.fixture(params=[1, 3])
def hasher(request):
    hasher = CpuHasher(5, request.param, chunk_pages=7)
    yield hasher
    hasher.close()


def digests(hasher, source):
    found, kinds = np.full(source.pages, 99, np.uint64), np.full(source.pages, 99, np.uint8)
    hasher.digest(source, found, kinds)
    return found.tolist(), kinds.tolist()


def test_a_backend_that_reads_by_itself_sees_the_same(area, hasher):
    start = vm.address_of(area)
    chosen = [0, 1, 2, 5, 9, 10, 30, 31, 32, 33, 63]
    column = np.array([start + page * PAGE_BYTES for page in chosen], np.uint64)
    child = subprocess.Popen(["sleep", "60"])
    try:
        # Another process in between, which has nothing there: its pages cannot be read.
        me = os.getpid()
        parts = [(me, column), (child.pid, column[:3]), (me, column[4:]), (me, column)]
        source = LivePages(parts)
        assert isinstance(source, RemoteSource)
        got, kinds = digests(hasher, source)
        assert (got, kinds) == digests(hasher, Plain(source))
    finally:
        child.kill()
        child.wait()
    assert kinds[11:14] == [KIND_UNREADABLE] * 3
    assert kinds[:11] == kinds[-11:] != [KIND_UNREADABLE] * 11
    assert got[:11] == got[-11:]
    assert len(set(got[:11])) == len(chosen)


def test_a_backend_that_reads_by_itself_marks_what_has_vanished(area, hasher):
    start = vm.address_of(area)
    for page in (3, 4, 20, 63):
        libc.munmap(ctypes.c_void_p(start + page * PAGE_BYTES), ctypes.c_size_t(PAGE_BYTES))
    libc.mprotect(ctypes.c_void_p(start + 30 * PAGE_BYTES), ctypes.c_size_t(4 * PAGE_BYTES), 0)
    source = LivePages([(os.getpid(), np.arange(PAGES, dtype=np.uint64) * PAGE_BYTES + np.uint64(start))])
    got, kinds = digests(hasher, source)
    source.close()
    assert [page for page, kind in enumerate(kinds) if kind == KIND_UNREADABLE] == [3, 4, 20, 63]
    plain = Plain(source)
    assert (got, kinds) == digests(hasher, plain)
    source.close()


class Unasked(LivePages):
    def read(self, first, count, out, ok):
        raise AssertionError("a backend that reads by itself asked for what it could have read")


def test_a_backend_that_reads_by_itself_takes_more_stretches_than_one_call():
    pages = 5000
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, np.uint64).reshape(pages, 512)
    view[:] = np.arange(pages, dtype=np.uint64)[:, None]
    column = np.arange(0, pages, 2, dtype=np.uint64) * PAGE_BYTES + vm.address_of(memory)
    hasher = CpuHasher(5, 1, chunk_pages=4096)
    got, kinds = digests(hasher, Unasked([(os.getpid(), column)]))
    hasher.close()
    expected, _ = digest_pages(np.ascontiguousarray(view[::2]).view(np.uint8), 5)
    assert got == expected.tolist()
    assert KIND_UNREADABLE not in kinds
    del view
