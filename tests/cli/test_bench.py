"""`gpuksm bench` as a user types it: it measures, and leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuksm.cli import main
from gpuksm.linux import procfs
from tests import requirements_env
from tests.report.test_json import SCHEMAS, differences

SMALL = ("--size", "4M", "--processes", "2", "--backend", "cpu")
STAGES = ["read", "hash", "read and hash", "sort", "fill", "compare", "commit", "commit", "unmerge"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; empty afterwards, and used by nobody."""
    requirements_env.need("uffd")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "never made"))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert [pid for pid in procfs.pids() if _mentions(pid, str(tmp_path))] == []


def _mentions(pid: int, text: str) -> bool:
    with contextlib.suppress(OSError):
        return pid != os.getpid() and text in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return False


def _start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpuksm", "bench", *SMALL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(done: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.usefixtures("folder")
def test_measures_every_stage() -> None:
    run = _start("--json")
    out, err = run.communicate(timeout=100)
    assert (run.returncode, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert differences(found, SCHEMAS["bench"]) == []
    assert [stage["stage"] for stage in found["stages"]] == STAGES
    amounts = {(stage["stage"], stage["what"]): stage["amount"] for stage in found["stages"]}
    straight = (4 << 20) * 7 // 8
    assert amounts["read", "other processes' pages"] == 2 * straight
    # On a busy machine a helper may not be stopped in time, and less is merged.
    assert amounts["fill", "slots of the store"] <= straight
    assert amounts["compare", "pages with their slots"] <= straight
    assert all(stage["per_second"] > 0 for stage in found["stages"])


@pytest.mark.parametrize(
    ("number", "code", "begun"),
    [(signal.SIGINT, 130, "*/guard.sock"), (signal.SIGTERM, 143, "gpuksm-bench-*")],
)
def test_a_signal_leaves_nothing_behind(folder: Path, number: int, code: int, begun: str) -> None:
    run = _start()
    _until(lambda: list(folder.glob(begun)))
    _until(lambda: len(_children(run.pid)) >= 2)
    helpers = _children(run.pid)
    run.send_signal(number)
    run.send_signal(number)
    assert run.communicate(timeout=60) == ("", "")
    assert run.returncode == code
    assert not [pid for pid in helpers if Path(f"/proc/{pid}").exists()]


@pytest.mark.usefixtures("folder")
def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "1000T"]) == 10
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "smaller --size" in err
