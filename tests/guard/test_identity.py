"""Whose memory a userfaultfd watches: processes of one layout are told apart."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuksm.guard import identity
from gpuksm.linux import uffd
from tests import requirements_env
from tests.support import processes
from tests.support.scripts import LIBC

AT, PAGES = 0x200000000000, 8

# Sends a userfaultfd of its own; maps the same memory at the same place as its siblings, and discards some.
_CHILD = (
    LIBC
    + """
import mmap, os, socket
for index in range(2):
    assert libc.mmap(0x200000000000 + index * 0x100000, 8 * 4096, 3, 0x100022, -1, 0)
fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
with socket.socket(fileno=os.dup(0)) as sock:
    socket.send_fds(sock, [b"x"], [fd])
    sock.recv(1)
    libc.madvise(0x200000000000, 4096, 4)
    sock.recv(1)
"""
)


@pytest.fixture
def children() -> Iterator[list[tuple[int, int, socket.socket]]]:
    """(pid, its userfaultfd, the way to tell it to go on) of two processes."""
    requirements_env.need("uffd")
    found = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            mine, theirs = socket.socketpair()
            stack.enter_context(mine)
            child = stack.enter_context(subprocess.Popen([sys.executable, "-S", "-c", _CHILD], stdin=theirs))
            stack.callback(child.kill)
            theirs.close()
            _, fds, _, _ = socket.recv_fds(mine, 1, 1)
            stack.callback(os.close, fds[0])
            uffd.api(fds[0], uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_EVENT_REMOVE)
            uffd.register(fds[0], AT, PAGES * 4096)
            found.append((child.pid, fds[0], mine))
        yield found


def _registered(pid: int) -> list[str]:
    blocks, at = [], ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            at = line.split()[0]
        if line.startswith("VmFlags:") and {"uw", "um", "ui"} & set(line.split()):
            blocks.append(at)
    return blocks


def test_siblings_are_told_apart(children: list[tuple[int, int, socket.socket]]) -> None:
    (one, watches_one, _), (two, watches_two, _) = children
    before = _registered(one)
    assert len(before) == 1
    assert identity.watches(watches_one, one) is True
    assert _registered(one) == before
    assert identity.watches(watches_one, two) is False
    assert identity.watches(watches_two, one) is False
    assert identity.watches(watches_two, two) is True


def test_also_while_an_event_waits(children: list[tuple[int, int, socket.socket]]) -> None:
    (one, watches_one, go_on), (two, _, _) = children
    go_on.send(b"x")
    deadline = time.monotonic() + 20
    while processes.waits_in(one) != "userfaultfd_event_wait_completion":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert identity.watches(watches_one, one) is True
    assert identity.watches(watches_one, two) is False
    event = uffd.read_event(watches_one)
    assert event is not None
    assert event.kind == uffd.EVENT_REMOVE


def test_a_process_that_has_gone(children: list[tuple[int, int, socket.socket]]) -> None:
    (_, watches_one, _), _ = children
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
        assert identity.watches(watches_one, gone.pid) is None
