"""Real programs for minutes under a daemon that merges all the time; each gives its own verdict.

    python -m tests.campaign.programs [--minutes 2] [--only NAME]... [--kill-guard-every SECONDS]

Each program runs twice over, from the same seeds, so that there is something to merge, and
writes, frees and forks meanwhile.  In the end all of it is unmerged while the programs
still run; then they look at everything once more.  A program that is not on this machine
is reported as that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpuksm import errors
from gpuksm.client import GuardClient
from tests.campaign import load
from tests.support import processes
from tests.support.world import User, World

WORKLOADS = Path(__file__).with_name("workloads")
_DAEMON = (
    *("--interval", "200ms", "--max-interval", "2s", "--backend", "cpu", "--threads", "1"),
    "--allow-kvm",  # the machines here run none themselves
)
# A program works this much longer than it is merged: it has to be ready first, and looks again afterwards.
_BEFORE_SECONDS, _AFTER_SECONDS = 10, 15
_PATIENCE_SECONDS = 300
_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
_GEANT4_PYTHON = os.environ.get("GPUKSM_GEANT4_PYTHON", "")


@dataclass(frozen=True)
class Program:
    """How one program is started, `copies` times; SECONDS and FOLDER in its command are filled in.

    `needs` are commands and files.  It prints READY and, at the end, OK or CORRUPT, unless
    `by_status` says that its exit status is all that it has to say.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    copies: int = 2
    by_status: bool = False
    env: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """What it needs and is not here, or None."""
        for need in self.needs:
            if not (Path(need).exists() if need.startswith("/") else shutil.which(need)):
                return need
        return None


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(WORKLOADS / script), *arguments)


def _churn(name: str, library: str | None) -> Program:
    path = None if library is None else str(_LIBRARIES / library)
    env = {} if path is None else {"LD_PRELOAD": path}
    needs = ("gcc",) if path is None else ("gcc", path)
    return Program(name, ("FOLDER/churn", "SECONDS", "96", "2"), needs, env=env)


_STRESS = (
    "stress-ng --verify --vm 2 --vm-bytes 64M --malloc 2 --malloc-bytes 96M --mremap 1 --mremap-bytes 16M "
    "--fork 1 --timeout SECONDS --temp-path FOLDER --oomable --metrics-brief"
)
# Buffers that a device has had for good before anything is read into most of them, and they are all alike.
_FIO = (
    "fio --name=job --directory=FOLDER --ioengine=ENGINE --direct=1 --rw=randrw --bs=16k --size=64M "
    "--numjobs=2 --iodepth=512 --rate_iops=60 --verify=crc32c --verify_fatal=1 --verify_backlog=128 "
    "--time_based --runtime=SECONDS"
)
# Where heaps are full of pointers, or pages have the server's own words in them, two copies are equal
# only with the same layout, as `gpuksm exec --same-layout` gives it.
_SAME = ("setarch", "-R")
PROGRAMS = (
    Program(
        "CPython", (*_SAME, *_python("workers.py", "SECONDS", "64")), _SAME[:1], env={"PYTHONHASHSEED": "0"}
    ),
    Program("node", ("node", str(WORKLOADS / "heap.js"), "SECONDS", "64"), ("node",)),
    Program("java", ("java", "-Xmx256m", str(WORKLOADS / "Heap.java"), "SECONDS", "64"), ("java", "javac")),
    Program("SQLite", (*_SAME, *_python("tables.py", "SECONDS", "100000")), _SAME[:1]),
    Program("redis", _python("servers.py", "redis", "SECONDS", "48"), ("redis-server",), copies=1),
    Program(
        "memcached",
        (*_SAME, *_python("servers.py", "memcached", "SECONDS", "48")),
        ("memcached", "setarch"),
        copies=1,
    ),
    Program(
        "PostgreSQL",
        (*_SAME, *_python("servers.py", "postgres", "SECONDS", "0")),
        ("postgres", "pgbench", "setarch"),
        copies=1,
    ),
    Program("qemu", _python("machines.py", "SECONDS"), ("qemu-system-x86_64", "gcc"), copies=1),
    _churn("glibc malloc", None),
    _churn("jemalloc", "libjemalloc.so.2"),
    _churn("mimalloc", "libmimalloc.so.2"),
    Program("stress-ng", tuple(_STRESS.split()), ("stress-ng",), by_status=True),
    Program(
        "fio, io_uring", (*_FIO.replace("ENGINE", "io_uring").split(), "--fixedbufs=1"), ("fio",), 1, True
    ),
    Program("fio, libaio", tuple(_FIO.replace("ENGINE", "libaio").split()), ("fio",), 1, True),
    Program("Geant4", _python("detectors.py", "SECONDS", _GEANT4_PYTHON), (_GEANT4_PYTHON or "/",), copies=1),
)


@dataclass
class Report:
    """What came of one program."""

    name: str
    verdict: str = ""
    good: bool = False
    minutes: float = 0.0
    most_bytes_saved: int = 0
    pages_merged: int = 0
    rounds: int = 0
    plans: int = 0
    events: int = 0
    kills: int = 0


class _Jobs:
    """The copies of a program, their output in files."""

    def __init__(self, program: Program, folder: Path, seconds: int) -> None:
        self.program = program
        words = [w.replace("FOLDER", str(folder)).replace("SECONDS", str(seconds)) for w in program.command]
        self.outputs = [folder / f"output.{number}" for number in range(program.copies)]
        self.processes = []
        for output in self.outputs:
            with open(output, "wb") as file:
                job = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **program.env},
                    cwd=folder,
                    start_new_session=True,
                )
            self.processes.append(job)

    def await_ready(self) -> None:
        """Until every copy has said that it has begun; those that say nothing get some seconds."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        if self.program.by_status:
            time.sleep(3)
        while not self.program.by_status and not all("READY" in o.read_text() for o in self.outputs):
            assert time.monotonic() < deadline, "not ready in time"
            self.must_run()
            time.sleep(0.1)

    def must_run(self) -> None:
        """AssertionError when a copy has ended before its time."""
        for job, output in zip(self.processes, self.outputs, strict=True):
            assert job.poll() is None, f"ended early with {job.returncode}: {_tail(output)}"

    def verdict(self) -> str:
        """Wait for the end of every copy; what they said.  AssertionError when it was not good."""
        said = []
        for job, output in zip(self.processes, self.outputs, strict=True):
            status = job.wait(_PATIENCE_SECONDS)
            last = _tail(output)
            assert status == 0, f"ended with {status}: {last}"
            if not self.program.by_status:
                assert last.startswith("OK"), last
                said.append(last.removeprefix("OK").strip())
        return "; ".join(dict.fromkeys(said)) or "exit status 0"

    def kill(self) -> None:
        """End all of it, with what it has started."""
        for job in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def _tail(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("CORRUPT")]
    return (wrong or lines[-1:] or ["nothing was said"])[0][:500]


def _numbers(report: Report) -> None:
    """Note what the daemon has done by now."""
    with contextlib.suppress(errors.GpuksmError, OSError):
        client = GuardClient.find()
        if client is None:
            return
        with client:
            status = client.request("status")[0]
        daemon: dict[str, Any] = status["daemon"] or {}
        report.most_bytes_saved = max(report.most_bytes_saved, daemon.get("general_profit", 0))
        report.pages_merged = max(report.pages_merged, daemon.get("pages_merged", 0))
        report.rounds = max(report.rounds, daemon.get("full_scans", 0))
        report.plans = max(report.plans, daemon.get("plans", 0))
        report.events = max(report.events, sum(status["events"].values()))


def _merge(jobs: _Jobs, world: World, seconds: float, kill_every: float, report: Report) -> None:
    """A daemon over the jobs for so long; then everything is unmerged."""
    trees = [part for job in jobs.processes for part in ("--tree", str(job.pid))]
    daemon = world.start("daemon", *trees, *_DAEMON)
    began = time.monotonic()
    next_kill = began + (kill_every or seconds * 2)
    try:
        while time.monotonic() < began + seconds:
            time.sleep(1)
            assert daemon.poll() is None, f"the daemon ended: {daemon.communicate()[1][-1000:]}"
            jobs.must_run()
            _numbers(report)
            if time.monotonic() > next_kill:
                next_kill += kill_every
                with contextlib.suppress(ProcessLookupError):
                    os.kill(world.guard_pid(), signal.SIGKILL)
                report.kills += 1
        report.minutes = (time.monotonic() - began) / 60
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            daemon.kill()
    load.unmerge_well()


def perform(program: Program, minutes: float, kill_every: float = 0) -> Report:
    """Run one program; its report."""
    report = Report(program.name)
    if (need := program.missing()) is not None:
        report.verdict, report.good = f"not on this machine ({need})", True
        if program.name == "Geant4":
            report.verdict = (
                "not on this machine (GPUKSM_GEANT4_PYTHON names no interpreter with geant4-pybind)"
            )
        return report
    seconds = int(minutes * 60)
    folder = Path(tempfile.mkdtemp(prefix="gpuksm-program-"))
    run = folder / "run"
    run.mkdir(mode=0o700)
    os.environ["GPUKSM_RUNTIME_DIR"] = str(run)
    os.environ["PYTHONPATH"] = str(WORKLOADS.parents[2])
    world = World(run, folder, User(os.getuid()))
    jobs: _Jobs | None = None
    try:
        if program.command[0] == "FOLDER/churn":
            source = str(WORKLOADS / "churn.c")
            subprocess.run(["gcc", "-O2", "-o", str(folder / "churn"), source, "-lpthread"], check=True)
        jobs = _Jobs(program, folder, seconds + _BEFORE_SECONDS + _AFTER_SECONDS)
        jobs.await_ready()
        _merge(jobs, world, seconds, kill_every, report)
        for job in jobs.processes:
            for pid in (job.pid, *_descendants(job.pid)):
                with contextlib.suppress(OSError):
                    assert not processes.store_mappings(pid), f"process {pid} maps the store after unmerging"
        report.verdict = jobs.verdict()
        report.good = True
        load.shut_down(world)
    except (AssertionError, OSError, errors.GpuksmError, subprocess.SubprocessError) as error:
        log = run / "guard.log"
        report.verdict = f"WRONG: {error}"
        print(f"{program.name}: {error!r}\n{log.read_text()[-3000:] if log.exists() else ''}", flush=True)
    finally:
        if jobs is not None:
            jobs.kill()
        for process in world.commands:
            process.kill()
            process.communicate()
        world._kill_guards()
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *_descendants(child))]


def table(reports: list[Report]) -> str:
    """All programs, in Markdown."""
    lines = [
        "| program | minutes | most saved | pages merged | merging rounds | events | guard kills | verdict |",
        "|---" * 8 + "|",
    ]
    for each in reports:
        numbers = (
            f"{each.minutes:.1f}",
            f"{each.most_bytes_saved / (1 << 20):.0f} MiB",
            f"{each.pages_merged:,}",
        )
        counts = (f"{each.plans} of {each.rounds}", f"{each.events:,}", str(each.kills))
        cells = (*numbers, *counts) if each.minutes else ("",) * 6
        lines.append(f"| {each.name} | " + " | ".join(cells) + f" | {each.verdict} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table; 0 when every program that is here was right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2)
    names = [program.name for program in PROGRAMS]
    parser.add_argument("--only", action="append", default=[], metavar="NAME", choices=names)
    parser.add_argument("--kill-guard-every", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    reports = []
    for program in PROGRAMS:
        if program.name in (arguments.only or names):
            reports.append(perform(program, arguments.minutes, arguments.kill_guard_every))
            print(table(reports[-1:]).splitlines()[-1], flush=True)
    print(table(reports))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
