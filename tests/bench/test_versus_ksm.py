"""bench/versus_ksm.py, with workloads of a few MiB: it measures both, and puts KSM's settings back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import kernel_ksm
from bench.workload import Processes, Workload, build
from tests import requirements_env
from tests.support import one_ksm

SCRIPT = Path(__file__).parents[2] / "bench" / "versus_ksm.py"
SMALL = ("--processes", "2", "--shared-mb", "4", "--own-mb", "4", "--repeats", "1", "--seconds", "0.2")


@pytest.fixture
def ksm() -> Iterator[None]:
    """A machine that can run the benchmark; afterwards KSM must be as it was."""
    requirements_env.need("root", "uffd", "gcc")
    with one_ksm.alone():
        reason = kernel_ksm.why_not()
        if reason:
            requirements_env.require("ksm", reason)
        yield


def _start(*words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL, *words], stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.usefixtures("ksm")
def test_measures_both(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    run = _start("--workload", "mix", "--workload", "writers", "--json", str(path))
    table, notes = run.communicate(timeout=60)
    assert run.returncode == 0, notes
    mix, writers = json.loads(path.read_text())["workloads"]
    for tool in ("ksm", "gpuksm"):
        assert f"│ {tool}" in table
        assert mix[tool]["wall"] > 0
        assert mix[tool]["cpu"] > 0
        assert mix[tool]["saved"] == pytest.approx(4 << 20, rel=0.1)
        assert writers[tool]["under_rate"] > 0
    assert mix["ratios"]["steady"] == mix["gpuksm"]["steady"] / mix["ksm"]["steady"]


@pytest.mark.usefixtures("ksm")
def test_a_signal_ends_it_in_order() -> None:
    run = _start("--workload", "mix")
    deadline = time.monotonic() + 30
    while kernel_ksm.setting("sleep_millisecs") != "0" and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM


def test_says_in_one_line_that_it_cannot() -> None:
    run = _start("--shared-mb", str(1 << 30))
    table, notes = run.communicate(timeout=30)
    assert (run.returncode, table, notes.count("\n")) == (3, "", 1)


@pytest.mark.parametrize("kind", ["mix", "scattered", "zeros", "constant"])
def test_processes_check_themselves(tmp_path: Path, kind: str) -> None:
    requirements_env.need("gcc")
    workload = Workload(kind, kind, processes=2, shared_mb=1, own_mb=1)
    with Processes(build(tmp_path), workload) as processes:
        processes.ask("write 1000")
        processes.ask("reset")
        time.sleep(0.05)
        assert all(row["events"] > 0 for row in processes.ask("count"))
        processes.ask("halt")
        processes.ask("check")
        with open(f"/proc/{processes.pids[0]}/mem", "r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), b"wrong", processes.places[0])
        with pytest.raises(SystemExit, match="CORRUPT"):
            processes.ask("check")
