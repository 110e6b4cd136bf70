"""attaching: each target is measured, attached to and armed, in that order, while something else goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import pytest

from gpuksm.errors import GuardError, TargetGone
from gpuksm.scan import attaching, run_scan
from gpuksm.scan.attaching import Attaching
from gpuksm.scan.types import NoProgress, ScanOptions, TargetRequest

OPTIONS = ScanOptions(backend="cpu")


class _Client:
    """A guard that refuses the targets of `refused`, finds that of `exited` gone, and fails at `fails`."""

    def __init__(self, refused: int = -1, exited: int = -1, fails: int = -1, slow: float = 0.0) -> None:
        self.did: list[tuple[str, int]] = []
        self.closed = False
        self._refused, self._exited, self._fails, self._slow = refused, exited, fails, slow

    def request(self, op: str, **fields: Any) -> tuple[dict[str, Any], bytearray]:
        if op == "hello":
            return {"pid": 1, "seed": 7}, bytearray()
        if op == "status":
            return {"store_bytes": 4096}, bytearray()
        time.sleep(self._slow)
        if op == "arm":
            self.did.append(("arm", fields["target"]))
            if fields["target"] == self._exited:
                raise TargetGone("gone")
            return {}, bytearray(16)
        pid = fields["targets"][0]["pid"] if fields["targets"] else 0
        self.did.append(("attach", pid))
        if pid == self._fails:
            raise GuardError("no")
        target = None if pid == self._refused else pid
        return {"targets": [{"pid": pid, "target": target}] if pid else []}, bytearray()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pids in the order in which what they hold was asked; process 3 is gone."""
    asked: list[int] = []

    def held(pid: int) -> Any:
        asked.append(pid)
        return None if pid == 3 else attaching.measure.Held(pid, 0)

    monkeypatch.setattr(attaching.measure, "held", held)
    return asked


def _attaching(client: Any, pids: list[int]) -> AbstractContextManager[Attaching]:
    return attaching.attaching(client, [TargetRequest(pid) for pid in pids], OPTIONS)


def test_each_is_measured_before_it_is_attached_to_and_armed_before_the_next(measured: list[int]) -> None:
    client = _Client(refused=2, exited=4)
    with _attaching(client, [1, 2, 3, 4]) as all_of_them:
        assert (all_of_them.guard, all_of_them.seed, all_of_them.store_bytes) == (1, 7, 4096)
        assert client.did == []
        began = time.monotonic()
        found = list(all_of_them)
    assert measured == [1, 2, 3, 4]
    assert client.did == [
        ("attach", 1),
        ("arm", 1),
        ("attach", 2),
        ("attach", 3),
        ("arm", 3),
        ("attach", 4),
        ("arm", 4),
    ]
    assert [item.request.pid for item in found] == [1, 2, 3, 4]
    assert [item.held and item.held.anonymous for item in found] == [1, 2, None, 4]
    times = [item.at for item in found]
    assert times[1] is None
    assert times[3] is None
    assert times[0] is not None
    assert times[2] is not None
    assert began <= times[0] <= times[2] <= time.monotonic()


def test_it_goes_on_while_nobody_takes_what_was_found() -> None:
    client = _Client()
    with _attaching(client, [1, 2]) as both:
        both.start()
        deadline = time.monotonic() + 10
        while len(client.did) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(list(both)) == 2
    assert not client.closed


def test_what_the_guard_says_against_it_comes_in_its_place() -> None:
    client = _Client(fails=2)
    with _attaching(client, [1, 2, 3]) as all_of_them:
        found = iter(all_of_them)
        assert next(found).request.pid == 1
        with pytest.raises(GuardError, match="no"):
            next(found)
    assert ("attach", 3) not in client.did


def test_without_targets_the_scan_lock_is_taken_all_the_same() -> None:
    client = _Client()
    with _attaching(client, []) as none:
        assert list(none) == []
    assert client.did == [("attach", 0)]


def test_a_scan_that_ends_asks_for_no_more() -> None:
    client = _Client(slow=0.05)

    def interrupted() -> None:
        with _attaching(client, list(range(1, 100))) as many:
            next(iter(many))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert client.closed, "who waits for an answer would wait on"
    assert all(thread.name != "gpuksm-attach" for thread in threading.enumerate())
    assert len(client.did) < 10


def test_nothing_is_asked_before_it_is_known_that_the_scan_can_take_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A backend that is asked for and missing leaves processes alone."""
    started: list[bool] = []
    monkeypatch.setattr(Attaching, "start", lambda _: started.append(True))
    monkeypatch.setattr("gpuksm.scan.round.run", lambda *_, **__: started.append(False))
    for options, early in (
        (ScanOptions(), True),
        (ScanOptions(backend="cpu"), True),
        (ScanOptions(backend="cuda"), False),
        (ScanOptions(device="0"), False),
        (ScanOptions(gpu_memory=1 << 30), False),
        (ScanOptions(merge_across_nodes=False), False),
    ):
        client: Any = _Client()
        run_scan(client, [TargetRequest(1)], options, NoProgress())
        assert started == ([True, False] if early else [False]), options
        started.clear()


def test_it_needs_no_numpy() -> None:
    code = "import sys; from gpuksm.scan import attaching; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
