"""Processes with seccomp filters: never killed by one for what gpuksm does (hazard 17)."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from gpuksm import errors
from tests import requirements_env
from tests.support import processes
from tests.support.merging import merged_pair, perform, scan_until_merged
from tests.support.standstill import wait_for_event
from tests.support.victims import Victim
from tests.support.world import World


def test_filters_of_containers_are_read_and_let_it_pass(world: World) -> None:
    """userfaultfd is refused there: the agent makes its own by the device that the guard has opened."""
    requirements_env.need("root", "userfaultfd_device")
    victims = merged_pair(world, "sandbox", "container")
    for victim, other in (victims, victims[::-1]):
        perform(victim, "discard child grandchild discard", [other])
    world.unmerge()
    for victim in victims:
        victim.verify()


def test_threads_may_be_started_as_the_c_library_does(world: World) -> None:
    """As QEMU's and browsers' sandboxes have it: the agent shares the descriptors until it has its own."""
    requirements_env.need("root")
    victims = [world.victim("sandbox", "threads") for _ in range(2)]
    before = [processes.descriptors(victim.pid) for victim in victims]
    scan_until_merged(world, victims, ["memory", "left"])
    assert [processes.descriptors(victim.pid) for victim in victims] == before
    perform(victims[0], "discard child grandchild discard", [victims[1]])
    os.kill(world.guard_pid(), signal.SIGKILL)
    perform(victims[1], "discard child", [victims[0]])
    world.unmerge()
    assert [processes.descriptors(victim.pid) for victim in victims] == before
    for victim in victims:
        assert victim.merged_pages("memory") == 0
        victim.verify()


@pytest.mark.parametrize("point", ["attach-hijack", "attach-code", "attach-socket", "attach-clone"])
@pytest.mark.parametrize("action", ["kill", "error"])
def test_an_attach_is_broken_off_where_descriptors_are_shared(world: World, point: str, action: str) -> None:
    requirements_env.need("root")
    victim = world.victim("sandbox", "threads")
    before = processes.footprint(victim.pid)
    world.extra_env["GPUKSM_FAULT"] = f"{point}:1:{action}"
    world.gpuksm("scan", "--pid", victim.pid)
    victim.verify()
    processes.await_nothing_left(victim.pid, before)
    del world.extra_env["GPUKSM_FAULT"]
    victim.verify()


def test_what_a_filter_kills_for_is_not_tried(world: World) -> None:
    deadly, *plain = [world.victim("sandbox", kind) for kind in ("deadly", "plain", "plain")]
    for options in ([], ["--allow-seccomp"]):  # what the filter says counts for more than what is believed
        alone = world.gpuksm("scan", "--pid", deadly.pid, *options)
        assert alone.code == errors.Unsupported.exit_code, alone
        assert alone.err.count("\n") == 1
        assert "socketpair" in alone.err
    world.scan(deadly, *plain)
    assert deadly.merged_pages("memory") == 0
    assert plain[0].merged_pages("memory") >= 255
    for victim in (deadly, *plain):
        victim.verify()


def test_filters_that_cannot_be_read_are_asked_about(user_world: World) -> None:
    victims = [user_world.victim("sandbox", "deadly") for _ in range(2)]
    refused = user_world.gpuksm("scan", "--pid", victims[0].pid)
    assert refused.code == errors.Unsupported.exit_code, refused
    assert "--allow-seccomp" in refused.err
    victims[0].verify()
    harmless = [user_world.victim("sandbox", "harmless") for _ in range(2)]
    scan_until_merged(user_world, harmless, ["memory", "left"], ["--allow-seccomp"])
    perform(harmless[0], "discard child grandchild reads", [harmless[1]])


def _refused_from_now_on(world: World, locked: Victim, other: Victim) -> None:
    """A scan leaves it alone, an unmerge gives the others all back, and says why not that one."""
    merged = locked.merged_pages("left")
    assert merged >= 255
    again = world.gpuksm("scan", "--pid", locked.pid, "--pid", other.pid)
    assert "seccomp" in again.out + again.err
    result = world.gpuksm("unmerge", "--all")
    assert result.code == errors.GuardError.exit_code, result
    assert "seccomp" in result.err
    assert result.err.count("\n") == 1
    assert locked.merged_pages("left") == merged
    assert other.merged_pages("left") == 0
    for victim in (locked, other):
        perform(victim, "discard")
    locked.stop()


@pytest.mark.parametrize("dies", ["nobody", "guard", "both"])
def test_a_filter_comes_after_the_agent(world: World, dies: str) -> None:
    """It would kill the process for what the agent does; discarding, writing and forking go on as before."""
    requirements_env.need("root")
    locked, other = merged_pair(world, "sandbox", "plain")
    locked.ask("run lock")
    perform(locked, "discard discard child grandchild", [other])
    if dies == "guard":
        os.kill(world.guard_pid(), 9)
    elif dies == "both":
        requirements_env.need("thread_pidfd")
        world.kill_guard_and_keeper()
        world.gpuksm("status")
    world.guard_pid()
    perform(locked, "discard discard child", [other])
    perform(other, "discard child", [locked])
    _refused_from_now_on(world, locked, other)


@pytest.mark.parametrize("dies", ["nobody", "both"])
def test_what_a_move_shows_reads_zeros_where_none_can_be_mapped(world: World, dies: str) -> None:
    """They are written; where a takeover has read the event, to memory that it has made to wait."""
    requirements_env.need("root", *(["thread_pidfd"] if dies == "both" else []))
    locked, other = merged_pair(world, "sandbox", "plain")
    locked.ask("run lock")
    if dies == "nobody":
        perform(locked, "apart keep grow again", [other])
    else:
        for action in ("keep", "grow"):
            world.kill_guard_and_keeper()
            locked.send(f"run {action}")
            wait_for_event(locked)
            world.gpuksm("status")
            locked.answer()
            locked.verify()
        perform(locked, "again", [other])
    locked.stop()


# Starts a program with as many supplementary groups as make its /proc status longer than some pages.
_MANY_GROUPS = "import os, sys; os.setgroups(range(100_000, 102_000)); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("kind", ["container", "plain"])
def test_filters_of_a_process_with_many_groups_are_counted(world: World, kind: str) -> None:
    """Those that it has before it is merged, and one that comes then."""
    requirements_env.need("root", "userfaultfd_device")
    many = (sys.executable, "-c", _MANY_GROUPS)
    locked, other = [world.victim("sandbox", kind, wrapper=many) for _ in range(2)]
    scan_until_merged(world, [locked, other], ["memory", "left"])
    locked.ask("run lock")
    perform(locked, "discard", [other])
    perform(other, "discard", [locked])
    locked.stop()


@pytest.mark.parametrize("dies", ["nobody", "guard"])
def test_a_filter_that_cannot_be_read_comes_after_the_agent(user_world: World, dies: str) -> None:
    locked, other = merged_pair(user_world, "sandbox", "plain")
    locked.ask("run lock")
    perform(locked, "discard discard", [other])
    if dies == "guard":
        os.kill(user_world.guard_pid(), 9)
        user_world.guard_pid()
    perform(locked, "discard discard reads", [other])
    perform(other, "discard child", [locked])
    _refused_from_now_on(user_world, locked, other)
