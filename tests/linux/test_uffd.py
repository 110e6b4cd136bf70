"""userfaultfds of processes that are there, have ended, or have started another program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from gpuksm.linux import pidfd, uffd
from tests import requirements_env
from tests.support import processes
from tests.support.scripts import LIBC

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


# Leaves a userfaultfd to a thread with a descriptor table of its own, then discards memory that it watches.
_LEAVER = (
    LIBC
    + """
import fcntl, os, struct, threading, time
at = libc.mmap(None, 8 * 4096, 3, 0x22, -1, 0)
fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("<QQQ", 0xAA, 1 << 13 | 1 << 15 | 1 << 3, 0)))
fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("<QQQQ", at, 8 * 4096, 2, 0)))
def hold():
    assert libc.unshare(0x400) == 0
    print(libc.syscall(186), fd, flush=True)
    alone.set()
    time.sleep(100)
alone = threading.Event()
threading.Thread(target=hold, daemon=True).start()
alone.wait()
os.close(fd)
libc.madvise(at, 4096, 4)
print("discarded", flush=True)
"""
)


def test_a_thread_alone_keeps_events_waiting() -> None:
    """What hazard 14 can be met with: such a userfaultfd outlives its readers, and a new one can take it."""
    requirements_env.need("uffd", "thread_pidfd")
    with subprocess.Popen([sys.executable, "-S", "-c", _LEAVER], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            tid, number = map(int, child.stdout.readline().split())
            deadline = time.monotonic() + 20
            while processes.waits_in(child.pid) != "userfaultfd_event_wait_completion":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process = os.pidfd_open(child.pid)
            try:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    pidfd.steal(process, number)
            finally:
                os.close(process)
            thread = pidfd.open_thread(tid)
            taken = pidfd.steal(thread, number)
            os.close(thread)
            event = uffd.read_event(taken)
            os.close(taken)
            assert event is not None
            assert event.kind == uffd.EVENT_REMOVE
            assert child.stdout.readline() == "discarded\n"
        finally:
            child.kill()
