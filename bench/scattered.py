"""What a process pays in which thousands of single pages are merged: each of them is a mapping.

    python bench/scattered.py [--pages 1000,10000,30000]

Needs gcc; run as root, or as an ordinary user for one's own processes.  For each number of pages two
processes hold the same pages, each in an order of its own.  One of them is watched: the longest time
in which it stood still during the scan, after `kill -9` of the guard until a successor has taken over,
and during `gpuksm unmerge --all`; and what a fork takes it, before and merged.  Numbers beyond half of
vm.max_map_count are cut by its budget.  Prints a Markdown table; exit code 1 when a byte is wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.contestants import end_guard
from bench.workload import Answering, build
from gpuksm.client import GuardClient

SOURCE = Path(__file__).parent / "workloads" / "scattered.c"
PAGES = (1000, 10_000, 30_000)
STEPS = (1, 7919)  # a prime: no two neighbours of one process are neighbours in the other
_DEADLINE_SECONDS = 60
_COLUMNS = (
    "pages",
    "mappings",
    "scan s",
    "still in it ms",
    "guard MiB",
    "fork ms",
    "fork, merged ms",
    "still in a takeover ms",
    "unmerge s",
    "still in it ms",
)


class Watched(Answering):
    """A process of the workload, ready."""

    def __init__(self, program: Path, pages: int, step: int) -> None:
        super().__init__(program, pages, step)
        self.answer()

    def mappings(self) -> int:
        return Path(f"/proc/{self.process.pid}/maps").read_bytes().count(b"\n")


def _timed(*arguments: str) -> float:
    """Seconds that a command of gpuksm takes."""
    began = time.monotonic()
    command = [sys.executable, "-m", "gpuksm", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _guard_pid() -> int:
    with GuardClient.connect(start=False) as guard:
        return int(guard.request("hello")[0]["pid"])


def _peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def _await_takeover(before: int, pids: set[int]) -> None:
    """Until another guard serves all of `pids`."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.02)
        guard = GuardClient.find()
        if guard is None:
            continue
        with guard:
            reply = guard.request("status")[0]
            if pids <= {target["pid"] for target in reply["targets"]} and _guard_pid() != before:
                return
    raise SystemExit("no guard has taken over")


def trial(program: Path, pages: int) -> list[float]:
    """The figures of one row."""
    both = [Watched(program, pages, step) for step in STEPS]
    one = both[1]
    try:
        [fork] = one.ms("fork")
        one.ask("gap")
        scan = _timed("scan", *(part for each in both for part in ("--pid", str(each.process.pid))))
        [still] = one.ms("gap")
        guard, mappings = _guard_pid(), one.mappings()
        memory, [merged_fork] = _peak_mib(guard), one.ms("fork")
        one.ask("gap")
        os.kill(guard, signal.SIGKILL)
        _await_takeover(guard, {each.process.pid for each in both})
        [takeover] = one.ms("gap")
        unmerge = _timed("unmerge", "--all")
        [given_back] = one.ms("gap")
        for each in both:
            each.ask("check")
        return [pages, mappings, scan, still, memory, fork, merged_fork, takeover, unmerge, given_back]
    finally:
        for each in both:
            each.end()


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", default=",".join(map(str, PAGES)), metavar="N,N")
    numbers = [int(number) for number in parser.parse_args(words).pages.split(",")]
    before = os.environ.get("GPUKSM_RUNTIME_DIR")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---:|' * len(_COLUMNS)}")
    try:
        for number in numbers:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                runtime = Path(folder) / "run"
                runtime.mkdir(mode=0o700)
                os.environ["GPUKSM_RUNTIME_DIR"] = str(runtime)
                row = trial(build(Path(folder), SOURCE), number)
                print(f"| {' | '.join(f'{value:.1f}' if value % 1 else f'{value:.0f}' for value in row)} |")
                if not end_guard():
                    raise SystemExit("the guard does not end")
    finally:
        if before is None:
            os.environ.pop("GPUKSM_RUNTIME_DIR", None)
        else:
            os.environ["GPUKSM_RUNTIME_DIR"] = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
