"""System calls that block during an attach return exactly what they would have (hazard 16)."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from tests.support.victims import Victim
from tests.support.world import World

EINTR, ETIMEDOUT = "4", "110"
# call -> what ends it, result, errno, detail (None: not looked at)
CALLS: dict[str, tuple[str, str, str, str | None]] = {
    "nanosleep": ("time", "0", "0", None),
    "clock_nanosleep": ("time", "0", "0", None),
    "futex": ("time", "-1", ETIMEDOUT, None),
    "poll_timeout": ("time", "0", "0", None),
    "wait": ("time", "1", "0", "5"),
    "eventfd": ("time", "8", "0", "9"),
    "flock": ("time", "0", "0", None),
    "read": ("line", "5", "0", None),
    "poll": ("line", "1", "0", "1"),
    "select": ("line", "1", "0", "1"),
    "epoll": ("line", "1", "0", "1234567"),
    "read_restarted": ("signal line", "5", "0", "1"),
    "pause": ("signal", "-1", EINTR, "1"),
    "sigsuspend": ("signal", "-1", EINTR, "11"),
    "sigwaitinfo": ("signal", "10", "0", None),
    "accept": ("connection", "1", "0", None),
}

FORKING = ("wait", "eventfd", "flock")


def _release(victim: Victim, how: str) -> None:
    if "signal" in how:
        os.kill(victim.pid, signal.SIGUSR1)
    if "line" in how:
        time.sleep(0.1)
        victim.send("done")
    if "connection" in how:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"\0gpuksm-victim-{victim.pid}")


def _finish(victim: Victim, call: str, started: float) -> None:
    how, result, number, detail = CALLS[call]
    released = time.monotonic()
    _release(victim, how)
    answer = victim.answer(20)
    assert (answer["ret"], answer["errno"]) == (result, number)
    assert detail is None or answer["detail"] == detail
    took = int(answer["ms"]) / 1000
    if how == "time":
        # Two seconds, no less; a restarted wait may last longer, by far less than this on a busy machine.
        assert 1.99 <= took < 2.0 + 8.0
    else:
        # It went on waiting until it was released; the victim may have been slow to begin.
        assert took >= released - started - 1.0


@pytest.mark.parametrize("call", CALLS)
def test_call_goes_on(world: World, call: str) -> None:
    # The first scan starts guard and compiler caches, so that the second is quick.
    partner = world.victim("regions", 256, 4, 1, "straight", 50000)
    world.scan(partner)
    victim = world.victim("blocking", call)
    started = time.monotonic()
    world.scan(victim, partner, options=["--settle", "0.1"])
    _finish(victim, call, started)
    if call not in FORKING:  # pages that a fork shares are left alone
        assert victim.merged_pages("around") == 256


def test_all_calls_as_an_ordinary_user(user_world: World) -> None:
    world = user_world
    partner = world.victim("regions", 256, 4, 1, "straight", 50000)
    world.scan(partner)
    blocked = {call: world.victim("blocking", call) for call in CALLS}
    started = time.monotonic()
    world.scan(partner, *blocked.values(), options=["--settle", "0.05"])
    for call in sorted(CALLS, key=lambda call: CALLS[call][0] != "time"):
        _finish(blocked[call], call, started)
