"""An agent replaces nothing more once the target's threads may run (hazards 9 and 10).

They do when the guard has died, within a group of runs that lie behind each other too, and when it has
taken back what the agent had not begun.  What was replaced is watched all the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from gpuksm import wire
from gpuksm.guard.agent import WAIT_NS
from gpuksm.guard.arch.x86_64 import NR
from gpuksm.linux import ptrace
from tests.support import processes
from tests.support.scanner import Scanner
from tests.support.tampering import Tampering, agent_of
from tests.support.victims import Victim
from tests.support.world import World

# `write` changes every page of the second half; `discard` gives the first page back.
_VICTIM = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype = void
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [void, size, ctypes.c_int]
PAGES = 24
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(void(at), size(PAGES * 4096), 3) == 0
def content(key):
    return key.to_bytes(8, "little") * 512
keys = [1 + page for page in range(PAGES)]
def put(page):
    ctypes.memmove(at + page * 4096, content(keys[page]), 4096)
for page in range(PAGES):
    put(page)
print("READY area=%#x:%d" % (at, PAGES), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    if word == "write":
        for page in range(PAGES // 2, PAGES):
            keys[page] = 1000 + page
            put(page)
    if word == "discard":
        keys[0] = 0
        assert libc.madvise(at, 4096, 4) == 0
    wrong = [page for page in range(PAGES) if ctypes.string_at(at + page * 4096, 4096) != content(keys[page])]
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""
_PAGES = 24
_AFTER = 4  # runs that are mapped before the guard dies


def _plan(scanner: Scanner, victims: list[Victim], pages: int, step: int) -> list[tuple[int, ...]]:
    """Of every `step` pages of the first victim the first `pages` are mapped, as a run."""
    start, other = (each.area("area")[0] for each in victims)
    first, second = scanner.targets
    plan = [(wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, second, other, _PAGES, 0, 0, 0, 0)]
    plan += [
        (wire.OP_MAP, wire.FLAG_NEW_EXTENT, 0, first, start + page * 4096, pages, 0, page, 0, 0)
        for page in range(0, _PAGES, step)
    ]
    return plan


def _maps_the_store(call: ptrace.Registers) -> bool:
    return call.orig_rax == NR.MMAP and call.r8 & 0xFFFFFFFF != 0xFFFFFFFF


def test_what_was_taken_back_is_not_performed(world: World) -> None:
    victims = [world.python(_VICTIM) for _ in range(2)]
    world.scan(*victims)  # starts the guard, and is no matter
    world.unmerge()
    scanner = Scanner(world, victims)
    mapped = 0

    def stand_still(call: ptrace.Registers) -> int | None:
        nonlocal mapped
        mapped += _maps_the_store(call)
        if mapped == _AFTER and _maps_the_store(call):
            time.sleep(WAIT_NS / 1e9 + 0.5)  # the guard gives up waiting
        return None

    with Tampering(agent_of(victims[0].pid), stand_still):
        scanner.commit([_PAGES], _plan(scanner, victims, 2, 3))
        for word in ("write", "verify"):
            for victim in victims:
                victim.ask(word)
    assert mapped == _AFTER
    scanner.close()


def test_the_guard_dies_within_a_group(world: World) -> None:
    victims = [world.python(_VICTIM) for _ in range(2)]
    world.scan(*victims)  # starts the guard, and is no matter
    world.unmerge()
    scanner = Scanner(world, victims)
    guard = world.guard_pid()
    victim = victims[0]
    mapped = 0

    def die_within(call: ptrace.Registers) -> int | None:
        nonlocal mapped
        if not _maps_the_store(call):
            return None
        mapped += 1
        if mapped == _AFTER:
            os.kill(guard, signal.SIGKILL)
            while processes.alive(guard):
                time.sleep(0.001)
            victim.ask("write")
        return None

    plan = _plan(scanner, victims, 1, 1)
    with Tampering(agent_of(victim.pid), die_within), contextlib.suppress(OSError, wire.WireError):
        scanner.commit([_PAGES], plan)
    assert mapped >= _AFTER, "nothing was mapped in a group"
    victim.ask("verify")
    victim.ask("discard")
    victims[1].ask("verify")
    world.guard_pid()
    victim.ask("verify")
    scanner.close()
