"""Children of merged processes: right bytes and zeros, with and without privileges (hazard 2)."""

from __future__ import annotations

import time

from tests.support import processes, standstill
from tests.support.merging import merged_pair, perform, scan_until_merged
from tests.support.scripts import area_script
from tests.support.world import World

ACTIONS = "reads drops writes grandchildren vfork spawn"


def test_children_do_everything(each_world: World) -> None:
    first, second = merged_pair(each_world, "forks", without=["during"])
    perform(first, ACTIONS, [second])
    perform(second, ACTIONS, [first])


def test_a_program_that_is_started_does_not_wait_for_the_guard_to_look_round(user_world: World) -> None:
    """The kernel stops each child for an unprivileged guard: it is let go as soon as it has stopped.

    41 programs take 0.3 s; before, each other one waited for the guard's tick of 500 ms.
    """
    first, _ = merged_pair(user_world, "forks", without=["during"])
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        perform(first, "spawn")
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 2, seconds


_STARTER = """
import mmap, sys, threading, time
SIZE = 1 << 20
memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(b"".join(page.to_bytes(8, "little") * 512 for page in range(1, 1 + SIZE // 4096)))
print("READY", flush=True)
for line in sys.stdin:
    if line.strip() == "quit":
        break
    began = time.monotonic()
    for _ in range(20):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    print("OK seconds=%f" % (time.monotonic() - began), flush=True)
"""


def test_a_thread_that_is_started_does_not_wait_either(user_world: World) -> None:
    """20 threads take 10 ms; before, about each sixth waited for the tick."""
    victims = [user_world.python(_STARTER) for _ in range(2)]
    user_world.scan(*victims)
    assert all(processes.merged_pages(victim.pid) >= 200 for victim in victims)
    assert min(float(victims[0].ask("start")["seconds"]) for _ in range(3)) < 0.4


def test_a_child_outlives_its_parent(each_world: World) -> None:
    """The parent ends, then everything else is unmerged: slots that only the child maps stay."""
    world = each_world
    first, second = merged_pair(world, "forks", without=["during"])
    parent = first.pid
    first.pid = int(first.ask("run orphan")["pid"])
    while processes.alive(parent):
        time.sleep(0.01)
    first.process.wait()
    first.verify()
    second.stop()
    world.victims.remove(second)
    other = [world.victim("regions", 256, 16, seed, "straight") for seed in (1, 2)]
    scan_until_merged(world, other, ["shared"])
    first.verify()
    perform(first, "late reads drops writes grandchildren")


def test_a_child_outlives_unmerge(each_world: World) -> None:
    world = each_world
    first, second = merged_pair(world, "forks", without=["during"])
    first.pid = int(first.ask("run orphan")["pid"])
    first.process.wait()
    second.stop()
    world.victims.remove(second)
    result = world.gpuksm("unmerge", "--all")
    assert "Traceback" not in result.err
    first.verify()
    perform(first, "late reads drops writes grandchildren")


def test_forks_while_merging(each_world: World) -> None:
    world = each_world
    victims = [world.victim("forks") for _ in range(2)]
    for victim in victims:
        victim.ask("run storm_start")
    for _ in range(3):
        world.scan(*victims)
    for victim in victims:
        assert int(victim.ask("run storm_stop")["children"]) > 0
        victim.verify()
        perform(victim, ACTIONS)


_FAMILY = """
import os, sys
import numpy
array = numpy.random.default_rng(7).integers(0, 2**63, 2**20, dtype=numpy.uint64)
reading, writing = os.pipe()
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)  # until the parent is gone
        os._exit(0)
    children.append(child)
place = "%#x:%d" % (-(-array.ctypes.data // 4096) * 4096, array.nbytes // 4096 - 1)
print("READY array=%s first=%d second=%d" % (place, *children), flush=True)
sys.stdin.read()
"""


def test_pages_that_fork_shares_are_not_counted(world: World) -> None:
    """Parent and children have one copy already: merging it would save nothing (hazard 28)."""
    parent = world.python(_FAMILY)
    result = world.scan(parent, int(parent.values["first"]), int(parent.values["second"]))
    for pid in (parent.pid, int(parent.values["first"])):
        assert processes.merged_pages(pid, *parent.area("array")) == 0
    # What the children wrote themselves may be equal: the interpreter's own pages, not the array.
    assert result["bytes_saved"] < 4 << 20
    parent.process.stdin.close()  # type: ignore[union-attr]
    parent.process.wait(20)


def test_a_sleeping_vfork_child_delays_nobody_for_long(world: World) -> None:
    """Its parent cannot be stopped until it is done: the scan goes on (hazard 15)."""
    victims = [world.victim("forks") for _ in range(2)]
    victims[0].send("run vfork_sleeper")
    world.scan(*victims, timeout=60)
    victims[0].answer()
    for victim in victims:
        victim.verify()
    world.scan(*victims)
    for victim in victims:
        victim.verify()


# `fork` leaves a child that waits; its pid is told.
_FORKS = (
    area_script(64)
    + """
import os, signal, sys
for line in sys.stdin:
    if line == "quit\\n":
        break
    if line == "fork\\n":
        child = os.fork()
        if not child:
            libc.prctl(1, signal.SIGKILL)
            while True:
                signal.pause()
        print(child, flush=True)
        continue
    print("CORRUPT pages %s" % wrong() if wrong() else "OK", flush=True)
"""
)


def test_unmerging_everything_includes_what_is_forked_meanwhile(world: World) -> None:
    victims = [world.python(_FORKS) for _ in range(2)]
    guard = standstill.start_standing_still(world, "restore-copied", victims[0])
    scan_until_merged(world, victims, ["area"])

    def fork() -> None:
        # The first is being unmerged, the other is merged still; its fork waits for the guard.
        assert standstill.stands(guard)
        victims[1].send("fork")
        standstill.wait_for_event(victims[1])

    standstill.while_it_stands(guard, world.unmerge, fork)
    child = int(victims[1].line(20))
    assert processes.alive(child)
    for pid in (*(victim.pid for victim in victims), child):
        assert processes.store_mappings(pid) == []
    for victim in victims:
        victim.verify()
