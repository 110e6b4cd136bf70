"""The scenarios of LTP's ksm01 to ksm07, against gpuksm (docs/ksm_scenarios.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from tests import requirements_env
from tests.support import numa
from tests.support.groups import memory_group
from tests.support.merging import perform_all
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 512
A, B, C, D = 97, 98, 99, 100


def _three(world: World, keys: Sequence[int], wrapper: Sequence[str] = ()) -> list[Victim]:
    return [world.victim("ksm", PAGES, key, wrapper=wrapper) for key in keys]


def _settled(
    world: World, victims: Sequence[Victim], contents: int, options: Sequence[object] = ()
) -> dict[str, Any]:
    """Scan until nothing new is merged, then hold the counters to what is known of the content."""
    world.scan(*victims, options=options)
    result = world.scan(*victims, options=options)
    perform_all(victims, "verify")
    merged = sum(victim.merged_pages("memory") for victim in victims)
    assert merged >= len(victims) * (PAGES - 2), result
    # Every content is kept at least once, stretches of it some square root of their length
    # times; what nobody maps any more is freed by and by.
    assert contents <= result["pages_shared"] <= 64 * (contents + 2) + 64
    assert result["pages_sharing"] >= 0.8 * merged
    return result


def _phases(world: World, victims: Sequence[Victim]) -> None:
    """The order of ksm01: c a a, then b b b, d d d, and at last one byte of one process."""
    _settled(world, victims, 2)
    perform_all(victims, f"fill {B}")
    _settled(world, victims, 1)
    perform_all(victims, f"fill {D}")
    one = _settled(world, victims, 1)
    victims[1].ask(f"write {PAGES - 1} {A}")
    after = world.scan(*victims)
    perform_all(victims, "verify")
    assert after["pages_sharing"] <= one["pages_sharing"]
    world.unmerge()
    perform_all(victims, "verify")
    assert all(victim.merged_pages("memory") == 0 for victim in victims)
    assert world.request("status")["store_bytes"] <= 64 * 4096  # punched by and by


def test_ksm01_three_processes(world: World) -> None:
    _phases(world, _three(world, [C, A, A]))


def test_ksm02_on_one_numa_node(world: World) -> None:
    """LTP binds the three to one node of memory: with a single node that is the machine itself."""
    requirements_env.need("numactl")
    _phases(world, _three(world, [C, A, A], ["numactl", "--membind=0"]))


def test_ksm03_in_a_memory_group(world: World) -> None:
    """Three processes whose group is limited merge as they do outside of it."""
    with memory_group("ltp") as group:
        group.allow(64 << 20)
        victims = _three(world, [C, A, A])
        for victim in victims:
            (group.path / "cgroup.procs").write_text(str(victim.pid))
        _phases(world, victims)


def test_ksm05_a_process_dies_while_it_is_merged(world: World) -> None:
    """LTP's ksm05 lets a merged process die of SIGSEGV: the others and the guard go on."""
    victims = _three(world, [A, A, A])
    world.scan(*victims)
    victims[0].expect_status = -11
    os.kill(victims[0].pid, 11)
    victims[0].process.wait(20)
    perform_all(victims[1:], "verify")
    world.scan(*victims[1:])
    perform_all(victims[1:], "verify")
    assert all(victim.merged_pages("memory") >= PAGES - 1 for victim in victims[1:])


def test_ksm06_pages_of_all_nodes_are_merged(world: World) -> None:
    """merge_across_nodes=1: a content is kept once (in parts of a stretch), wherever it lies."""
    victims = _three(world, [A, A, A])
    result = _settled(world, victims, 1)
    assert result["pages_shared"] < 3 * PAGES // 2


def test_ksm06_pages_of_one_node_are_merged(world: World) -> None:
    """merge_across_nodes=0: with a single node that is all of them."""
    if len(numa.nodes()) != 1:
        pytest.skip("with several nodes, where processes lie is the kernel's choice")
    victims = _three(world, [A, A, A])
    result = _settled(world, victims, 1, ["--no-merge-across-nodes"])
    assert result["pages_shared"] < 3 * PAGES // 2
    assert {node for _, _, node in numa.extents(world)} == {min(numa.nodes()) + 1}


def test_zero_pages_are_given_back(world: World) -> None:
    """use_zero_pages is always on: zeros need no stable page."""
    victims = _three(world, [0, 0, 0])
    result = world.scan(*victims)
    assert result["zero_pages"] >= 3 * PAGES
    assert all(victim.merged_pages("memory") == 0 for victim in victims)
    for victim in victims:
        victim.ask(f"write 5 {A}")
    world.unmerge()
    perform_all(victims, "verify")


def test_ksm07_pages_that_change_are_skipped(world: World) -> None:
    """Smart scan skips what failed to merge before; gpuksm reads no page again that was not written."""
    victims = _three(world, [A, B, C])
    world.scan(*victims)
    again = world.scan(*victims)
    assert again["pages_merged"] <= 8, again
    perform_all(victims, "verify")
