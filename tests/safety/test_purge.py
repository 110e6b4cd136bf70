"""MADV_DONTNEED and its kin on merged memory: zeros at once, nothing else touched (hazard 1)."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support import processes
from tests.support.merging import merged_pair, perform
from tests.support.world import World

ACTIONS = "one bulk span many same arena process_madvise remove advice locked lazy loop gap"


def test_every_way_of_giving_memory_back(each_world: World) -> None:
    world = each_world
    first, second = merged_pair(world, "purge", 1, without=["span"])
    assert first.merged_pages("span") >= 32
    perform(first, ACTIONS, [second])
    perform(second, ACTIONS, [first])
    for victim in (first, second):
        victim.ask("run refill")
    world.scan(first, second)
    perform(first, ACTIONS, [second])
    world.unmerge()
    perform(second, ACTIONS, [first])


def test_a_locked_page_refuses(each_world: World) -> None:
    """DONTNEED ends at a page that was locked after the merge; what lies behind it is kept."""
    first, second = merged_pair(each_world, "purge", 1, without=["span"])
    perform(first, "refused", [second])


def test_what_differs_in_the_middle_stays_private(world: World) -> None:
    victims = [world.victim("purge", seed) for seed in (1, 2)]
    world.scan(*victims)
    for victim in victims:
        start, _ = victim.area("span")
        assert processes.merged_pages(victim.pid, start, start + 16 * 4096) == 16
        assert processes.merged_pages(victim.pid, start + 16 * 4096, start + 32 * 4096) == 0
    for victim, other in (victims, reversed(victims)):
        perform(victim, "span", [other])


@pytest.mark.parametrize("action", ["bulk", "many", "same", "arena", "loop"])
def test_memory_given_back_while_it_is_merged(world: World, action: str) -> None:
    """Scans and purges at the same time: whatever wins, zeros are zeros."""
    victims = [world.victim("purge", seed) for seed in (1, 1)]
    stop = threading.Event()

    def scan() -> None:
        while not stop.is_set():
            world.scan(*victims)

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        end = time.monotonic() + 7
        while time.monotonic() < end:
            for victim in victims:
                victim.ask(f"run {action}")
                victim.ask("run refill")
                victim.verify()
            time.sleep(0.7)
    finally:
        stop.set()
        scanner.join()


def test_dontneed_is_not_slow(world: World) -> None:
    """One event, one freeze: well below what a batch job could notice."""
    first, second = merged_pair(world, "purge", 1, without=["span"])
    slowest_us = int(first.ask("run loop")["slowest_us"])
    second.verify()
    assert slowest_us < 1_000_000
