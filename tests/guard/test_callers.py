"""An event is not read while a thread may be its caller and is not seen waiting (hazard 1)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from gpuksm.guard import callers
from gpuksm.guard.freeze import Freeze
from gpuksm.guard.target import Target
from gpuksm.linux import procfs


@pytest.fixture(params=["spins", "sleeps"])
def process(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    body = {"spins": "while True: pass", "sleeps": "import time; time.sleep(1000)"}[request.param]
    child = subprocess.Popen([sys.executable, "-S", "-c", body])
    try:
        deadline = time.monotonic() + 30
        while (procfs.wchan(child.pid, child.pid) == "") != (request.param == "spins"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        yield request.param, child.pid
    finally:
        child.kill()
        child.wait()


def test_a_running_thread_may_be_the_caller(process: tuple[str, int]) -> None:
    """Asked to stop and neither stopped nor asleep: it may have queued the event that is next."""
    kind, pid = process
    target = cast(Target, SimpleNamespace(pid=pid, link=SimpleNamespace(agent=SimpleNamespace(tid=0))))
    freeze = Freeze(pid, None)
    freeze.waiting.add(pid)
    assert callers.waiting_calls(target, freeze) == (None if kind == "spins" else [])
    freeze.waiting.clear()
    assert callers.waiting_calls(target, freeze) is None, "nobody is held, so nobody's event may be read"
    assert callers.still_calls(target) is None
