"""What a round of a settled session costs, when some of its memory was written before.

The session is `gpuksm.scan.session.Session` in this process, over a real guard, and a
round is what `gpuksm daemon` does in one: the round itself, and telling the guard the
numbers.  A page that was written is seen by the next round, which arms it, and read by
the one after that, when it has been calm for a whole round; so what was written
costs in two rounds, and both are measured.  What is written is equal to nothing: a round
that makes a plan all the same does so for other pages that the processes write to, on
their stacks and in their libraries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contestants import Gpuksm
from bench.kernel_ksm import cpu_seconds
from bench.workload import Processes, Workload
from gpuksm.client import GuardClient
from gpuksm.linux import procfs
from gpuksm.scan import NoProgress, ScanOptions, TargetRequest
from gpuksm.scan.session import Session

PERCENTAGES = (0, 1, 10)
_SETTLE_SECONDS = 120.0
_NAP = 0.05

Row = dict[str, float]


def measure(
    program: Path,
    workload: Workload,
    folder: Path,
    repeats: int,
    percentages: Sequence[int] = PERCENTAGES,
) -> list[dict[str, Any]]:
    """One object for each of `percentages`; the processes check all their bytes at the end."""
    with Processes(program, workload) as processes:
        owner = Gpuksm(processes, workload, folder)
        try:
            with GuardClient.connect(start=True) as client:
                session = Session(client, ScanOptions(backend="cpu"), NoProgress())
                try:
                    session.open()
                    rows = _measured(session, processes, repeats, percentages)
                finally:
                    session.close()
            processes.ask("check")
        finally:
            processes.kill()
            owner.close()
    return [{"bytes": workload.bytes, **row} for row in rows]


def _measured(
    session: Session, processes: Processes, repeats: int, percentages: Sequence[int]
) -> list[dict[str, Any]]:
    """Settle, then write and look in turns."""
    session.follow([TargetRequest(pid) for pid in processes.pids])
    if len(session.followers) != len(processes.pids):
        raise SystemExit("the guard did not attach to every process")
    _settle(session)
    rows: dict[int, list[Row]] = {percent: [] for percent in percentages}
    for _ in range(repeats):
        for percent in percentages:
            rows[percent].append(_written_and_read(session, processes, percent))
    return [_summary(percent, found) for percent, found in rows.items()]


def _settle(session: Session) -> None:
    """Rounds until two in a row did nothing and no map is left to be read again."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    quiet = 0
    while quiet < 2:
        if time.monotonic() > deadline:
            raise SystemExit(f"the session did not settle in {_SETTLE_SECONDS:.0f} s")
        time.sleep(_NAP)
        done = session.round(smart=True, use_zero_pages=True)
        changed = any(follower.changed for follower in session.followers.values())
        quiet = 0 if done.scanned or done.merged or done.planned or changed else quiet + 1


def _written_and_read(session: Session, processes: Processes, percent: int) -> Row:
    """Have the processes write, then two rounds: one that sees it and one that reads it."""
    written = 0.0
    # Asked for nothing they do nothing: answering alone writes to a stack.
    if percent:
        written = sum(row["pages"] for row in processes.ask(f"rewrite {percent}"))
        _wait_asleep(processes)
    seeing, reading = _round(session), _round(session)
    read = seeing["read"] + reading["read"]
    if read < written or (not written and read):
        raise SystemExit(f"{written:.0f} pages were written, and {read:.0f} read")
    row = {"written": written, "read": read}
    row |= {name: seeing[name] + reading[name] for name in ("plans", "wall", "cpu")}
    return {
        **row,
        **{f"seeing_{name}": value for name, value in seeing.items()},
        **{f"reading_{name}": value for name, value in reading.items()},
    }


def _wait_asleep(processes: Processes) -> None:
    """Wait until each waits for its next command, and writes to no stack any more."""
    while any(procfs.stat(pid).state != "S" for pid in processes.pids):
        time.sleep(0.001)


def _round(session: Session) -> Row:
    def used() -> tuple[float, float]:
        return time.process_time(), cpu_seconds(session.guard_pid)

    began, (scanner, guard) = time.monotonic(), used()
    done = session.round(smart=True, use_zero_pages=True)
    session.client.request("knobs", publish={**session.numbers(), **session.counters()})
    wall, (scanner_after, guard_after) = time.monotonic() - began, used()
    return {
        "read": done.scanned,
        "plans": int(done.planned),
        "wall": wall,
        "cpu": scanner_after - scanner + guard_after - guard,
        "cpu_scanner": scanner_after - scanner,
        "cpu_guard": guard_after - guard,
    }


def _summary(percent: int, rows: list[Row]) -> dict[str, Any]:
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {"percent": percent, **medians, "most_cpu": max(row["cpu"] for row in rows), "trials": rows}
