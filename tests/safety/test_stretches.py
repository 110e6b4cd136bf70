"""Unmerging what lies side by side at once, whatever slots it maps and whatever was done to it since."""

from __future__ import annotations

import pytest

from gpuksm.guard.arch.x86_64 import NR
from gpuksm.linux import mappings, ptrace
from gpuksm.linux._libc import PAGE_SIZE
from tests.support.merging import scan_until_merged
from tests.support.scripts import LIBC
from tests.support.tampering import Tampering, agent_of
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 256

# The same pages in each process, in an order of its own: hardly two are neighbours in both.
_SHUFFLED = (
    LIBC
    + f"""
import sys
PAGES, step = {PAGES}, int(sys.argv[1])
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
keys = [1 + page * step % PAGES for page in range(PAGES)]
def content(key):
    return key.to_bytes(8, "little") * 512
def shown(page):
    return ctypes.string_at(at + page * 4096, 4096)
for page, key in enumerate(keys):
    ctypes.memmove(at + page * 4096, content(key), 4096)
print("READY area=%#x:%d" % (at, PAGES), flush=True)
"""
    + """
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "quit":
        break
    first, count = map(int, numbers or (0, 0))
    where, length = at + first * 4096, count * 4096
    if word == "read-only":
        assert libc.mprotect(where, length, 1) == 0
    if word == "none":
        assert libc.mprotect(where, length, 0) == 0
        keys[first : first + count] = [None] * count
    if word == "unmap":
        assert libc.munmap(where, length) == 0
        keys[first : first + count] = [None] * count
    if word == "discard":
        assert libc.madvise(where, length, 4) == 0
        keys[first : first + count] = [0] * count
    if word == "lock":
        assert libc.mlock(void(where), size(length)) == 0
    if word == "write":
        for page in range(first, first + count):
            keys[page] = 5000 + page
            ctypes.memmove(at + page * 4096, content(keys[page]), 4096)
    if word == "open":
        assert libc.mprotect(where, length, 3) == 0
        keys[first : first + count] = [1 + page * step % PAGES for page in range(first, first + count)]
    wrong = [p for p, key in enumerate(keys) if key is not None and shown(p) != content(key)]
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""
)


class _Moves:
    """Counts the moves that an agent makes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: ptrace.Registers) -> int | None:
        self.count += call.orig_rax == NR.MREMAP
        return None


def _merged_shuffled(world: World) -> list[Victim]:
    pair = [world.python(_SHUFFLED, step) for step in (1, 101)]
    scan_until_merged(world, pair, ["area"])
    assert min(victim.merged_pages("area") for victim in pair) >= PAGES - 16
    return pair


def _pages(victim: Victim, flag: str) -> set[int]:
    """Pages of the area in VMAs that have this flag of smaps."""
    start = victim.area("area")[0]
    return {
        (page - start) // PAGE_SIZE
        for entry in mappings.smaps(victim.pid)
        if flag in entry.flags
        for page in range(entry.vma.start, entry.vma.end, PAGE_SIZE)
        if start <= page < start + PAGES * PAGE_SIZE
    }


def test_scattered_pages_come_back_together(world: World) -> None:
    one, two = _merged_shuffled(world)
    moves = _Moves()
    with Tampering(agent_of(one.pid), moves):
        assert not world.request("unmerge", pids=[one.pid])["failed"]
    assert 1 <= moves.count <= PAGES // 8
    assert one.merged_pages("area") == 0
    for victim in (one, two):
        victim.verify()


@pytest.mark.parametrize("locked", [False, True])
def test_what_was_done_to_parts_of_it_stays(each_world: World, locked: bool) -> None:
    one, two = _merged_shuffled(each_world)
    done = ["read-only 10 4", "none 20 2", "unmap 30 3", "discard 40 1", "write 60 5", "discard 255 1"]
    for what in done + ["lock 50 3"] * locked:
        one.ask(what)
    protections = {flag: _pages(one, flag) for flag in ("rd", "wr", "lo")}
    assert protections["lo"] == ({50, 51, 52} if locked else set())
    each_world.unmerge()
    assert one.merged_pages("area") == 0
    assert {flag: _pages(one, flag) for flag in protections} == protections
    for victim in (one, two):
        victim.verify()
    one.ask("open 20 2")
    one.ask("discard 100 9")
    one.verify()
