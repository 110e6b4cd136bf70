"""A process that cannot be taken over now stays on the list, whatever the reason is, and how far it got."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.errors import NotPermitted, TargetGone, Unsupported
from gpuksm.guard import adoption
from gpuksm.guard.agent import Agent
from gpuksm.guard.children import Orphan
from gpuksm.guard.equipment import Attachment
from gpuksm.guard.freeze import FreezeFailed
from gpuksm.linux import procfs
from tests import requirements_env
from tests.support import processes
from tests.support.merging import scan_until_merged
from tests.support.scripts import area_script
from tests.support.standstill import wait_for, wait_for_event
from tests.support.victims import Victim
from tests.support.world import World


@pytest.mark.parametrize(
    "error", [NotPermitted("no"), Unsupported("no"), FreezeFailed("no"), OSError("no")], ids=repr
)
def test_a_takeover_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def attach(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(adoption, "attach", attach)
    monkeypatch.setattr(adoption, "maps_store", lambda *_: True)
    orphan = Orphan(0, None, 7, os.getpid())
    guard: Any = SimpleNamespace(
        orphans=[orphan], gifts=tuple, census=None, privileged=True, targets={}, attic=None
    )
    adoption.adopt_orphans(guard)
    assert guard.orphans == [orphan]
    assert orphan.tries == 1
    assert orphan.pid == os.getpid()


@pytest.mark.parametrize("has_userfaultfd", [True, False])
def test_a_child_that_ends_before_it_is_a_target_leaves_no_descriptor(has_userfaultfd: bool) -> None:
    """The agent is there already; the orphan's own userfaultfd stays its own."""
    with subprocess.Popen(["true"]) as process:
        pid = process.pid
    before = processes.descriptors(os.getpid()).keys()
    ours, theirs = socket.socketpair()
    track, event = (os.open(os.devnull, os.O_RDONLY) for _ in range(2))
    attachment = Attachment(Agent(pid, pid, 0x10000, ours), track, event, 0, 0, 0, (0,) * 5, 0)
    orphan = Orphan(0, event if has_userfaultfd else None, 7, pid)
    orphan.guard = SimpleNamespace(targets={})  # type: ignore[assignment]
    with theirs, pytest.raises(TargetGone):
        orphan.inside(attachment)
    left = processes.descriptors(os.getpid()).keys() - before
    assert left == ({event} if has_userfaultfd else set())
    if has_userfaultfd:
        os.close(event)


# On "cut" it unmaps its second half, on "move" it moves all, on "discard" it discards four pages of it.
_CUT = (
    area_script(32)
    + """
import sys
for line in sys.stdin:
    word = line.strip()
    if word == "quit":
        break
    if word == "cut":
        assert libc.munmap(at + 16 * 4096, 16 * 4096) == 0
        del expected[16:]
    if word == "move":
        there = libc.mmap(None, PAGES * 4096, 0, 0x4022, -1, 0)
        assert libc.mremap(at, PAGES * 4096, PAGES * 4096, 3, there) == there
        at = there
    if word == "discard":
        assert libc.madvise(at + 4 * 4096, 4 * 4096, 4) == 0
        expected[4:8] = [0] * 4
    print("CORRUPT pages %s" % wrong() if wrong() else "OK", flush=True)
"""
)


def _fail_takeover(world: World, times: str) -> list[Victim]:
    """Two victims; a takeover of the first has failed as it settles the end of a run, all else being done."""
    requirements_env.need("thread_pidfd")
    victims = [world.python(_CUT) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    world.kill_guard_and_keeper()
    victims[0].send("cut")
    wait_for_event(victims[0])
    world.extra_env["GPUKSM_FAULT"] = f"restore-copied:{times}:eagain"
    world.gpuksm("status", "--json")
    del world.extra_env["GPUKSM_FAULT"]
    victims[0].answer()
    wait_for(lambda: _failed(world) > 0)
    return victims


def test_what_moves_just_before_a_process_is_frozen_is_still_known_as_merged(world: World) -> None:
    """What it maps was learned before; the freeze looks again."""
    victims = [world.python(_CUT) for _ in range(2)]
    scan_until_merged(world, victims, ["area"])
    world.kill_guard_and_keeper()
    world.extra_env["GPUKSM_FAULT"] = "takeover-prepared:1:500ms"
    world.start("status", "--json")
    wait_for(lambda: _failed(world) > 0)
    for victim in victims:
        victim.send("move")
    for victim in victims:
        victim.answer()
    _await_targets(world, victims)
    status = world.request("status")["targets"]
    assert [target["merged_pages"] >= 31 for target in status] == [True, True], status
    _perform_all(world, victims)


def _failed(world: World) -> int:
    """How often a try has failed so far."""
    return (world.folder / "guard.log").read_text().count("fault injected")


def _await_targets(world: World, victims: list[Victim]) -> None:
    """Wait until all are taken over, and no process is left to be."""
    pids = {victim.pid for victim in victims}
    world.request("unmerge", pids=[])  # waits for that, and unmerges nothing
    wait_for(lambda: {target["pid"] for target in world.request("status")["targets"]} == pids)


def _least_held(pid: int) -> dict[str, int]:
    """How many descriptors of each kind `pid` has at least, looked at for a while."""
    least: dict[str, int] = {}
    for turn in range(40):
        kinds = [re.sub(r"\d+", "N", link) for link in processes.descriptors(pid).values()]
        now = {kind: kinds.count(kind) for kind in kinds}
        least = {kind: min(count, now.get(kind, 0)) for kind, count in least.items()} if turn else now
        time.sleep(0.003)
    return {kind: count for kind, count in least.items() if count}


def _more(now: dict[str, int], before: dict[str, int]) -> bool:
    return any(count > before.get(kind, 0) for kind, count in now.items())


def _perform_all(world: World, victims: list[Victim]) -> None:
    for victim in victims:
        for word in ("verify", "discard", "verify"):
            victim.ask(word)
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_a_takeover_that_fails_half_way_succeeds_at_the_next_try(world: World) -> None:
    """And the guard then holds what one does that has not failed."""
    victims = _fail_takeover(world, "1")
    _await_targets(world, victims)
    guard = world.guard_pid()
    held = _least_held(guard)
    os.kill(guard, 9)
    assert world.guard_pid() != guard
    _await_targets(world, victims)
    assert _failed(world) == 1
    assert _least_held(world.guard_pid()) == held
    _perform_all(world, victims)


def test_a_takeover_that_fails_again_and_again_leaves_nothing_behind(world: World) -> None:
    """Neither in the guard nor in the keeper; and should both die, the next guard takes over."""
    victims = _fail_takeover(world, "*")
    guard = world.guard_pid()
    both = (guard, procfs.stat(guard).ppid)
    held: list[dict[str, int]] = []

    def holds_what_it_must() -> bool:
        held[:] = [_least_held(pid) for pid in both]  # for a moment one may be exchanged for another
        userfaultfds = [each["anon_inode:[userfaultfd]"] for each in held]  # one of who is not taken over
        # No eventfd for an agent that has been let go.
        return userfaultfds == [3, 3] and held[1]["anon_inode:[eventfd]"] == 1

    wait_for(holds_what_it_must)
    tries = _failed(world)
    wait_for(lambda: _failed(world) >= tries + 5)
    # A try may be under way all the time that is looked at; what each leaves behind adds up.
    wait_for(lambda: not any(_more(_least_held(pid), before) for pid, before in zip(both, held, strict=True)))
    world.kill_guard_and_keeper()
    victims[0].send("discard")
    wait_for_event(victims[0])
    world.gpuksm("status", "--json")
    victims[0].answer()
    _await_targets(world, victims)
    _perform_all(world, victims)
