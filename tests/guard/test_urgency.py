"""Guard and agent come before jobs while a target stands still, and only then."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tests import requirements_env
from tests.support import processes, standstill
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 1000


def _agent(victim: Victim) -> int:
    for task in Path(f"/proc/{victim.pid}/task").iterdir():
        if (task / "comm").read_text() == "gpuksm-agent\n":
            return int(task.name)
    raise AssertionError("no agent")


def _policies(*tids: int) -> list[int]:
    return [os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK for tid in tids]


def _policies_in_the_freeze(world: World, guard: int, pair: list[Victim]) -> list[int]:
    """Policies of guard and agent while a target is stopped for a commit."""
    seen: list[list[int]] = []

    def look() -> None:
        stopped = [each for each in pair if processes.stopped_threads(each.pid)]
        assert len(stopped) == 1
        seen.append(_policies(guard, _agent(stopped[0])))

    standstill.while_it_stands(guard, lambda: world.scan(*pair), look)
    return seen[0]


@pytest.fixture
def standing(world: World) -> tuple[World, int, list[Victim]]:
    """A guard that stops itself inside each freeze of a commit, and two victims to merge."""
    requirements_env.need("root", "realtime")
    pair = [world.victim("regions", PAGES, 64, seed, "straight") for seed in (1, 2)]
    return world, standstill.start_standing_still(world, "commit-mapped", pair[0]), pair


def test_the_lowest_real_time_priority_in_a_freeze(standing: tuple[World, int, list[Victim]]) -> None:
    world, guard, pair = standing
    for victim in pair:
        os.sched_setscheduler(victim.pid, os.SCHED_BATCH, os.sched_param(0))
    nice = os.getpriority(os.PRIO_PROCESS, guard)
    assert _policies_in_the_freeze(world, guard, pair) == [os.SCHED_FIFO, os.SCHED_FIFO]
    assert _policies(guard) == [os.SCHED_OTHER]
    assert os.getpriority(os.PRIO_PROCESS, guard) == nice
    assert os.sched_getaffinity(guard) == os.sched_getaffinity(0)
    for victim in pair:
        # What the agent was started with: its target's own.
        assert _policies(victim.pid, _agent(victim)) == [os.SCHED_BATCH, os.SCHED_BATCH]
        victim.verify()


def test_no_agent_whose_process_limits_that_time(standing: tuple[World, int, list[Victim]]) -> None:
    world, guard, pair = standing
    for victim in pair:
        resource.prlimit(victim.pid, resource.RLIMIT_RTTIME, (200_000, 200_000))
    assert _policies_in_the_freeze(world, guard, pair) == [os.SCHED_FIFO, os.SCHED_OTHER]
    for victim in pair:
        victim.verify()


def test_attaching_counts_as_a_pause(world: World) -> None:
    victim = world.victim("regions", PAGES, 64, 1, "straight")
    result = world.scan(victim)
    assert result["pages_merged"] == 0
    assert len(result["pauses_us"]) == 1
    assert 0 < max(result["pauses_us"]) / 1000 == result["max_pause_ms"]
