"""The benchmark of waiting does all that it tells of to real processes, and KSM is as before."""

from __future__ import annotations

import pytest

from bench import kernel_ksm, waiting
from tests import requirements_env


def test_prints_a_row_for_everything_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    requirements_env.need("gcc", "uffd")
    before = {name: kernel_ksm.setting(name) for name in (*kernel_ksm.FULL_SPEED, "run")}
    assert waiting.main(["--mib", "8,12", "--seconds", "0.5"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    wanted = [
        "nothing happens",
        *(f"gpuksm {what}" for what in ("estimate", "scan", "daemon, settled", "unmerge")),
    ]
    if not kernel_ksm.why_not():
        wanted += ["KSM merges", "KSM gives back"]
    assert [row[1] for row in rows] == 2 * wanted
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])
    assert all(float(cell) > 0 for row in rows if row[1] == "nothing happens" for cell in row[2:])
    assert {name: kernel_ksm.setting(name) for name in before} == before
