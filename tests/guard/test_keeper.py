"""The keeper goes on trying where the kernel starts no process just then."""

from __future__ import annotations

import errno
import os
import socket
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
