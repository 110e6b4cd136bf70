"""A guard that stands still at one of its fault points until the test has done something."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World


def start_standing_still(world: World, point: str, registered: Victim) -> int:
    """Start a guard that stops itself whenever it passes `point`; its pid.

    It lives as long as `registered`, a victim that is registered with it.
    """
    world.extra_env["GPUKSM_FAULT"] = f"{point}:*:stop"
    assert world.gpuksm("register", "--pid", registered.pid).code == 0
    return world.guard_pid()


def let_go(pids: list[int]) -> None:
    """Continue processes that stopped themselves."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def while_it_stands(guard: int, request: Callable[[], Any], act: Callable[[], Any]) -> Any:
    """What `request` gives; `act` is done when the guard stands still for the first time."""
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(request)
        try:
            wait_for(lambda: stands(guard) or reply.done())
            act()
        finally:
            while not reply.done():
                if stands(guard):
                    os.kill(guard, signal.SIGCONT)
                time.sleep(0.001)
        return reply.result(60)


def stands(guard: int) -> bool:
    """Whether the guard has stopped itself."""
    return processes.thread_states(guard).get(guard) == "T"


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait, up to a minute, until `condition` holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_event(victim: Victim) -> None:
    """Wait until the victim waits for the guard to read an event."""
    wait_for(lambda: processes.waits_in(victim.pid) == "userfaultfd_event_wait_completion")
