"""What the guard makes of an agent that is gone."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from gpuksm.errors import TargetGone
from gpuksm.guard.agent import Agent, Table


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
