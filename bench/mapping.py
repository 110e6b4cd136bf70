"""How long a process waits to map and unmap memory while others look at what it has, or merge it.

    python bench/mapping.py [--mib 1024,4096] [--seconds 5]

Needs gcc; run as root, or as an ordinary user for one's own processes, without kernel KSM then.  Two
processes have one mapping of so many MiB each, a quarter of it equal.  A thread of each maps and unmaps pages
again and again, another only wakes: how long these took at most, in milliseconds, with nobody there, while
`gpuksm estimate` and `gpuksm scan` run, while a daemon that has settled goes on for some seconds, during
`gpuksm unmerge --all`, and while kernel KSM at full speed merges and gives back.  Prints a Markdown table;
exit code 1 when a byte is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kernel_ksm
from bench.workload import build
from gpuksm.client import GuardClient

SOURCE = Path(__file__).parent / "workloads" / "mapper.c"
MIB = (1024, 4096)
_KSM_LIMIT_SECONDS = 120
_COLUMNS = ("MiB each", "while", "mapping, longest ms", "not running, longest ms")


class Mapper:
    """A process of the workload."""

    def __init__(self, program: Path, mib: int, seed: int, *, mergeable: bool) -> None:
        pipe = subprocess.PIPE
        command = [str(program), str(mib), str(seed), str(int(mergeable))]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line or line == "CORRUPT":
            raise SystemExit("a byte is wrong" if line else "a process has ended")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def mappers(program: Path, mib: int, *, mergeable: bool) -> Iterator[list[Mapper]]:
    """Two of them, ready; all their bytes are right in the end."""
    both = [Mapper(program, mib, seed, mergeable=mergeable) for seed in (1, 2)]
    try:
        for each in both:
            each.answer()
        yield both
        for each in both:
            each.ask("check")
    finally:
        for each in both:
            each.end()


def _gpuksm(verb: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpuksm", verb, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(verb: str, *arguments: str) -> None:
    if _gpuksm(verb, *arguments).wait():
        raise SystemExit(f"gpuksm {verb} has failed")


class Table:
    """Prints a row for each thing that is done to `both`."""

    def __init__(self, both: list[Mapper], mib: int) -> None:
        self._both, self._mib = both, mib
        self._gaps()

    def _gaps(self) -> list[float]:
        found = [each.ask("gap").split() for each in self._both]
        return [max(int(gaps[column]) for gaps in found) / 1000 for column in (0, 1)]

    @contextlib.contextmanager
    def row(self, what: str) -> Iterator[None]:
        """The gaps while the block runs."""
        self._gaps()
        yield
        mapping, still = self._gaps()
        print(f"| {self._mib} | {what} | {mapping:.1f} | {still:.1f} |", flush=True)


def gpuksm(program: Path, mib: int, seconds: float) -> None:
    """The rows of gpuksm."""
    with mappers(program, mib, mergeable=False) as both:
        pids = [word for each in both for word in ("--pid", str(each.process.pid))]
        table = Table(both, mib)
        with table.row("nobody"):
            time.sleep(seconds)
        with table.row("gpuksm estimate"):
            _run("estimate", *pids)
        with table.row("gpuksm scan"):
            _run("scan", *pids)
        daemon = _gpuksm("daemon", *pids)
        try:
            time.sleep(max(3.0, mib / 1024))  # two rounds that read everything
            with table.row("gpuksm daemon, settled"):
                time.sleep(seconds)
        finally:
            daemon.send_signal(signal.SIGINT)
            daemon.wait()
        with table.row("gpuksm unmerge"):
            _run("unmerge", "--all")


def ksm(program: Path, mib: int, full_speed: kernel_ksm.FullSpeed) -> None:
    """The rows of KSM."""
    try:
        full_speed.begin()
        with mappers(program, mib, mergeable=True) as both:
            table = Table(both, mib)
            with table.row("KSM merges"):
                full_speed.merge(mib * 64, _KSM_LIMIT_SECONDS)
            with table.row("KSM gives back"):
                full_speed.clear()
    finally:
        full_speed.restore()


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", default=",".join(map(str, MIB)), metavar="N,N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    options = parser.parse_args(words)
    print(f"| {' | '.join(_COLUMNS)} |\n|---:|---|---:|---:|")
    before = os.environ.get("GPUKSM_RUNTIME_DIR")
    full_speed = None if kernel_ksm.why_not() else kernel_ksm.FullSpeed()
    try:
        for mib in [int(number) for number in options.mib.split(",")]:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                runtime = Path(folder) / "run"
                runtime.mkdir(mode=0o700)
                os.environ["GPUKSM_RUNTIME_DIR"] = str(runtime)
                program = build(Path(folder), SOURCE)
                gpuksm(program, mib, options.seconds)
                with GuardClient.connect(start=False) as guard:
                    guard.request("shutdown", force=False)
                if full_speed is not None:
                    ksm(program, mib, full_speed)
    finally:
        if before is None:
            os.environ.pop("GPUKSM_RUNTIME_DIR", None)
        else:
            os.environ["GPUKSM_RUNTIME_DIR"] = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
