"""The benchmark of scattered pages merges two real processes, has a guard killed, and prints a row."""

from __future__ import annotations

import pytest

from bench import scattered
from tests import requirements_env


def test_prints_a_row_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    requirements_env.need("gcc", "uffd")
    assert scattered.main(["--pages", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = lines[2].strip("| ").split(" | ")
    assert len(lines) == 3
    assert cells[0] == "300"
    assert int(cells[1]) > 300
    assert all(float(cell) > 0 for cell in cells)
