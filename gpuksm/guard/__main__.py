"""`python -m gpuksm.guard RUNTIME_DIR`: a guard process, started by the keeper with descriptors to inherit.

GPUKSM_INHERIT is "tag=fd,..." with at least `listener` and `keeper`; a successor
also gets `store`, `ledger` and the userfaultfds of every target.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path

from gpuksm.guard import keeper, recovery
from gpuksm.guard.guard import Guard
from gpuksm.guard.journal import BORN, Journal
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
    keeping = Keeping(Path(sys.argv[1]), link, dict(inherited))
    listener = socket.socket(fileno=inherited.pop("listener"))
    first = "store" not in inherited
    store = Store(inherited.pop("store", None))
    journal = Journal(inherited.pop("ledger", None))
    if first:
        keeping.keep("store", store.fd)
        keeping.keep("ledger", journal.fd)
    guard = Guard(keeping, store, journal)
    if first:
        guard.store_born = procfs.stat(os.getpid()).start_time
        guard.seed = int.from_bytes(os.urandom(8), "little")
        journal.append(BORN, 0, guard.store_born, guard.seed)
    else:
        recovery.recover(guard, inherited)
    # A collection pause inside a freeze would be a pause of the target.
    gc.freeze()
    Server(guard, listener, keeping).run()
    keeping.end()
    os._exit(0)


if __name__ == "__main__":
    main()
