"""Memory that is tracked and not merged costs its owner nothing: nobody waits for the guard (hazard 19)."""

from __future__ import annotations

import os
import signal

from tests.support import processes, standstill
from tests.support.scripts import LIBC
from tests.support.world import World

# Discards, moves, unmaps and protects memory of its own.
_CALLS = (
    LIBC
    + """
import sys
PAGES = 64
own_key = int(sys.argv[1])
def area(key):
    at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
    assert libc.mprotect(at, PAGES * 4096, 3) == 0
    for page in range(PAGES):
        ctypes.memmove(at + page * 4096, (key + page).to_bytes(8, "little") * 512, 4096)
    return at
shared, own = area(1000), area(own_key)
print("READY shared=%#x:%d own=%#x:%d" % (shared, PAGES, own, PAGES), flush=True)
def is_page(at, key):
    return ctypes.string_at(at, 4096) == key.to_bytes(8, "little") * 512
for line in sys.stdin:
    if line == "quit\\n":
        break
    right = True
    if line == "own\\n":
        assert libc.madvise(own, 8 * 4096, 4) == 0
        assert libc.madvise(own + 9 * 4096, 4096, 8) == 0
        moved = libc.mremap(own + 16 * 4096, 8 * 4096, 8 * 4096, 3, own + 32 * 4096)
        assert moved == own + 32 * 4096
        assert libc.munmap(own + 48 * 4096, 4 * 4096) == 0
        assert libc.mprotect(own + 60 * 4096, 4096, 1) == 0
        right = is_page(own, 0) and is_page(moved, own_key + 16) and is_page(own + 12 * 4096, own_key + 12)
    if line == "shared\\n":
        assert libc.madvise(shared, 8 * 4096, 4) == 0
        right = is_page(shared, 0) and is_page(shared + 9 * 4096, 1009)
    print("OK" if right else "CORRUPT", flush=True)
"""
)


def test_calls_on_unmerged_memory_do_not_wait_for_the_guard(each_world: World) -> None:
    victims = [each_world.python(_CALLS, key) for key in (5000, 6000)]
    each_world.scan(*victims)
    one, two = victims
    assert one.merged_pages("shared") >= 63
    assert one.merged_pages("own") == 0
    guard = each_world.guard_pid()
    os.kill(guard, signal.SIGSTOP)
    try:
        one.ask("own", timeout=60)
        two.send("shared")
        standstill.wait_for_event(two)  # merged memory is another matter: there the caller waits
        assert processes.thread_states(guard)[guard] == "T"
    finally:
        os.kill(guard, signal.SIGCONT)
    two.answer()
