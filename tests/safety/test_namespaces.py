"""Containers: targets in namespaces of their own, and all of gpuksm inside of a rootless container."""

from __future__ import annotations

import time

import psutil

from gpuksm import errors
from tests import requirements_env
from tests.support import processes
from tests.support.merging import merged_pair, perform, scan_until_merged
from tests.support.victims import Victim
from tests.support.world import World

_ALL = ("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child")


def _contained(world: World, name: str) -> Victim:
    """A victim that is process 1 of its container; known by its pid outside."""
    victim = world.victim(name, wrapper=_ALL)
    (victim.pid,) = (child.pid for child in psutil.Process(victim.pid).children())
    return victim


def test_every_other_namespace(world: World) -> None:
    """The guard is outside; pids, files and networks inside mean nothing to it."""
    requirements_env.need("root", "unshare")
    victims = [_contained(world, "forks") for _ in range(2)]
    areas = [area for area in victims[0].values if area != "during"]
    scan_until_merged(world, victims, areas)
    for victim, other in (victims, victims[::-1]):
        perform(victim, "reads drops writes grandchildren vfork", [other])
    world.unmerge()
    for victim in victims:
        victim.verify()
    world.scan(*victims)
    victims[0].process.kill()  # and with it its container
    deadline = time.monotonic() + 10
    while processes.alive(victims[0].pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victims[0].expect_status = -9
    perform(victims[1], "reads drops writes")


def test_a_rootless_container(container_world: World) -> None:
    """Its root has every capability inside and none outside: the kernel tells of no forks."""
    first, second = merged_pair(container_world, "forks", without=["during"])
    for victim, other in ((first, second), (second, first)):
        perform(victim, "reads drops writes grandchildren vfork spawn", [other])
    container_world.unmerge()
    for victim in (first, second):
        victim.verify()


def test_another_user_namespace_is_refused(world: World) -> None:
    requirements_env.need("root", "unshare")
    inside = ("unshare", "--user", "--map-root-user")
    victims = [world.victim("regions", 256, 4, seed, "straight", wrapper=inside) for seed in (1, 2)]
    result = world.gpuksm("scan", *(f"--pid={victim.pid}" for victim in victims))
    assert result.code == errors.Unsupported.exit_code, result
    assert "another user namespace" in result.err
    assert len(result.err.strip().splitlines()) == 1
    for victim in victims:
        victim.verify()
