"""Targets at their limits: what fails in them for want of mappings or memory costs no byte (hazard 12)."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import pytest

from gpuksm import wire
from gpuksm.guard.arch.x86_64 import NR
from gpuksm.linux import ptrace, uffd
from tests import requirements_env
from tests.support import processes
from tests.support.merging import scan_until_merged
from tests.support.scanner import Scanner
from tests.support.tampering import Tampering, agent_of
from tests.support.victims import Victim
from tests.support.world import World

_ENOMEM, _FIXED, _NOBODY = 12, 0x10, (1 << 64) - 1

# Uses up vm.max_map_count with mappings of its own, then discards and grows what is merged.
_CROWDED = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
void, size = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.argtypes = [void, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [void, size]
libc.mprotect.argtypes, libc.madvise.argtypes = [void, size, ctypes.c_int], [void, size, ctypes.c_int]
PAGES = 64
at = libc.mmap(None, PAGES * 4096, 3, 0x22, -1, 0)
keys = [1 + page for page in range(PAGES)]
def content(key):
    return key.to_bytes(8, "little") * 512
for page in range(PAGES):
    ctypes.memmove(at + page * 4096, content(keys[page]), 4096)
libc.madvise(at, PAGES * 4096, 15)  # MADV_NOHUGEPAGE: alone in its mapping
SPAN = int(open("/proc/sys/vm/max_map_count").read()) * 2 * 4096
print("READY area=%#x:%d" % (at, PAGES), flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "quit":
        break
    if word == "crowd":
        crowd = libc.mmap(None, SPAN, 0, 0x4022, -1, 0)
        page = 0  # of pairs
        while libc.mprotect(crowd + 2 * page * 4096, 4096, 1) == 0:
            page += 1
        # An odd number of mappings may be left: one more at the end of something.
        libc.mprotect(crowd + SPAN - 4096, 4096, 1)
    if word == "spare":
        libc.munmap(crowd + 2 * page * 4096 - 4096 * 2, 4096)
        page -= 1
    if word == "relieve":
        libc.munmap(crowd, SPAN)
    if word == "discard":
        first, count = map(int, rest)
        assert libc.madvise(at + first * 4096, count * 4096, 4) == 0
        keys[first : first + count] = [0] * count
        print("OK", flush=True)  # unseen: what it looks like is the next question
        continue
    wrong = [page for page in range(PAGES) if ctypes.string_at(at + page * 4096, 4096) != content(keys[page])]
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""


DISCARDS = ("20 1", "30 5", "20 1", "0 1", "60 3")


def test_discarding_at_the_limit_of_mappings(each_world: World) -> None:
    requirements_env.need("map_limit")
    victims = [each_world.python(_CROWDED) for _ in range(2)]
    scan_until_merged(each_world, victims, ["area"])
    victims[0].ask("crowd")
    for pages in DISCARDS:
        victims[0].ask(f"discard {pages}")
        for victim in victims:
            victim.verify()
    assert victims[0].merged_pages("area") >= 62, "zeros could be mapped: this was no limit"
    # At an end of a run, and with few mappings left, some calls of the agent succeed and others do not.
    for page in range(1, 6):
        victims[0].ask("spare")
        victims[0].ask(f"discard {page} 1")
        victims[0].verify()
    victims[0].ask("relieve")
    each_world.unmerge()
    for victim in victims:
        victim.verify()


class _CannotUnwatch:
    """No memory can be unwatched; `mapped`: the agent went on and mapped over it all the same."""

    def __init__(self) -> None:
        self.failed = self.mapped = False

    def __call__(self, call: ptrace.Registers) -> int | None:
        if call.orig_rax == NR.IOCTL and call.rsi == uffd.UFFDIO_UNREGISTER:
            self.failed = True
            call.orig_rax = _NOBODY
            return -_ENOMEM
        self.mapped |= call.orig_rax == NR.MREMAP or (call.orig_rax == NR.MMAP and bool(call.r10 & _FIXED))
        return None


@pytest.mark.parametrize("what", ["discard", "unmerge"])
def test_memory_that_cannot_be_unwatched_is_not_mapped_over(world: World, what: str) -> None:
    """The agent would wait with an UNMAP event for the guard, which waits for the agent."""
    victims = [world.python(_CROWDED) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    failing = _CannotUnwatch()
    with Tampering(agent_of(victims[0].pid), failing):
        if what == "discard":
            victims[0].ask("discard 20 2")
        else:
            failed = world.request("unmerge", pids=[victims[0].pid])["failed"]
            assert list(failed) == [str(victims[0].pid)]
    assert failing.failed
    assert not failing.mapped
    for victim in victims:
        victim.verify()


@pytest.mark.parametrize("point", ["event-prepared", "event-unwiped"])
def test_a_guard_dies_at_the_limit_of_mappings(world: World, point: str) -> None:
    """The successor finds in the ledger what was not wiped; until then it may show."""
    requirements_env.need("map_limit")
    world.extra_env["GPUKSM_FAULT"] = point
    victims = [world.python(_CROWDED) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    before = world.guard_pid()
    victims[0].ask("crowd")
    victims[0].ask("discard 20 2")
    deadline = time.monotonic() + 20
    while world.guard_pid() == before or not _is_target(world, victims[0]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for victim in victims:
        victim.verify()
    victims[0].ask("relieve")


def _is_target(world: World, victim: Victim) -> bool:
    return any(target["pid"] == victim.pid for target in world.request("status")["targets"])


class _Failing:
    """System calls of the agent as they were where the kernel has no memory left for them."""

    def __init__(
        self, unmaps: bool = False, maps: bool = True, later: int = 0, registers: bool = True
    ) -> None:
        self.unmaps = unmaps  # the store's mmap fails, having unmapped
        self.maps = maps  # False: it fails, having done nothing
        self.later = later  # how many mmaps of anonymous memory fail after that
        self.registers = registers  # False: the merged memory cannot be watched
        self.failed = 0

    def __call__(self, call: ptrace.Registers) -> int | None:
        if call.orig_rax == NR.MMAP and call.r8 & 0xFFFFFFFF != 0xFFFFFFFF:
            if self.unmaps or not self.maps:
                self.failed += 1
                call.orig_rax = NR.MUNMAP if self.unmaps else _NOBODY
                return -_ENOMEM
        elif call.orig_rax == NR.MMAP and self.failed and self.later:
            self.later -= 1
            call.orig_rax = _NOBODY
            return -_ENOMEM
        elif call.orig_rax == NR.IOCTL and call.rsi == uffd.UFFDIO_REGISTER and not self.registers:
            self.registers = True
            self.failed += 1
            call.orig_rax = _NOBODY
            return -_ENOMEM
        return None


FAILURES: tuple[dict[str, Any], ...] = (
    {"unmaps": True},
    {"unmaps": True, "later": 3},
    {"maps": False},
    {"registers": False},
)


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_mapping_fails(world: World, merged_before: bool) -> None:
    """Linux 6.12 and newer unmap nothing when MAP_FIXED fails; before, a failure left a hole."""
    pages = 64 * len(FAILURES)
    victims = [world.victim("regions", pages, 4, seed, "straight") for seed in (1, 2)]
    if merged_before:
        scan_until_merged(world, victims, ["shared"])
        victims[0].ask("rewrite")
    else:
        world.scan(*(world.victim("regions", 16, 4, seed, "straight", 777000) for seed in (8, 9)))
    scanner = Scanner(world, victims)
    (first, _), (second, _) = (victim.area("shared") for victim in victims)
    one, two = scanner.targets
    try:
        for number, failure in enumerate(FAILURES):
            failing = _Failing(**failure)
            at = 64 * 4096 * number
            fill = (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, one, first + at, 64, 0, 0, 0, 0)
            share = (wire.OP_MAP, wire.FLAG_NEW_EXTENT, 0, two, second + at, 64, 0, 0, 0, 0)
            with Tampering(agent_of(victims[0].pid), failing):
                reply = scanner.commit([64], [fill] if merged_before else [fill, share])
            assert failing.failed, (number, reply)
            assert reply["skipped"]["map-failed"] == 64, (number, reply)
            for victim in victims:
                victim.verify()
        world.check_nothing_stopped()
    finally:
        scanner.close()
    victims[0].ask("write 50 3")
    world.scan(*victims)
    world.unmerge()
    for victim in victims:
        victim.verify()
        assert processes.store_mappings(victim.pid) == []


def test_a_user_whose_descriptors_in_flight_are_too_many(world: World) -> None:
    """The agent, which has no privilege, cannot send its userfaultfds; that is said, and costs nothing."""
    victims = [
        world.victim("regions", 256, 4, 1, "straight", wrapper=("prlimit", "--nofile=64")) for _ in range(2)
    ]
    before = [processes.footprint(victim.pid) for victim in victims]
    one, other = socket.socketpair()
    with one, other, open(os.devnull) as file:
        for _ in range(100):
            socket.send_fds(one, [b"x"], [file.fileno()])
        done = world.gpuksm("scan", "--json", *(part for victim in victims for part in ("--pid", victim.pid)))
        assert "could not hand over its userfaultfds" in done.out + done.err
    for victim, was in zip(victims, before, strict=True):
        victim.verify()
        processes.await_nothing_left(victim.pid, was)
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    deadline = time.monotonic() + 20
    while (
        done := world.gpuksm("scan", "--json", *pids)
    ).code:  # others of this user may have some in flight, too
        assert time.monotonic() < deadline, done.err
    assert done.json()["pages_sharing"] > 0
