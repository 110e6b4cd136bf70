"""`gpuksm exec` with real jobs; the guard's end of the registration is a small server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wire_server import listening


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    def answer(message: dict[str, Any], _payload: bytearray) -> tuple[dict[str, Any], bytes]:
        seen.append(message)
        return {"ok": True}, b""

    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    with listening(tmp_path / "run", answer):
        yield seen


def _exec(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuksm", "exec", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


# One write for a line, whatever PYTHONUNBUFFERED says: the copies share a pipe.
_SAY = "import os; say = lambda *words: os.write(1, (' '.join(map(str, words)) + chr(10)).encode());"


def _python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", _SAY + code]


def test_each_copy_is_registered_under_its_own_pid(registered: list[dict[str, Any]]) -> None:
    done = _exec("-n", "3", *_python("say(os.getpid(), os.environ['GPUKSM_INDEX'])"))
    assert (done.returncode, done.stderr) == (0, "")
    rows = sorted((line.split() for line in done.stdout.splitlines()), key=lambda row: int(row[1]))
    assert [index for _, index in rows] == ["0", "1", "2"]
    expected = [{"op": "register", "pid": int(pid), "ranges": None} for pid, _ in rows]
    assert registered == expected


def test_options_behind_the_dashes_belong_to_the_command(registered: list[dict[str, Any]]) -> None:
    assert _exec("--", "echo", "--same-layout", "-n", "9").stdout == "--same-layout -n 9\n"
    assert _exec("echo", "-n", "9").stdout == "9"


@pytest.mark.parametrize(("code", "expected"), [("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_is_the_commands(registered: list[dict[str, Any]], code: str, expected: int) -> None:
    assert _exec(*_python(code)).returncode == expected


def test_the_first_failure_counts(registered: list[dict[str, Any]]) -> None:
    code = "import os, time; i = int(os.environ['GPUKSM_INDEX']); time.sleep((2 - i) * 0.5); exit(i * 10)"
    assert _exec("-n", "3", *_python(code)).returncode == 20


def test_commands_that_cannot_run(registered: list[dict[str, Any]], tmp_path: Path) -> None:
    missing = _exec("--", str(tmp_path / "missing"))
    assert missing.returncode == 127
    assert missing.stderr == f"gpuksm: cannot run {tmp_path}/missing: No such file or directory\n"
    assert _exec("--", str(tmp_path)).returncode == 126


def test_same_layout_means_the_same_addresses(registered: list[dict[str, Any]]) -> None:
    layout = "say(*(line.split()[0] for line in open('/proc/self/maps') if '[stack]' in line))"
    done = _exec("--same-layout", "-n", "3", *_python(layout))
    assert len(set(done.stdout.splitlines())) == 1
    done = _exec("-n", "3", *_python(layout))
    assert len(set(done.stdout.splitlines())) > 1


def test_the_command_gets_its_signals_unblocked_and_default(registered: list[dict[str, Any]]) -> None:
    code = "print([l.split()[1] for l in open('/proc/self/status') if l.startswith(('SigBlk', 'SigPnd'))])"
    assert _exec(*_python(code)).stdout == "['0000000000000000', '0000000000000000']\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_forwarded_to_every_copy(registered: list[dict[str, Any]], number: int) -> None:
    code = (
        f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}]);"
        f"say('ready'); signal.sigwait([{int(number)}]); say('got')"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuksm", "exec", "-n", "2", *_python(code)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.kill(process.pid, number)
    assert process.stdout.read() == "got\ngot\n"
    assert process.wait(30) == 0


def test_jobs_outlive_a_killed_exec(registered: list[dict[str, Any]], tmp_path: Path) -> None:
    code = f"import time; time.sleep(1); open({str(tmp_path / 'done')!r}, 'w').write('done')"
    process = subprocess.Popen([sys.executable, "-m", "gpuksm", "exec", *_python(code)])
    deadline = time.monotonic() + 30
    while not registered and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(30)
    while not (tmp_path / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "done").exists()


def test_a_refused_registration_does_not_stop_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUKSM_RUNTIME_DIR", str(tmp_path / "run"))
    refusal = {"error": "Unsupported", "message": "not this one"}
    with listening(tmp_path / "run", lambda _message, _payload: (refusal, b"")):
        done = _exec(*_python("import json; print(json.dumps(1))"))
    assert json.loads(done.stdout) == 1
    assert done.returncode == 0
    assert "not registered: not this one" in done.stderr
