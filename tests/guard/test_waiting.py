"""What waits for a guard is believed only if we made it ourselves, for this runtime folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpuksm.guard import journal, waiting
from gpuksm.guard.agent import STAY, STAY_OFFSET
from gpuksm.guard.attach import AGENT_NAME
from gpuksm.guard.attic import Attic
from gpuksm.guard.journal import Journal
from gpuksm.guard.store import Store
from tests import requirements_env

_NOBODY = 65534

# Does what an agent does that waits, with descriptors that it is given or makes itself.
_AGENT = """
import ctypes, mmap, os, sys, threading
user, name, store, ledger, sending, receiving, layout, offset, target = sys.argv[1:]
os.setuid(int(user))
libc = ctypes.CDLL(None, use_errno=True)
word = os.eventfd(0, os.EFD_CLOEXEC)
event = libc.syscall(323, os.O_CLOEXEC | 1)
if store == "own":
    first = os.pread(int(ledger), 32, 0)
    store, ledger = os.memfd_create("gpuksm-store"), os.memfd_create("gpuksm-ledger")
    os.pwrite(ledger, first[:16] + os.fstat(store).st_ino.to_bytes(8, "little") + first[24:], 0)
block = mmap.mmap(-1, 8192)
at = ctypes.addressof(ctypes.c_char.from_buffer(block))
import struct
rest = map(int, (store, ledger, sending, receiving, target))
struct.pack_into(layout, block, int(offset), word, event, *rest)
def wait():
    libc.prctl(15, name.encode())
    print("READY", flush=True)
    libc.read(word, ctypes.c_void_p(at + 24), ctypes.c_size_t(8))
    print("DISMISSED", flush=True)
threading.Thread(target=wait).start()
"""


@contextmanager
def _agent(user: int, store: object, ledger: int, attic: Attic) -> Iterator[subprocess.Popen[str]]:
    held = (store, ledger, attic.sending, attic.receiving)
    arguments = [user, AGENT_NAME, *held, STAY.format, STAY_OFFSET, 7]
    fds = [fd for fd in held if isinstance(fd, int)]
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _AGENT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "READY\n"
            yield process
        finally:
            process.kill()


def _ledger(folder: Path, store: Store) -> Journal:
    log = Journal()
    log.append(journal.HOME, 0, waiting.home(folder), store.inode, 1)
    return log


def test_an_agent_that_waits_is_found_and_ends_by_word(tmp_path: Path) -> None:
    requirements_env.need("uffd", "thread_pidfd")
    store = Store()
    log = _ledger(tmp_path, store)
    with _agent(os.geteuid(), store.read_only, log.read_only, Attic()) as agent:
        assert waiting.find(tmp_path / "other") == {}
        found = waiting.find(tmp_path)
        assert set(found) == {"store", "ledger", "attic-in", "attic-out", "event:7", "word:7"}
        assert os.fstat(found["store"]).st_ino == store.inode
        Journal(found["ledger"]).append(journal.GONE, 7)  # it can be written, as a successor does
        assert os.fstat(found["ledger"]).st_mode & 0o777 == 0o400
        os.eventfd_write(found["word:7"], 1)
        assert agent.stdout is not None
        assert agent.stdout.readline() == "DISMISSED\n"
    for fd in found.values():
        os.close(fd)


@pytest.mark.parametrize("store", ["own", "ours"])
def test_what_another_user_made_is_not_believed(tmp_path: Path, store: str) -> None:
    """Its own store and ledger, which say what ours do."""
    requirements_env.need("uffd", "thread_pidfd", "root")
    ours = Store()
    log = _ledger(tmp_path, ours)
    with _agent(_NOBODY, store if store == "own" else ours.read_only, log.read_only, Attic()):
        found = waiting.find(tmp_path)
    # Of what we made, also an agent in another user's process may have a descriptor: it is how agents are.
    assert bool(found) == (store == "ours")
    for fd in found.values():
        os.close(fd)
