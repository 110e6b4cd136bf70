"""`gpuksm scan` and `estimate` from the command line, on two small real processes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuksm.client import GuardClient
from gpuksm.linux import procfs
from tests import requirements_env
from tests.report.test_json import SCHEMAS, differences

PAGES = 4096
_JOB = f"""
import mmap, random, sys
memory = mmap.mmap(-1, {PAGES} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(random.Random(1).randbytes({PAGES} * 4096))
expected = memory[:]
print('ready', flush=True)
for line in sys.stdin:
    print(memory[:] == expected, flush=True)
"""


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen[str]]]:
    requirements_env.need("uffd")
    command = [sys.executable, "-c", _JOB]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for job in running:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    yield running
    for job in running:
        job.kill()
        job.communicate()


@pytest.fixture(autouse=True)
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: object) -> Iterator[None]:
    """A guard of its own, which ends, once the jobs have, by itself."""
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    yield
    running = GuardClient.find()
    if running is not None:
        with running:
            running.request("unmerge", pids=None, max_pause_us=5000)
            running.request("shutdown", force=False)


def _gpuksm(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuksm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def _pids(jobs: list[subprocess.Popen[str]]) -> list[str]:
    return ["--pid", *(str(job.pid) for job in jobs)]


def _whole(jobs: list[subprocess.Popen[str]]) -> bool:
    for job in jobs:
        print("check", file=job.stdin, flush=True)
    return all(job.stdout is not None and job.stdout.readline() == "True\n" for job in jobs)


def _object(done: subprocess.CompletedProcess[str], schema: str) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert differences(found, SCHEMAS[schema]) == []
    assert isinstance(found, dict)
    return found


def test_estimate_scan_and_unmerge_agree(jobs: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    dry = _object(_gpuksm("scan", *_pids(jobs), "--dry-run", "--json"), "estimate")
    assert dry["pages_mergeable"] >= 2 * PAGES
    assert not (tmp_path / "run").exists()
    found = _object(_gpuksm("scan", *_pids(jobs), "--json"), "scan")
    assert found["pages_merged"] >= 2 * PAGES
    assert found["bytes_saved"] >= PAGES * 4096 * 0.9
    assert [target["pid"] for target in found["targets"]] == [job.pid for job in jobs]
    assert _whole(jobs)
    shown = _gpuksm("status").stdout
    assert all(str(job.pid) in shown for job in jobs)
    back = _object(_gpuksm("unmerge", *_pids(jobs), "--json"), "unmerge")
    assert back["pages"] >= 2 * PAGES
    assert _whole(jobs)


def test_registered_jobs_are_what_a_plain_scan_takes(jobs: list[subprocess.Popen[str]]) -> None:
    nothing = _gpuksm("scan")
    assert nothing.returncode == 3
    assert "gpuksm register --pid" in nothing.stderr
    assert _gpuksm("register", *_pids(jobs)).returncode == 0
    done = _gpuksm("scan", "--batch", "1000", "--passes", "2", "--settle", "50ms")
    assert done.returncode == 0
    for part in ("saved by this scan", "longest pause", *(str(job.pid) for job in jobs)):
        assert part in done.stdout
    assert _whole(jobs)


def test_the_device_of_a_backend_can_be_named(jobs: list[subprocess.Popen[str]]) -> None:
    wrong = _gpuksm("scan", *_pids(jobs), "--backend", "opencl", "--device", "no such device")
    assert wrong.returncode in (2, 9)
    assert wrong.stderr.count("\n") == 1
    assert _whole(jobs)


def test_progress_is_shown_on_a_terminal_and_only_there(jobs: list[subprocess.Popen[str]]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gpuksm", "scan", *_pids(jobs), "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the last writer is gone
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.stdout is not None
    assert json.loads(process.stdout.read())["pages_merged"] >= 2 * PAGES
    assert process.wait() == 0
    assert b"\x1b[" in seen
    assert b"/" in seen


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """What the background of a shell starts ignores SIGINT, and so does all that it starts itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_interrupts")
def test_an_interrupted_scan_leaves_the_jobs_well(jobs: list[subprocess.Popen[str]]) -> None:
    command = [sys.executable, "-m", "gpuksm", "scan", *_pids(jobs), "--settle", "60s"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(procfs.threads(jobs[0].pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # until the guard's agent is there
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130
    assert _whole(jobs)
    assert all(procfs.stat(job.pid).state in "SR" for job in jobs)
