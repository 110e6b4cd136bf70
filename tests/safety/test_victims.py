"""The victims on their own: right without gpuksm, and able to see a wrong byte."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

ACTIONS = {
    "purge": (
        ["7"],
        "one bulk span many same arena lazy process_madvise remove advice locked loop refused gap"
        " refill bulk",
    ),
    "growth": (["32"], "in_place reserved shrunk step moved kept over tail part piece again malloc"),
    "forks": ([], "reads drops writes grandchildren vfork vfork_sleeper spawn orphan late"),
    "protect": ([], "kept unprotect changed split replaced break advised executable swapped"),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_are_right_without_merging(world: World, name: str) -> None:
    arguments, actions = ACTIONS[name]
    victim = world.victim(name, *arguments)
    for action in actions.split():
        values = victim.ask(f"run {action}")
        victim.pid = int(values.get("pid", victim.pid))
    victim.verify()


@pytest.mark.parametrize("order", ["straight", "permuted", "constant", "zero"])
def test_regions_sees_a_wrong_byte(world: World, order: str) -> None:
    victim = world.victim("regions", 300, 20, 3, order)
    victim.verify()
    victim.ask("write 20 5")
    victim.ask("rewrite")
    victim.verify()
    _poke(victim, victim.area("shared")[0] + 77 * 4096 + 123, b"!")
    with pytest.raises(AssertionError, match="CORRUPT"):
        victim.verify()
    victim.expect_status = 9


@pytest.mark.parametrize("name", ["purge", "growth", "forks", "protect"])
def test_actions_see_a_wrong_byte(world: World, name: str) -> None:
    arguments, _ = ACTIONS[name]
    victim = world.victim(name, *arguments)
    _poke(victim, victim.area(list(victim.values)[-1])[0] + 4097, b"!")
    with pytest.raises(AssertionError, match="CORRUPT"):
        victim.verify()
    victim.expect_status = 9


def test_writers_sees_a_wrong_byte(world: World) -> None:
    victim = world.victim("writers", 64, 2, 100000)
    victim.ask("report")
    _poke(victim, victim.area("at")[0] + 4097, b"!")
    with pytest.raises(AssertionError, match="CORRUPT"):
        victim.ask("stop")
    victim.expect_status = 9


def test_changeling_sees_a_wrong_byte(world: World) -> None:
    victim = world.victim("changeling", 24)
    os.kill(victim.pid, signal.SIGUSR1)
    while int(victim.ask("verify 1")["children"]) != 1:
        pass
    os.kill(victim.pid, signal.SIGUSR2)
    assert victim.line(20) == "AGAIN"
    start = processes.mappings(victim.pid)  # the new program does not say where its areas are
    wanted = [one.start for one in start if one.pages == 24 and one.perms == "rw-p"]
    _poke(victim, wanted[0] + 4097, b"!")
    with pytest.raises(AssertionError, match="CORRUPT"):
        victim.ask("verify 2")
    victim.expect_status = 9


def _poke(victim: Victim, address: int, data: bytes) -> None:
    with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), data, address)
