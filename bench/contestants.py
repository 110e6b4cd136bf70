"""Kernel KSM and gpuksm as a benchmark sees them: merge, go on, tell, rest, and be gone.

Both have the same methods.  What is measured is said at the head of versus_ksm.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench import kernel_ksm
from bench.kernel_ksm import FullSpeed, cpu_seconds
from bench.workload import Processes, Workload
from gpuksm.client import GuardClient
from gpuksm.errors import GuardError
from gpuksm.linux import procfs

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 150.0  # for one merging
PEAK_EVERY_SECONDS = 0.02
Row = dict[str, float]


def end_guard(seconds: float = 10.0) -> bool:
    """End the guard, as soon as it has seen that its processes are gone; whether it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(GuardError):
            guard = GuardClient.find()
            if guard is None:
                return True
            with guard:
                guard.request("shutdown", force=False)
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def bytecode_kept() -> Iterator[None]:
    """Have all that is started keep compiled modules, as an installation does, wherever this one runs.

    Otherwise each command compiles all of gpuksm anew where PYTHONDONTWRITEBYTECODE is set.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="gpuksm-bytecode-", ignore_cleanup_errors=True) as folder:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        try:
            yield
        finally:
            os.environ.pop("PYTHONPYCACHEPREFIX")
            os.environ.update(before)


class Ended(NamedTuple):
    """What a command took: CPU seconds with its ended children's, the most memory it held by itself."""

    wall: float
    cpu: float
    peak_bytes: int
    printed: dict[str, Any]


def peak_bytes(pid: int) -> int:
    """The most memory that process `pid` has held so far; 0 when it has ended.

    Not the peak that wait4 gives: that counts what was there before exec, the memory of whoever started it.
    """
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0


def run_json(command: list[str], environment: Mapping[str, str]) -> Ended:
    """Run a command that prints a JSON object."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        running = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        handle = os.pidfd_open(running.pid)
        try:
            peak = 0
            while not select.select([handle], [], [], PEAK_EVERY_SECONDS)[0]:
                peak = max(peak, peak_bytes(running.pid))
                if time.monotonic() - began < LIMIT_SECONDS:
                    continue
                raise SystemExit(f"{' '.join(command)} did not end in {LIMIT_SECONDS:.0f} s")
            _, status, usage = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
        finally:
            os.close(handle)
            if running.returncode is None:
                running.kill()
                running.wait()
        wall = time.monotonic() - began
        if running.returncode:
            errors.seek(0)
            said = errors.read().decode().strip()
            raise SystemExit(f"{' '.join(command)} ended with {running.returncode}: {said}")
        output.seek(0)
        return Ended(wall, usage.ru_utime + usage.ru_stime, peak, json.load(output))


def _children_cpu(guard: int) -> float:
    """CPU seconds of the comparers that a guard had, which end with the scan."""
    deadline = time.monotonic() + 2
    children = Path(f"/proc/{guard}/task/{guard}/children")
    while children.read_text() and time.monotonic() < deadline:
        time.sleep(0.005)
    ticks = Path(f"/proc/{guard}/stat").read_bytes().rpartition(b")")[2].split()[13:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Kernel:
    """One trial's worth of kernel KSM."""

    def __init__(self, ksm: FullSpeed, processes: Processes, workload: Workload) -> None:
        self._ksm, self._processes, self._workload = ksm, processes, workload

    def merge(self) -> Row:
        """Merge, and say what it cost."""
        self._processes.ask("mergeable")
        wall, cpu = self._ksm.merge(self._workload.expected_pages, LIMIT_SECONDS)
        return {"wall": wall, "cpu": cpu, "cpu_ksmd": cpu}

    def keep_on(self, until: float) -> None:
        """Go on at full speed."""
        time.sleep(max(0.0, until - time.monotonic()))

    def store_bytes(self) -> int:
        return 0

    def profit(self) -> int:
        """What it says itself, its own tables subtracted."""
        return kernel_ksm.number("general_profit")

    def steady(self, seconds: float) -> float:
        """CPU time of a second in which nothing changes."""
        began, before = time.monotonic(), cpu_seconds(self._ksm.pid)
        time.sleep(seconds)
        return (cpu_seconds(self._ksm.pid) - before) / (time.monotonic() - began)

    def close(self) -> None:
        """After the end of the processes: have it forget them."""
        self._ksm.clear()


class Gpuksm:
    """One trial's worth of gpuksm, with a guard of its own."""

    def __init__(self, processes: Processes, workload: Workload, folder: Path) -> None:
        self._processes = processes
        self._targets_idle = workload.rate is None
        self.environment = {**os.environ, "GPUKSM_RUNTIME_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        os.environ["GPUKSM_RUNTIME_DIR"] = str(folder)  # for GuardClient
        self._guard = self._keeper = 0
        self.options: list[str] = []  # of the scan
        self._last: dict[str, Any] = {}
        self._peak_bytes = 0

    def _command(self, *words: str) -> list[str]:
        pids = ",".join(map(str, self._processes.pids))
        return [sys.executable, "-m", "gpuksm", *words, "--pid", pids, "--backend", "cpu"]

    def _scan(self) -> tuple[float, float]:
        """One scan; its wall and CPU seconds."""
        ended = run_json(self._command("scan", "--json", *self.options), self.environment)
        self._last, self._peak_bytes = ended.printed, ended.peak_bytes
        return ended.wall, ended.cpu

    def _find_guard(self) -> None:
        with GuardClient.connect(start=False) as guard:
            self._guard = guard.request("hello")[0]["pid"]
        self._keeper = procfs.stat(self._guard).ppid

    def guard_pid(self) -> int:
        """The guard's, once something was merged."""
        return self._guard

    def _targets_cpu(self) -> float:
        return sum(cpu_seconds(pid) for pid in self._processes.pids)

    def merge(self) -> Row:
        """Merge, and say what it cost."""
        targets = self._targets_cpu()
        wall, scanner = self._scan()
        self._find_guard()
        parts = {
            "cpu_scanner": scanner,
            "cpu_guard": cpu_seconds(self._guard) + _children_cpu(self._guard),
            "cpu_keeper": cpu_seconds(self._keeper),
            "cpu_targets": self._targets_cpu() - targets if self._targets_idle else 0.0,
        }
        late = sum(bool(target["error"]) for target in self._last["targets"])
        return {
            "wall": wall,
            "cpu": sum(parts.values()),
            **parts,
            "peak_scanner": self._peak_bytes,
            "peak_guard": peak_bytes(self._guard),
            "own_seconds": self._last["seconds"],
            "max_pause_ms": self._last["max_pause_ms"],
            "targets_left_out": late,
            **{f"skipped_{reason}": pages for reason, pages in self._last["skipped"].items()},
        }

    def keep_on(self, until: float) -> None:
        """Scan again and again."""
        while time.monotonic() < until:
            self._scan()

    def store_bytes(self) -> int:
        with GuardClient.connect(start=False) as guard:
            return int(guard.request("status")[0]["store_bytes"])

    def profit(self) -> int:
        """What it says itself, its own costs subtracted."""
        return int(self._last["general_profit"])

    def steady(self, seconds: float) -> float:
        """CPU time of a second of the daemon, once it no longer reads anything."""
        silence = subprocess.DEVNULL
        daemon = subprocess.Popen(
            self._command("daemon", "--interval", f"{min(1.0, seconds)}s"),
            stdout=silence,
            stderr=silence,
            env=self.environment,
        )
        try:
            self._settle(daemon)
            pids = (daemon.pid, self._guard, self._keeper)
            began, before = time.monotonic(), sum(map(cpu_seconds, pids)) + self._targets_cpu()
            time.sleep(seconds)
            used = sum(map(cpu_seconds, pids)) + self._targets_cpu() - before
            return used / (time.monotonic() - began)
        finally:
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _settle(self, daemon: subprocess.Popen[bytes]) -> None:
        """Wait for two rounds that read nothing."""
        deadline = time.monotonic() + 60
        scanned, since = -1, 0
        while time.monotonic() < deadline and daemon.poll() is None:
            time.sleep(0.2)
            with GuardClient.connect(start=False) as guard:
                numbers = guard.request("knobs")[0]["daemon"] or {}
            if not numbers:
                continue
            if numbers["pages_scanned"] != scanned:
                scanned, since = numbers["pages_scanned"], numbers["full_scans"]
            elif scanned and numbers["full_scans"] >= since + 2:
                return
        raise SystemExit("gpuksm daemon did not settle")

    def close(self) -> None:
        """After the end of the processes: end the guard, and see that it has ended."""
        with contextlib.suppress(GuardError, OSError):
            self._find_guard()
        if end_guard():
            return
        for pid in filter(None, (self._keeper, self._guard)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
