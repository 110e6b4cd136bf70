"""register, status, unregister and unmerge against a real guard, as a user types them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuksm.cli import main
from gpuksm.client import GuardClient
from tests.report.test_json import SCHEMAS, differences


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of its own; the guard in it is told to end, and does."""
    folder = tmp_path / "run"
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(folder))
    yield folder
    running = GuardClient.find()
    if running is not None:
        with running:
            running.request("shutdown", force=False)
    deadline = time.monotonic() + 10
    while (folder / "guard.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not (folder / "guard.sock").exists()


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert differences(found, SCHEMAS[words[0]]) == []
    assert isinstance(found, dict)
    return found


def test_register_shows_in_status_until_taken_back(sleeper: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register", "--pid", str(sleeper)]) == 0
    assert "registered 1 process;" in capsys.readouterr().err
    assert _json(capsys, "status")["registered"] == [{"pid": sleeper, "ranges": None}]
    assert main(["status"]) == 0
    assert f"registered: {sleeper}" in capsys.readouterr().out
    assert main(["unregister", "--all"]) == 0
    assert _json(capsys, "status")["registered"] == []
    assert main(["unregister", "--pid", str(sleeper)]) == 7
    assert "is not registered" in capsys.readouterr().err


def test_what_cannot_be_registered_starts_no_guard(guard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register", "--pid", "1"]) == 6
    assert not guard.exists()
    assert main(["unmerge", "--all"]) == 7
    assert capsys.readouterr().err.splitlines()[-1].startswith("gpuksm: no guard is running")


def test_unmerging_nothing(sleeper: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register", "--pid", str(sleeper)]) == 0
    assert _json(capsys, "unmerge", "--all")["pages"] == 0
    assert main(["unmerge"]) == 0
    assert capsys.readouterr().out == "nothing was merged\n"
