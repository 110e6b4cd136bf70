"""Processes that must be skipped, refused or handled with care (hazards 6, 8, 17, 18, 20, 22, 25)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import requirements_env
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World


def _with_plain(world: World, *arguments: object) -> tuple[Victim, list[Victim]]:
    return world.victim("odd", *arguments), [world.victim("odd", "plain") for _ in range(2)]


def _target(result: dict[str, Any], victim: Victim) -> dict[str, Any]:
    found = [target for target in result["targets"] if target["pid"] == victim.pid]
    assert len(found) == 1, result
    return dict(found[0])


def test_a_process_that_shares_the_memory_keeps_its_writes(each_world: World) -> None:
    world = each_world
    odd, plain = _with_plain(world, "sibling")
    for _ in range(4):
        world.scan(odd, *plain)
        assert int(odd.ask("count")["count"]) > 0
    # Nobody stops the sibling in a freeze, so this process must be left alone altogether.
    assert processes.store_mappings(odd.pid) == []
    assert plain[0].merged_pages("memory") == 256
    world.unmerge()
    for _ in range(3):
        time.sleep(0.2)
        odd.ask("count")


@pytest.mark.parametrize("kind", ["seccomp", "undumpable"])
def test_processes_that_are_never_attached(each_world: World, kind: str) -> None:
    world = each_world
    if kind == "undumpable" and world.user.uid == 0:
        pytest.skip("root may trace what is not dumpable; it is skipped all the same, see the other user")
    odd, plain = _with_plain(world, kind)
    before = processes.footprint(odd.pid) if os.geteuid() == 0 else None
    result = world.gpuksm("scan", "--json", *_pids(odd, *plain))
    assert odd.merged_pages("memory") == 0
    assert result.code == 0 or result.err.count("\n") == 1
    if before is not None:
        assert processes.left_behind(before, processes.footprint(odd.pid)) == []
    odd.verify()
    alone = world.gpuksm("scan", "--json", "--pid", odd.pid)
    assert alone.code in (5, 6), alone
    assert alone.err.count("\n") == 1, alone.err
    assert str(odd.pid) in alone.err


def _pids(*victims: Victim) -> list[object]:
    return [part for victim in victims for part in ("--pid", victim.pid)]


@pytest.mark.parametrize("kind", ["locked", "uffd", "shared", "stack", "wiped", "undumped"])
def test_memory_that_is_never_merged(each_world: World, kind: str) -> None:
    world = each_world
    odd, plain = _with_plain(world, kind)
    result = world.gpuksm("scan", "--json", *_pids(odd, *plain))
    if result.code:  # a process that uses userfaultfd itself is refused as a whole
        assert (kind, result.code) == ("uffd", 6), result.err
        world.scan(*plain)
    assert plain[0].merged_pages("memory") == 256
    assert odd.merged_pages("memory") == 0
    odd.verify()
    if kind != "uffd":
        assert sum(_target(result.json(), odd)["skipped"].values()) >= 256


@pytest.mark.parametrize("kind", ["exits", "execs"])
@pytest.mark.parametrize("after_ms", [50, 400, 900, 1300])
def test_targets_that_leave_half_way(world: World, kind: str, after_ms: int) -> None:
    odd, plain = _with_plain(world, kind, after_ms)
    result = world.gpuksm("scan", *_pids(odd, *plain))
    assert result.code in (0, 4, 6), result.err  # it may be gone before anybody looks
    for victim in plain:
        victim.verify()
    if kind == "execs":
        time.sleep(max(0.0, after_ms / 1000))
        odd.send("hello from=cat")
        assert odd.answer(verdict="hello") == {"from": "cat"}
    world.scan(*plain)
    for victim in plain:
        victim.verify()


def test_a_target_is_stopped_and_continued(each_world: World) -> None:
    """Job control in the middle of a merge: stopped stays stopped, continued goes on (hazard 9)."""
    world = each_world
    odd, plain = _with_plain(world, "plain")
    os.kill(odd.pid, signal.SIGSTOP)
    world.gpuksm("scan", *_pids(odd, *plain))
    assert set(processes.thread_states(odd.pid).values()) <= {"T", "t"}
    os.kill(odd.pid, signal.SIGCONT)
    odd.verify()
    scan = world.start("scan", *_pids(odd, *plain))
    for turn in range(60):
        os.kill(odd.pid, signal.SIGSTOP if turn % 2 == 0 else signal.SIGCONT)
        time.sleep(0.02)
    os.kill(odd.pid, signal.SIGCONT)
    scan.communicate(timeout=60)
    odd.verify()
    os.kill(odd.pid, signal.SIGSTOP)
    world.request("unmerge", pids=None, max_pause_us=5000)
    os.kill(odd.pid, signal.SIGCONT)
    odd.verify()
    world.scan(odd, *plain)
    odd.verify()


def test_a_stopped_agent_loses_no_write(world: World) -> None:
    writers = [world.victim("writers", 2048, 2, 300) for _ in range(2)]
    scan = world.start("scan", "--passes", 3, *_pids(*writers))
    while scan.poll() is None:
        for victim in writers:
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(0.003)
            os.kill(victim.pid, signal.SIGCONT)
        time.sleep(0.002)
    scan.communicate()
    for victim in writers:
        victim.ask("stop")


def test_a_process_under_gdb_is_refused(world: World) -> None:
    requirements_env.need("gdb")
    odd, plain = _with_plain(world, "plain")
    gdb = subprocess.Popen(
        ["gdb", "-q", "-nx", "-p", str(odd.pid), "-batch", "-ex", "shell sleep 30"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while f"TracerPid:\t{gdb.pid}" not in Path(f"/proc/{odd.pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = world.gpuksm("scan", "--pid", odd.pid)
        assert result.code == 6, result
        assert result.err.count("\n") == 1
        assert str(odd.pid) in result.err
    finally:
        while gdb.poll() is None:  # it does not end before what it waits for has, once that was started
            for child in psutil.Process(gdb.pid).children(recursive=True):
                child.kill()
            time.sleep(0.05)
    odd.verify()
    world.scan(odd, *plain)
    assert odd.merged_pages("memory") == 256
    odd.verify()


def test_a_debugger_comes_after_the_merge(world: World) -> None:
    """Nobody can be frozen then, and the process must go on all the same (hazard 18)."""
    requirements_env.need("gdb")
    victims = [world.victim("purge", 1) for _ in range(2)]
    world.scan(*victims)
    gdb = subprocess.Popen(
        [
            "gdb",
            "-q",
            "-nx",
            "-p",
            str(victims[0].pid),
            "-ex",
            "handle all nostop noprint",
            "-ex",
            "continue",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while f"TracerPid:\t{gdb.pid}" not in Path(f"/proc/{victims[0].pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        for action in ("one", "bulk", "many", "same"):
            victims[0].ask(f"run {action}", timeout=20)
    finally:
        gdb.kill()
        gdb.wait()
    for victim in victims:
        victim.verify()


def test_the_first_thread_is_gone(world: World) -> None:
    odd, plain = _with_plain(world, "headless")
    world.scan(odd, *plain)
    assert odd.merged_pages("memory") == 256
    odd.ask("run leave")
    odd.verify()
    odd.stop()  # the agent alone must not keep the process
    world.scan(*plain)


def test_a_process_without_its_first_thread_is_left_alone_or_merged(world: World) -> None:
    odd, plain = _with_plain(world, "headless")
    odd.ask("run leave")
    result = world.gpuksm("scan", *_pids(odd, *plain))
    assert result.code == 0 or result.err.count("\n") == 1
    odd.verify()


def test_privileges_are_dropped_after_the_merge(world: World) -> None:
    requirements_env.need("root")
    odd, plain = _with_plain(world, "privileged")
    world.scan(odd, *plain)
    assert odd.merged_pages("memory") == 256
    answer = odd.ask("run drop")
    assert answer["uid"] == "65534"
    assert answer["shared_executable"] == "0"
    for task in Path(f"/proc/{odd.pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        assert int(status["CapEff"], 16) == 0, (task.name, status)
        assert int(status["CapPrm"], 16) == 0, (task.name, status)
    odd.verify()
    # Who drops privileges is not dumpable any more: no new attach, but an end that leaves it right.
    world.unmerge()
    odd.verify()
