"""Processes with long mappings: what is cut while it is looked at is whole again, whoever dies meanwhile."""

from __future__ import annotations

import itertools
import time

import pytest

from gpuksm.linux import mappings
from tests.support import processes
from tests.support.scripts import area_script
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 64
_LONG = 160 << 20  # so much of it is there that it is cut: gpuksm/guard/seams.py

# Beside the area, which is equal in all, a long mapping of its own, and one that is left out, of which little
# is there.  `look`: whether all is right.
_SCRIPT = (
    area_script(PAGES).replace("print(", "import os, sys\nREADY = (").replace(", flush=True)", ")")
    + f"""
LONG = {_LONG}
"""
    + """
long = libc.mmap(None, LONG, 3, 0x4022, -1, 0)
kept = libc.mmap(None, 2 * LONG, 3, 0x4022, -1, 0)
assert libc.madvise(long, LONG, 15) == libc.madvise(kept, 2 * LONG, 16) == 0
own = os.urandom(8)
for page in range(LONG // 4096):
    ctypes.memmove(long + page * 4096, own + page.to_bytes(8, "little"), 16)
ctypes.memmove(kept + LONG, own, 8)
print(READY + " long=%#x kept=%#x" % (long, kept), flush=True)
for line in sys.stdin:
    if line == "quit\\n":
        break
    right = all(
        ctypes.string_at(long + page * 4096, 17) == own + page.to_bytes(8, "little") + bytes(1)
        for page in range(LONG // 4096)
    )
    right &= ctypes.string_at(kept + LONG, 9) == own + bytes(1) and not wrong()
    print("OK" if right else "CORRUPT", flush=True)
"""
)


def _victims(world: World) -> list[Victim]:
    return [world.python(_SCRIPT) for _ in range(2)]


def _registered(victim: Victim, name: str, size: int) -> list[bool]:
    """Of each mapping that lies in one of the victim's, whether it is registered."""
    start = int(victim.values[name], 16)
    found = [entry for entry in mappings.smaps(victim.pid) if start <= entry.vma.start < start + size]
    assert found[-1].vma.end >= start + size
    return ["uw" in entry.flags for entry in found]


def _is_whole(victim: Victim, *, tracked: bool) -> None:
    assert _registered(victim, "long", _LONG) == [tracked]
    assert _registered(victim, "kept", 2 * _LONG) == [False]
    victim.ask("look")


def _leave(world: World, victims: list[Victim], before: dict[int, processes.Footprint]) -> None:
    world.unmerge()
    for victim in victims:
        processes.await_nothing_left(victim.pid, before[victim.pid])
        _is_whole(victim, tracked=False)


def test_they_are_cut_while_they_are_looked_at_and_whole_before_and_after(each_world: World) -> None:
    victims = _victims(each_world)
    before = {victim.pid: processes.footprint(victim.pid) for victim in victims}
    each_world.extra_env["GPUKSM_FAULT"] = "seams-cut:*:300ms"
    scan = each_world.start(
        "scan", *itertools.chain.from_iterable(("--pid", victim.pid) for victim in victims)
    )
    seen: set[int] = set()
    while scan.poll() is None:
        seen |= {len(_registered(victim, "long", _LONG)) for victim in victims}
        time.sleep(0.01)
    assert scan.returncode == 0
    assert max(seen) >= 3
    assert [victim.merged_pages("area") >= PAGES - 2 for victim in victims] == [True] * 2
    for victim in victims:
        _is_whole(victim, tracked=True)
    _leave(each_world, victims, before)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_guard_that_dies_while_they_are_cut(world: World, nth: int) -> None:
    victims = _victims(world)
    before = {victim.pid: processes.footprint(victim.pid) for victim in victims}
    world.extra_env["GPUKSM_FAULT"] = f"seams-cut:{nth}"
    result = world.gpuksm("scan", *itertools.chain.from_iterable(("--pid", victim.pid) for victim in victims))
    assert result.code != 0
    del world.extra_env["GPUKSM_FAULT"]
    world.kill_guard_and_keeper()  # which go by the fault
    world.scan(*victims)
    for victim in victims:
        _is_whole(victim, tracked=True)
    _leave(world, victims, before)


def test_a_guard_that_dies_while_it_leaves_them(world: World) -> None:
    victims = _victims(world)
    before = {victim.pid: processes.footprint(victim.pid) for victim in victims}
    world.extra_env["GPUKSM_FAULT"] = "seams-part:2"
    world.scan(*victims)
    guard = world.guard_pid()
    assert world.gpuksm("unmerge", "--all").code != 0
    assert world.guard_pid() != guard
    world.kill_guard_and_keeper()
    del world.extra_env["GPUKSM_FAULT"]
    world.scan(*victims)
    _leave(world, victims, before)
