"""The keeper: holds duplicates of the guard's descriptors and starts a successor when it dies.

A process of a few lines, so that nothing in it can fail.  It holds every
userfaultfd (events wait as long as somebody does), the store, the ledger's memfd
and the listening socket; never an agent's socket, on whose closing the agents rely.

Run as `python -m gpuksm.guard.keeper RUNTIME_DIR`, detached, by the client.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from gpuksm.linux import process


def _listen(folder: Path) -> socket.socket:
    path = folder / "guard.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o177)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def _start_guard(kept: dict[str, int]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = {**kept, "keeper": theirs.fileno()}
    environment = {**os.environ, "GPUKSM_INHERIT": ",".join(f"{tag}={fd}" for tag, fd in fds.items())}
    guard = subprocess.Popen(
        [sys.executable, "-m", "gpuksm.guard"], pass_fds=list(fds.values()), env=environment, cwd="/"
    )
    theirs.close()
    return guard, ours


def _hold(link: socket.socket, kept: dict[str, int]) -> None:
    """Take and let go descriptors as the guard says, until it is gone."""
    while True:
        data, fds, _, _ = socket.recv_fds(link, 64, 1)
        if not data:
            return
        tag = data.decode().strip()
        if tag in kept:
            os.close(kept.pop(tag))
        if fds:
            kept[tag] = fds[0]


def main() -> None:
    """Keep a guard running until it ends by itself."""
    folder = Path(sys.argv[1])
    lock = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    process.set_title("gpuksm keeper")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kept = {"listener": _listen(folder).detach()}
    delay = 0.01
    while True:
        guard, link = _start_guard(kept)
        signal.signal(signal.SIGTERM, lambda *_, guard=guard: guard.terminate())
        started = time.monotonic()
        _hold(link, kept)
        link.close()
        if guard.wait() == 0:
            break
        os.environ.pop("GPUKSM_FAULT", None)  # a fault is injected once, not into the successor
        # A guard that dies at once again and again must not take the processor with it.
        delay = 0.01 if time.monotonic() - started > 5 else min(2.0, delay * 2)
        time.sleep(delay)
    (folder / "guard.sock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
