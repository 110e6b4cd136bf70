"""The keeper goes on trying where the kernel starts no process just then."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import keeper


def test_a_guard_that_cannot_be_started_now_is_started_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []

    def start(module: str, folder: Path, fds: dict[str, int]) -> Any:
        assert fds.keys() == {"store", "keeper"}
        tries.append(fds["keeper"])
        if len(tries) < 6:
            kinds = errno.EAGAIN, errno.ENOMEM, errno.ENOMEM, errno.ENOMEM, errno.EFAULT
            raise OSError(kinds[len(tries) - 1], "no process")
        return SimpleNamespace(pid=os.getpid())

    monkeypatch.setattr(keeper, "start", start)
    before = len(os.listdir("/proc/self/fd"))
    guard, link = keeper._start_guard_at_last(tmp_path, {"store": 0}, keeper.Patience())
    assert isinstance(link, socket.socket)
    assert len(tries) == 6
    assert capfd.readouterr().err.count("cannot start a guard") == 3, "each reason once"
    link.close()
    os.close(guard)
    assert len(os.listdir("/proc/self/fd")) == before


_TRYING = """
import signal, sys
from pathlib import Path
from gpuksm.guard import keeper
signal.signal(signal.SIGTERM, lambda *_: None)  # as while a guard runs
def start(*_):
    print("tries", flush=True)
    raise OSError(11, "no process")
keeper.start = start
keeper._start_guard_at_last(Path("/"), dict.fromkeys(sys.argv[1:], 0), keeper.Patience())
"""


@pytest.mark.parametrize(("kept", "ends"), [(["listener"], True), (["listener", "store"], False)])
def test_sigterm_ends_a_keeper_without_a_guard_only_where_nothing_was_merged(
    kept: list[str], ends: bool
) -> None:
    trying = subprocess.Popen(
        [sys.executable, "-c", _TRYING, *kept], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert trying.stdout is not None
    with trying.stdout:
        trying.stdout.readline()
        trying.terminate()
        try:
            assert trying.wait(10 if ends else 0.5) == -signal.SIGTERM
            assert ends
        except subprocess.TimeoutExpired:
            assert not ends
        finally:
            trying.kill()
            trying.wait()
