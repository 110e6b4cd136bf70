"""`python -m gpuksm.guard`: a guard process, started by the keeper with descriptors to inherit.

GPUKSM_INHERIT is "tag=fd,..." with at least `listener` and `keeper`; a successor
also gets `store`, `ledger` and the userfaultfds of every target.
"""

from __future__ import annotations

import gc
import os
import signal
import socket

from gpuksm.guard import recovery
from gpuksm.guard.guard import Guard
from gpuksm.guard.journal import BORN, Journal
from gpuksm.guard.server import Server
from gpuksm.guard.store import Store
from gpuksm.linux import process, procfs


def main() -> None:
    """Run until there is no reason left; exit code 0 tells the keeper to end as well."""
    process.set_title("gpuksm guard")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    items = (item.partition("=") for item in os.environ["GPUKSM_INHERIT"].split(","))
    inherited = {tag: int(fd) for tag, _, fd in items}
    for fd in inherited.values():
        os.set_inheritable(fd, False)
    keeper = socket.socket(fileno=inherited.pop("keeper"))
    listener = socket.socket(fileno=inherited.pop("listener"))

    def keep(tag: str, fd: int | None) -> None:
        """A keeper that is gone is no reason to stop: only the takeover after our death is lost."""
        try:
            socket.send_fds(keeper, [tag.encode().ljust(64)], [] if fd is None else [fd])
        except OSError:
            return

    first = "store" not in inherited
    store = Store(inherited.pop("store", None))
    journal = Journal(inherited.pop("ledger", None))
    if first:
        keep("store", store.fd)
        keep("ledger", journal.fd)
    guard = Guard(keep, store, journal)
    if first:
        guard.store_born = procfs.stat(os.getpid()).start_time
        guard.seed = int.from_bytes(os.urandom(8), "little")
        journal.append(BORN, 0, guard.store_born, guard.seed)
    else:
        recovery.recover(guard, inherited)
    # A collection pause inside a freeze would be a pause of the target.
    gc.freeze()
    Server(guard, listener).run()
    os._exit(0)


if __name__ == "__main__":
    main()
