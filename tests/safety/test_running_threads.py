"""Threads that run, write and take signals while they are merged (hazards 6, 16)."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.merging import perform
from tests.support.world import World


def test_writers_with_timers(each_world: World) -> None:
    world = each_world
    victims = [world.victim("writers", 4096, 3, 200) for _ in range(2)]
    for _ in range(2):
        result = world.scan(*victims)
        for victim in victims:
            victim.ask("report")
    assert sum(target["pages_merged"] for target in result["targets"]) > 0
    for victim in victims:
        assert victim.merged_pages("at") > 1000
    world.unmerge()
    for victim in victims:
        answer = victim.ask("stop")
        assert int(answer["signals"]) > 100
        assert int(answer["writes"]) > 100


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_registers_are_kept(world: World, how: str) -> None:
    victims = [world.victim("cpustate", how) for _ in range(2)]
    for _ in range(2):
        world.scan(*victims)
        world.unmerge()
    world.shut_down()
    world.scan(*victims)
    for victim in victims:
        assert victim.merged_pages("around") == 256
        assert int(victim.ask("run report")["turns"]) > 0


def test_no_signal_is_lost(each_world: World) -> None:
    world = each_world
    victims = [world.victim("signals") for _ in range(2)]
    for victim in victims:
        victim.ask("run start")
    for _ in range(2):
        world.scan(*victims)
        world.unmerge()
    world.shut_down()
    world.scan(*victims)
    for victim in victims:
        assert int(victim.ask("run stop")["signals"]) > 100
        victim.verify()
        assert victim.merged_pages("around") == 1024


def test_threads_come_and_go(world: World) -> None:
    victims = [world.victim("odd", kind) for kind in ("churn", "churn", "plain")]
    for _ in range(3):
        world.scan(*victims)
        for victim in victims:
            victim.verify()
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_purges_writes_and_scans_together(world: World) -> None:
    """Everything at once, as in a job: writers, purges and scans, from three sides."""
    writers = [world.victim("writers", 2048, 2, 500) for _ in range(2)]
    purgers = [world.victim("purge", 1) for _ in range(2)]
    problems: list[str] = []

    def purge() -> None:
        try:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                for victim, other in (purgers, reversed(purgers)):
                    perform(victim, "arena refill one many", [other])
        except AssertionError as error:
            problems.append(str(error))

    thread = threading.Thread(target=purge)
    thread.start()
    while thread.is_alive():
        world.scan(*writers, *purgers)
    thread.join()
    assert not problems
    for victim in writers:
        victim.ask("stop")
