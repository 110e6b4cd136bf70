"""The parser of GPUKSM_FAULT, in a process of its own each time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "from gpuksm.guard import faults\nfor i in range(3): faults.point('here'); print(i, flush=True)"


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
    ],
)
def test_points(spec: str, printed: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "GPUKSM_FAULT": spec},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == (printed, code)
