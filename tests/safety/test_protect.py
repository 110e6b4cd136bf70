"""Protections, replaced mappings and the heap's end (hazards 4, 12, 20)."""

from __future__ import annotations

from tests.support import processes
from tests.support.merging import merged_pair, perform
from tests.support.world import World

ACTIONS = "kept unprotect changed split replaced break advised executable swapped"


def test_protection_is_kept_and_changes_work(each_world: World) -> None:
    first, second = merged_pair(each_world, "protect", without=["hidden", "churned"])
    start, end = first.area("readonly")
    assert {mapping.perms for mapping in processes.store_mappings(first.pid, start, end)} == {"r--p"}
    perform(first, ACTIONS, [second])
    perform(second, ACTIONS, [first])


def test_unmerge_keeps_protections(world: World) -> None:
    first, second = merged_pair(world, "protect", without=["hidden", "churned"])
    world.unmerge()
    perform(first, ACTIONS, [second])


def test_mappings_are_replaced_while_merging(each_world: World) -> None:
    world = each_world
    victims = [world.victim("protect") for _ in range(2)]
    for victim in victims:
        victim.ask("run churn_start")
    for _ in range(4):
        world.scan(*victims)
    world.unmerge()
    for victim in victims:
        assert int(victim.ask("run churn_stop")["rounds"]) > 0
        victim.verify()
