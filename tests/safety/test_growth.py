"""Growing, shrinking and moving merged memory: what appears reads zeros (hazard 3)."""

from __future__ import annotations

import os

import pytest

from tests import requirements_env
from tests.support.merging import merged_pair, perform, scan_until_merged
from tests.support.world import World

ACTIONS = "in_place reserved shrunk step moved kept over tail part again malloc"


def test_whole_extents(each_world: World) -> None:
    first, second = merged_pair(each_world, "growth", 32)
    perform(first, ACTIONS, [second])
    perform(second, ACTIONS, [first])


@pytest.mark.parametrize("pages", [8, 13, 31])
def test_runs_that_are_a_part_of_an_extent(each_world: World, pages: int) -> None:
    """The short victim joins last: behind its runs the store has the content of the long ones."""
    world = each_world
    long_ones = merged_pair(world, "growth", 32)
    short = world.victim("growth", pages)
    scan_until_merged(world, [short], list(short.values))
    perform(short, ACTIONS, long_ones)


@pytest.mark.parametrize("pages", [32, 13])
def test_a_piece_moves_away_and_grows(each_world: World, pages: int) -> None:
    """What was the middle of a run has an end of its own after a move."""
    world = each_world
    others = merged_pair(world, "growth", 32)
    victim = world.victim("growth", pages)
    scan_until_merged(world, [victim], list(victim.values))
    perform(victim, "piece", others)


def test_short_victims_first(world: World) -> None:
    """The other way round: the extents are made for the short victims, long runs continue elsewhere."""
    short_ones = merged_pair(world, "growth", 12)
    long_ones = [world.victim("growth", 32) for _ in range(2)]
    scan_until_merged(world, [*short_ones, *long_ones], [])
    for victim in (*short_ones, *long_ones):
        perform(victim, ACTIONS)
    for victim in (*short_ones, *long_ones):
        victim.verify()


def test_after_unmerge(world: World) -> None:
    first, second = merged_pair(world, "growth", 32)
    world.unmerge()
    perform(first, ACTIONS, [second])


def test_a_guard_that_is_faster_than_its_targets(world: World) -> None:
    """The caller of an event may lose its only processor to the guard before it sleeps.

    Both on one processor, the guard ahead of all others: where the kernel may be preempted,
    it looks while the caller is still on its way to sleep, and must not read an event before
    it has seen whose it is.
    """
    requirements_env.need("root", "realtime")
    processor = {min(os.sched_getaffinity(0))}
    first, second = merged_pair(world, "growth", 32)
    for pid in [first.pid, *world.guard_processes()]:
        os.sched_setaffinity(pid, processor)
    os.sched_setscheduler(world.guard_pid(), os.SCHED_FIFO, os.sched_param(1))
    perform(first, ACTIONS, [second])
