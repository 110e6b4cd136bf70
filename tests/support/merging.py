"""Steps that many tests of merged processes have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tests.support.victims import Victim
from tests.support.world import World


def scan_until_merged(
    world: World, victims: Sequence[Victim], areas: Iterable[str], options: Sequence[object] = ()
) -> dict[str, Any]:
    """Scan, and insist that every page of `areas` is merged in every victim: a test that
    merges nothing proves nothing.  Then let every victim look at all its bytes."""
    result = world.scan(*victims, options=options)
    for victim in victims:
        for area in areas:
            start, end = victim.area(area)
            merged = victim.merged_pages(area)
            # A run that ends inside its extent gives up its last page when nothing lies behind it.
            wanted = (end - start) // 4096 - 1
            assert merged >= wanted, f"{victim.name}: {merged} pages of {area} merged: {result}"
        victim.verify()
    return result


def merged_pair(world: World, name: str, *arguments: object, without: Iterable[str] = ()) -> list[Victim]:
    """Two victims of one kind with all their areas but those of `without` merged."""
    victims = [world.victim(name, *arguments) for _ in range(2)]
    areas = [area for area in victims[0].values if area not in set(without)]
    scan_until_merged(world, victims, areas)
    return victims


def perform(victim: Victim, actions: str, others: Sequence[Victim] = ()) -> dict[str, dict[str, str]]:
    """Perform the named actions one after the other; all victims look at everything after each."""
    answers = {}
    for action in actions.split():
        try:
            answers[action] = victim.ask(f"run {action}")
            for each in (victim, *others):
                each.verify()
        except AssertionError as error:
            raise AssertionError(f"after `{action}`: {error}") from None
    return answers


def perform_all(victims: Iterable[Victim], command: str) -> None:
    """The same command to each victim, one after the other."""
    for victim in victims:
        victim.ask(command)
