"""Memory control groups: who is charged for what is merged, and what happens at their limits.

The kernel answers a charge that a group's limit does not allow by killing a process of that group:
a target when it is unmerged, the guard when it fills the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gpuksm import errors
from gpuksm.linux import cgroup
from tests.support.groups import Group, memory_group
from tests.support.merging import scan_until_merged
from tests.support.world import World

PAGES = 8192
MIB = 1 << 20


@pytest.fixture
def jobs() -> Iterator[Group]:
    with memory_group("jobs") as group:
        yield group


@pytest.fixture
def service() -> Iterator[Group]:
    with memory_group("service") as group:
        yield group


def test_unmerging_beyond_a_limit_is_refused(world: World, jobs: Group) -> None:
    """Merged memory is charged to the guard's group; giving it back would have a job killed."""
    victims = [
        world.victim("regions", PAGES, 4, seed, "straight", wrapper=jobs.wrapper) for seed in (1, 2, 3)
    ]
    before = jobs.used()
    scan_until_merged(world, victims, ["shared"])
    merged = sum(victim.merged_pages("shared") for victim in victims) * 4096
    assert before - jobs.used() > 0.9 * merged
    jobs.allow(jobs.used() + merged // 2)
    assert cgroup.memory_room(victims[0].pid)[jobs.path] < merged
    refused = world.gpuksm("unmerge", "--all")
    assert refused.code == errors.NotEnoughMemory.exit_code, refused
    assert str(jobs.path) in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert sum(victim.merged_pages("shared") for victim in victims) * 4096 == merged
    world.unmerge("--pid", victims[0].pid)  # what the line says
    for victim in victims:
        victim.verify()
    assert not jobs.kills()
    jobs.allow(1 << 40)
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_the_store_stays_below_the_limit_of_the_guard(world: World, service: Group) -> None:
    """What does not fit stays unmerged, with the reason; nobody is killed."""
    small = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    victims = [world.victim("regions", PAGES, 4, seed, "straight", 1 << 20) for seed in (3, 4)]
    (service.path / "cgroup.procs").write_text(str(os.getpid()))  # whoever starts the guard
    try:
        world.scan(*small)
    finally:
        (service.path.parent / "cgroup.procs").write_text(str(os.getpid()))
    service.allow(service.used() + 24 * MIB)
    result = world.scan(*victims)
    assert result["skipped"].get("guard-memory-limit", 0) > 0, result
    assert service.used() < int(service.limit.read_text())
    assert not service.kills()
    for victim in victims:
        victim.verify()
    service.allow(1 << 40)
    world.scan(*victims)
    for victim in victims:
        victim.verify()
        assert victim.merged_pages("shared") >= PAGES - 1
    world.unmerge()
