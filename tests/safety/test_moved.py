"""Memory that moves between being compared and being replaced (hazards 5 and 35).

The guard stops itself when it has compared a plan; the victim then moves other pages to
where those are, and the guard goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuksm import wire
from tests.support import standstill
from tests.support.scanner import Scanner
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 512

# `over FIRST LAST STEP`: every second page of the range is replaced by the one STEP pages further on.
_MOVING = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = libc.mremap.restype = void
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [void, size, size, ctypes.c_int, void]
libc.mprotect.argtypes = [void, size, ctypes.c_int]
PAGES = 512
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
keys = {page: 1000 + page for page in range(PAGES)}
def content(key):
    return key.to_bytes(8, "little") * 512
def write(page, key):
    keys[page] = key
    ctypes.memmove(at + page * 4096, content(key), 4096)
for page in range(PAGES):
    write(page, keys[page])
print("READY area=%#x:%d" % (at, PAGES), flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "quit":
        break
    if word == "write":
        first, last, salt = map(int, rest)
        for page in range(first, last):
            write(page, salt + page)
    if word == "over":
        first, last, step = map(int, rest)
        for page in range(first, last, 2):
            there = at + page * 4096
            assert libc.mremap(there + step * 4096, 4096, 4096, 3, there) == there
            keys[page] = keys.pop(page + step)
    wrong = [page for page in keys if ctypes.string_at(at + page * 4096, 4096) != content(keys[page])]
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""


@pytest.fixture
def held(world: World) -> Iterator[World]:
    """A guard that stops itself whenever it has compared a plan."""
    standstill.start_standing_still(world, "verified", world.python(_MOVING))
    yield world
    standstill.let_go(world.guard_processes())


def test_plain_memory_moves_by_the_hundreds(held: World) -> None:
    victims = [held.python(_MOVING) for _ in range(2)]
    guard = held.guard_pid()
    scanner = Scanner(held, victims)
    (one, _), (two, _) = (victim.area("area") for victim in victims)
    first, second = scanner.targets
    plan = [
        (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, first, one, PAGES, 0, 0, 0, 0),
        (wire.OP_MAP, wire.FLAG_NEW_EXTENT, 0, second, two, PAGES, 0, 0, 0, 0),
    ]
    try:
        reply = standstill.while_it_stands(
            guard,
            lambda: scanner.commit([PAGES], plan),
            lambda: [victim.ask("over 0 480 1") for victim in victims] and None,
        )
        assert reply["mapped_pages"] == 2 * 32, reply
        for victim in victims:
            assert victim.merged_pages("area") == 32
            victim.verify()
    finally:
        scanner.close()


def test_merged_memory_moves_while_it_is_merged_again(held: World) -> None:
    """The mover waits for the guard, which learns of the move when it freezes the process."""
    victims = [held.python(_MOVING) for _ in range(2)]
    guard = held.guard_pid()
    scan = held.start("scan", *(part for victim in victims for part in ("--pid", victim.pid)))
    standstill.while_it_stands(guard, lambda: scan.wait(60), lambda: None)
    assert min(victim.merged_pages("area") for victim in victims) >= PAGES - 1
    victim = victims[0]
    victim.ask("write 0 64 7000")
    victim.ask("write 256 320 7000")
    scanner = Scanner(held, victims)
    start, _ = victim.area("area")
    target = scanner.targets[0]
    try:
        for page in range(0, 32, 2):
            plan = (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, target, start + page * 4096, 1, 0, 0, 0, 0)
            reply = standstill.while_it_stands(
                guard,
                lambda plan=plan: scanner.commit([1], [plan]),  # type: ignore[misc]
                lambda page=page: _begin(victim, f"over {page} {page + 2} 256"),  # type: ignore[misc]
            )
            victim.answer()
            assert reply["mapped_pages"] == 0, reply
            assert reply["skipped"].get("moved") == 1, (page, reply)
        # What stays where it is is merged again.
        plan = (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, target, start + 40 * 4096, 8, 0, 0, 0, 0)
        reply = standstill.while_it_stands(guard, lambda: scanner.commit([8], [plan]), lambda: None)
        assert reply["mapped_pages"] == 8, reply
    finally:
        scanner.close()
    for each in victims:
        each.verify()


def _begin(victim: Victim, command: str) -> None:
    """Send a command and see it wait for the guard."""
    victim.send(command)
    standstill.wait_for_event(victim)
