"""Who else holds a page, against what the kernel does: pipes, io_uring, forks, huge pages, the swap cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuksm.errors import FeatureMissing
from gpuksm.linux import numa, page_references, pagemap, uffd, vm
from gpuksm.linux._libc import syscall_function
from gpuksm.linux.btf import Btf
from gpuksm.linux.memory import PageBuffer
from gpuksm.linux.page_references import ANY_COPY, FREE, HELD, Copies, PageReferences
from tests import requirements_env

PAGES = 1100  # more than fit in two calls
_userfaultfd = syscall_function("userfaultfd", uffd.SYS_USERFAULTFD, ctypes.c_int)
_io_uring_setup = syscall_function("io_uring_setup", 425, ctypes.c_uint, ctypes.c_void_p)
_io_uring_register = syscall_function(
    "io_uring_register", 427, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint
)
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1


class Memory(PageBuffer):
    """Memory of this process, and what of it is held."""

    def __init__(
        self, references: PageReferences | Copies, pages: int = PAGES, advice: int = mmap.MADV_NOHUGEPAGE
    ):
        super().__init__(pages)
        self.references = references
        self.data.madvise(advice)
        for page in range(pages):
            self.data[page * 4096] = 1
        numa.drain_lists()

    def held(self, start: int = 0) -> list[int]:
        """Which pages somebody holds, counted from `start`."""
        fd = pagemap.open_pagemap(os.getpid())
        try:
            found = self.references.held(fd, self.address + start * 4096, self.pages - start)
        finally:
            os.close(fd)
        assert len(found) == self.pages - start
        assert set(found) <= {FREE, HELD}
        return [page for page, what in enumerate(found) if what == HELD]


@pytest.fixture(scope="module")
def references() -> Iterator[PageReferences]:
    requirements_env.need("root", "btf", "bpf")
    made = PageReferences()
    yield made
    made.close()


@pytest.fixture
def ring() -> Iterator[int]:
    parameters = ctypes.create_string_buffer(120)
    fd = _io_uring_setup(1, ctypes.addressof(parameters))
    yield fd
    os.close(fd)


def _register(ring: int, address: int, pages: int) -> None:
    vector = (ctypes.c_uint64 * 2)(address, pages * 4096)
    _io_uring_register(ring, _REGISTER_BUFFERS, ctypes.addressof(vector), 1)


def test_a_pipe_holds_what_is_in_it(references: PageReferences) -> None:
    memory = Memory(references)
    assert memory.held() == []
    reading, writing = os.pipe()
    pages = [0, 5, 511, 512, 1024, 1099]
    for page in pages:
        vm.splice_page(writing, memory.address + page * 4096)
    assert memory.held() == pages
    assert memory.held(5) == [page - 5 for page in pages[1:]]
    for page in pages:
        os.read(reading, 4096)
        assert memory.held() == pages[pages.index(page) + 1 :]
    os.close(reading)
    os.close(writing)


def test_io_uring_holds_what_is_registered(references: PageReferences, ring: int) -> None:
    memory = Memory(references)
    _register(ring, memory.address + 100 * 4096, 700)
    assert memory.held() == list(range(100, 800))
    _io_uring_register(ring, _UNREGISTER_BUFFERS, None, 0)
    assert memory.held() == []


def test_who_takes_hold_of_an_armed_page_has_written_it(references: PageReferences, ring: int) -> None:
    """What everything relies on: mm/gup.c, can_follow_write_pte."""
    requirements_env.need("uffd")
    memory = Memory(references)
    tracking = _userfaultfd(uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
    uffd.api(tracking, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED)
    uffd.register(tracking, memory.address, PAGES * 4096)
    fd = pagemap.open_pagemap(os.getpid())
    end = memory.address + PAGES * 4096
    flags = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC
    pagemap.scan(
        fd, memory.address, end, mask=pagemap.PAGE_IS_WRITTEN, ret=pagemap.PAGE_IS_WRITTEN, flags=flags
    )
    assert memory.held() == []
    _register(ring, memory.address + 100 * 4096, 700)
    written = pagemap.scan(fd, memory.address, end, mask=pagemap.PAGE_IS_WRITTEN, ret=pagemap.PAGE_IS_WRITTEN)
    assert [(low, high) for low, high, _ in written] == [
        (memory.address + 100 * 4096, memory.address + 800 * 4096)
    ]
    os.close(fd)
    os.close(tracking)


def test_children_map_pages_and_do_not_hold_them(references: PageReferences) -> None:
    memory = Memory(references)
    reading, writing = os.pipe()
    vm.splice_page(writing, memory.address + 7 * 4096)
    child = os.fork()
    if not child:
        os.read(reading, 1)
        os._exit(0)
    try:
        assert memory.held() == [7]
    finally:
        os.close(reading)
        os.close(writing)
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_huge_page_is_held_as_a_whole(references: PageReferences) -> None:
    memory = Memory(references, 4 * 512 * 4, mmap.MADV_HUGEPAGE)
    text = Path("/proc/self/smaps_rollup").read_text()
    if "AnonHugePages:         0 kB" in text:
        pytest.skip("no huge pages")
    assert memory.held() == []
    middle = memory.address // (1 << 21) * (1 << 21) + (4 << 21)
    page = (middle - memory.address) // 4096
    reading, writing = os.pipe()
    vm.splice_page(writing, middle + 3 * 4096)
    assert memory.held() == list(range(page, page + 512))
    os.close(writing)
    os.close(reading)
    assert memory.held() == []
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(middle + 4096), ctypes.c_size_t(4096), mmap.PROT_READ)
    assert memory.held() == [], "mapped by small entries"


def test_what_is_not_there_or_a_files_is_nobodys(references: PageReferences) -> None:
    memory = Memory(references)
    memory.data.madvise(mmap.MADV_DONTNEED)
    assert memory.held() == []
    file = os.memfd_create("gpuksm-test")
    os.truncate(file, PAGES * 4096)
    shared = mmap.mmap(file, PAGES * 4096)
    for page in range(PAGES):
        shared[page * 4096] = 1
    memory.data = shared
    memory.address = vm.address_of(shared)
    assert memory.held() == []
    os.close(file)


def test_beyond_the_end_of_memory_all_is_held(references: PageReferences) -> None:
    fd = pagemap.open_pagemap(os.getpid())
    assert references.held(fd, (1 << 47) - 4096, 3).count(HELD) >= 1
    os.close(fd)


def test_who_else_may_look_at_pages_is_told_why_not(tmp_path: Path) -> None:
    requirements_env.need("root", "setpriv")
    code = "from gpuksm.linux import page_references as p; print(p.why_not())"
    found = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "references to pages cannot be looked at" in found.stdout


@pytest.mark.parametrize("wrong", ["address", "references", "mappings", "nothing"])
def test_a_kernel_that_is_other_than_it_says_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    requirements_env.need("root", "btf", "bpf")
    first_page, offset = page_references._first_page, Btf.offset
    if wrong == "address":
        monkeypatch.setattr(page_references, "_first_page", lambda *of: first_page(*of) + (64 << 10))

    def elsewhere(self: Btf, name: str, *members: str) -> int:
        other = {"references": "_refcount", "mappings": "_mapcount"}.get(wrong)
        return offset(self, name, *members) + 4 * (members == (other,) and name == "page")

    monkeypatch.setattr(Btf, "offset", elsewhere)
    if wrong == "nothing":
        PageReferences().close()
        return
    with pytest.raises(FeatureMissing, match="counts them in another way"):
        PageReferences()


def test_who_cannot_look_believes_each_copy_to_be_held() -> None:
    memory = Memory(ANY_COPY, 8)
    assert memory.held() == list(range(8))
    memory.data.madvise(mmap.MADV_DONTNEED, 2 * 4096, 4096)
    assert memory.held() == [0, 1, 3, 4, 5, 6, 7]
    file = os.memfd_create("gpuksm-test")
    os.truncate(file, 8 * 4096)
    memory.data = mmap.mmap(file, 8 * 4096, flags=mmap.MAP_PRIVATE)
    memory.address = vm.address_of(memory.data)
    assert sum(memory.data[page * 4096] for page in range(8)) == 0
    memory.data[4096] = 1
    assert memory.held() == [1]
    os.close(file)
