"""`python -m gpuksm.guard RUNTIME_DIR`: a guard process, started by the keeper with descriptors to inherit.

GPUKSM_INHERIT is "tag=fd,..." with at least `listener` and `keeper`; a successor
also gets `store`, `ledger`, `private`, the attic and the userfaultfds of every target.  A first guard
looks for what agents have of these.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path

from gpuksm.guard import keeper, recovery, waiting
from gpuksm.guard.attic import Attic
from gpuksm.guard.guard import Guard
from gpuksm.guard.journal import BORN, HOME, Journal
from gpuksm.guard.keeping import Keeping
from gpuksm.guard.server import Server
from gpuksm.guard.store import Store
from gpuksm.linux import process, procfs


def main() -> None:
    """Run until there is no reason left, and tell the keeper so."""
    process.set_title("gpuksm guard")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    inherited = keeper.inherited()
    link = socket.socket(fileno=inherited.pop("keeper"))
    folder = Path(sys.argv[1])
    keeping = Keeping(folder, link, dict(inherited))
    listener = socket.socket(fileno=inherited.pop("listener"))
    found = {} if "store" in inherited else waiting.find(folder)
    for tag, fd in found.items():
        inherited[tag] = fd
        keeping.keep(tag, fd)
    first, anew = "store" not in inherited, "private" not in inherited
    store = Store(inherited.pop("store", None))
    journal = Journal(inherited.pop("ledger", None), inherited.pop("private", None))
    keeping.keep("store", store.fd)
    keeping.keep("ledger", journal.fd)
    keeping.keep("private", journal.private_fd)
    attic = Attic(inherited.pop("attic-in", None), inherited.pop("attic-out", None))
    keeping.keep("attic-in", attic.sending)
    keeping.keep("attic-out", attic.receiving)
    for number, fd in attic.copies().items() if found else ():
        if f"event:{number}" not in inherited:
            inherited[f"event:{number}"] = fd
            keeping.keep(f"event:{number}", fd)
    guard = Guard(keeping, store, journal, attic)
    if first:
        guard.store_born = procfs.stat(os.getpid()).start_time
        journal.append(HOME, 0, waiting.home(folder), store.inode, guard.store_born)
    if anew:
        guard.seed = int.from_bytes(os.urandom(8), "little")
        journal.append(BORN, 0, guard.seed)
    if not first:
        recovery.recover(guard, inherited)
    # A collection pause inside a freeze would be a pause of the target.
    gc.freeze()
    Server(guard, listener, keeping).run()
    keeping.end()
    os._exit(0)


if __name__ == "__main__":
    main()
