"""Speaks gpuksm/wire.py where the guard would listen: each request is answered by a function."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpuksm import wire

Answer = Callable[[dict[str, Any], bytearray], tuple[dict[str, Any], bytes] | None]


@contextlib.contextmanager
def listening(folder: Path, answer: Answer) -> Iterator[None]:
    """Serve connections in `folder`, one after the other; an answer of None hangs up."""
    folder.mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "guard.sock"))
    listener.listen()

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(wire.WireError, OSError):
                while (reply := answer(*wire.receive(connection))) is not None:
                    wire.send(connection, *reply)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
