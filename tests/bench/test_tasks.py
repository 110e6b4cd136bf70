"""The benchmark of threads, forks and signals merges two real processes and prints its table."""

from __future__ import annotations

import pytest

from bench import tasks
from tests import requirements_env


def test_prints_a_row_for_each_thing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements_env.need("gcc", "uffd")
    monkeypatch.setattr(tasks, "MIB", 4)
    assert tasks.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["thread", "fork", "program", "signal"]
