"""A ledger that takes two processes for each other: the userfaultfds tell which is which."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gpuksm.guard import journal
from gpuksm.linux import pidfd
from tests.support import processes
from tests.support.merging import merged_pair
from tests.support.world import World


def _ledger(pid: int) -> int:
    """A descriptor of the ledger that process `pid`, the keeper, holds."""
    for number, path in processes.descriptors(pid).items():
        if "memfd:gpuksm-ledger" in path:
            process = pidfd.open_process(pid)
            try:
                return pidfd.steal(process, number)
            finally:
                os.close(process)
    raise AssertionError(f"process {pid} holds no ledger")


def _exchange(fd: int, pids: list[int]) -> int:
    """Exchange the processes in what the ledger says of targets; how many records were changed."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    targets = {}
    log = journal.Journal(os.dup(fd))
    at = 0
    for record in log.replay():
        size = journal.RECORD.size + len(record.column)
        if record.kind == journal.TARGET and record.a in pids:
            targets[record.a] = (at, record)
        at += size
    os.close(log.fd)
    for (place, record), (_, other) in zip(targets.values(), reversed(targets.values()), strict=True):
        changed = journal.RECORD.pack(journal.TARGET, record.target, other.a, other.b, other.c)
        assert data[place : place + 4] == changed[:4]
        os.pwrite(fd, changed, place)
    return len(targets)


def test_a_successor_does_not_take_one_process_for_another(world: World) -> None:
    world.extra_env["GPUKSM_JOURNAL_BYTES"] = str(1 << 20)  # records lie one behind the other
    victims = merged_pair(world, "purge", 1, without=["span"])
    guard = world.guard_pid()
    keeper = int(Path(f"/proc/{guard}/stat").read_text().rpartition(")")[2].split()[1])
    ledger = _ledger(keeper)
    try:
        assert _exchange(ledger, [victim.pid for victim in victims]) == 2
    finally:
        os.close(ledger)
    os.kill(guard, signal.SIGKILL)
    assert world.guard_pid() != guard
    deadline = time.monotonic() + 30
    while len(world.request("status")["targets"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for victim, other in (victims, reversed(victims)):
        for action in ("one", "bulk"):
            victim.ask(f"run {action}")
            for each in (victim, other):
                each.verify()
