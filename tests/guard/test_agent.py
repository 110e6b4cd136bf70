"""What the guard makes of an agent that is gone, or cannot be looked at."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from gpuksm.errors import TargetGone
from gpuksm.guard.agent import TABLE_OFFSET, Agent, Table
from gpuksm.guard.freeze import release_stragglers
from gpuksm.linux import pidfd, uffd
from gpuksm.linux.memory import PageBuffer
from tests import requirements_env
from tests.support import processes
from tests.support.scripts import LIBC
from tests.support.standstill import wait_for, wait_for_event
from tests.support.world import World


def test_an_agent_that_is_gone() -> None:
    """Exit and exec may come between any two steps; a scan goes on without that target."""
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE)
    pid = int(process.stdout)
    ours, theirs = socket.socketpair()
    agent = Agent(pid, pid, 0x10000, ours)
    table = Table()
    table.add(39)
    with theirs, pytest.raises(TargetGone):
        agent.perform(table)
    agent.close()


def test_an_agent_that_goes_without_reading_what_it_was_sent() -> None:
    """Its end is reset then, not just closed, and that must not end the scan of all others."""
    ours, theirs = socket.socketpair()
    memory = PageBuffer(1 + TABLE_OFFSET // 4096 + 1)
    agent = Agent(os.getpid(), threading.get_native_id(), memory.address, ours)
    table = Table()
    table.add(39)
    agent.start(table)  # writes into our own memory
    theirs.close()
    with pytest.raises(TargetGone):
        agent.finish(table)
    agent.close()


# On "wait" its thread cannot be stopped until somebody reads an event of its userfaultfd.
_UNSTOPPABLE = (
    LIBC
    + """
import sys
from gpuksm.linux import uffd
fd = libc.syscall(uffd.SYS_USERFAULTFD, uffd.CLOEXEC_NONBLOCK | uffd.USER_MODE_ONLY)
uffd.api(fd, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_EVENT_REMOVE)
at = libc.mmap(None, 4096, 3, 0x22, -1, 0)
uffd.register(fd, at, 4096)
print("READY fd=%d" % fd, flush=True)
for line in sys.stdin:
    if line == "quit\\n":
        break
    if line == "wait\\n":
        assert libc.madvise(at, 4096, 4) == 0
    print("OK", flush=True)
"""
)


def test_an_agent_that_does_not_stop_to_be_looked_at_is_refused_this_time_only(world: World) -> None:
    """Its filters have become others, and nobody can say now whether they let it go on."""
    requirements_env.need("root")
    victim = world.python(_UNSTOPPABLE)
    victim.send("wait")
    wait_for_event(victim)
    ours, theirs = socket.socketpair()
    agent = Agent(victim.pid, victim.pid, 0x10000, ours, filters=1)
    agent.count_filters()
    try:
        began = time.monotonic()
        assert agent.muzzled()
        assert agent.muzzled()  # nor again, as long as it has not stopped
        assert time.monotonic() - began < 5
        assert not release_stragglers()
        handle = os.pidfd_open(victim.pid)
        fd = pidfd.steal(handle, int(victim.values["fd"]))
        assert uffd.read_event(fd) is not None
        os.close(fd)
        os.close(handle)
        wait_for(release_stragglers)
        victim.answer()
        assert not agent.muzzled()
        assert agent.filters == 0
        assert processes.stopped_threads(victim.pid) == []
        victim.ask("on")
    finally:
        theirs.close()
        agent.close()
