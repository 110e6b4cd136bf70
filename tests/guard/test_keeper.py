"""The keeper: how a guard is made of it, also where the kernel starts no process just then."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from gpuksm.guard import keeper, life
from gpuksm.linux import procfs


def test_a_guard_that_cannot_be_started_now_is_started_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []
    fork = os.fork

    def start() -> int:
        tries.append(1)
        if len(tries) < 6:
            kinds = errno.EAGAIN, errno.ENOMEM, errno.ENOMEM, errno.ENOMEM, errno.EFAULT
            raise OSError(kinds[len(tries) - 1], "no process")
        return fork()

    def become(folder: Path, inherited: dict[str, int]) -> NoReturn:
        os._exit(0 if inherited.keys() == {"store", "keeper"} else 1)

    monkeypatch.setattr(keeper.os, "fork", start)
    monkeypatch.setattr(keeper, "_become_guard", become)
    before = len(os.listdir("/proc/self/fd"))
    guard, link = keeper._start_guard_at_last(tmp_path, {"store": 0}, keeper.Patience())
    assert isinstance(link, socket.socket)
    assert len(tries) == 6
    assert capfd.readouterr().err.count("cannot start a guard") == 3, "each reason once"
    ended = os.waitid(os.P_PIDFD, guard, os.WEXITED)
    assert ended is not None
    assert ended.si_status == 0
    link.close()
    os.close(guard)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_fork_that_becomes_a_guard_has_nothing_of_the_keepers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen, writing = os.pipe()
    lock = os.open(tmp_path / "keeper.lock", os.O_RDWR | os.O_CREAT)
    kept = os.open(os.devnull, os.O_RDONLY)

    def run(_folder: Path, inherited: dict[str, int]) -> NoReturn:
        has = {os.readlink(f"/proc/self/fd/{fd}") for fd in inherited.values()}
        told = f"{sorted(inherited)} {os.devnull in has}"
        told += f" {signal.getsignal(signal.SIGTERM) == signal.SIG_DFL} {procfs.stat(os.getpid()).comm}"
        told += f" {any(str(tmp_path) in link for link in procfs.fd_targets(os.getpid()).values())}"
        os.write(inherited["told"], told.encode())
        os._exit(7)

    monkeypatch.setattr(life, "run", run)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        guard, link = keeper._start_guard(tmp_path, {"store": kept, "told": writing})
    finally:
        signal.signal(signal.SIGTERM, before)
    with link:
        os.close(writing)
        told = os.read(seen, 1000).decode()
        ended = os.waitid(os.P_PIDFD, guard, os.WEXITED)
    assert told == "['keeper', 'store', 'told'] True True gpuksm guard False"
    assert ended is not None
    assert ended.si_status == 7
    for fd in (seen, lock, kept, guard):
        os.close(fd)


def test_a_keeper_loads_what_a_guard_is_once_it_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a guard has started; until then forks come first, which wait for its answers."""
    monkeypatch.delitem(sys.modules, "gpuksm.guard.life")
    loaded: list[float] = []
    monkeypatch.setattr(keeper, "load", lambda: loaded.append(time.monotonic()))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    began, kept = time.monotonic(), dict[str, int]()
    holding = threading.Thread(target=lambda: loaded.append(keeper._hold(theirs, kept)))
    holding.start()
    while time.monotonic() < began + 3 * keeper._QUIET_SECONDS:
        ours.send(b"event:1".ljust(keeper.TAG_BYTES))
        time.sleep(keeper._QUIET_SECONDS / 10)
    assert loaded == []
    time.sleep(3 * keeper._QUIET_SECONDS)
    assert len(loaded) == 1
    ours.send(keeper.END.encode().ljust(keeper.TAG_BYTES))
    holding.join(10)
    assert loaded[1:] == [True]
    ours.close()
    theirs.close()


def test_what_could_not_be_loaded_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the guard has nothing to say meanwhile."""
    monkeypatch.delitem(sys.modules, "gpuksm.guard.life")
    monkeypatch.setattr(keeper, "_QUIET_SECONDS", 0.005)
    tries: list[float] = []

    def load() -> bool:
        tries.append(time.monotonic())
        return len(tries) == 3

    monkeypatch.setattr(keeper, "_load_beside_jobs", load)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        threading.Timer(2.0, ours.close).start()
        assert not keeper._hold(theirs, {})
    assert len(tries) == 3
    assert tries[2] - tries[1] > 5 * (tries[1] - tries[0]) > 0.04


def test_one_that_has_lived_is_followed_at_once_and_one_that_dies_young_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now)
    patience = keeper.Patience()
    waits = [patience.died() for _ in range(12)]
    assert waits == sorted(waits)
    assert 0 < waits[0] < 0.1
    assert waits[-1] == 2.0
    now += 1
    assert patience.died() == 0.0
    patience.started()
    assert patience.died() == waits[0]


def test_what_is_held_for_a_successor_goes_to_no_other_program(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = dict[str, int]()
    with (tmp_path / "store").open("wb") as store:
        socket.send_fds(ours, [b"store".ljust(keeper.TAG_BYTES)], [store.fileno()])
    ours.close()
    with theirs:
        assert not keeper._hold(theirs, kept)
    assert kept.keys() == {"store"}
    assert not os.get_inheritable(kept["store"])
    os.close(kept["store"])


def test_jobs_come_before_a_keeper_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before them else, and before the agents that a frozen process waits for."""
    policies: list[int] = []

    def load() -> bool:
        policies.append(os.sched_getscheduler(0))
        return False

    monkeypatch.setattr(keeper, "load", load)
    before = os.sched_getscheduler(0)
    try:
        keeper._come_first()
        first = os.sched_getscheduler(0)
        assert not keeper._load_beside_jobs()
        assert os.sched_getscheduler(0) == first
    finally:
        os.sched_setscheduler(0, before & ~os.SCHED_RESET_ON_FORK, os.sched_param(0))
    assert policies == [os.SCHED_OTHER]


def test_what_could_not_be_loaded_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the package may be there when it is tried again."""
    for name in ("gpuksm.guard.life", "gpuksm.guard.server"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gpuksm.guard.server", None)  # its import fails
    before = set(sys.modules)
    assert not keeper.load()
    assert set(sys.modules) == before


_TRYING = """
import signal, sys
from pathlib import Path
from gpuksm.guard import keeper
signal.signal(signal.SIGTERM, lambda *_: None)  # as while a guard runs
def fork():
    print("tries", flush=True)
    raise OSError(11, "no process")
keeper.os.fork = fork
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
