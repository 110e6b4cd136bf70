"""How long processes wait while gpuksm, or kernel KSM, works on them, or on others.

    python bench/waiting.py [--mib 1024,4096] [--seconds 5]

Needs gcc; run as root, or as an ordinary user for one's own processes, without kernel KSM then.  Two
processes have one mapping of so many MiB each, a quarter equal.  A thread of each maps and unmaps
pages again and again, another only wakes.  Two bystanders of 32 MiB, equal and merged before, go on:
one of them forks, and discards merged pages.  How long each of these took at most, in milliseconds: while
`gpuksm estimate` and `gpuksm scan` run over the large ones, while a daemon that has settled goes on for some
seconds, during `gpuksm unmerge` of them, and while kernel KSM at full speed merges and gives back.  Prints a
Markdown table; exit code 1 when a byte is wrong.
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
from bench.contestants import end_guard
from bench.workload import Answering, build

WORKLOADS = Path(__file__).parent / "workloads"
MIB = (1024, 4096)
_BYSTANDER_PAGES = 8192
_KSM_LIMIT_SECONDS = 120
_COLUMNS = ("MiB each", "while", "mapping", "not running", "bystander's fork", "its discard")


class Scene:
    """Two large processes and two bystanders."""

    def __init__(self, folder: Path, mib: int, *, mergeable: bool) -> None:
        mapper, bystander = (build(folder, WORKLOADS / f"{name}.c") for name in ("mapper", "bystander"))
        self.mib = mib
        self.large = [Answering(mapper, mib, seed, int(mergeable)) for seed in (1, 2)]
        self.bystanders = [Answering(bystander, int(mergeable)) for _ in range(2)]
        self.everybody = [*self.large, *self.bystanders]

    def begin(self) -> None:
        """From now on one of the bystanders, which are merged, is at work."""
        self.bystanders[0].ask("begin")

    @contextlib.contextmanager
    def row(self, what: str) -> Iterator[None]:
        """Print the longest times while the block runs."""
        watched = (*self.large, self.bystanders[0])
        for each in watched:
            each.ms("gap")
        yield
        first, second, bystander = (each.ms("gap") for each in watched)
        times = (*map(max, first, second), *bystander)
        print(f"| {self.mib} | {what} | {' | '.join(f'{took:.1f}' for took in times)} |", flush=True)

    def __enter__(self) -> Scene:
        for each in self.everybody:
            each.answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End all; their bytes must be right."""
        try:
            if kind is None:
                for each in self.everybody:
                    each.ask("check")
        finally:
            for each in self.everybody:
                each.end()


def _pids(processes: list[Answering]) -> list[str]:
    return [word for each in processes for word in ("--pid", str(each.process.pid))]


def _gpuksm(verb: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpuksm", verb, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(verb: str, *arguments: str) -> None:
    if _gpuksm(verb, *arguments).wait():
        raise SystemExit(f"gpuksm {verb} has failed")


def gpuksm(folder: Path, mib: int, seconds: float) -> None:
    """The rows of gpuksm."""
    with Scene(folder, mib, mergeable=False) as scene:
        pids = _pids(scene.large)
        _run("scan", *_pids(scene.bystanders))
        scene.begin()
        with scene.row("nothing happens"):
            time.sleep(seconds)
        with scene.row("gpuksm estimate"):
            _run("estimate", *pids)
        with scene.row("gpuksm scan"):
            _run("scan", *pids)
        daemon = _gpuksm("daemon", *pids)
        try:
            time.sleep(max(3.0, mib / 1024))  # two rounds that read everything
            with scene.row("gpuksm daemon, settled"):
                time.sleep(seconds)
        finally:
            daemon.send_signal(signal.SIGINT)
            daemon.wait()
        with scene.row("gpuksm unmerge"):
            _run("unmerge", *pids)


def ksm(folder: Path, mib: int, full_speed: kernel_ksm.FullSpeed) -> None:
    """The rows of KSM."""
    try:
        full_speed.begin()
        with Scene(folder, mib, mergeable=True) as scene:
            scene.begin()
            with scene.row("KSM merges"):
                full_speed.merge(mib * 64 + _BYSTANDER_PAGES // 2, _KSM_LIMIT_SECONDS)
            with scene.row("KSM gives back"):
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
    print(f"| {' | '.join(_COLUMNS)} |\n|---:|---|{'---:|' * (len(_COLUMNS) - 2)}")
    before = os.environ.get("GPUKSM_RUNTIME_DIR")
    full_speed = None if kernel_ksm.why_not() else kernel_ksm.FullSpeed()
    try:
        for mib in [int(number) for number in options.mib.split(",")]:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                runtime = Path(folder) / "run"
                runtime.mkdir(mode=0o700)
                os.environ["GPUKSM_RUNTIME_DIR"] = str(runtime)
                gpuksm(Path(folder), mib, options.seconds)
                if not end_guard():
                    raise SystemExit("the guard does not end")
                if full_speed is not None:
                    ksm(Path(folder), mib, full_speed)
    finally:
        if before is None:
            os.environ.pop("GPUKSM_RUNTIME_DIR", None)
        else:
            os.environ["GPUKSM_RUNTIME_DIR"] = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
