"""userfaultfds of processes that are there, have ended, or have started another program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from gpuksm.linux import uffd
from tests import requirements_env

# Sends a userfaultfd of its own over its standard input, then does as it is told.
_CHILD = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
with socket.socket(fileno=os.dup(0)) as sock:
    socket.send_fds(sock, [b"x"], [fd])
    order = sock.recv(4)
if order == b"exec":
    os.execv("/bin/sleep", ["sleep", "100"])
"""


@pytest.mark.parametrize("order", [b"exec", b"exit"])
def test_memory_exists(order: bytes) -> None:
    requirements_env.need("uffd")
    mine, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, "-S", "-c", _CHILD], stdin=theirs) as child, mine:
        theirs.close()
        _, fds, _, _ = socket.recv_fds(mine, 1, 1)
        try:
            uffd.api(fds[0], uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED)
            assert uffd.memory_exists(fds[0])
            mine.send(order)
            deadline = time.monotonic() + 20
            while uffd.memory_exists(fds[0]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert (child.poll() is None) == (order == b"exec")
        finally:
            os.close(fds[0])
            child.kill()
