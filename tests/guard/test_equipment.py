"""What comes while a new agent is being given what it works with, its process running again."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest

from gpuksm import errors
from gpuksm.guard import attach, equipment
from gpuksm.guard.agent import Agent, AgentStuck
from gpuksm.guard.arch.x86_64 import NR
from gpuksm.guard.freeze import ProcessCensus
from tests import requirements_env
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

# What an agent is given one after the other once its process runs again, by who does it.
STEPS = (
    (equipment, "_drop_capabilities"),
    (equipment, "_send_descriptors"),
    (equipment, "_create_uffd"),
    (equipment, "_receive_descriptors"),
    (attach, "reserve_mappings"),
)


def _attach_and_leave(victim: Victim) -> None:
    """Put an agent into a process, as the guard does, and let it end."""
    gifts = tuple(os.memfd_create("gift") for _ in range(4))
    try:
        attachment = attach.attach(
            victim.pid, gifts, ProcessCensus(), fork_events=False, tethered=set(), believed=0
        )
        attachment.close()
    finally:
        for fd in gifts:
            os.close(fd)


@pytest.mark.parametrize("action", ["lock", "shut"])
@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_filter_comes_while_the_agent_is_being_equipped(
    world: World, monkeypatch: pytest.MonkeyPatch, module: Any, step: str, action: str
) -> None:
    """It kills the process for what an agent at work does, or for what one does that is new."""
    requirements_env.need("root")
    victim = world.victim("sandbox", "plain")
    before = processes.footprint(victim.pid)
    perform = getattr(module, step)

    def perform_late(*arguments: Any) -> Any:
        monkeypatch.setattr(module, step, perform)
        victim.ask(f"run {action}")
        return perform(*arguments)

    monkeypatch.setattr(module, step, perform_late)
    # Once it has all the rest, what it is not allowed it does without.
    refused = pytest.raises(errors.Unsupported) if module is equipment else contextlib.nullcontext()
    with refused:
        _attach_and_leave(victim)
    victim.verify()
    processes.await_nothing_left(victim.pid, before)


def test_a_filter_comes_while_the_agent_has_the_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements_env.need("root", "userfaultfd_device")
    victim = world.victim("sandbox", "container")
    before = processes.footprint(victim.pid)
    call = Agent.call

    def call_late(agent: Agent, number: int, *arguments: int) -> int:
        if number == NR.CLOSE:
            victim.ask("run lock")
        return call(agent, number, *arguments)

    monkeypatch.setattr(Agent, "call", call_late)
    with pytest.raises(errors.Unsupported):
        _attach_and_leave(victim)
    victim.verify()
    processes.await_nothing_left(victim.pid, before)


@pytest.mark.timeout(60)
def test_a_process_is_stopped_while_the_agent_is_being_equipped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard does not wait for userfaultfds that an agent which is stopped cannot send."""
    requirements_env.need("root")
    receive = equipment._receive_descriptors
    victim = world.victim("sandbox", "plain")

    def receive_late(*arguments: Any) -> Any:
        os.kill(victim.pid, signal.SIGSTOP)
        return receive(*arguments)

    monkeypatch.setattr(equipment, "_receive_descriptors", receive_late)
    monkeypatch.setattr(equipment, "WAIT_NS", 100_000_000)
    for _ in range(20):
        before = processes.footprint(victim.pid)
        try:
            _attach_and_leave(victim)
        except AgentStuck:
            break
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        victim = world.victim("sandbox", "plain")  # that one had sent them a moment before it was stopped
    else:
        pytest.fail("never stuck")
    victim.verify()
    processes.await_nothing_left(victim.pid, before)
