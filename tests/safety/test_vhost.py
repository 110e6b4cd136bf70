"""vhost writes to a process's memory from a thread of the kernel that stops with the process (hazard 8)."""

from __future__ import annotations

import os
import signal
import time

from tests import requirements_env
from tests.support.merging import perform, scan_until_merged
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 64


def _victims(world: World) -> list[Victim]:
    requirements_env.need("root", "vhost")
    return [world.victim("vhost") for _ in range(2)]


def test_frames_arrive_in_merged_memory(world: World) -> None:
    victims = _victims(world)
    scan_until_merged(world, victims, ["frames", "plain"])
    for _ in range(3):
        for victim in victims:
            perform(victim, "receive", victims)
        world.scan(*victims)
        assert all(victim.merged_pages("frames") >= PAGES - 16 for victim in victims)
    world.unmerge()
    for victim in victims:
        perform(victim, "receive", victims)


def test_frames_arrive_while_memory_is_merged_under_guards_that_die(world: World) -> None:
    victims = _victims(world)
    for victim in victims:
        victim.ask("run stream")
    merged = 0
    for turn in range(8):
        world.scan(*victims)
        merged += sum(victim.merged_pages("frames") for victim in victims)
        if turn % 3 == 2:
            os.kill(world.guard_pid(), signal.SIGKILL)
        if turn == 5:
            world.unmerge()
        time.sleep(0.1)
    assert merged > PAGES
    for victim in victims:
        assert int(victim.ask("run still")["frames"]) > PAGES
    world.unmerge()
    for victim in victims:
        perform(victim, "receive", victims)
