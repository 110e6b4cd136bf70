"""A run whose continuation fails in a later slice ends well all the same (hazard 3)."""

from __future__ import annotations

from gpuksm import wire
from gpuksm.guard import commit, pace
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE
from tests.support import merging, processes
from tests.support.scanner import Scanner
from tests.support.scripts import area_script
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 160
SHORTEST_PAUSE_US = 100
# Pages of the first slice of a long run, where nothing was learned of pauses yet.
SLICE = int((pace.Pace().limit(SHORTEST_PAUSE_US) - commit.ENTRY_WEIGHT) / commit.PAGE_WEIGHT)

_GROWING = (
    area_script(PAGES)
    + """
import sys
for line in sys.stdin:
    word, *rest = line.split()
    if word == "quit":
        break
    if word == "write":
        page = int(rest[0])
        expected[page] = 9000 + page
        ctypes.memmove(at + page * 4096, content(expected[page]), 4096)
    if word == "discard":
        page, count = map(int, rest)
        assert libc.madvise(at + page * 4096, count * 4096, 4) == 0
        expected[page : page + count] = [0] * count
    if word == "grow":
        pages = int(rest[0])
        moved = libc.mremap(at, pages * 4096, (pages + 1) * 4096, 1, None)
        assert moved not in (at, (1 << 64) - 1)
        shown = [ctypes.string_at(moved + page * 4096, 4096) for page in range(pages + 1)]
        right = shown == [content(key) for key in expected[:pages]] + [bytes(4096)]
        print("OK" if right else "CORRUPT grown", flush=True)
        continue
    print("CORRUPT" if wrong() else "OK", flush=True)
"""
)


def test_a_run_whose_next_slice_begins_with_a_written_page(world: World) -> None:
    assert 0 < SLICE < PAGES - 1
    starters = [world.victim("regions", 16, 4, seed, "straight", 777000) for seed in (8, 9)]
    world.scan(*starters)  # a guard that has learned nothing
    victim = world.python(_GROWING)
    scanner = Scanner(world, [victim])
    victim.ask(f"write {SLICE}")
    start = victim.area("area")[0]
    fill = (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, scanner.targets[0], start, PAGES, 0, 0, 0, 0)
    reply = scanner.commit([PAGES], [fill], max_pause_us=SHORTEST_PAUSE_US)
    assert reply.get("ok"), reply
    assert reply["skipped"].get("written") == 1, reply
    first_slice = processes.merged_pages(victim.pid, start, start + SLICE * PAGE_SIZE)
    assert first_slice == SLICE - 1, "no border page"
    victim.verify()
    victim.ask(f"grow {SLICE - 1}")  # all that is one mapping
    scanner.close()


def test_a_run_of_which_an_error_leaves_out_the_rest(world: World) -> None:
    """Before its second slice; what has been mapped of it until then ends well all the same."""
    victim = world.python(_GROWING)
    world.extra_env["GPUKSM_FAULT"] = "turn:2:error"
    world.gpuksm("register", "--pid", victim.pid)  # starts a guard
    scanner = Scanner(world, [victim])
    start = victim.area("area")[0]
    fill = (wire.OP_FILL, wire.FLAG_NEW_EXTENT, 0, scanner.targets[0], start, PAGES, 0, 0, 0, 0)
    reply = scanner.commit([PAGES], [fill], max_pause_us=SHORTEST_PAUSE_US)
    assert "fault injected" in reply["message"], reply
    merged = processes.merged_pages(victim.pid, start, start + PAGES * PAGE_SIZE)
    assert merged == SLICE - 1, "no border page"
    victim.verify()
    victim.ask(f"grow {merged}")
    scanner.close()


def _watched(victim: Victim) -> list[int]:
    """The pages of its area that are its own and raise events."""
    start, end = victim.area("area")
    own = [entry.vma for entry in mappings.smaps(victim.pid) if not entry.vma.inode and "uw" in entry.flags]
    return [
        (page - start) // PAGE_SIZE
        for vma in own
        for page in range(max(start, vma.start), min(end, vma.end), PAGE_SIZE)
    ]


def test_what_was_behind_an_end_that_is_gone_is_not_watched_any_more(each_world: World) -> None:
    """A heap that shrinks page by page would else have each page watched, for ever, and in each child."""
    victims = [each_world.python(_GROWING) for _ in range(2)]
    merging.scan_until_merged(each_world, victims, ["area"])
    victim = victims[0]
    for page in range(PAGES - 2, PAGES // 2, -1):
        victim.ask(f"discard {page} 1")
        assert _watched(victim) in ([page], []), "one border page, where the run ends"
    victim.ask("discard 20 5")
    victim.ask("discard 10 1")
    assert set(_watched(victim)) >= {10, 20, PAGES // 2 + 1}, "each of these is behind an end"
    victim.ask("discard 11 9")
    assert set(_watched(victim)) & set(range(PAGES // 2)) == {10}
    victim.verify()
    victim.ask("grow 10")
