"""What the guard's main loop waits for: clients in the midst of an exchange, and else for everything."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gpuksm.guard.server import Server


@pytest.fixture
def server() -> Iterator[Any]:
    """One that has just looked at everything, with one client; nothing behind it runs."""
    made: Any = Server.__new__(Server)
    made._wake, made.waker = socket.socketpair()
    ours, made.peer = socket.socketpair()
    made.clients = {ours.fileno(): ours}
    made._looked, made._answered = time.monotonic() + 10, True
    yield made
    for each in (made._wake, made.waker, ours, made.peer):
        each.close()


def test_one_that_was_answered_may_ask_again_at_once(server: Any) -> None:
    server.peer.send(b"x")
    assert server._await_clients() == set(server.clients)


def test_a_signal_comes_before_clients(server: Any) -> None:
    server.peer.send(b"x")
    server.waker.send(b"x")
    assert server._await_clients() == set()


@pytest.mark.parametrize(("answered", "looked"), [(False, 10.0), (True, -10.0)])
def test_who_does_not_ask_keeps_nobody_waiting(
    server: Any, monkeypatch: pytest.MonkeyPatch, answered: bool, looked: float
) -> None:
    """A daemon is connected all the time, and targets that wait for an event must not wait for it."""
    server._answered, server._looked = answered, time.monotonic() + looked
    monkeypatch.setattr(select, "poll", lambda: pytest.fail("waited for a client"))
    assert server._await_clients() == set()


def test_only_one_wait_follows_an_answer(server: Any) -> None:
    server._looked = time.monotonic() + 0.001
    assert server._await_clients() == set()
    assert not server._answered
