"""Whose child it is that a fork event tells of."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import arch, children
from gpuksm.linux import ptrace


def test_the_thread_that_forked_gets_the_processor_to_come_to_its_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have to run on ours, and while a target is stopped we come before everybody there."""
    freeze: Any = SimpleNamespace(stops={}, waiting={7, 8}, collect=lambda: None)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            freeze.stops[8] = freeze.waiting.discard(8)

    monkeypatch.setattr(children, "_FORK_NS", 10**10)
    monkeypatch.setattr(time, "sleep", nap)
    monkeypatch.setattr(ptrace, "get_registers", lambda _: SimpleNamespace(orig_rax=56, rax=4711))
    monkeypatch.setattr(children, "_in_our_namespace", lambda _, number: number)
    assert 56 in arch.current().NR.FORKS
    assert children.pid_of_fork(SimpleNamespace(pid=1), freeze, [7, 8]) == 4711  # type: ignore[arg-type]
    assert len(naps) == 3
