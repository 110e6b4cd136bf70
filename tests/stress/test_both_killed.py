"""Guard and keeper are killed together: merged memory waits for the next guard, and reads no old byte."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from gpuksm.linux import pidfd, procfs, uffd
from tests import requirements_env
from tests.stress.test_kill import KILLS
from tests.support import processes
from tests.support.merging import scan_until_merged
from tests.support.scripts import LIBC, area_script
from tests.support.standstill import wait_for
from tests.support.victims import Victim
from tests.support.world import World


def _purgers(world: World) -> list[Victim]:
    requirements_env.need("thread_pidfd")
    return [world.victim("purge", 1) for _ in range(2)]


def test_a_discard_waits_for_the_next_guard(each_world: World) -> None:
    victims = _purgers(each_world)
    before = [processes.footprint(victim.pid) for victim in victims]
    each_world.scan(*victims)
    each_world.kill_guard_and_keeper()
    for victim in victims:
        victim.send("run span")
    time.sleep(0.3)
    for victim in victims:
        assert processes.waits_in(victim.pid) == "userfaultfd_event_wait_completion"
    status = each_world.gpuksm("status", "--json").json()
    assert {target["pid"] for target in status["targets"]} == {victim.pid for victim in victims}
    for victim in victims:
        victim.answer()
        victim.verify()
        victim.ask("run refill")
    assert each_world.scan(*victims)["pages_sharing"] > 0
    each_world.unmerge()
    for victim, was in zip(victims, before, strict=True):
        victim.verify()
        processes.await_nothing_left(victim.pid, was)


def test_a_fork_waits_for_the_next_guard(world: World) -> None:
    requirements_env.need("thread_pidfd")
    victims = [world.victim("forks") for _ in range(2)]
    world.scan(*victims)
    world.kill_guard_and_keeper()
    for victim in victims:
        victim.send("run drops")
    time.sleep(0.3)
    world.scan(*victims)
    for victim in victims:
        victim.answer()
        victim.verify()


@pytest.mark.timeout(60 + KILLS * 30)
def test_both_are_killed_while_they_are_at_work(world: World) -> None:
    """At any moment, a scan being under way and discards waiting; each time another guard takes over."""
    victims = [*_purgers(world), *(world.victim("regions", 2048, 256, seed, "straight") for seed in (1, 2))]
    world.scan(*victims)
    choice = random.Random(5)
    named = [part for victim in victims for part in ("--pid", victim.pid)]
    for turn in range(KILLS):
        scan = world.start("scan", *named)
        for victim in victims[:2]:
            victim.send("run arena")
        time.sleep(choice.uniform(0.2, 2))
        world.kill_guard_and_keeper()
        scan.communicate(timeout=60)
        world.scan(*victims)
        for victim in victims[:2]:
            victim.answer()
            victim.verify()
            victim.ask("run refill")
        for victim in victims[2:]:
            victim.verify()
            victim.ask(f"write 10 {turn}")
        world.check_nothing_stopped()
    world.unmerge()
    for victim in victims:
        victim.verify()
        assert processes.store_mappings(victim.pid) == []


# Moves page 8 away, growing it, to a place of its own or the kernel's choice, or leaves its place mapped.
_MOVER = (
    LIBC
    + """
import sys
PAGES = 24
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
room = libc.mmap(None, 64 * 4096, 0, 0x4022, -1, 0)
def content(key):
    return key.to_bytes(8, "little") * 512
expected = {at + page * 4096: 1 + page for page in range(PAGES)}
for place, key in expected.items():
    ctypes.memmove(place, content(key), 4096)
print("READY area=%#x:%d room=%#x" % (at, PAGES, room), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    old, pages, new = at + 8 * 4096, 0, 0
    if word == "fixed":
        pages, new = 6, libc.mremap(old, 4096, 6 * 4096, 3, room)
    if word == "anywhere":
        pages, new = 6, libc.mremap(old, 4096, 6 * 4096, 1, 0)
    if word == "kept":
        pages, new = 1, libc.mremap(old, 4096, 4096, 5, 0)
    if pages:
        assert new and new != 2**64 - 1, ctypes.get_errno()
        del expected[old]
        expected |= {new + page * 4096: 0 for page in range(pages)} | {new: 9}
        if word == "kept":
            expected[old] = 0
    if word in ("discard", "replace"):
        assert libc.madvise(old, 3 * 4096, 4) == 0
        expected |= {old + page * 4096: 0 for page in range(3)}
    if word == "replace":  # what has just been discarded, by a page that is merged
        assert libc.mremap(at + 20 * 4096, 4096, 4096, 3, old) == old
        expected[old] = expected.pop(at + 20 * 4096)
    wrong = [hex(place) for place, key in expected.items() if ctypes.string_at(place, 4096) != content(key)]
    if word == "write":
        for place in expected:
            expected[place] += 1000
            ctypes.memmove(place, content(expected[place]), 4096)
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""
)


def _break_takeover_off(world: World, victim: Victim, command: str, fault: str) -> None:
    """Kill guard and keeper, let `victim` wait in `command`, have the takeover that reads its event fail."""
    world.kill_guard_and_keeper()
    victim.send(command)
    deadline = time.monotonic() + 10
    while processes.waits_in(victim.pid) != "userfaultfd_event_wait_completion":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    world.extra_env["GPUKSM_FAULT"] = f"child-event-read:1:{fault}"
    world.gpuksm("status", "--json")
    assert "fault injected" in (world.folder / "guard.log").read_text()
    victim.answer()
    world.guard_pid()
    for word in ("verify", "write", "verify"):
        victim.ask(word)


@pytest.mark.parametrize("action", ["fixed", "anywhere", "kept", "replace"])
@pytest.mark.parametrize("fault", ["eagain", "kill"])
def test_a_takeover_that_is_broken_off_shows_nothing_of_the_store(
    world: World, action: str, fault: str
) -> None:
    """The move's event has been read, and its caller goes on, before there is an agent to map zeros."""
    requirements_env.need("thread_pidfd")
    victims = [world.python(_MOVER) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    _break_takeover_off(world, victims[0], action, fault)
    victims[1].verify()


def _give_zeros(world: World, pages: list[int]) -> None:
    """Answer who waits for zeros at `pages`, as a try of the guard does that is broken off then."""
    guard = world.guard_pid()
    handle = os.pidfd_open(guard)
    for number, link in processes.descriptors(guard).items():
        if "[userfaultfd]" not in link:
            continue
        with contextlib.suppress(OSError):
            fd = pidfd.steal(handle, int(number))
            for page in pages:
                with contextlib.suppress(OSError):
                    uffd.zeropage(fd, page, 4096)
            os.close(fd)
    os.close(handle)


@pytest.mark.parametrize("action", ["fixed", "discard"])
def test_what_is_written_between_two_tries_of_a_takeover_stays(world: World, action: str) -> None:
    """A try answers who waits and is broken off, the program writes there, the next one succeeds."""
    requirements_env.need("thread_pidfd")
    victims = [world.python(_MOVER) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    first = (
        int(victims[0].values["room"], 16) + 4096 if action == "fixed" else victims[0].area("area")[0] + 32768
    )
    world.kill_guard_and_keeper()
    victims[0].send(action)
    deadline = time.monotonic() + 10
    while processes.waits_in(victims[0].pid) != "userfaultfd_event_wait_completion":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    world.extra_env["GPUKSM_FAULT"] = "attach-frozen:*:eagain"
    world.gpuksm("status", "--json")
    tries = world.guard_pid()
    while not select.select([victims[0].output], [], [], 0.01)[0]:
        assert time.monotonic() < deadline + 20
        _give_zeros(world, [first + page * 4096 for page in range(5)])
    victims[0].answer()
    for word in ("verify", "write", "verify"):
        victims[0].ask(word)
    assert "fault injected" in (world.folder / "guard.log").read_text()
    os.kill(tries, signal.SIGKILL)
    del world.extra_env["GPUKSM_FAULT"]
    assert world.guard_pid() != tries
    deadline = time.monotonic() + 10
    while len(world.request("status")["targets"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for word in ("verify", "write", "verify"):
        victims[0].ask(word)
    victims[1].verify()


# Discards pages 4 to 11 and reads from a pipe into pages 6 to 8 of them, the last in part: at once, so that
# the kernel is who touches them first.  It may be told EFAULT (hazard 2), and does it again then.
_READER = (
    LIBC
    + """
import os, sys
PAGES = 24
libc.read.restype = ctypes.c_ssize_t
libc.read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
at = libc.mmap(None, (PAGES + 2) * 4096, 0, 0x4022, -1, 0) + 4096
assert libc.mprotect(at, PAGES * 4096, 3) == 0
expected = bytearray()
for page in range(PAGES):
    expected += (1 + page).to_bytes(8, "little") * 512
ctypes.memmove(at, bytes(expected), PAGES * 4096)
ours, theirs = os.pipe()
os.write(theirs, b"read" * 2500)
print("READY area=%#x:%d" % (at, PAGES), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    if word == "read":
        assert libc.madvise(at + 4 * 4096, 8 * 4096, 4) == 0
        done = 0
        while done < 10000:
            got = libc.read(ours, at + 6 * 4096 + done, 10000 - done)
            assert got > 0 or ctypes.get_errno() == 14, ctypes.get_errno()
            done += max(got, 0)
        expected[4 * 4096:12 * 4096] = bytes(8 * 4096)
        expected[6 * 4096:6 * 4096 + 10000] = b"read" * 2500
    now = ctypes.string_at(at, PAGES * 4096)
    wrong = [page for page in range(PAGES) if now[page * 4096:][:4096] != expected[page * 4096:][:4096]]
    if word == "write":
        expected = bytearray(page * 7 % 251 for page in range(PAGES * 4096))
        ctypes.memmove(at, bytes(expected), PAGES * 4096)
    print("CORRUPT pages %s" % wrong if wrong else "OK", flush=True)
"""
)


def test_what_a_system_call_writes_into_discarded_memory_stays(world: World) -> None:
    """Discarded before there is an agent to map zeros; the call that writes there comes before that too."""
    requirements_env.need("thread_pidfd")
    victims = [world.python(_READER) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    _break_takeover_off(world, victims[0], "read", "kill")
    victims[1].verify()


# On "fork" a child goes on in the parent's place, which waits.
_FORKER = (
    area_script(24)
    + """
import os, sys
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    if word == "fork":
        if os.fork():
            os.wait()
            os._exit(0)
        libc.prctl(1, 9)  # with its parent
    if word == "drop":
        assert libc.madvise(at + 4 * 4096, 8 * 4096, 4) == 0
        expected[4:12] = [0] * 8
    if word == "cut":
        assert libc.munmap(at + 16 * 4096, 8 * 4096) == 0
        del expected[16:]
    print("CORRUPT pages %s" % wrong() if wrong() else "OK pid=%d" % os.getpid(), flush=True)
"""
)


def _lose_userfaultfds_on_their_way(guard: int) -> None:
    """Take what is in the attic out of it, and close it."""
    handle = os.pidfd_open(guard)
    for number, path in processes.descriptors(guard).items():
        if not path.startswith("socket:"):
            continue
        with socket.socket(fileno=pidfd.steal(handle, number)) as end, contextlib.suppress(OSError):
            for _ in range(10):
                for _level, _kind, rights in end.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT)[1]:
                    os.close(int.from_bytes(rights[:4], sys.byteorder))
    os.close(handle)


@pytest.mark.parametrize("fault", ["", "restore-copied:1:eagain"], ids=["", "fails"])
def test_a_child_whose_userfaultfd_is_lost_is_found_by_the_next_guard(world: World, fault: str) -> None:
    """It dies with guard and keeper between the read of the fork's event and the attic.

    With the fault it has got another, and all else, when its takeover fails for the first time.
    """
    requirements_env.need("thread_pidfd")
    victims = [world.python(_FORKER) for _ in range(2)]
    world.extra_env["GPUKSM_FAULT"] = "fork-read:1:stop"
    scan_until_merged(world, victims, ["area"])
    forker, guard = victims[0], world.guard_pid()
    child = int(forker.ask("fork")["pid"])
    while processes.thread_states(guard) != {guard: "T"}:
        time.sleep(0.01)
    _lose_userfaultfds_on_their_way(guard)
    world.kill_guard_and_keeper()
    deadline = time.monotonic() + 10
    while processes.userfault_flags(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert processes.store_mappings(child)
    if fault:
        forker.ask("cut")  # so that there is an end to be settled
    world.extra_env["GPUKSM_FAULT"] = fault
    assert world.gpuksm("status", "--json").code == 0
    wait_for(lambda: child in {target["pid"] for target in world.request("status")["targets"]})
    assert ("fault injected: restore" in (world.folder / "guard.log").read_text()) == bool(fault)
    for word in ("verify", "drop", "verify"):
        forker.ask(word)
    world.unmerge()
    assert processes.store_mappings(child) == []
    for victim in victims:
        victim.ask("verify")


@pytest.mark.parametrize("turn", [1, 2])
def test_what_is_not_taken_over_yet_is_not_attached_anew(world: World, turn: int) -> None:
    """A takeover that fails is tried again some time later; a scan that comes in between has to wait."""
    victims = _purgers(world)
    before = [processes.footprint(victim.pid) for victim in victims]
    world.scan(*victims)
    world.kill_guard_and_keeper()
    world.extra_env["GPUKSM_FAULT"] = f"attach-frozen:{turn}:eagain"
    world.gpuksm("scan", *[part for victim in victims for part in ("--pid", victim.pid)])
    assert "fault injected" in (world.folder / "guard.log").read_text()
    for victim in victims:
        victim.ask("run span")
        victim.verify()
        assert sum(mapping.pages for mapping in processes.anonymous_code(victim.pid)) == 1
    world.unmerge()
    for victim, was in zip(victims, before, strict=True):
        victim.verify()
        processes.await_nothing_left(victim.pid, was)


def test_the_keeper_comes_first_and_nothing_else_of_ours(world: World) -> None:
    victims = _purgers(world)
    world.scan(*victims)
    guard = world.guard_pid()
    keeper = procfs.stat(guard).ppid
    trial = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    if subprocess.run([sys.executable, "-c", trial], capture_output=True, check=False).returncode:
        pytest.skip("no real-time priority here")
    assert os.sched_getscheduler(keeper) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    assert os.sched_getscheduler(guard) == os.SCHED_OTHER
    os.kill(guard, 9)
    assert os.sched_getscheduler(world.guard_pid()) == os.SCHED_OTHER
