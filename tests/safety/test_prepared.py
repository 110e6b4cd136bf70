"""What is prepared before a freeze for short runs is looked at again inside of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from gpuksm import wire
from tests.support import processes, standstill
from tests.support.scanner import Scanner
from tests.support.scripts import area_script
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 24

# `write PAGE KEY`, `protect PAGE COUNT PROT`, `fresh PAGE COUNT` (other zeros there), `lock PAGE COUNT`,
# `grow PAGE COUNT` (moved elsewhere, with a page behind).
_SCRIPT = (
    area_script(PAGES)
    + """
import sys
if sys.argv[1] == "backwards":
    expected[:-1] = expected[-2::-1]
    for page, key in enumerate(expected):
        ctypes.memmove(at + page * 4096, content(key), 4096)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "quit":
        break
    page, count, *rest = map(int, numbers or (0, 0))
    if word == "write":
        expected[page] = count
        ctypes.memmove(at + page * 4096, content(count), 4096)
    if word == "protect":
        assert libc.mprotect(at + page * 4096, count * 4096, *rest) == 0
    if word == "fresh":
        assert libc.mmap(at + page * 4096, count * 4096, 3, 0x32, -1, 0) == at + page * 4096
        expected[page : page + count] = [0] * count
    if word == "lock":
        assert libc.mlock(void(at + page * 4096), size(count * 4096)) == 0
    if word == "grow":
        moved = libc.mremap(at + page * 4096, count * 4096, (count + 1) * 4096, 1, None)
        assert moved not in (at, (1 << 64) - 1)
        shown = ctypes.string_at(moved + (count - 1) * 4096, 8192)
        right = shown == content(expected[page + count - 1]) + bytes(4096)
        print("OK" if right else "CORRUPT grown", flush=True)
        continue
    print("CORRUPT pages %s" % wrong() if wrong() else "OK", flush=True)
"""
)


def _commit(
    world: World, victims: list[Victim], meanwhile: str, before: Sequence[int] = ()
) -> dict[str, Any]:
    """Merge what `victims` share page by page; the second one is told `meanwhile` when all is prepared.

    By then its pages `before` are mappings of their own already, and the others lie between them.
    """
    guard = standstill.start_standing_still(world, "prepared", victims[0])
    scanner = Scanner(world, victims)
    (one, _), (two, _) = (victim.area("area") for victim in victims)
    first, second = scanner.targets
    flag = wire.FLAG_NEW_EXTENT
    # The last slot is where the hole begins: what maps it needs no border page.
    slots = [*range(PAGES - 2, -1, -1), PAGES - 1]
    plan = [(wire.OP_FILL, flag, 0, first, one, PAGES, 0, 0, 0, 0)]
    for page in before:
        plan.append((wire.OP_MAP, flag, 0, second, two + page * 4096, 1, 0, slots[page], 0, 0))
    for low, high in itertools.pairwise([-1, *before, PAGES]):
        count = high - low - 1
        plan.append((wire.OP_MAP_EACH, 0, 0, second, two + (low + 1) * 4096, count, 0, 0, 0, PAGES + low + 1))
    column = [0] * PAGES + [wire.EACH_NEW_EXTENT + slot for slot in slots]

    def act() -> None:
        assert standstill.stands(guard), "nothing was prepared"
        victims[1].ask(meanwhile or "verify")

    try:
        return standstill.while_it_stands(guard, lambda: scanner.commit([PAGES], plan, column), act)
    finally:
        scanner.close()
        standstill.let_go(world.guard_processes())


BETWEEN = (5, 11, 17)


@pytest.mark.parametrize("before", [(), BETWEEN])
@pytest.mark.parametrize(
    ("meanwhile", "skipped"),
    [
        ("", {}),
        ("write 7 7777", {"written": 1}),
        ("fresh 7 3", {"written": 3}),
        ("protect 7 3 1", {}),
        ("protect 0 24 1", {}),
        ("lock 7 3", {"locked": PAGES}),
        ("lock 0 24", {"locked": PAGES}),
    ],
)
def test_what_happens_after_preparing(
    world: World, meanwhile: str, skipped: dict[str, int], before: Sequence[int]
) -> None:
    victims = [world.python(_SCRIPT, order) for order in ("forwards", "backwards")]
    for victim in victims:
        victim.verify()  # it has turned its pages round by then
    reply = _commit(world, victims, meanwhile, before)
    # One each for what fills, what is mapped before, and all that was prepared.
    assert len(reply["pauses_us"]) == 2 + bool(before), "not all of it was prepared together"
    skipped = {reason: pages - len(before) * (reason == "locked") for reason, pages in skipped.items()}
    found = {reason: pages for reason, pages in reply["skipped"].items() if reason != "border-page"}
    assert found == skipped, reply
    for victim in victims:
        victim.verify()
    start, _ = victims[1].area("area")
    if meanwhile.startswith("protect"):
        page, count, _ = map(int, meanwhile.split()[1:])
        low, high = start + page * 4096, start + (page + count) * 4096
        for mapping in processes.mappings(victims[1].pid):
            if mapping.start < high and low < mapping.end:
                assert mapping.perms == "r--p", mapping
    victims[0].ask("write 3 5555")
    for victim in victims:
        victim.verify()


def test_a_chain_that_ends_within_its_extent_gives_up_a_page(world: World) -> None:
    """What grows out of its last run must not show the slot behind it (hazard 3)."""
    victims = [world.python(_SCRIPT, order) for order in ("forwards", "backwards")]
    for victim in victims:
        victim.verify()
    world.scan(*(world.victim("regions", 16, 4, seed, "straight", 777000) for seed in (8, 9)))
    scanner = Scanner(world, victims)
    (one, _), (two, _) = (victim.area("area") for victim in victims)
    first, second = scanner.targets
    count = PAGES - 1
    plan = [
        (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, first, one, PAGES, 0, 0, 0, 0),
        (wire.OP_MAP_EACH, 0, 0, second, two, count, 0, 0, 0, PAGES),
    ]
    slots = range(wire.EACH_NEW_EXTENT + count - 1, wire.EACH_NEW_EXTENT - 1, -1)
    reply = scanner.commit([PAGES], plan, [*[0] * PAGES, *slots])
    assert reply["skipped"] == {"border-page": 1}, reply
    assert reply["mapped_pages"] == PAGES + count - 1, reply
    victims[1].verify()
    victims[1].ask(f"grow {count - 1} 1")
    scanner.close()
