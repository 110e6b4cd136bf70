"""`make demo`: a node's worth of detector-like jobs, merged while they run, and unmerged again.

Needs no root and leaves nothing behind: the guard it starts has a folder of its
own.  Ends with 0 only when memory was really saved, every check of every job is
green before, while and after, and unmerging gave the memory back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuksm.client import GuardClient
from gpuksm.errors import GuardError
from gpuksm.linux import mappings
from gpuksm.report import text

ROOT = Path(__file__).resolve().parent.parent
JOBS = 4
SHARED_MB = 120
OWN_MB = 30
SCANS = 3
# What must be saved of the copies of the tables, which do not start and end at page boundaries.
LEAST_SHARE = 0.9
# After unmerging, private memory must be back to what it was, but for what the jobs did meanwhile.
TOLERANCE = 0.05

console = Console(width=110, highlight=False)


class Jobs:
    """The running jobs, and their pipes."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "bench" / "detector.py")]
        command += ["--shared-mb", str(SHARED_MB), "--own-mb", str(OWN_MB), "--seed"]
        self._jobs = [
            subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for seed in range(JOBS)
        ]
        self.pids = [job.pid for job in self._jobs]

    def reports(self) -> list[dict[str, Any]]:
        """The next report of every job."""
        found = []
        for job in self._jobs:
            assert job.stdout is not None
            line = job.stdout.readline()
            if not line:
                raise SystemExit(f"job {job.pid} ended with {job.wait()}")
            found.append(json.loads(line))
        return found

    def ask(self, *commands: str) -> list[dict[str, Any]]:
        """Give each job its command, or all the same one, and return their reports."""
        for number, job in enumerate(self._jobs):
            assert job.stdin is not None
            print(commands[number % len(commands)], file=job.stdin, flush=True)
        return self.reports()

    def stop(self) -> None:
        """End every job."""
        for job in self._jobs:
            job.kill()
            job.communicate()


def run(*words: str) -> dict[str, Any]:
    """Run a gpuksm command and return its JSON object."""
    console.print(f"\n[bold]$ gpuksm {' '.join(words)}[/]")
    command = [sys.executable, "-m", "gpuksm", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"gpuksm {words[0]} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def scan() -> dict[str, Any]:
    """The scan; again where a busy machine kept a job from being stopped in time, as its report advises."""
    for _ in range(SCANS):
        found = run("scan", "--batch", "65536")
        late = [target["error"] for target in found["targets"] if target["error"]]
        if not late:
            break
        console.print("\n".join(late))
    return found


def memory(pids: list[int]) -> dict[int, dict[str, int]]:
    """smaps_rollup of each process, in bytes."""
    return {pid: mappings.smaps_rollup(pid) for pid in pids}


def total(found: dict[int, dict[str, int]], name: str) -> int:
    """One of the kernel's sums over all jobs, in bytes."""
    return sum(row[name] for row in found.values())


class Verdict:
    """What was judged, and whether all of it was good."""

    def __init__(self) -> None:
        self.good = True

    def judge(self, good: bool, what: str) -> None:
        """Print one line of the verdict."""
        console.print(("[green]ok[/]     " if good else "[red]WRONG[/]  ") + what)
        self.good &= good

    def jobs(self, reports: list[dict[str, Any]], when: str) -> None:
        """Judge the jobs' own checks."""
        events, checks = (sum(row[key] for row in reports) for key in ("events", "checks"))
        wrong = sum(row["wrong"] for row in reports)
        slowest = max(row["slowest_event_ms"] for row in reports)
        numbers = f"{events:,} events and {checks:,} self-checks so far, slowest event {slowest:.1f} ms"
        self.judge(wrong == 0, f"{when}: {wrong} wrong; {numbers}")


def merge(jobs: Jobs, verdict: Verdict) -> None:
    """Scan, show what it did, and judge it."""
    before = memory(jobs.pids)
    found = scan()
    reports = jobs.ask("report")  # reads every merged page: PSS only counts what somebody has touched
    after = memory(jobs.pids)
    for target in found["targets"]:
        target["pss_before"] = before[target["pid"]]["Pss"]
        target["pss_after"] = after[target["pid"]]["Pss"]
    console.print(text.scan(found))
    tables = (JOBS - 1) * SHARED_MB << 20
    for saved, what in (
        (found["general_profit"], "saved, costs subtracted"),
        (total(before, "Pss") - total(after, "Pss"), "fall of the jobs' PSS"),
    ):
        sizes = f"{text.size(saved)} (needless copies of the tables: {text.size(tables)})"
        verdict.judge(saved >= LEAST_SHARE * tables, f"{what}: {sizes}")
    verdict.jobs(reports, "after merging")


def unmerge(jobs: Jobs, private_before: int, verdict: Verdict) -> None:
    """Unmerge, show and judge it."""
    console.print(text.unmerge(run("unmerge", "--all")))
    verdict.jobs(jobs.ask("report"), "after unmerging")
    private = total(memory(jobs.pids), "Anonymous")
    sizes = f"{text.size(private_before)} before, {text.size(private)} now"
    verdict.judge(abs(private - private_before) <= TOLERANCE * private_before, f"private memory: {sizes}")


def shut_down() -> None:
    """End the demo's own guard, if it came to that; it would end by itself too, a little later."""
    guard = GuardClient.find()
    if guard is not None:
        with guard, contextlib.suppress(GuardError):
            guard.request("shutdown", force=False)


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.monotonic()
    verdict = Verdict()
    with tempfile.TemporaryDirectory(prefix="gpuksm-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GPUKSM_RUNTIME_DIR"] = os.path.join(folder, "run")
        os.environ["PYTHONPATH"] = str(ROOT)
        console.print(
            f"{JOBS} jobs; each computes the same {SHARED_MB} MiB of field map and geometry by itself, has "
            f"{OWN_MB} MiB of its own events, simulates, and checks all of it all the time"
        )
        jobs = Jobs()
        try:
            verdict.jobs(jobs.reports(), "before")
            private = total(memory(jobs.pids), "Anonymous")
            merge(jobs, verdict)
            calibrations = [f"calibrate {number * 7}" for number in range(JOBS)]
            verdict.jobs(jobs.ask(*calibrations), "after each wrote to its own place in the merged field map")
            unmerge(jobs, private, verdict)
        finally:
            jobs.stop()
            shut_down()
    seconds = time.monotonic() - started
    console.print(
        f"\n{'All is as it should be' if verdict.good else 'NOT as it should be'}; {seconds:.0f} s."
    )
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
