"""The parser of GPUKSM_FAULT, in a process of its own each time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "from gpuksm.guard import faults\nfor i in range(3): faults.point('here'); print(i, flush=True)"

READS = """
from gpuksm.guard import faults
for i in range(3):
    try:
        print(faults.read("here", 8))
    except OSError as error:
        print(type(error).__name__)
"""


def _run(code: str, spec: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GPUKSM_FAULT": spec},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("spec", "printed", "code"),
    [
        ("", "0\n1\n2\n", 0),
        ("there", "0\n1\n2\n", 0),
        ("here", "", -9),
        ("here:2", "0\n", -9),
        ("here:3:kill", "0\n1\n", -9),
        ("here:2:error", "0\n", 1),
        ("here:1:1ms", "0\n1\n2\n", 0),
        ("here:*:1ms", "0\n1\n2\n", 0),
        ("here:*:error", "", 1),
        ("here:1:short", "0\n1\n2\n", 0),
    ],
)
def test_points(spec: str, printed: str, code: int) -> None:
    done = _run(CODE, spec)
    assert (done.stdout, done.returncode) == (printed, code)


@pytest.mark.parametrize(
    ("spec", "printed"),
    [
        ("there:1:short", "8 8 8"),
        ("here:2:short", "8 4 8"),
        ("here:1:eagain", "BlockingIOError 8 8"),
        ("here:1:esrch", "ProcessLookupError 8 8"),
        ("here:3:enomem", "8 8 OSError"),
    ],
)
def test_reads(spec: str, printed: str) -> None:
    done = _run(READS, spec)
    assert done.stdout.split() == printed.split()
    assert done.stderr == ("" if spec.startswith("there") else f"fault injected: {spec}\n")


def test_a_signal_for_another_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert _run(CODE, f"here:2:SIGKILL@{other.pid}").returncode == 0
        assert other.wait(20) == -9
