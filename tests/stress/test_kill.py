"""kill -9 of scanner, guard and keeper at random moments: no byte, no thread, no next scan is lost.

`GPUKSM_STRESS_KILLS` is the number of kills per test (3 when unset); a hundred
each is what a release is checked with.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuksm.guard import arch
from gpuksm.linux import pidfd, ptrace, uffd
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

KILLS = int(os.environ.get("GPUKSM_STRESS_KILLS", "3"))


def _victims(world: World) -> list[Victim]:
    return [
        *(world.victim("writers", 4096, 2, 300, 200) for _ in range(2)),
        *(world.victim("regions", 4096, 256, seed, "straight") for seed in (1, 2)),
        *(world.victim("regions", 2048, 256, seed, "permuted") for seed in (3, 4)),
        *(world.victim("purge", 1) for _ in range(2)),
    ]


def _pids(victims: list[Victim]) -> list[object]:
    return [part for victim in victims for part in ("--pid", victim.pid)]


def _exercise(victims: list[Victim], turn: int) -> None:
    """Everybody looks at everything and changes something."""
    for victim in victims:
        if victim.program == "writers":
            victim.ask("report")
        elif victim.program == "regions":
            victim.verify()
            victim.ask(f"write 10 {turn}" if turn % 2 else "rewrite")
        else:
            victim.verify()
            victim.ask("run arena")
            victim.ask("run refill")


def _finish(world: World, victims: list[Victim]) -> None:
    world.check_nothing_stopped()
    done = world.gpuksm("scan", "--json", *_pids(victims))
    assert done.json()["pages_sharing"] > 0
    _exercise(victims, 1)
    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
        victim.ask("stop" if victim.program == "writers" else "verify")


@pytest.mark.timeout(60 + KILLS * 30)
def test_kill_the_scanner(world: World) -> None:
    victims = _victims(world)
    world.scan(*victims)
    choice = random.Random(1)
    for turn in range(KILLS):
        scan = world.start("scan", *_pids(victims))
        time.sleep(choice.uniform(0.3, 3.0))
        scan.kill()
        scan.communicate()
        world.check_nothing_stopped()
        _exercise(victims, turn)
    _finish(world, victims)


def _kill_moments(choice: random.Random) -> float:
    return choice.uniform(0.2, 2.5)


@pytest.mark.timeout(60 + KILLS * 30)
def test_kill_the_guard(world: World) -> None:
    victims = _victims(world)
    world.scan(*victims)
    choice = random.Random(2)
    for turn in range(KILLS):
        scan = world.start("scan", *_pids(victims))
        time.sleep(_kill_moments(choice))
        pid = world.guard_pid()
        os.kill(pid, signal.SIGKILL)
        _, err = scan.communicate(timeout=60)
        assert "Traceback" not in err, err
        _exercise(victims, turn)
        assert world.guard_pid() != pid
        world.check_nothing_stopped()
    _finish(world, victims)


@pytest.mark.timeout(60 + KILLS * 30)
def test_kill_the_guard_while_it_answers_purges(world: World) -> None:
    """DONTNEED waits while there is no guard, and reads zeros when there is one again."""
    victims = _victims(world)
    world.scan(*victims)
    purgers = [victim for victim in victims if victim.program == "purge"]
    choice = random.Random(3)
    for _ in range(KILLS):
        for victim in purgers:
            victim.send("run arena")
        time.sleep(choice.uniform(0, 0.02))
        os.kill(world.guard_pid(), signal.SIGKILL)
        for victim in purgers:
            victim.answer()
            victim.verify()
            victim.ask("run refill")
        world.scan(*victims)
    _finish(world, victims)


@pytest.mark.timeout(60 + KILLS * 30)
def test_kill_the_guard_while_it_unmerges(world: World) -> None:
    victims = _victims(world)
    choice = random.Random(4)
    for turn in range((KILLS + 1) // 2):
        world.scan(*victims)
        unmerge = world.start("unmerge", "--all")
        time.sleep(choice.uniform(0.1, 0.6))
        os.kill(world.guard_pid(), signal.SIGKILL)
        unmerge.communicate(timeout=60)
        world.guard_pid()
        _exercise(victims, turn)
        world.check_nothing_stopped()
    _finish(world, victims)


@pytest.mark.timeout(60 + KILLS * 30)
def test_kill_the_keeper(world: World) -> None:
    """A guard without its keeper starts a new one, which can do what the first could: see to a successor."""
    victims = _victims(world)
    world.scan(*victims)
    for turn in range(KILLS):
        guard = world.guard_pid()
        (keeper,) = world.keepers()
        os.kill(keeper, signal.SIGKILL)
        if turn % 2:
            _exercise(victims, turn)
            world.scan(*victims)
        world.await_other_keeper(keeper)
        assert world.guard_pid() == guard
        if turn % 2 == 0:
            os.kill(guard, signal.SIGKILL)
            _exercise(victims, turn)
            assert world.guard_pid() != guard
    _finish(world, victims)


def test_the_keeper_is_killed_while_a_guard_that_it_has_just_forked_has_its_lock(world: World) -> None:
    """That goes with the fork's first lines; until then each keeper that is started finds it taken."""
    victims = _victims(world)
    world.scan(*victims)
    guard, (keeper,) = world.guard_pid(), world.keepers()
    lock = os.open(world.folder / "keeper.lock", os.O_RDWR)
    os.kill(keeper, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            assert time.monotonic() < deadline
    time.sleep(0.5)
    _exercise(victims, 0)
    os.close(lock)
    world.await_other_keeper(keeper)
    assert world.guard_pid() == guard
    time.sleep(0.5)
    os.kill(guard, signal.SIGKILL)
    _exercise(victims, 1)
    assert world.guard_pid() != guard
    _finish(world, victims)


def test_what_a_successor_has_not_yet_is_not_told_to_be_unmerged(world: World) -> None:
    """A debugger keeps it out of one target, in which memory is merged."""
    victims = [world.victim("regions", 256, 16, seed, "straight") for seed in (1, 2)]
    world.scan(*victims)
    debugged = victims[0].pid
    guard = world.guard_pid()
    ptrace.seize(debugged)
    try:
        os.kill(guard, signal.SIGKILL)
        assert world.guard_pid() != guard
        assert list(world.request("unmerge", pids=None)["failed"]) == [str(debugged)]
        assert processes.store_mappings(debugged)
    finally:
        ptrace.interrupt(debugged)
        os.waitpid(debugged, 0)
        ptrace.detach(debugged)
    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
        victim.verify()


def test_successors_leave_nothing_behind(each_world: World) -> None:
    """One code page in a target, the agent's; and slots that nobody maps are freed although the
    guard that would have done it later was killed."""
    world = each_world
    victims = [world.victim("regions", 1024, 64, seed, "straight") for seed in (1, 2)]
    victims += [world.victim("purge", 1) for _ in range(2)]
    before = {victim.pid: processes.footprint(victim.pid).coredump_filter for victim in victims}
    first = world.scan(*victims)["pages_shared"]
    for turn in range(6):
        os.kill(world.guard_pid(), signal.SIGKILL)
        for victim in victims:
            victim.verify()
            if victim.program == "regions":
                victim.ask("rewrite" if turn % 2 else f"write 100 {turn}")
        result = world.scan(*victims)
    # Those of one turn may still wait to be freed.
    assert result["pages_shared"] <= 2 * first, "slots of dead guards are kept"
    for victim in victims:
        code = processes.anonymous_code(victim.pid)
        assert sum(mapping.pages for mapping in code) <= 1, f"code of ended agents: {code}"
    world.unmerge()
    after = {victim.pid: processes.footprint(victim.pid).coredump_filter for victim in victims}
    assert before == after, "what is written into core dumps was not put back"


# Pages that hold what an ended agent has left, side by side: one mapping for the kernel.
LEFTOVERS = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
pages = mmap.mmap(-1, 3 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(3):
    pages[page * 4096 : page * 4096 + len(sys.argv[1]) // 2] = bytes.fromhex(sys.argv[1])
at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert libc.mprotect(ctypes.c_void_p(at), 3 * 4096, mmap.PROT_READ | mmap.PROT_EXEC) == 0
print("READY", flush=True)
sys.stdin.readline()
"""


def test_code_pages_side_by_side_are_unmapped(world: World) -> None:
    victim = world.python(LEFTOVERS, arch.current().AGENT.hex())
    before = sum(mapping.pages for mapping in processes.anonymous_code(victim.pid))
    world.scan(victim)
    deadline = time.monotonic() + 10
    while (left := sum(mapping.pages for mapping in processes.anonymous_code(victim.pid))) > before - 3 + 1:
        assert time.monotonic() < deadline, f"{before} pages of code became {left}"
        time.sleep(0.01)


@pytest.mark.parametrize("point", ["restore-noted", "restore-mapped", "restore-copied"])
def test_a_copy_that_a_dead_guard_was_making_is_unmapped(world: World, point: str) -> None:
    victims = [world.victim("regions", 512, 16, seed, "straight") for seed in (1, 2)]
    before = [processes.footprint(victim.pid) for victim in victims]
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1"
    world.scan(*victims)
    assert world.gpuksm("unmerge", "--all").code != 0
    world.unmerge()
    for victim, was in zip(victims, before, strict=True):
        processes.await_nothing_left(victim.pid, was)


def test_a_code_page_that_is_watched_does_not_keep_a_successor_out(world: World) -> None:
    """It may lie where a border page was, which the ledger still tells of; unmapping it would wait for us."""
    victims = [world.victim("purge", 1) for _ in range(2)]
    world.scan(*victims)
    guard = world.guard_pid()
    pages = [mapping.start for victim in victims for mapping in processes.anonymous_code(victim.pid)]
    watched = 0
    handle = os.pidfd_open(guard)
    for number, path in processes.descriptors(guard).items():
        if path != "anon_inode:[userfaultfd]":
            continue
        features = Path(f"/proc/{guard}/fdinfo/{number}").read_text().split("API:")[1].split(":")[1]
        if int(features, 16) & uffd.FEATURE_EVENT_UNMAP:
            stolen = pidfd.steal(handle, number)
            for page in pages:
                with contextlib.suppress(OSError):  # another's
                    uffd.register(stolen, page, 4096)
                    watched += 1
            os.close(stolen)
    os.close(handle)
    assert watched == len(pages) == 2
    os.kill(guard, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        successor = pool.submit(world.guard_pid)
        while not successor.done():
            for task in (task for victim in victims for task in Path(f"/proc/{victim.pid}/task").iterdir()):
                with contextlib.suppress(OSError):  # it has just ended
                    wait = (task / "wchan").read_text()
                    assert wait != "userfaultfd_event_wait_completion", "an agent waits for its guard"
    assert successor.result() != guard
    for victim in victims:
        victim.ask("run span")
        victim.verify()
        assert sum(mapping.pages for mapping in processes.anonymous_code(victim.pid)) == 1
    assert world.request("unmerge", pids=None)["failed"] == {}


def test_a_successor_watches_all_that_is_merged(world: World) -> None:
    """Also what the guard before it had mapped and could not watch."""
    victims = [world.victim("purge", 1) for _ in range(2)]
    world.scan(*victims)
    guard = world.guard_pid()
    handle = os.pidfd_open(guard)
    for number, path in processes.descriptors(guard).items():
        if path != "anon_inode:[userfaultfd]":
            continue
        stolen = pidfd.steal(handle, number)
        for victim in victims:
            for mapping in processes.store_mappings(victim.pid):
                with contextlib.suppress(OSError):  # another's
                    uffd.unregister(stolen, mapping.start, mapping.end - mapping.start)
        os.close(stolen)
    os.close(handle)
    os.kill(guard, signal.SIGKILL)
    assert world.guard_pid() != guard
    for victim in victims:
        victim.ask("run span")
        victim.verify()


def test_a_keeper_that_does_not_answer_is_replaced(world: World) -> None:
    """It is asked to read fork events; left alive it would read later on what nobody has prepared."""
    victims = [world.victim("forks") for _ in range(2)]
    world.scan(*victims)
    (keeper,) = world.keepers()
    os.kill(keeper, signal.SIGSTOP)
    for victim in victims:
        victim.ask("run drops")
    world.await_other_keeper(keeper)
    guard = world.guard_pid()
    os.kill(guard, signal.SIGKILL)
    for victim in victims:
        victim.ask("run drops")
        victim.verify()
    assert world.guard_pid() != guard
    assert not processes.alive(keeper)
