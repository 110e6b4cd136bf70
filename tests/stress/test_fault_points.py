"""The guard is killed at every point that it names, in turn; nothing of a target may be lost.

The points are read from the source, so that a new one is tested without being
listed here.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import gpuksm
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

POINTS = sorted(
    {
        name
        for source in Path(gpuksm.__file__).parent.glob("guard/**/*.py")
        for name in re.findall(r'faults\.point\("([^"]+)"\)', source.read_text())
    }
)


def _victims(world: World, point: str) -> list[Victim]:
    # Only runs of few pages are prepared.
    scattered = (1, 2) if point == "prepared" else ()
    return [
        *(world.victim("writers", 1024, 2, 300, 300) for _ in range(2)),
        *(world.victim("regions", 1024, 64, seed, "straight") for seed in (1, 2)),
        *(world.victim("regions", 700, 16, seed, "permuted", 9000) for seed in scattered),
        *(world.victim("purge", seed) for seed in (1, 2)),
        *(world.victim("growth", pages) for pages in (32, 32, 12)),
        *(world.victim("forks") for _ in range(2)),
    ]


def _look(victims: list[Victim]) -> None:
    for victim in victims:
        victim.ask("report" if victim.program == "writers" else "verify")


def _provoke(victims: list[Victim]) -> None:
    """Whatever makes the guard pass its points: events of every kind."""
    actions = {"purge": "span", "growth": "shrunk", "forks": "drops"}
    for victim in victims:
        action = actions.get(victim.program)
        if action:
            victim.ask(f"run {action}")
    _look(victims)


# Points that are passed again and again within one request, where more is under way by then.
LATER = [point for point in POINTS if point.startswith(("commit", "restore", "filled", "verified", "turn"))]


@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith("takeover")])
def test_killed_at(each_world: World, point: str) -> None:
    _kill_at(each_world, _victims(each_world, point), point, 1)


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("takeover")])
def test_killed_in_each_takeover(world: World, point: str) -> None:
    """No successor comes further; an ordinary user's children have nobody then (what is left of hazard 2)."""
    _kill_at(world, _victims(world, point), point, 1)


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("commit")])
def test_killed_in_a_chain(world: World, point: str) -> None:
    """Where all is scattered but what fills the slots: the third slice is one of a chain."""
    victims = [world.victim("regions", 700, 16, seed, "permuted", 9000) for seed in (1, 2, 3)]
    _kill_at(world, victims, point, 3)


@pytest.mark.parametrize("point", LATER)
def test_killed_at_a_later_turn(world: World, point: str) -> None:
    _kill_at(world, _victims(world, point), point, 3)


def _have_comparers(world: World, point: str) -> None:
    """Where it is they that pass `point`, or their start; a few pages at a time."""
    if point.startswith("compar"):
        world.extra_env |= {"GPUKSM_COMPARERS": "2", "GPUKSM_COMPARER_PAGES": "16"}


def _kill_at(world: World, victims: list[Victim], point: str, turn: int) -> None:
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    _have_comparers(world, point)
    world.extra_env["GPUKSM_FAULT"] = f"{point}:{turn}"
    scan = world.gpuksm("scan", *pids)
    assert "Traceback" not in scan.err
    _look(victims)
    _provoke(victims)
    world.gpuksm("unmerge", "--all")
    _look(victims)
    del world.extra_env["GPUKSM_FAULT"]
    if point.startswith("compar"):
        assert "fault injected" in (world.folder / "guard.log").read_text()
    world.check_nothing_stopped()
    for victim in victims:
        if victim.program == "purge":
            victim.ask("run refill")
    world.gpuksm("scan", *pids)
    _look(victims)
    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
    _look(victims)


# Each point with one kind of error; with every kind `python -m tests.campaign.faults` goes through them.
ERRORS = list(zip(POINTS, itertools.cycle(["error", "enomem"]), strict=False))


@pytest.mark.parametrize(("point", "error"), ERRORS)
def test_failed_at(world: World, point: str, error: str) -> None:
    """The same with an error instead of a death: it may cost the scan, never the guard's targets."""
    victims = _victims(world, point)
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    _have_comparers(world, point)
    world.extra_env["GPUKSM_FAULT"] = f"{point}:2:{error}"
    world.gpuksm("scan", *pids)
    _look(victims)
    _provoke(victims)
    world.gpuksm("unmerge", "--all")
    _look(victims)
    world.check_nothing_stopped()
    world.gpuksm("scan", *pids)
    _look(victims)
    world.unmerge()
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
    _look(victims)


@pytest.mark.parametrize("point", ["commit-thawed", "event-prepared"])
def test_a_target_that_only_seems_to_be_gone_is_kept(world: World, point: str) -> None:
    """ESRCH for a process that lives: whoever merged its memory must go on answering for it."""
    victims = [world.victim("purge", 1) for _ in range(2)]
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1:esrch"
    world.gpuksm("scan", *pids)
    _look(victims)
    _provoke(victims)
    for victim in victims:
        victim.ask("run bulk")
    world.gpuksm("unmerge", "--all")
    world.gpuksm("unmerge", "--all")
    for victim in victims:
        assert processes.store_mappings(victim.pid) == []
    _look(victims)


def test_a_child_is_served_whatever_fails_after_its_fork_was_read(world: World) -> None:
    victims = [world.victim("forks") for _ in range(2)]
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    world.extra_env["GPUKSM_FAULT"] = "fork-read:1:esrch"
    world.gpuksm("scan", *pids)
    for victim in victims:
        victim.ask("run drops")
    assert "fault injected" in (world.folder / "guard.log").read_text()
    _look(victims)


@pytest.mark.parametrize("turn", [2, 4, 9])
@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("commit-")])
def test_killed_while_merging_again(world: World, point: str, turn: int) -> None:
    """Also while pages are replaced that were merged before, and written since."""
    victims = [world.victim("regions", 1500, 64, seed, "straight") for seed in (1, 2)]
    pids = [part for victim in victims for part in ("--pid", victim.pid)]
    world.extra_env["GPUKSM_FAULT"] = f"{point}:{turn}"
    for salt in range(3):
        world.gpuksm("scan", *pids)
        _look(victims)
        for victim in victims:
            victim.ask(f"write 40 {salt}")
        victims[salt % 2].ask("rewrite")
    del world.extra_env["GPUKSM_FAULT"]
    world.check_nothing_stopped()
    world.shut_down()  # successors inherit the fault
    _look(victims)
    for victim in victims:
        victim.ask("rewrite")
    world.gpuksm("scan", *pids)
    _look(victims)
    assert all(processes.private_pages(victim.pid, *victim.area("shared")) <= 2 for victim in victims)
    world.unmerge()
    _look(victims)
