"""The client's end of the control socket: finds the guard, starts it, asks it.

`GuardClient.connect` looks for the guard of this user in the runtime folder and,
when asked to, starts one: detached from terminal, session, working directory and
every inherited descriptor, so that a script which reads a scan's output sees its
end.  A lock file in the folder keeps two clients from starting two guards.  The
folder must be a real directory of this user that nobody else can write to;
anything else is refused, because whoever owns it could answer in the guard's
place.  Stdlib only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpuksm import errors, starting, wire
from gpuksm.linux.descriptors import await_readable

_TRIES, _RETRY_SECONDS = 4, 0.1  # to start a process
START_SECONDS = 60.0  # where all processors are busy; one that has failed is noticed at once
# Unmerging a full node is one request; anything longer than this is a hang.
REPLY_SECONDS = 600.0


def runtime_dir() -> Path:
    """The folder of this user's guard: socket, lock and log.  Nothing is created."""
    override = os.environ.get("GPUKSM_RUNTIME_DIR")
    if override:
        return Path(override).absolute()
    uid = os.geteuid()
    # Root never follows XDG_RUNTIME_DIR: under sudo it may still be the caller's.
    base = "/run" if uid == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isabs(base) and os.access(base, os.W_OK | os.X_OK):
        return Path(base) / "gpuksm"
    return Path(f"/tmp/gpuksm-{uid}")


def ensure_runtime_dir(folder: Path) -> None:
    """Create `folder` (0700) where it is missing; raises GuardError when it is not safe to use."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # not a directory: check_runtime_dir says so
    except OSError as error:
        raise errors.GuardError(f"cannot create {folder}: {error.strerror}") from None
    check_runtime_dir(folder)


def start_ahead() -> None:
    """Have a process ready that becomes keeper and guard, unless there seems to be a guard.

    For a command that will want one and has to load much before; what it costs is lost when it wants none.
    """
    if not os.path.exists(runtime_dir() / "guard.sock"):
        starting.ahead()


def check_runtime_dir(folder: Path) -> None:
    """Raise GuardError unless `folder` is a real directory that only this user can write to."""
    try:
        handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        raise errors.GuardError(
            f"{folder} is not a directory (or a symbolic link): remove it or set GPUKSM_RUNTIME_DIR"
        ) from None
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    if found.st_uid != os.geteuid():
        raise errors.GuardError(f"{folder} belongs to uid {found.st_uid}: set GPUKSM_RUNTIME_DIR")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise errors.GuardError(f"others can write to {folder}: chmod 700 it or set GPUKSM_RUNTIME_DIR")


class GuardClient:
    """One connection to the guard; requests are answered in order.

    `attach` takes the guard's scan lock, which is held until `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def find(cls, folder: Path | None = None) -> Self | None:
        """A connection to this user's guard (or to that of another `folder`), or None when none runs.

        One that was killed together with its keeper is started again.  Raises GuardError when the
        runtime folder is not safe.
        """
        folder = folder or runtime_dir()
        sock = _connect(folder)
        if sock is None and (folder / "guard.sock").exists():
            # One that ends takes its socket with it.  This one and its keeper were killed, and what
            # they have merged waits for another.
            sock = _start(folder)
        return None if sock is None else cls(sock)

    @classmethod
    def connect(cls, start: bool, folder: Path | None = None) -> Self:
        """Connect to this user's guard (or that of another `folder`), starting one if `start` and none runs.

        Raises GuardError when there is none, or it does not come up in time, or
        the runtime folder is not safe.
        """
        if start:
            folder = folder or runtime_dir()
            ensure_runtime_dir(folder)
            sock = _connect(folder) or _start(folder)
            starting.dismiss()  # another was quicker
            return cls(sock)
        found = cls.find(folder)
        if found is None:
            raise errors.GuardError("no guard is running: nothing is registered or merged")
        return found

    def request(
        self, op: str, payload: bytes | bytearray | memoryview = b"", **fields: Any
    ) -> tuple[dict[str, Any], bytearray]:
        """Send `op` with its fields and payload; returns (reply, payload of the reply).

        Raises the class of gpuksm.errors that the reply names, GuardError when
        the connection fails or no reply comes within REPLY_SECONDS.
        """
        try:
            wire.send(self._sock, {"op": op, **fields}, payload)
            reply, data = wire.receive(self._sock)
        except TimeoutError:
            self.close()
            raise errors.GuardError(f"the guard did not answer '{op}' in {REPLY_SECONDS:.0f} s") from None
        except (OSError, wire.WireError) as error:
            self.close()
            raise errors.GuardError(f"lost the guard during '{op}': {error}; run the command again") from None
        if "error" in reply:
            raise _named_error(reply)
        return reply, data

    def fileno(self) -> int:
        """The socket, for select; -1 once the connection is closed or lost."""
        return self._sock.fileno()

    def ask(self, op: str, **fields: Any) -> None:
        """Send a request whose reply comes when there is something to say (`watch`); see `answer`."""
        try:
            wire.send(self._sock, {"op": op, **fields})
        except OSError as error:
            self.close()
            raise errors.GuardError(f"lost the guard during '{op}': {error}; run the command again") from None

    def answer(self) -> dict[str, Any]:
        """The reply to `ask`, once the socket is readable; GuardError when the guard is gone."""
        try:
            return wire.receive(self._sock)[0]
        except (OSError, wire.WireError) as error:
            self.close()
            raise errors.GuardError(f"lost the guard: {error}; run the command again") from None

    def close(self) -> None:
        """Close the connection; the guard drops the scan lock it may have held.

        A thread that waits for an answer gets an error.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _named_error(reply: dict[str, Any]) -> errors.GpuksmError:
    kind = getattr(errors, str(reply["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, errors.GpuksmError)):
        kind = errors.GuardError
    return kind(str(reply.get("message", reply["error"])))


def _connect(folder: Path) -> socket.socket | None:
    """A connection to the guard that listens in `folder`; None when there is none."""
    try:
        check_runtime_dir(folder)
    except FileNotFoundError:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(REPLY_SECONDS)
    try:
        sock.connect(str(folder / "guard.sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise errors.GuardError(f"cannot connect to {folder}/guard.sock: {error}") from None
    return sock


def _own_file(path: Path, flags: int) -> int:
    """Open or make a file of the runtime folder; whatever else stands in its place is a GuardError."""
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.GuardError(f"cannot open {path}: {error.strerror}; remove it") from None


@contextlib.contextmanager
def _start_lock(folder: Path, deadline: float) -> Iterator[None]:
    handle = _own_file(folder / "lock", os.O_RDWR)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise errors.GuardError(f"another client holds {folder}/lock") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _start(folder: Path) -> socket.socket:
    """Start a keeper (which starts the guard) and return a connection to it."""
    deadline = time.monotonic() + START_SECONDS
    with _start_lock(folder, deadline):
        sock = _connect(folder)
        if sock is not None:
            return sock
        log = folder / "guard.log"
        keeper = _persistently(lambda: _spawn_keeper(folder, log))
        try:
            while time.monotonic() < deadline:
                sock = _connect(folder)
                if sock is not None:
                    return sock
                if keeper is None or await_readable([keeper], 0.01):
                    raise errors.GuardError(f"the guard did not start: {_last_line(log)}")
        finally:
            if keeper is not None:
                os.close(keeper)
        raise errors.GuardError(f"the guard did not listen in {START_SECONDS:.0f} s; see {log}")


def _persistently(start: Callable[[], int | None]) -> int | None:
    """What `start` returns, tried again where the kernel would not start a process just then.

    On a busy machine that is EAGAIN or ENOMEM; on one virtual machine execve also gave EFAULT now and then.
    """
    for _ in range(_TRIES - 1):
        with contextlib.suppress(OSError):
            return start()
        time.sleep(_RETRY_SECONDS)
    try:
        return start()
    except OSError as error:
        raise errors.GuardError(
            f"cannot start a process for the guard ({error.strerror}); try again"
        ) from None


def _spawn_keeper(folder: Path, log: Path) -> int | None:
    """Start the keeper detached; a pidfd of it, or None when it is already gone."""
    output = _own_file(log, os.O_WRONLY | os.O_APPEND)
    try:
        keeper = starting.spawn(folder, output)
        return None if keeper is None else os.pidfd_open(keeper)
    except ProcessLookupError:
        return None
    finally:
        os.close(output)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")
