"""Pages that devices, or the kernel in their place, write to past the page tables (hazard 8)."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from gpuksm import wire
from tests.support import processes
from tests.support.disks import Disk, slow_disk
from tests.support.merging import perform, scan_until_merged
from tests.support.scanner import Scanner
from tests.support.victims import Victim
from tests.support.world import World

PAGES, FIRST, COUNT = 64, 16, 24  # as in victims/pins.c


@pytest.fixture
def disk() -> Iterator[Disk]:
    with slow_disk(1 << 20) as made:
        yield made


@contextlib.contextmanager
def _everybodys_file() -> Iterator[str]:
    """A file that takes direct I/O, which a tmpfs of older kernels does not, in the place of a disk."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        os.truncate(file.name, 1 << 20)
        os.chmod(file.name, 0o666)
        yield file.name


def _held(victim: Victim, *areas: str) -> list[int]:
    """How many of the pages in the middle of each area are the victim's own."""
    starts = [victim.area(area)[0] + FIRST * 4096 for area in areas]
    return [processes.private_pages(victim.pid, start, start + COUNT * 4096) for start in starts]


def _others_merged(victim: Victim) -> None:
    """All but the pages in the middle are merged, but for border pages where runs end."""
    for area in ("buffer", "chained"):
        assert victim.merged_pages(area) >= PAGES - COUNT - 4, area
    assert victim.merged_pages("plain") >= PAGES - 1


@pytest.mark.parametrize("comparers", [0, 2])
def test_what_is_registered_with_io_uring_stays(world: World, comparers: int) -> None:
    if comparers:
        world.extra_env["GPUKSM_COMPARERS"] = str(comparers)
        world.extra_env["GPUKSM_COMPARER_PAGES"] = "8"
    victims = [world.victim("pins", *order) for order in ((), (), ("reversed",), ("reversed",))]
    holding = victims[::2]
    for victim in holding:
        victim.ask("run ring")
    for _ in range(2):
        result = world.scan(*victims)
        for victim in holding:
            assert _held(victim, "buffer", "chained", "zeros") == [COUNT] * 3
            _others_merged(victim)
            perform(victim, "fixed", victims)
        assert result["skipped"]["pinned"] >= 2 * 2 * COUNT, result
    for victim in victims[1::2]:
        assert victim.merged_pages("buffer") >= PAGES - 1
    world.unmerge()
    for victim in holding:
        perform(victim, "fixed unregister", victims)
    world.scan(*victims)
    for victim in holding:
        assert victim.merged_pages("chained") >= PAGES - 6  # but what was read meanwhile


@pytest.mark.parametrize("before", [True, False])
def test_what_is_read_by_direct_io_arrives(world: World, disk: Disk, before: bool) -> None:
    """The device has pages of a process, and writes to them after all others have been merged."""
    victims = [
        world.victim("pins", disk.path, wrapper=disk.wrapper),
        *(world.victim("pins") for _ in range(2)),
    ]
    reader = victims[0]
    if not before:  # what was merged is copied for the device, and merged again
        scan_until_merged(world, victims, ["incoming", "buffer"])
    reader.ask("run submit")
    for _ in range(2):
        result = world.scan(*victims)
        assert _held(reader, "incoming") == [COUNT]
        assert result["skipped"]["pinned"] == COUNT, result
        assert victims[1].merged_pages("incoming") >= PAGES - 1
    disk.let_go()
    perform(reader, "collect", victims)
    world.unmerge()
    for victim in victims:
        victim.verify()


@pytest.mark.parametrize("grows", [False, True])
def test_it_is_given_back_only_when_nobody_holds_it(world: World, disk: Disk, grows: bool) -> None:
    victims = [
        world.victim("pins", disk.path, wrapper=disk.wrapper),
        *(world.victim("pins") for _ in range(2)),
    ]
    reader = victims[0]
    scan_until_merged(world, victims, ["incoming", "buffer"])
    reader.ask("run submit")
    start, _ = reader.area("incoming")
    failed = world.request("unmerge", pids=[reader.pid], max_pause_us=5000)["failed"]
    assert f"may hold memory of process {reader.pid} ({start + FIRST * 4096:#x}" in failed[str(reader.pid)]
    assert reader.merged_pages("incoming") == COUNT
    assert reader.merged_pages("buffer") == 0
    reader.verify()
    if grows:
        perform(reader, "grow", victims)
    timer = threading.Timer(0.2, disk.let_go)  # it is asked for again and again
    timer.start()
    world.unmerge("--pid", reader.pid)
    timer.join()
    assert processes.store_mappings(reader.pid) == []
    perform(reader, "collect", victims)


def test_targets_begin_direct_io_after_their_attach(each_world: World) -> None:
    """Root's guard looks at their pages, an ordinary user's leaves them alone."""
    world, kinds = each_world, ("ring", "context", "direct")
    with _everybodys_file() as path:
        plain, *pinning = [world.victim("pins", path) for _ in range(4)]
        scan_until_merged(world, [plain, *pinning], ["buffer"])
        for victim in (plain, *pinning):
            victim.ask("run fill")
        scanner = Scanner(world, [plain, *pinning])
        for victim, kind in zip(pinning, kinds, strict=True):
            victim.ask(f"run {kind}")
        try:
            # Attached and armed they are; when the plan begins they are looked at again.
            plan = [
                (op, wire.FLAG_NEW_EXTENT, 0, target, victim.area("late")[0], PAGES, 0, 0, 0, 0)
                for op, target, victim in zip(
                    [wire.OP_FILL, *[wire.OP_MAP] * 3], scanner.targets, [plain, *pinning], strict=True
                )
            ]
            reply = scanner.commit([PAGES], plan)
        finally:
            scanner.close()
        if world.user.uid == 0:
            assert "direct-io" not in reply["skipped"], reply
            assert reply["mapped_pages"] >= 4 * PAGES - 4, reply
            assert all(victim.merged_pages("late") >= PAGES - 1 for victim in pinning)
        else:
            assert reply["skipped"]["direct-io"] == 3 * PAGES, reply
            assert reply["mapped_pages"] == PAGES, reply
            result = world.scan(plain, *pinning)
            errors = {target["pid"]: target["error"] for target in result["targets"]}
            for victim in pinning:
                assert "--allow-direct-io" in errors[victim.pid], errors
                assert victim.merged_pages("late") == 0
                assert victim.merged_pages("buffer") >= PAGES - 1
        for victim in (plain, *pinning):
            victim.verify()
        perform(pinning[0], "fixed unregister close", [plain, *pinning])


def test_a_thread_of_the_kernel_polls_a_ring(world: World) -> None:
    """It writes by way of the page tables, and is stopped like the others."""
    victims = [world.victim("pins") for _ in range(2)]
    for victim in victims:
        victim.ask("run poll")
    for turn in range(4):
        world.scan(*victims)
        for victim in victims:
            perform(victim, "polled polled", victims)
            assert victim.merged_pages("plain") >= PAGES - 4 * turn - 4
            time.sleep(0.05 * turn)  # it falls asleep meanwhile
    world.unmerge()
    for victim in victims:
        perform(victim, "polled", victims)


@pytest.mark.parametrize("kind", ["ring", "context", "direct"])
def test_an_ordinary_users_guard_leaves_them_alone(user_world: World, kind: str) -> None:
    """Who holds a page is told to root alone."""
    world = user_world
    with _everybodys_file() as path:
        plain, other, odd = (world.victim("pins", path) for _ in range(3))
        scan_until_merged(world, [plain, other, odd], ["buffer"])
        odd.ask(f"run {kind}")
        for victim in (plain, other, odd):
            victim.ask("run fill")
        result = world.scan(plain, other, odd)
        errors = {target["pid"]: target["error"] for target in result["targets"]}
        assert "--allow-direct-io" in errors[odd.pid], errors
        assert other.merged_pages("late") >= PAGES - 1
        assert odd.merged_pages("late") == 0
        # What it has a copy of might be held; all else is given back, and the rest once nobody can hold any.
        before = processes.private_pages(odd.pid, *odd.area("buffer"))
        failed = world.request("unmerge", pids=[odd.pid], max_pause_us=5000)["failed"]
        assert bool(failed) == bool(before)
        assert odd.merged_pages("buffer") == before
        odd.verify()
        if kind == "ring":
            perform(odd, "fixed unregister close")
            world.unmerge("--pid", odd.pid)
        else:
            assert not before
