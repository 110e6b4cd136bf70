"""The benchmark of waiting does all that it tells of to real processes, and KSM is as before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import kernel_ksm
from tests import requirements_env
from tests.support import one_ksm

SCRIPT = Path(__file__).parents[2] / "bench" / "waiting.py"


def test_prints_a_row_for_everything_that_is_done() -> None:
    requirements_env.need("gcc", "uffd")
    verbs = ("estimate", "scan", "daemon, settled", "unmerge")
    wanted = ["nothing happens", *(f"gpuksm {what}" for what in verbs)]
    with one_ksm.alone():
        if not kernel_ksm.why_not():
            wanted += ["KSM merges", "KSM gives back"]
        command = [sys.executable, str(SCRIPT), "--mib", "8,12", "--seconds", "0.5"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == 2 * wanted
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])
    assert all(float(cell) > 0 for row in rows if row[1] == "nothing happens" for cell in row[2:])
