"""The keeper: holds duplicates of the guard's descriptors and starts a successor when it dies.

A process that does little, so that nothing in it can fail.  It holds every
userfaultfd (events wait as long as somebody does), the store, the ledger's memfds, the
attic and the listening socket; never an agent's socket, on whose closing the agents rely.

A guard is a fork of it.  All modules of the guard are loaded before there is need of one, so that a
successor is there within a millisecond or two, with no file to read: targets wait for it, and the package
may lie on a file server that hangs, or have been replaced meanwhile.  What the fork has of the keeper's own,
the lock and the other end of the link, it closes first.

If we die between the fork and that: the lock is held for a moment longer; the guard finds the link closed
and starts another keeper, which tries again if it comes too early.

Started by the client (starting.py), detached; or, when the keeper before it has died, by the guard
(keeping.py), as `python -m gpuksm.guard.keeper RUNTIME_DIR`, with all that it has to hold
and `link` and `guard`, a pidfd, in GPUKSM_INHERIT.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from gpuksm.guard import arch, attic, faults
from gpuksm.linux import process, uffd
from gpuksm.linux.descriptors import await_readable

END = "end"  # the guard's word that it ends on purpose
FORK = "fork "  # and, with two tags, that an event is to be read in its place
NOTHING = b"-"
TAG_BYTES = 64
_GUARD = "gpuksm.guard.life"  # which imports this module
# One that was started by a guard loads that when it was asked nothing for so long: forks wait for its answer.
_QUIET_SECONDS = 0.1
# A process that dies at once again and again must not take the processor with it.
_SHORT_LIFE_SECONDS = 0.5
_FIRST_DELAY_SECONDS, _LAST_DELAY_SECONDS = 0.01, 2.0


class Patience:
    """How long to wait before something that has died is started again."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY_SECONDS
        self._started = time.monotonic()

    def started(self) -> None:
        """It was started now."""
        self._started = time.monotonic()

    def died(self) -> float:
        """It has died; the seconds to wait."""
        if time.monotonic() - self._started > _SHORT_LIFE_SECONDS:
            self._delay = _FIRST_DELAY_SECONDS
            return 0.0
        self._delay = min(_LAST_DELAY_SECONDS, self._delay * 2)
        return self._delay


def inherited() -> dict[str, int]:
    """Descriptors by tag that GPUKSM_INHERIT, "tag=fd,...", names; not handed on any further."""
    items = (item.partition("=") for item in os.environ.pop("GPUKSM_INHERIT", "").split(",") if item)
    found = {tag: int(fd) for tag, _, fd in items}
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found


def start(folder: Path, fds: dict[str, int]) -> subprocess.Popen[bytes]:
    """Another keeper, with descriptors to inherit."""
    environment = {**os.environ, "GPUKSM_INHERIT": ",".join(f"{tag}={fd}" for tag, fd in fds.items())}
    command = [sys.executable, "-m", "gpuksm.guard.keeper", str(folder)]
    return subprocess.Popen(command, pass_fds=list(fds.values()), env=environment, cwd="/")


def load() -> bool:
    """Load what a guard is, so that none that is started has anything to load; False: it cannot be now.

    Then each guard tries by itself, and is started again when it fails.
    """
    before = set(sys.modules)
    try:
        importlib.import_module(_GUARD)
        arch.current()
    except Exception:
        for name in set(sys.modules) - before:  # half of one version is no part of another
            if name.startswith("gpuksm."):
                del sys.modules[name]
        return False
    gc.freeze()  # what a collection writes to is no longer shared with the guard
    return True


def _load_beside_jobs() -> bool:
    """`load`, while others come first."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    loaded = load()
    _come_first()
    return loaded


def _listen(folder: Path) -> socket.socket:
    path = folder / "guard.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o177)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def _start_guard(folder: Path, kept: dict[str, int]) -> tuple[int, socket.socket]:
    """A guard that takes over what is kept: a pidfd of it, and our end of the link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            guard = os.fork()
        except OSError:
            ours.close()
            raise
        if not guard:
            _become_guard(folder, {**kept, "keeper": theirs.fileno()})
    try:
        return os.pidfd_open(guard), ours
    except OSError:
        ours.close()
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)
        raise


def _become_guard(folder: Path, inherited: dict[str, int]) -> NoReturn:
    """In the fork: be a guard and nothing of a keeper's."""
    try:
        process.set_title("gpuksm guard")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        kept = {0, 1, 2, *inherited.values()}
        for fd in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
            with contextlib.suppress(OSError):  # the folder's own, which is closed by now
                os.close(fd)
        importlib.import_module(_GUARD).run(folder, inherited)
    except BaseException:
        traceback.print_exc()  # into guard.log
    os._exit(1)


def _start_guard_at_last(folder: Path, kept: dict[str, int], patience: Patience) -> tuple[int, socket.socket]:
    """The same, also where the kernel starts no process now (EAGAIN, ENOMEM): we must not end for it.

    It is tried for ever; what stands in the way is told when it is something else than before.  SIGTERM ends
    us here only where no guard has been: with a store we hold what merged memory relies on.
    """
    told = ""
    if "store" not in kept:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        patience.started()
        try:
            return _start_guard(folder, kept)
        except OSError as error:
            if str(error) != told:
                told = str(error)
                os.write(2, f"gpuksm keeper: cannot start a guard: {told}; trying again\n".encode())
            time.sleep(patience.died())


def _hold(link: socket.socket, kept: dict[str, int]) -> bool:
    """Take and let go descriptors as the guard says, until it is gone; whether it said that it ends."""
    loaded, quiet = _GUARD in sys.modules, _QUIET_SECONDS
    while True:
        if not loaded and not await_readable([link.fileno()], quiet):
            loaded, quiet = _load_beside_jobs(), 10 * quiet
            continue
        try:
            data, fds, _, _ = socket.recv_fds(link, TAG_BYTES, 1)
        except ConnectionResetError:
            continue  # it died with an answer of ours unread; what it said before that comes next
        tag = data.decode().strip()
        if tag in ("", END):
            return tag == END
        if tag.startswith(FORK):
            _read_fork(link, kept, *tag.removeprefix(FORK).split())
            continue
        if tag in kept:
            os.close(kept.pop(tag))
        if fds:
            os.set_inheritable(fds[0], False)
            kept[tag] = fds[0]


def _read_fork(link: socket.socket, kept: dict[str, int], parent: str, child: str) -> None:
    """Read an event of `parent` for the guard; if it brings a userfaultfd, hold that as `child`.

    Read by the guard, it would have one holder for a moment, and with the guard's death none:
    the child would go on with merged memory that nobody answers for.
    """
    fd = None
    with socket.socket(fileno=os.dup(kept["attic-in"])) as queue:
        number = child.partition(":")[2].encode()
        data = uffd.read_message(kept[parent]) if parent in kept else b""
        # Until the next line is done our death and the guard's would leave the child to nobody.
        if data and data[0] == uffd.EVENT_FORK:
            attic.send(queue, number, data[uffd.FORKED])
            kept[child] = fd = int.from_bytes(data[uffd.FORKED], sys.byteorder)
            os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):  # the guard has just died: its successor is told of the child
        socket.send_fds(link, [data or NOTHING], [] if fd is None else [fd])


def _await_end(guard: int) -> None:
    """Wait until the guard has ended altogether and let its tracees go; it may be our child."""
    await_readable([guard], None)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, guard, os.WEXITED)
    os.close(guard)


def _terminate(guard: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(guard, signal.SIGTERM)


def _come_first() -> None:
    """Run before what we wake, where that is allowed; those we start do not.

    Reading a fork's event wakes the parent, which may take the processor from us: then milliseconds pass
    until the child's userfaultfd is in the attic, instead of microseconds.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def _disarm() -> None:
    """A fault is injected once, not into the successor."""
    os.environ.pop("GPUKSM_FAULT", None)
    faults.disarm()


def main() -> None:
    """Keep a guard running until it ends by itself."""
    folder = Path(sys.argv[1])
    kept = inherited()
    lock = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    process.set_title("gpuksm keeper")
    _come_first()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if "link" in kept:
        guard, link = kept.pop("guard"), socket.socket(fileno=kept.pop("link"))
    else:
        kept["listener"] = _listen(folder).detach()
        guard, link = _start_guard_at_last(folder, kept, Patience())
    patience = Patience()
    while True:
        signal.signal(signal.SIGTERM, lambda *_, guard=guard: _terminate(guard))
        on_purpose = _hold(link, kept)
        link.close()
        _await_end(guard)
        if on_purpose:
            break
        _disarm()
        time.sleep(patience.died())
        guard, link = _start_guard_at_last(folder, kept, patience)
    (folder / "guard.sock").unlink(missing_ok=True)


if __name__ == "__main__":
    # As the module that the guard's import too, not a second time as another.
    importlib.import_module("gpuksm.guard.keeper").main()
