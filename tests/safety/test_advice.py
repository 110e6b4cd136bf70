"""What programs have said of their memory by madvise holds when it is merged, and afterwards (hazard 55)."""

from __future__ import annotations

import os
import signal

import pytest

from gpuksm.linux import mappings
from tests.support import processes
from tests.support.merging import merged_pair, perform, scan_until_merged
from tests.support.victims import Victim
from tests.support.world import World

_ADVICE = {"dc", "hg", "nh", "mg"}


def _told(victim: Victim, areas: list[str] | None = None) -> dict[str, list[set[str]]]:
    """What the kernel says of each page of the areas: the advice among its VmFlags."""
    told: dict[str, list[set[str]]] = {}
    entries = mappings.smaps(victim.pid)
    for area in areas or list(victim.values):
        start, end = victim.area(area)
        told[area] = []
        for entry in entries:
            pages = (min(end, entry.vma.end) - max(start, entry.vma.start)) // 4096
            told[area] += [set(entry.flags & _ADVICE)] * max(0, pages)
        assert len(told[area]) == (end - start) // 4096
    return told


def test_children_miss_what_they_missed_and_nothing_else(each_world: World) -> None:
    first, second = merged_pair(each_world, "advice")
    for victim in (first, second):
        assert all("dc" in page for page in _told(victim)["unforked"])
        assert ["dc" in page for page in _told(victim)["halves"]] == [True] * 64 + [False] * 64
        assert not any("dc" in page for page in _told(victim)["plain"])
    perform(first, "child write child discard child", [second])
    each_world.scan(first, second)  # what was written, and the zeros
    perform(first, "child", [second])
    perform(second, "discard child", [first])
    each_world.unmerge()
    for victim in (first, second):
        perform(victim, "child")


def test_scattered_memory_is_no_exception(world: World) -> None:
    victims = [world.victim("advice", order) for order in ("straight", "reversed", "straight", "reversed")]
    scan_until_merged(world, victims, victims[0].values)
    for victim in victims:
        assert all("dc" in page for page in _told(victim)["backwards"])
        perform(victim, "child")
    world.unmerge()
    for victim in victims:
        assert all("dc" in page for page in _told(victim)["backwards"])
        perform(victim, "child")


def test_it_moves_along(world: World) -> None:
    """Merged, moved, and something else in the old place that is merged in its turn, then all given back."""
    victims = merged_pair(world, "advice")
    for victim in victims:
        victim.values |= perform(victim, "move child")["move"]
        assert victim.merged_pages("moved") >= 63
    scan_until_merged(world, victims, ["moved", "other"])
    for victim in victims:
        told = _told(victim, ["moved", "other"])
        assert all("dc" in page for page in told["moved"])
        assert not any(told["other"])
        perform(victim, "child")
    world.unmerge()
    for victim in victims:
        told = _told(victim, ["moved", "other"])
        assert all("dc" in page for page in told["moved"])
        assert not any(told["other"])
        perform(victim, "child")


def test_what_is_given_back_is_advised_as_before(world: World) -> None:
    victims = [world.victim("advice") for _ in range(2)]
    before = [_told(victim) for victim in victims]
    assert before[0]["nohuge"] == [{"nh"}] * 64 + [set()] * 64
    for _ in range(2):  # what is merged says only part of it, when it is looked at again
        scan_until_merged(world, victims, victims[0].values)
    perform(victims[0], "discard")
    world.unmerge()
    assert [_told(victim) for victim in victims] == before


def test_a_successor_knows_it(world: World) -> None:
    victims = [world.victim("advice") for _ in range(2)]
    before = [_told(victim) for victim in victims]
    scan_until_merged(world, victims, victims[0].values)
    guard = world.guard_pid()
    os.kill(guard, signal.SIGKILL)
    perform(victims[0], "discard child", [victims[1]])
    assert world.guard_pid() != guard
    world.unmerge()
    assert [_told(victim) for victim in victims] == before
    for victim in victims:
        perform(victim, "child")


@pytest.mark.parametrize("point", ["commit-mapped", "restore-copied", "restore-moved"])
def test_a_guard_that_dies_leaves_it_as_it_was(world: World, point: str) -> None:
    victims = [world.victim("advice") for _ in range(2)]
    before = [_told(victim) for victim in victims]
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1"
    world.gpuksm("scan", *(word for victim in victims for word in ("--pid", victim.pid)))
    if point.startswith("restore"):
        assert world.gpuksm("unmerge", "--all").code != 0
    del world.extra_env["GPUKSM_FAULT"]
    for victim in victims:
        perform(victim, "child", victims)
    world.unmerge()
    assert [_told(victim) for victim in victims] == before
    for victim in victims:
        perform(victim, "child", victims)


def test_devices_memory_is_left_alone_where_they_are_let_in(world: World) -> None:
    """RDMA marks memory so before a device writes to it unseen; --allow-direct-io is about others."""
    victims = [world.victim("advice") for _ in range(2)]
    world.scan(*victims, options=["--allow-direct-io"])
    for victim in victims:
        assert victim.merged_pages("plain") >= 63
        assert victim.merged_pages("unforked") == 0
        assert processes.merged_pages(victim.pid, *victim.area("halves")) <= 64
        perform(victim, "child")
