"""Pages that were written after they were merged, and became equal again, are merged again."""

from __future__ import annotations

import time

import pytest

from gpuksm import wire
from tests.safety.test_wrong_plans import Scanner
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


def test_a_run_that_ends_inside_its_extent(world: World) -> None:
    victims = [world.victim("regions", PAGES, 64, seed, "straight") for seed in (1, 2)]
    shorter = world.victim("regions", PAGES // 2, 64, 3, "straight")
    scan_until_merged(world, [*victims, shorter], ["shared"])
    for salt in range(3):
        shorter.ask(f"write 30 {salt}")
        shorter.ask("rewrite")
        result = world.scan(*victims, shorter)
        assert _private_pages(shorter) <= 4, result
        for victim in (*victims, shorter):
            victim.verify()
    world.unmerge()
    for victim in (*victims, shorter):
        victim.verify()


_ZEROING = """
import mmap, sys
size = 400 * 4096
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = bytes(range(1, 251)) * (size // 250) + bytes(1) * (size % 250)
import ctypes
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
expected = bytearray(area)
print("READY shared=%#x:400" % at, flush=True)
for line in sys.stdin:
    if line == "quit\\n":
        break
    if line == "zero\\n":
        for page in range(7, 380, 5):
            area[page * 4096 : (page + 1) * 4096] = expected[page * 4096 : (page + 1) * 4096] = bytes(4096)
    print("OK" if area[:] == expected else "CORRUPT area", flush=True)
"""


def test_zeros_in_merged_memory_are_left_alone(world: World) -> None:
    victims = [world.python(_ZEROING) for _ in range(2)]
    scan_until_merged(world, victims, ["shared"])
    for victim in victims:
        victim.ask("zero")
    result = world.scan(*victims)
    assert result["skipped"]["zeros-in-merged"] >= 2 * 75
    for victim in victims:
        victim.verify()
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_the_guard_compares_what_is_merged_again(world: World) -> None:
    """A scanner that maps written pages back to the slots they came from, whatever they hold now."""
    victims = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    start, _ = victims[0].area("shared")
    with open(f"/proc/{victims[0].pid}/maps") as file:
        line = next(line for line in file if line.startswith(f"{start:x}-"))
    slot = int(line.split()[2], 16) // 4096
    victims[0].ask("write 50 3")
    private = _private_pages(victims[0])
    scanner = Scanner(world, victims)
    target = scanner.targets[0]
    try:
        plan = [
            (wire.OP_MAP, 0, 0, target, start + 4096 * page, 1, 0, slot + page, 0, 0) for page in range(64)
        ]
        reply = scanner.commit([], plan)
        assert reply["skipped"]["differs"] == private
        assert reply["mapped_pages"] == 0
        plan = [(wire.OP_ZERO, 0, 0, target, start, 64, 0, 0, 0, 0)]
        assert scanner.commit([], plan)["zero_pages"] == 0
    finally:
        scanner.close()
    for victim in victims:
        victim.verify()
    assert _private_pages(victims[0]) == private
