"""A whole scan with the pages hashed and sorted by OpenCL kernels: what is merged is what the CPU merges."""

from __future__ import annotations

import pytest

from tests.kernels.executors import PoclExecutor
from tests.support import processes
from tests.support.world import World

PAGES = 4096


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "cpu"],
        ["--backend", "opencl", "--device", "cpu"],
        ["--backend", "opencl", "--device", "cpu", "--gpu-memory", "64M", "--threads", "1"],
    ],
    ids=["cpu", "opencl", "opencl-capped"],
)
def test_the_same_pages_are_merged(world: World, options: list[str]) -> None:
    if "opencl" in options:
        PoclExecutor("")  # skips or fails where there is no PoCL
    victims = [world.victim("regions", PAGES, PAGES, seed, "straight") for seed in (1, 2)]
    result = world.scan(*victims, options=options)
    assert result["backend"] == options[1]
    for victim in victims:
        victim.verify()
        start, end = victim.area("shared")
        merged = processes.store_mappings(victim.pid, start, end)
        assert [(run.start, run.end) for run in merged] == [(start, end)]
