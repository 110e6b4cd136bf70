"""`gpuksm daemon` on real processes: it finds, settles, notices, obeys, and may be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuksm.linux import procfs
from tests.report.test_metrics import parse
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

PAGES = 1500
FAST = ("--interval", "50ms", "--max-interval", "200ms")


def _daemon(world: World, *arguments: object) -> subprocess.Popen[str]:
    process = world.start("daemon", "--backend", "cpu", *FAST, *arguments)
    _until(lambda: _numbers(world) is not None or process.poll() is not None, "the daemon starts")
    return process


def _numbers(world: World) -> Any:
    if not (world.folder / "guard.sock").exists():
        return None
    return world.request("status")["daemon"]


def _until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def _rounds(world: World, more: int) -> dict[str, int]:
    """The numbers after `more` further rounds."""
    wanted = _numbers(world)["full_scans"] + more
    _until(lambda: _numbers(world)["full_scans"] >= wanted, f"{more} more rounds")
    found: dict[str, int] = _numbers(world)
    return found


def _settle(world: World) -> dict[str, int]:
    """Wait until nothing was read for some rounds."""

    def settled() -> bool:
        before = _numbers(world)["pages_scanned"]
        return bool(_rounds(world, 5)["pages_scanned"] == before)

    _until(settled, "the daemon settles")
    found: dict[str, int] = _numbers(world)
    return found


def _merged(victims: list[Victim]) -> bool:
    return all(victim.merged_pages("shared") >= PAGES - 1 for victim in victims)


def _pair(world: World, count: int = 2) -> list[Victim]:
    return [world.victim("regions", PAGES, 500, seed, "straight") for seed in range(1, count + 1)]


def _pids(victims: list[Victim]) -> list[object]:
    return ["--pid", ",".join(str(victim.pid) for victim in victims)]


def _end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == ""
    assert "Traceback" not in err
    return err


def test_settled_memory_is_not_read_again(each_world: World) -> None:
    world = each_world
    victims = _pair(world)
    daemon = _daemon(world, *_pids(victims))
    _until(lambda: _merged(victims), "the pair is merged")
    before = _settle(world)
    cpu = procfs.stat(daemon.pid)
    after = _rounds(world, 20)
    used = procfs.stat(daemon.pid)
    assert after["pages_scanned"] == before["pages_scanned"]
    assert after["plans"] == before["plans"]
    assert used.utime + used.stime - cpu.utime - cpu.stime <= 20 * 2, "at most 20 ms a round"
    assert after["pages_shared"] >= PAGES - 1
    assert after["interval_millisecs"] == 200
    assert after["general_profit"] > 0
    # A process in which nothing is merged stays attached, too.
    assert after["targets"] == 2
    _end(daemon)
    assert daemon.returncode == 0
    assert _merged(victims), "what is merged stays merged"
    assert _numbers(world) is None
    for victim in victims:
        victim.verify()


def test_written_pages_are_merged_once_they_are_calm(world: World) -> None:
    victims = _pair(world, 3)
    daemon = _daemon(world, *_pids(victims))
    _until(lambda: _merged(victims), "all are merged")
    before = _settle(world)
    victims[0].ask("write 20 5")
    after = _settle(world)
    private = processes.private_pages(victims[0].pid, *victims[0].area("shared"))
    assert PAGES // 10 < private < PAGES // 2, "they equal nothing now"
    read = after["pages_scanned"] - before["pages_scanned"]
    assert private <= read < PAGES, "only what was written is read"
    victims[0].ask("rewrite")
    _until(
        lambda: processes.private_pages(victims[0].pid, *victims[0].area("shared")) <= 2,
        "what became equal again is shared again",
    )
    for victim in victims:
        victim.verify()
    _end(daemon)


def test_new_processes_are_taken_and_old_ones_let_go(user_world: World) -> None:
    world = user_world  # a pattern never takes processes with capabilities
    name = f"regions{os.getpid()}"  # no other test has a process of this name
    shutil.copy(world.victims_folder / "regions", world.victims_folder / name)
    victims = [world.victim(name, PAGES, 500, seed, "straight") for seed in (1, 2)]
    daemon = _daemon(world, "--name", f"^{name}$", "--user", world.user.uid)
    _until(lambda: _merged(victims), "the pair is merged")
    victims.append(world.victim(name, PAGES, 500, 9, "straight"))
    _until(lambda: _merged(victims), "a process that came later is merged")
    victims[0].stop()
    _until(lambda: _numbers(world)["targets"] == 2, "one that has exited is let go")
    for victim in victims[1:]:
        victim.verify()
    _end(daemon)


def test_registering_wakes_it(world: World) -> None:
    victims = _pair(world)
    daemon = _daemon(world, "--interval", "50ms", "--max-interval", "60s")
    _until(lambda: _numbers(world)["interval_millisecs"] > 1500, "it waits for long")
    assert world.gpuksm("register", *_pids(victims)).code == 0
    _until(lambda: _merged(victims), "what was registered is merged", 20)
    _end(daemon)


def test_it_may_be_killed_and_a_next_one_goes_on(world: World) -> None:
    victims = _pair(world)
    for salt in range(3):
        daemon = _daemon(world, *_pids(victims))
        if salt:
            time.sleep(0.1 * salt)
        else:
            _until(lambda: _merged(victims), "the pair is merged")
        daemon.kill()
        daemon.communicate()
        for victim in victims:
            victim.verify()
    daemon = _daemon(world, *_pids(victims))
    third = world.start("daemon", *_pids(victims))
    _, err = third.communicate(timeout=60)
    assert third.returncode == 7
    assert err.count("\n") == 1
    assert "another scan is running" in err
    _end(daemon)


def test_a_guard_that_dies_is_followed_by_its_successor(world: World) -> None:
    victims = _pair(world)
    daemon = _daemon(world, *_pids(victims))
    _until(lambda: _merged(victims), "the pair is merged")
    scanned = _numbers(world)["pages_scanned"]
    os.kill(world.guard_pid(), signal.SIGKILL)
    world.guard_pid()
    _until(lambda: (_numbers(world) or {}).get("targets") == 2, "the daemon has come back")
    assert _numbers(world)["pages_scanned"] >= scanned
    victims[0].ask("write 20 5")
    victims[0].ask("rewrite")
    _until(lambda: processes.private_pages(victims[0].pid, *victims[0].area("shared")) <= 2, "shared again")
    for victim in victims:
        victim.verify()
    assert "starting over" in _end(daemon)


def test_ctl_pauses_and_unmerges(world: World) -> None:
    victims = _pair(world)
    daemon = _daemon(world, *_pids(victims))
    _until(lambda: _merged(victims), "the pair is merged")
    assert world.gpuksm("ctl", "set", "run", 0).code == 0
    before = _numbers(world)
    assert before["run"] == 0
    victims[0].ask("write 50 5")
    victims[0].ask("rewrite")
    time.sleep(1)
    assert _numbers(world)["full_scans"] == before["full_scans"]
    assert world.gpuksm("ctl", "get", "run").out == "0\n"
    assert world.gpuksm("ctl", "set", "run", 2).code == 0
    assert [victim.merged_pages("shared") for victim in victims] == [0, 0]
    assert world.gpuksm("ctl", "set", "run", 1).code == 0
    _until(lambda: _merged(victims), "merged again")
    assert parse(world.gpuksm("metrics").out)["gpuksm_run"] == 1
    assert "daemon" in world.gpuksm("status").out
    for victim in victims:
        victim.verify()
    _end(daemon)


def test_the_configuration_is_read_again(world: World, tmp_path: Path) -> None:
    victims = _pair(world)
    config = tmp_path / "gpuksm.toml"
    config.write_text(f'backend = "cpu"\nmax-cpu = "80%"\n[targets]\npid = {victims[0].pid}\n')
    daemon = _daemon(world, "--config", config)
    _until(lambda: _numbers(world)["targets"] == 1, "one target")
    assert _numbers(world)["max_cpu_percent"] == 80
    config.write_text("max-cpu = [1]\n")
    daemon.send_signal(signal.SIGHUP)
    pids = [victim.pid for victim in victims]
    time.sleep(0.5)
    assert _numbers(world)["max_cpu_percent"] == 80, "what is wrong changes nothing"
    config.write_text(f'backend = "cpu"\nmax-cpu = 70\n[targets]\npid = {pids}\n')
    daemon.send_signal(signal.SIGHUP)
    _until(lambda: _merged(victims), "both are merged")
    assert _numbers(world)["max_cpu_percent"] == 70
    assert "not reloaded" in _end(daemon)


def test_cpu_time_stays_within_the_limit(world: World) -> None:
    victims = _pair(world)
    daemon = _daemon(world, *_pids(victims), "--max-cpu", "10%", "--no-smart-scan")
    _until(lambda: _merged(victims), "the pair is merged")
    guard = world.guard_pid()

    def used() -> float:
        stats = [procfs.stat(pid) for pid in (daemon.pid, guard)]
        return sum(stat.utime + stat.stime for stat in stats) / procfs.TICKS_PER_SECOND

    began, cpu = time.monotonic(), used()
    salt = 0
    while time.monotonic() < began + 5:
        salt += 1
        victims[0].ask(f"write 50 {salt}")
    share = (used() - cpu) / (time.monotonic() - began)
    assert share < 0.2, f"{share:.2f} of a CPU"
    _end(daemon)
