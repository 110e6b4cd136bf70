"""Sends work to the guard from a thread of its own, so that reading and planning go on meanwhile.

The guard answers one request after another, and so does this: what is put first
is done first.  While anything is under way nobody else may use the connection.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CLOSE_SECONDS = 2.0


class Commits:
    """A queue of things to do, in order, by one thread; left, it drops what has not begun.

    The first exception ends it: what is left is dropped, and `finish` raises it.
    """

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = False

    def put(self, work: Callable[[], None]) -> None:
        """Have `work` done after all that was put before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._labour, name="gpuksm-commits", daemon=True)
            self._thread.start()
        self._todo.put(work)

    def finish(self) -> None:
        """Wait until all is done; raises what any of it raised."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _labour(self) -> None:
        while (work := self._todo.get()) is not None:
            if self._stopped or self._error is not None:
                continue
            try:
                work()
            except BaseException as error:
                self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drop what has not begun, and give what has begun a while to end."""
        self._stopped = True
        if self._thread is not None:
            self._todo.put(None)
            with contextlib.suppress(RuntimeError):
                self._thread.join(_CLOSE_SECONDS)
