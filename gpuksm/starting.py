"""The process that becomes keeper and guard: started by a client, detached from all that the client has.

It loads what they need, which takes a tenth of a second, and then waits for the word to become them, which
comes from the client that holds the lock for it (client.py).  So it can be started before the client knows
that there will be something to do: one that hears no such word ends with its client and has left nothing
behind.  `python -m gpuksm scan` starts one first of all, so that the command line, which loads numpy, and the
guard are ready at about the same time.

What it is told is the runtime folder, in a message that brings the log, which becomes its standard
output and error.  It answers with the pid of the keeper, a child of it that is nobody's when it ends.
Stdlib only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

# The package may live outside of the isolated interpreter's path (a checkout): then it comes first there, or
# a guard of another installation would be started, and with the keepers that a guard starts.  By its first
# line gpuksm knows it for its own.
MARK = "# gpuksm keeper"
_BOOTSTRAP = f"""\
{MARK}
import os, socket, sys
root = sys.argv[1]
os.environ["PYTHONSAFEPATH"] = "1"
if root not in sys.path:
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root
from gpuksm.guard import keeper
keeper.load()
with socket.socket(fileno=os.dup(0)) as client:
    folder, log, _, _ = socket.recv_fds(client, 4096, 1)
    if not log:
        os._exit(0)
    child = os.fork()
    if child:
        client.send(str(child).encode())
        os._exit(0)
null = os.open(os.devnull, os.O_RDONLY)
os.dup2(null, 0)
os.dup2(log[0], 1)
os.dup2(log[0], 2)
for fd in (null, *log):
    os.close(fd)
sys.argv[1] = os.fsdecode(folder)
keeper.main()
"""
_REPLY_SECONDS = 60.0  # where all processors are busy


class Starting:
    """One such process; what it says before its word goes to `errors`, a descriptor, or nowhere."""

    def __init__(self, errors: int = subprocess.DEVNULL) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(_REPLY_SECONDS)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _BOOTSTRAP, root],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                self._sock.close()
                raise

    def go(self, folder: Path, log: int) -> int | None:
        """Become the keeper of `folder`; its pid, or None where this one has failed."""
        reply = b""
        with contextlib.suppress(OSError):
            socket.send_fds(self._sock, [os.fsencode(folder)], [log])
            reply = self._sock.recv(32)
        self.end()
        return int(reply) if reply else None

    def end(self) -> None:
        """Have no more to do with it: it ends, where it has not become a keeper."""
        self._sock.close()
        self._process.kill()
        self._process.wait()


_ahead: Starting | None = None


def ahead() -> None:
    """Start one that the next guard of this process can be made of; where none can be, nothing is done."""
    global _ahead
    if _ahead is None:
        with contextlib.suppress(OSError):
            _ahead = Starting()


def dismiss() -> None:
    """What was started ahead is not wanted: it ends."""
    global _ahead
    if _ahead is not None:
        _ahead.end()
        _ahead = None


def spawn(folder: Path, log: int) -> int | None:
    """Start a keeper, which starts a guard; its pid, or None when it has failed, see `log`.  OSError."""
    global _ahead
    early, _ahead = _ahead, None
    pid = None if early is None else early.go(folder, log)
    return Starting(log).go(folder, log) if pid is None else pid
