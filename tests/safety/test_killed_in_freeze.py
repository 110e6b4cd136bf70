"""A target that is killed while it is frozen is gone at once: nobody waits for us to reap it."""

from __future__ import annotations

import time

import pytest

from tests.support import processes
from tests.support.world import World


@pytest.mark.parametrize("point", ["commit-validated", "attach-frozen"])
def test_its_parent_can_reap_it(each_world: World, point: str) -> None:
    world = each_world
    victims = [world.victim("regions", 2048, 64, seed, "straight") for seed in (1, 2)]
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1:1500ms"
    scan = world.start("scan", "--json", *(part for victim in victims for part in ("--pid", victim.pid)))
    deadline = time.monotonic() + 30
    frozen = None
    while frozen is None and time.monotonic() < deadline:
        frozen = next((victim for victim in victims if processes.stopped_threads(victim.pid)), None)
    assert frozen is not None, "no victim was ever frozen"
    time.sleep(0.05)
    frozen.expect_status = -9
    frozen.process.kill()
    assert frozen.process.wait(timeout=10) == -9
    scan.communicate(timeout=60)
    (other,) = [victim for victim in victims if victim is not frozen]
    other.verify()


@pytest.mark.parametrize("point", ["attach-hijack", "attach-clone"])
def test_the_others_are_merged_all_the_same(world: World, point: str) -> None:
    killed, *others = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2, 3)]
    killed.expect_status = -9
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1:SIGKILL@{killed.pid}"
    scan = world.scan(killed, *others)
    assert killed.process.wait(timeout=10) == -9
    for victim in others:
        assert victim.merged_pages("shared") == 64, scan
        victim.verify()
