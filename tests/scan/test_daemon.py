"""The daemon and guards that are lost, or busy with another scanner."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.errors import GuardError
from gpuksm.scan import daemon
from gpuksm.scan.daemon import Daemon, Setup, Stopped
from gpuksm.scan.types import ScanOptions


class _Client:
    """A connection that may be lost."""

    def __init__(self) -> None:
        self.lost = False

    def fileno(self) -> int:
        return -1 if self.lost else 5


def _daemon(monkeypatch: pytest.MonkeyPatch, open_session: Any) -> tuple[Daemon, list[str]]:
    """A daemon that opens its sessions so, and what it says."""

    def session(client: _Client, *_: object) -> Any:
        return SimpleNamespace(open=lambda: open_session(client), close=lambda: None, counters=dict)

    said: list[str] = []
    connect = SimpleNamespace(connect=lambda **_: nullcontext(_Client()))
    monkeypatch.setattr(daemon, "GuardClient", connect)
    monkeypatch.setattr(daemon, "Session", session)
    control: Any = SimpleNamespace(wait=lambda *_: None, stopping=lambda: False, reloaded=lambda: None)
    setup = Setup(list, ScanOptions(), {"merge_across_nodes": 1})
    return Daemon(setup, control, said.append), said


def test_a_guard_that_is_lost_while_a_session_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter(range(3))

    def opens(client: _Client) -> None:
        if next(losses, None) is None:
            raise Stopped
        client.lost = True
        raise GuardError("lost the guard during 'slots': it is gone; run the command again")

    resident, said = _daemon(monkeypatch, opens)
    resident.run()
    assert said == ["lost the guard during 'slots': it is gone; starting over"] * 3


def test_another_scanner_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(_client: _Client) -> None:
        raise GuardError("another scan is running")

    resident, said = _daemon(monkeypatch, opens)
    with pytest.raises(GuardError, match="another"):
        resident.run()
    assert said == []
