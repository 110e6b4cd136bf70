"""The daemon and guards that are lost, or busy with another scanner."""

from __future__ import annotations

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

    def close(self) -> None:
        self.lost = True

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _daemon(
    monkeypatch: pytest.MonkeyPatch, open_session: Any, connect: Any = lambda **_: _Client()
) -> tuple[Daemon, list[str]]:
    """A daemon that opens its sessions so, and what it says."""

    def session(client: _Client, *_: object) -> Any:
        return SimpleNamespace(
            open=lambda: open_session(client), close=lambda: None, counters=lambda: {"rounds": 1}
        )

    said: list[str] = []
    monkeypatch.setattr(daemon, "GuardClient", SimpleNamespace(connect=connect))
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


def test_no_guard_can_be_had_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start that ends the daemon; later it tries again, and leaves no connection behind."""
    clients: list[_Client] = []
    outcomes = iter(["there", "there", "there", "none", "none", "there", "there"])

    def connects(**_: object) -> _Client:
        if next(outcomes) == "none":
            raise GuardError("the guard did not listen in 60 s; see guard.log")
        clients.append(_Client())
        return clients[-1]

    def opens(client: _Client) -> None:
        if len(clients) > 3:
            raise Stopped
        client.lost = True
        raise GuardError("lost the guard: it is gone; run the command again")

    resident, said = _daemon(monkeypatch, opens, connects)
    resident.run()
    assert said == [
        "lost the guard: it is gone; starting over",
        *["the guard did not listen in 60 s; see guard.log; starting over"] * 2,
    ]
    assert len(clients) == 5
    assert all(client.lost for client in clients)
    outcomes = iter(["none"])
    resident, said = _daemon(monkeypatch, opens, connects)
    with pytest.raises(GuardError, match="listen"):
        resident.run()
    assert said == []
