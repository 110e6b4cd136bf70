"""The guard writes its journal anew all the time; its successors know all the same what there is."""

from __future__ import annotations

import os

import pytest

from gpuksm.guard import journal
from gpuksm.linux import pidfd
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World


def _logs(pid: int) -> journal.Journal:
    """The journal that process `pid` holds."""
    found = {}
    process = pidfd.open_process(pid)
    for number, path in processes.descriptors(pid).items():
        for name in ("ledger", "private"):
            if f"memfd:gpuksm-{name}" in path:
                found[name] = pidfd.steal(process, number)
    os.close(process)
    return journal.Journal(found["ledger"], found["private"])


def _churn(world: World, victims: list[Victim], turns: int) -> None:
    """Events, attaches and new extents, so that much is appended."""
    for turn in range(turns):
        for victim in victims[:2]:
            victim.ask("run span")
            victim.ask("run refill")
        for victim in victims[2:]:
            victim.ask(f"write 10 {turn}")
        world.scan(*victims)


def _victims(world: World) -> list[Victim]:
    purgers = [world.victim("purge", 1) for _ in range(2)]
    return [*purgers, *(world.victim("regions", 700, 64, seed, "straight") for seed in (1, 2))]


def test_a_successor_knows_what_was_written_anew(world: World) -> None:
    victims = _victims(world)
    before = [processes.footprint(victim.pid) for victim in victims]
    world.gpuksm("register", "--pid", victims[0].pid)
    world.scan(*victims)
    _churn(world, victims, 4)
    guard = world.guard_pid()
    log = _logs(guard)
    told = list(log.replay())
    for fd in (log.fd, log.private_fd):
        page = int.from_bytes(os.pread(fd, 4, 4), "little")
        assert page > 0, "it was never written anew"
    for fd in (log.fd, log.private_fd, log.read_only):
        os.close(fd)
    assert {record.a for record in told if record.kind == journal.TARGET} == {v.pid for v in victims}
    extents = {record.a for record in told if record.kind == journal.EXTENT}
    assert {record.a for record in told if record.kind == journal.DIGESTS} <= extents
    status = world.request("status")
    seed = world.request("hello")["seed"]
    os.kill(guard, 9)
    assert world.guard_pid() != guard
    after = world.request("status")
    assert world.request("hello")["seed"] == seed
    assert after["registered"] == status["registered"]
    assert 0 < after["store_slots"] <= status["store_slots"]  # it reclaims at once
    merged = {item["pid"]: item["merged_pages"] for item in status["targets"]}
    assert {item["pid"]: item["merged_pages"] for item in after["targets"]} == merged
    _churn(world, victims, 2)
    for victim in victims:
        victim.verify()
    world.unmerge()
    for victim, was in zip(victims, before, strict=True):
        victim.verify()
        processes.await_nothing_left(victim.pid, was)


@pytest.mark.parametrize("fault", ["kill", "error", "enomem"])
@pytest.mark.parametrize("point", ["journal-written", "journal-turned"])
def test_it_fails_while_it_is_written_anew(world: World, point: str, fault: str) -> None:
    victims = _victims(world)
    world.extra_env["GPUKSM_FAULT"] = f"{point}:2:{fault}"
    world.gpuksm("scan", *[part for victim in victims for part in ("--pid", victim.pid)])
    _churn(world, victims, 2)
    assert "fault injected" in (world.folder / "guard.log").read_text()
    os.kill(world.guard_pid(), 9)
    _churn(world, victims, 1)
    for victim in victims:
        victim.verify()
    world.check_nothing_stopped()
    world.unmerge()
    for victim in victims:
        victim.verify()
        assert processes.store_mappings(victim.pid) == []


def test_no_slot_is_used_again_after_all_extents_are_gone(world: World) -> None:
    """Offsets are used once: what comes after the last extent is told although that is gone."""
    victims = _victims(world)
    world.scan(*victims)
    world.gpuksm("register", "--pid", victims[0].pid)  # keeps the guard
    _churn(world, victims, 3)
    log = _logs(world.guard_pid())
    highest = max(r.a + r.b for r in log.replay() if r.kind == journal.EXTENT)
    world.unmerge()
    _churn(world, victims[:2], 2)
    world.unmerge()
    os.kill(world.guard_pid(), 9)
    world.guard_pid()
    world.scan(*victims)
    extents = [r.a for r in log.replay() if r.kind == journal.EXTENT]
    for fd in (log.fd, log.private_fd, log.read_only):
        os.close(fd)
    assert extents
    assert min(extents) > highest
