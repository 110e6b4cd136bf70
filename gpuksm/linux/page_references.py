"""Who else holds a page: what KSM compares before it merges one, read from outside.

The kernel counts who refers to a page and who maps it.  Where it is referred to more often than it is mapped,
somebody has taken hold of it: a device that reads or writes it (O_DIRECT, AIO, buffers registered with
io_uring, RDMA, VFIO), a pipe, KVM for a machine within a machine; or, for a moment, the kernel's own lists.
Both counts are in the page's `struct page` (a large folio's in its first two), and a BPF program that is
attached to nothing reads them.  Nothing is changed, neither in the kernel nor in the process.

What must hold: nobody is believed to hold nothing who does.  Whatever is not understood counts as held: what
is swapped out, what cannot be read, a large folio in a kernel that does not count its mappings.  Where fields
lie is what the kernel says (BTF), where its array of pages lies is worked out from two pages of our own, and
before any answer is believed a page of ours is looked at while a pipe holds it, and while nobody does.

Source: mm/ksm.c (write_protect_page: page_mapcount(page) + 1 + swapped != page_count(page)),
include/linux/mm_types.h, Documentation/core-api/pin_user_pages.rst.  A large folio's `_large_mapcount` is of
Linux 6.10 (05c5323b2a34).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct

from gpuksm.errors import FeatureMissing, GpuksmError
from gpuksm.linux import numa, pagemap, vm
from gpuksm.linux._libc import PAGE_SIZE
from gpuksm.linux.bpf import GET_CURRENT_TASK, R0, R1, R2, R3, R4, R6, R7, R8, R9, R10, Area, Code, Program
from gpuksm.linux.btf import Btf
from gpuksm.linux.memory import PageBuffer
from gpuksm.linux.vm import address_of

FREE, HELD = 0, 1
PAGES_PER_CALL = 128  # the kernel checks the program for each of them: 75 ms with 512, once

_FRAME_BITS = 55
_FRAME = (1 << _FRAME_BITS) - 1
_ENTRIES = 8  # of the area: a count, then pagemap entries, then what was found
_FOUND = _ENTRIES + PAGES_PER_CALL * pagemap.ENTRY_BYTES
_TRIES = 5
_ARRAY_ALIGNMENT = (
    1 << 30
)  # of vmemmap, randomized or not (arch/x86/mm/kaslr.c); arrays of sections have less
_PROBE_PAGES = 64  # more than the kernel's own lists hold for one processor (PAGEVEC_SIZE 31)


class PageReferences:
    """Tells pages that somebody else holds; FeatureMissing where that cannot be had, with the reason."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            try:
                self._area = Area(_FOUND + PAGES_PER_CALL)
                undo.callback(self._area.close)
                layout = Btf()
                code = _code(layout, _first_page(layout, self._area), self._area)
                del layout  # some 20 MiB
                self._program = Program(code)
                undo.callback(self._program.close)
            except OSError as error:
                raise FeatureMissing(f"references to pages cannot be looked at: {error.strerror}") from None
            self._data = memoryview(self._area.data)
            undo.callback(self._data.release)
            try:
                self._check()
            except (OSError, GpuksmError) as error:
                raise FeatureMissing(f"references to pages cannot be looked at: {error}") from None
            undo.pop_all()

    def held(self, pagemap_fd: int, start: int, pages: int) -> bytearray:
        """One byte for each page from address `start` of the process whose pagemap that is: HELD or FREE.

        Where there is none, or one of a file, it is FREE, whoever holds that; what is swapped out is HELD.
        """
        found = bytearray()
        while len(found) < pages:
            count = min(PAGES_PER_CALL, pages - len(found))
            entries = self._data[_ENTRIES : _ENTRIES + count * pagemap.ENTRY_BYTES]
            got = pagemap.read_entries(pagemap_fd, start + len(found) * PAGE_SIZE, entries)
            struct.pack_into("<Q", self._data, 0, got)
            self._program.run()
            found += self._data[_FOUND : _FOUND + got]
            found += bytes([HELD]) * (count - got)
        return found

    def close(self) -> None:
        self._data.release()
        self._program.close()
        self._area.close()

    def _check(self) -> None:
        """Look at pages of our own, one of which a pipe holds."""
        if not any(self._tells_a_pipes_page() for _ in range(_TRIES)):
            raise FeatureMissing("this kernel counts them in another way")

    def _tells_a_pipes_page(self) -> bool:
        memory = PageBuffer(_PROBE_PAGES)
        memory.data.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(_PROBE_PAGES):
            memory.data[page * PAGE_SIZE] = 1
        numa.drain_lists()
        with contextlib.ExitStack() as undo:
            fd = pagemap.open_pagemap(os.getpid())
            undo.callback(os.close, fd)
            reading, writing = os.pipe()
            undo.callback(os.close, reading)
            undo.callback(os.close, writing)
            before = bytes(self.held(fd, memory.address, 3))
            vm.splice_page(writing, memory.address + PAGE_SIZE)
            during = bytes(self.held(fd, memory.address, 3))
            os.read(reading, PAGE_SIZE)
            after = bytes(self.held(fd, memory.address, 3))
        return (before, during, after) == (bytes(3), bytes([FREE, HELD, FREE]), bytes(3))


class Copies:
    """For who cannot look: each page of its own that a process has is believed to be held."""

    def held(self, pagemap_fd: int, start: int, pages: int) -> bytearray:
        """As `PageReferences.held`."""
        entries = bytearray(pages * pagemap.ENTRY_BYTES)
        pagemap.read_entries(pagemap_fd, start, entries)
        anything = pagemap.ENTRY_PRESENT | pagemap.ENTRY_SWAPPED
        return bytearray(
            HELD if entry & anything and not entry & pagemap.ENTRY_FILE else FREE
            for (entry,) in struct.iter_unpack("<Q", entries)
        )


ANY_COPY = Copies()


def can_look() -> bool:
    """Whether references to pages can be looked at here; it is tried once."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Why references to pages cannot be looked at here, or None where they can."""
    try:
        PageReferences().close()
    except FeatureMissing as error:
        return str(error)
    return None


def _first_page(layout: Btf, area: Area) -> int:
    """Where the kernel has the struct of its page 0, by where it has those of two pages of ours."""
    found = set()
    for _ in range(2):
        file = os.memfd_create("gpuksm-page")
        try:
            os.truncate(file, PAGE_SIZE)
            with mmap.mmap(file, PAGE_SIZE) as memory:
                memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page is no only page
                memory[0] = 1
                found.add(_page_of_file(layout, file, area) - _frame(memory) * layout.size("page"))
        finally:
            os.close(file)
    first = found.pop()
    if found or first % _ARRAY_ALIGNMENT:
        raise FeatureMissing(
            "references to pages cannot be looked at: this kernel's pages are in no one array"
        )
    return first


def _page_of_file(layout: Btf, file: int, area: Area) -> int:
    """Where the kernel has the struct of the only page of our `file`: its page cache has nothing else."""
    way = (
        layout.offset("task_struct", "files"),
        layout.offset("files_struct", "fdt"),
        layout.offset("fdtable", "fd"),
        file * 8,
        layout.offset("file", "f_mapping"),
        layout.offset("address_space", "i_pages", "xa_head"),
    )
    code = Code()
    code.call(GET_CURRENT_TASK)
    code.copy(R6, R0)
    for offset in way:
        code.read_kernel(-8, 8, R6, offset)
        code.load(R6, R10, -8, 8)
    code.set_area(R7, area)
    code.store(R7, 0, R6, 8)
    code.end()
    program = Program(code)
    try:
        program.run()
    finally:
        program.close()
    address: int = struct.unpack_from("<Q", area.data)[0]
    return address


def _frame(memory: mmap.mmap) -> int:
    """The page frame number of a page of ours; the kernel tells it to CAP_SYS_ADMIN alone."""
    fd = pagemap.open_pagemap(os.getpid())
    entry = bytearray(pagemap.ENTRY_BYTES)
    try:
        pagemap.read_entries(fd, address_of(memory), entry)
    finally:
        os.close(fd)
    frame = int.from_bytes(entry, "little") & _FRAME
    if not frame:
        raise FeatureMissing("references to pages cannot be looked at: that takes CAP_SYS_ADMIN")
    return frame


def _jump_if_bit(code: Code, bit: int, name: str) -> None:
    """Jump where R8 has `bit`."""
    code.copy(R2, R8)
    code.shift_right(R2, bit.bit_length() - 1)
    code.jump_if(R2, "&", 1, name)


def _code(layout: Btf, first_page: int, area: Area) -> Code:
    """What finds out of the area's pagemap entries which pages are held."""
    page_bytes = layout.size("page")
    references, mappings = layout.offset("page", "_refcount"), layout.offset("page", "_mapcount")
    if page_bytes & (page_bytes - 1) or max(references, mappings) + 4 > page_bytes:
        raise FeatureMissing("references to pages cannot be looked at: this kernel's struct page is unknown")
    code = Code()
    code.set_area(R7, area)
    code.set(R6, 0)
    code.label("next page")
    code.load(R1, R7, 0, 8)
    code.jump_if_register(R6, ">=", R1, "end")
    code.copy(R1, R6)
    code.shift_left(R1, 3)
    code.add_register(R1, R7)
    code.load(R8, R1, _ENTRIES, 8)
    code.set(R9, FREE)
    _jump_if_bit(code, pagemap.ENTRY_FILE, "found")
    code.set(R9, HELD)
    _jump_if_bit(code, pagemap.ENTRY_PRESENT, "look")
    _jump_if_bit(code, pagemap.ENTRY_SWAPPED, "found")
    code.set(R9, FREE)
    code.jump("found")
    code.label("look")
    code.shift_left(R8, 64 - _FRAME_BITS)
    code.shift_right(R8, 64 - _FRAME_BITS - page_bytes.bit_length() + 1)
    code.set(R2, first_page)
    code.add_register(R8, R2)
    stack = -page_bytes
    code.read_kernel(stack, page_bytes, R8, 0)
    code.jump_if(R0, "!=", 0, "found")
    code.load(R2, R10, stack + layout.offset("page", "compound_head"), 8)
    code.jump_if(R2, "&", 1, "tail")
    code.load(R3, R10, stack + layout.offset("page", "flags"), 8)
    code.jump_if(R3, "&", 1 << layout.enumerator("PG_head"), "large")
    code.load(R3, R10, stack + references, 4)
    code.load(R4, R10, stack + mappings, 4)
    code.load(R2, R10, stack + layout.offset("page", "flags"), 8)
    for name in ("PG_swapbacked", "PG_swapcache"):
        code.copy(R1, R2)
        code.shift_right(R1, layout.enumerator(name))
        code.jump_if(R1, "&", 1, name)
        code.jump("compare")
        code.label(name)
    code.add(R4, 1)  # the swap cache refers to it, too
    code.jump("compare")
    code.label("tail")
    code.copy(R8, R2)
    code.add(R8, -1)
    code.label("large")
    try:
        # Splitting its page table entry maps it once more for a moment: pins are counted apart, and the
        # references must not have changed meanwhile.
        counts = (references, layout.offset("folio", "_large_mapcount"))
        for number, offset in enumerate((*counts, layout.offset("folio", "_pincount"), references), 1):
            code.read_kernel(-8 * number, 4, R8, offset)
            code.jump_if(R0, "!=", 0, "found")
        code.load(R3, R10, -24, 4)
        code.jump_if(R3, "!=", 0, "found")
        code.load(R3, R10, -8, 4)
        code.load(R4, R10, -32, 4)
        code.jump_if_register(R3, "!=", R4, "found")
        code.load(R4, R10, -16, 4)
    except FeatureMissing:
        code.jump("found")
    code.label("compare")  # counts of mappings begin at -1
    code.add(R4, 1)
    code.jump_if_register(R3, "!=", R4, "found")
    code.set(R9, FREE)
    code.label("found")
    code.copy(R1, R6)
    code.add_register(R1, R7)
    code.store(R1, _FOUND, R9, 1)
    code.add(R6, 1)
    code.jump_if(R6, "<", PAGES_PER_CALL, "next page")
    code.label("end")
    code.end()
    return code
