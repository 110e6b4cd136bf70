"""Pages that were written after they were merged, and became equal again, are merged again."""

from __future__ import annotations

import time

import pytest

from tests.support import processes
from tests.support.merging import scan_until_merged
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 2000


def _private_pages(victim: Victim) -> int:
    """Pages of the shared area that the victim has of its own, whatever they lie in."""
    return processes.private_pages(victim.pid, *victim.area("shared"))


@pytest.fixture
def pair(each_world: World) -> list[Victim]:
    victims = [each_world.victim("regions", PAGES, 64, seed, "straight") for seed in (1, 2)]
    scan_until_merged(each_world, victims, ["shared"])
    return victims


def test_rewritten_pages_are_shared_again(each_world: World, pair: list[Victim]) -> None:
    pair[0].ask("write 10 7")
    assert _private_pages(pair[0]) > PAGES // 20
    each_world.scan(*pair)
    assert _private_pages(pair[0]) > PAGES // 20, "they equal nothing: they stay private"
    pair[0].ask("rewrite")
    assert _private_pages(pair[0]) == PAGES
    result = each_world.scan(*pair)
    assert _private_pages(pair[0]) <= 2, result
    # What goes back to its own slots is one mapping again.
    start, end = pair[0].area("shared")
    assert len(processes.store_mappings(pair[0].pid, start, end)) <= 2
    for victim in pair:
        victim.verify()
    pair[1].ask("write 30 8")
    for victim in pair:
        victim.verify()
    each_world.unmerge()
    for victim in pair:
        victim.verify()


def test_the_same_new_content_in_merged_memory_is_shared(world: World) -> None:
    victims = [world.victim("regions", PAGES, 64, 1, "straight") for _ in range(3)]
    scan_until_merged(world, victims, ["shared"])
    for victim in victims:
        victim.ask("write 5 9")  # the same pages get the same new content
    before = sum(map(_private_pages, victims))
    assert before >= 3 * PAGES // 40
    result = world.scan(*victims)
    assert sum(map(_private_pages, victims)) <= 6, result
    for victim in victims:
        victim.verify()
    victims[0].ask("write 20 10")
    for victim in victims:
        victim.verify()


def test_a_writer_in_merged_memory_loses_nothing(world: World) -> None:
    """Scans while pages of merged memory are written: every write is seen or refused."""
    victims = [world.victim("regions", PAGES, 64, seed, "straight") for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    for salt in range(3):
        scan = world.start("scan", "--pid", victims[0].pid, "--pid", victims[1].pid, "--settle", "0.05")
        deadline = time.monotonic() + 60
        while scan.poll() is None and time.monotonic() < deadline:
            victims[salt % 2].ask(f"write 20 {salt}")
            victims[salt % 2].ask("rewrite")
        assert scan.wait(60) == 0
        for victim in victims:
            victim.verify()
