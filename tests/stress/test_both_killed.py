"""Guard and keeper are killed together: merged memory waits for the next guard, and reads no old byte."""

from __future__ import annotations

import random
import time

import pytest

from tests import requirements_env
from tests.stress.test_kill import KILLS
from tests.support import processes
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
        deadline = time.monotonic() + 10
        while left := processes.left_behind(was, processes.footprint(victim.pid)):
            assert time.monotonic() < deadline, left
            time.sleep(0.01)


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
