"""What a user can get wrong ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuksm import errors
from tests.support import processes
from tests.support.world import Result, World


def _refused(result: Result, error: type[errors.GpuksmError]) -> None:
    assert result.code == error.exit_code, result
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert "Traceback" not in result.err


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_dead_pid(world: World, json: list[str]) -> None:
    _refused(world.gpuksm("scan", *json, "--pid", _dead_pid()), errors.NoSuchProcess)


def test_kernel_threads_and_pid_1(world: World) -> None:
    kernel_thread = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[6]) & 0x200000
    )
    for pid in (kernel_thread, 1):
        result = world.gpuksm("scan", "--pid", pid)
        _refused(
            result, errors.Unsupported if os.geteuid() == 0 or pid == kernel_thread else errors.NotPermitted
        )


def test_itself(world: World) -> None:
    script = (
        "import os, sys, gpuksm.cli\n"
        "sys.argv = ['gpuksm', 'scan', '--pid', str(os.getpid())]\n"
        "sys.exit(gpuksm.cli.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=world.env, capture_output=True, text=True, timeout=60
    )
    _refused(Result(done.returncode, done.stdout, done.stderr), errors.Unsupported)


def test_the_guard_itself(world: World) -> None:
    victims = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    world.scan(*victims)
    _refused(world.gpuksm("scan", "--pid", world.guard_pid()), errors.Unsupported)


@pytest.mark.parametrize("batch", ["0", "-1", str(10**12), "many", "1.5", ""])
def test_senseless_batches(world: World, batch: str) -> None:
    victim = world.victim("regions", 64, 4, 1, "straight")
    result = world.gpuksm("scan", "--batch", batch, "--pid", victim.pid)
    assert result.code == errors.UsageError.exit_code, result
    assert result.out == ""
    assert "batch" in result.err


def test_no_targets(world: World) -> None:
    result = world.gpuksm("scan")
    _refused(result, errors.NoTargets)
    assert "register" in result.err


def test_another_users_process(world: World, user_world: World) -> None:
    if world.user.uid == user_world.user.uid:
        pytest.skip("both are the same user")
    victim = world.victim("regions", 64, 4, 1, "straight")
    before = processes.footprint(victim.pid)
    _refused(user_world.gpuksm("scan", "--pid", victim.pid), errors.NotPermitted)
    assert processes.left_behind(before, processes.footprint(victim.pid)) == []
    victim.verify()


def test_another_user_cannot_talk_to_the_guard(world: World, user_world: World) -> None:
    victims = [world.victim("regions", 64, 4, seed, "straight") for seed in (1, 2)]
    world.scan(*victims)
    world.folder.chmod(0o711)  # even where the folder would let them pass
    script = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "try:\n    sock.connect(sys.argv[1])\n"
        "except PermissionError:\n    print('READY refused=1', flush=True)\n"
        "else:\n    print('READY refused=0', flush=True)\n"
    )
    stranger = user_world.python(script, world.folder / "guard.sock")
    assert stranger.values["refused"] == "1"
    world.folder.chmod(0o700)


def test_one_good_and_one_dead_target(world: World) -> None:
    """A target that was named and does not exist is an error; nothing is changed."""
    victim = world.victim("regions", 64, 4, 1, "straight")
    result = world.gpuksm("scan", "--pid", victim.pid, "--pid", _dead_pid())
    _refused(result, errors.NoSuchProcess)
    assert processes.store_mappings(victim.pid) == []
