"""A guard from its start to its end: a fork of the keeper, with the descriptors that it holds.

At least `listener` and `keeper`, the link to it, are inherited; a successor also gets `store`, `ledger`,
`private`, the attic and the userfaultfds of every target.  A first guard looks for what agents have of these.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from pathlib import Path
from typing import NoReturn

from gpuksm.guard import attic, recovery, waiting
from gpuksm.guard.guard import Guard
from gpuksm.guard.journal import BORN, HOME, Journal
from gpuksm.guard.keeping import Keeping
from gpuksm.guard.server import Server
from gpuksm.guard.store import Store
from gpuksm.linux import process, procfs


def _look_for_agents(folder: Path, keeping: Keeping, inherited: dict[str, int]) -> None:
    """What agents hold that wait for a guard, as if it were inherited.

    Without a store all that is inherited is a part of it, from a guard that died doing this.
    """
    for tag, fd in inherited.items():
        keeping.keep(tag, None)
        os.close(fd)
    inherited.clear()
    inherited.update(waiting.find(folder))
    if not inherited:
        return
    for tag, fd in inherited.items():
        if tag != "store":  # with that our successor will believe that it has all
            keeping.keep(tag, fd)
    for number, fd in attic.copies(inherited["attic-out"]).items():
        if f"event:{number}" in inherited:
            os.close(fd)
            continue
        inherited[f"event:{number}"] = fd
        keeping.keep(f"event:{number}", fd)


def _guard(folder: Path, keeping: Keeping, inherited: dict[str, int]) -> Guard:
    """A guard on what is inherited of store, ledger and attic, or on new ones; the keeper holds all of it."""
    first, anew = "store" not in inherited, "private" not in inherited
    store = Store(inherited.pop("store", None))
    journal = Journal(inherited.pop("ledger", None), inherited.pop("private", None))
    ends = attic.Attic(inherited.pop("attic-in", None), inherited.pop("attic-out", None))
    guard = Guard(keeping, store, journal, ends)
    if first:
        guard.store_born = procfs.stat(os.getpid()).start_time
        journal.append(HOME, 0, waiting.home(folder), store.inode, guard.store_born)
    if anew:
        guard.seed = int.from_bytes(os.urandom(8), "little")
        journal.append(BORN, 0, guard.seed)
    held = {"ledger": journal.fd, "private": journal.private_fd}
    held |= {"attic-in": ends.sending, "attic-out": ends.receiving, "store": store.fd}
    for tag, fd in held.items():  # the store last
        keeping.keep(tag, fd)
    if not first:
        recovery.recover(guard, inherited)
    return guard


def run(folder: Path, inherited: dict[str, int]) -> NoReturn:
    """Be the guard of `folder` until there is no reason left, and tell the keeper so."""
    process.set_title("gpuksm guard")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    link = socket.socket(fileno=inherited.pop("keeper"))
    keeping = Keeping(folder, link, dict(inherited))
    listener = socket.socket(fileno=inherited.pop("listener"))
    if "store" not in inherited:
        _look_for_agents(folder, keeping, inherited)
    guard = _guard(folder, keeping, inherited)
    # A collection pause inside a freeze would be a pause of the target: the main loop collects.
    gc.freeze()
    gc.disable()
    Server(guard, listener, keeping).run()
    keeping.end()
    os._exit(0)
