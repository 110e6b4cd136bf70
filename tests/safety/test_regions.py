"""Merging plain memory: right bytes, private writes, everything back after unmerge."""

from __future__ import annotations

import os
import signal
import struct
import time
from pathlib import Path

import pytest

from tests import requirements_env
from tests.support import processes
from tests.support.merging import scan_until_merged
from tests.support.victims import Victim
from tests.support.world import World


def _regions(world: World, seed: int, order: str = "straight", shared: int = 2048, own: int = 512) -> Victim:
    return world.victim("regions", shared, own, seed, order)


def test_merged_then_written_then_merged_again_then_given_back(each_world: World) -> None:
    world = each_world
    victims = [_regions(world, seed) for seed in (1, 2, 3)]
    before = [processes.footprint(victim.pid) for victim in victims]
    result = scan_until_merged(world, victims, ["shared"])
    assert result["pages_shared"] >= 2048
    assert result["pages_sharing"] >= 2 * 2048
    for victim in victims:
        start, end = victim.area("shared")
        assert len(processes.store_mappings(victim.pid, start, end)) == 1
        assert victim.merged_pages("own") == 0

    victims[0].ask("write 30 5")
    for victim in victims:
        victim.verify()
    victims[1].ask("write 100 6")
    for victim in victims:
        victim.verify()
    for victim in victims[:2]:
        victim.ask("rewrite")
    # Pages that were written came back to life as private copies inside merged
    # mappings; a second scan has to cope with them and to change no byte.
    world.scan(*victims)
    for victim in victims:
        victim.verify()

    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
        victim.verify()
    world.shut_down()
    for victim, old in zip(victims, before, strict=True):
        assert processes.left_behind(old, processes.footprint(victim.pid)) == []
    for victim in victims:
        victim.ask("write 10 7")


@pytest.mark.parametrize("order", ["permuted", "constant", "zero"])
def test_scattered_and_repeated_content(world: World, order: str) -> None:
    victims = [_regions(world, seed, order) for seed in (4, 5)]
    world.scan(*victims)
    for victim in victims:
        victim.verify()
    if order == "zero":
        for victim in victims:
            start, end = victim.area("shared")
            assert processes.rollup(victim.pid)["Anonymous"] < end - start
    else:
        # A run that ends inside its extent gives up its last page when nothing lies behind it.
        assert sum(victim.merged_pages("shared") for victim in victims) >= 2 * 2048 - 8
    if order == "constant":
        # Slots with the same content keep repeated pages from taking one mapping each.
        start, end = victims[0].area("shared")
        assert len(processes.store_mappings(victims[0].pid, start, end)) <= 64
    victims[0].ask("write 50 8")
    victims[1].verify()
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_repeated_content_within_one_process(world: World) -> None:
    victim = _regions(world, 6, "constant")
    result = world.scan(victim)
    assert result["pages_sharing"] >= 2048 - 512
    victim.verify()
    victim.ask("write 20 3")
    victim.verify()


def test_a_victim_that_comes_later_joins(world: World) -> None:
    victims = [_regions(world, seed) for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    shared = world.request("status")["store_slots"]
    victims.append(_regions(world, 3))
    scan_until_merged(world, victims, ["shared"])
    assert world.request("status")["store_slots"] <= shared + 64
    victims[0].stop()
    victims[1].verify()
    victims[2].verify()


def test_slots_are_given_back_when_their_last_user_ends(world: World) -> None:
    victims = [_regions(world, seed) for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    keeper = _regions(world, 3, shared=8)
    for victim in victims:
        victim.stop()
    world.scan(keeper)
    deadline = time.monotonic() + 10
    while (used := world.request("status")["store_bytes"]) > 2048 * 4096 // 4:
        assert time.monotonic() < deadline, f"{used} bytes of the store are still used"
        time.sleep(0.1)


def test_unmerge_of_one_process_leaves_the_other_merged(world: World) -> None:
    victims = [_regions(world, seed) for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    world.unmerge("--pid", victims[0].pid)
    assert victims[0].merged_pages("shared") == 0
    assert victims[1].merged_pages("shared") == 2048
    for victim in victims:
        victim.ask("write 40 9")
        victim.verify()


def test_repeated_scans_leave_the_same_traces(world: World) -> None:
    victims = [_regions(world, seed) for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    guard = world.guard_pid()
    after_one = processes.footprint(guard).descriptors
    threads = [processes.footprint(victim.pid).threads for victim in victims]
    for _ in range(3):
        world.scan(*victims)
    assert len(processes.footprint(guard).descriptors) <= len(after_one)
    assert [processes.footprint(victim.pid).threads for victim in victims] == threads
    for victim in victims:
        victim.verify()


def _core_pages(core: Path, start: int, pages: int) -> bytes:
    """The memory [start, start + pages * 4096) as an ELF core file has it; what is left out is missing."""
    data = core.read_bytes()
    offset, _, _, size, count = struct.unpack_from("<Q8xIHHH", data, 32)
    found = b""
    for index in range(count):
        kind, _, at, address, _, in_file, _, _ = struct.unpack_from("<IIQQQQQQ", data, offset + index * size)
        if kind == 1 and address < start + pages * 4096 and address + in_file > start:
            first, last = max(start, address), min(start + pages * 4096, address + in_file)
            found += data[at + first - address : at + last - address]
    return found


def test_core_dumps_are_complete(world: World, tmp_path: Path) -> None:
    """Merged memory is file memory, which a core dump leaves out by default (hazard 21)."""
    requirements_env.need("prlimit")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        requirements_env.require("core", f"core dumps go to {pattern}")
    wrapper = ["prlimit", "--core=unlimited", "env", "-C", str(tmp_path)]
    victims = [world.victim("regions", 256, 4, seed, "straight", wrapper=wrapper) for seed in (1, 2)]
    scan_until_merged(world, victims, ["shared"])
    start, end = victims[0].area("shared")
    with open(f"/proc/{victims[0].pid}/mem", "rb") as memory:
        memory.seek(start)
        expected = memory.read(end - start)
    victims[0].expect_status = -signal.SIGABRT
    os.kill(victims[0].pid, signal.SIGABRT)
    victims[0].process.wait(20)
    deadline = time.monotonic() + 10
    while not (cores := list(tmp_path.glob("core*"))):
        assert time.monotonic() < deadline, "no core file"
        time.sleep(0.05)
    assert _core_pages(cores[0], start, 256) == expected
    victims[1].verify()
