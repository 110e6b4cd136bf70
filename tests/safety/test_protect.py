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


def test_nothing_of_ours_lies_where_the_program_may_map_again(each_world: World) -> None:
    """The kernel would put the agent into a hole that the program has left, and may fill by MAP_FIXED."""
    first, _ = merged_pair(each_world, "protect", without=["hidden", "churned"])
    (code,) = processes.anonymous_code(first.pid)
    mappings = processes.mappings(first.pid)
    below = max((each.end for each in mappings if each.end <= code.start), default=0)
    block = max(each.end for each in mappings if code.end <= each.start < code.end + (1 << 20))
    above = min(each.start for each in mappings if each.start >= block)
    assert code.start - below > 1 << 30
    assert above - block > 1 << 30
