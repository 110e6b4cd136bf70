"""Self-checking victims under a guard of their own, and scans that run in this process.

A scan takes tens of milliseconds here instead of the second that a command takes; the
guard and its keeper are processes of their own as always.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpuksm import errors
from gpuksm.client import GuardClient
from gpuksm.scan import NoProgress, ScanOptions, ScanResult, TargetRequest, run_scan
from tests.support import processes, victims
from tests.support.victims import Victim
from tests.support.world import User, World

OPTIONS = ScanOptions(batch_pages=1024, settle_seconds=0.01, backend="cpu", threads=1)
TRY_AGAIN = ("try again", "does not stop", "is stopped", "did not stop", "lost the guard", "another scan")
_MOVES_ITS_MEMORY = ("growth", "forks")
_SETTLE_SECONDS = 2
_tags = itertools.count(1)


@contextlib.contextmanager
def built(*names: str) -> Iterator[Path]:
    """A folder with victims compiled: those named, or all."""
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-victims-"))
    try:
        victims.build(folder, names or ("*",))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def opened(victims_folder: Path) -> Iterator[World]:
    """A world of this user; whatever is left of it at the end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-campaign-"))
    world = World(folder, victims_folder, User(os.getuid()))
    os.environ["GPUKSM_RUNTIME_DIR"] = str(folder)
    try:
        yield world
    finally:
        for victim in world.victims:
            victim.kill()
        for _ in range(50):  # a keeper may have been starting a guard
            if not world._kill_guards():
                break
        shutil.rmtree(folder, ignore_errors=True)


def scan(pids: list[int]) -> ScanResult:
    """One scan in this process; GpuksmError as the command would report it."""
    with GuardClient.connect(start=True) as client:
        return run_scan(client, [TargetRequest(pid) for pid in pids], OPTIONS, NoProgress())


def scan_well(pids: list[int], attempts: int = 5) -> ScanResult:
    """A scan that must succeed for every target; tried again where it says so."""
    said = ""
    for attempt in range(attempts):
        try:
            result = scan(pids)
        except errors.GpuksmError as error:
            said = repr(error)
        else:
            wrong = [target.error for target in result.targets if target.error is not None]
            if not wrong:
                return result
            said = "; ".join(map(str, wrong))
        assert any(text in said for text in TRY_AGAIN), f"scan: {said}"
        time.sleep(0.05 * 2**attempt)
    raise AssertionError(f"scan, tried {attempts} times: {said}")


def unmerge_well(attempts: int = 5) -> None:
    """Unmerge everything; tried again while a target cannot be stopped."""
    failed: object = None
    for attempt in range(attempts):
        with GuardClient.connect(start=True) as client:
            failed = client.request("unmerge", pids=None, max_pause_us=5000)[0].get("failed")
        if not failed:
            return
        time.sleep(0.05 * 2**attempt)
    raise AssertionError(f"unmerge: {failed}")


def shut_down(world: World) -> None:
    """End guard and keeper, which may have ended by themselves: nothing is merged any more."""
    client = GuardClient.find()
    if client is not None:
        with client, contextlib.suppress(errors.GuardError):
            client.request("shutdown", force=False)
    deadline = time.monotonic() + 20
    while left := world.guard_processes():
        assert time.monotonic() < deadline, f"still running after shutdown: {left}"
        time.sleep(0.005)


def ask_changeling(victim: Victim, word: str, timeout: float = 20) -> dict[str, str]:
    """A command to tests/victims/changeling.c, said again when it has called exec meanwhile."""
    tag = str(next(_tags))
    victim.send(f"{word} {tag}")
    while True:
        line = victim.line(timeout)
        if line == "AGAIN":
            victim.send(f"{word} {tag}")
            continue
        verdict, *rest = line.split()
        assert verdict == "OK", f"victim {victim.name} ({victim.pid}): {line}"
        values = dict(part.split("=", 1) for part in rest)
        if values["tag"] == tag:
            return values


def look(victim: Victim) -> None:
    """Let a victim compare all its bytes."""
    if victim.program == "changeling":
        ask_changeling(victim, "verify")
    else:
        victim.ask("report" if victim.program == "writers" else "verify", 20)


def footprints(all_victims: list[Victim]) -> dict[int, processes.Footprint]:
    """What is to be as before when nothing is merged any more, by pid."""
    return {victim.pid: processes.footprint(victim.pid) for victim in all_victims}


def settled_difference(victim: Victim, before: processes.Footprint) -> list[str]:
    """What gpuksm has left in a victim, once agents that are ending have had time to."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        said = processes.left_behind(before, processes.footprint(victim.pid))
        if victim.program in _MOVES_ITS_MEMORY:
            said = [each for each in said if not each.startswith("mapping")]
        if not said or time.monotonic() > deadline:
            return said
        time.sleep(0.02)
