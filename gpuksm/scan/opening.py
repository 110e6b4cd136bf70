"""How a scan begins to read: what has been armed is looked up, and its first pages are read.

The guard has one thread, and each target takes it some ten milliseconds for a GiB.  So one thread has it
attach to a target and arm it (attaching.py), and another looks up what is armed, and reads of it while the
guard does the next.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from gpuksm.errors import TargetGone
from gpuksm.scan import measure
from gpuksm.scan.asking import MOST_GUARD_SECONDS
from gpuksm.scan.attaching import Attaching
from gpuksm.scan.batches import digest
from gpuksm.scan.engine import Engine, Target, error_of
from gpuksm.scan.tracker import Tracker

# Read at a time, so that the next target need not wait; targets of fewer pages are better read together.
_PIECE_PAGES, _LEAST_PAGES = 1 << 13, 1 << 12


class Opening(NamedTuple):
    """What processes held before (of those that run), pages read so far of each, when memory has settled."""

    before: dict[int, measure.Held]
    scanned: dict[int, int]
    settled: float  # of the monotonic clock


def open_targets(engine: Engine, attaching: Attaching) -> Opening:
    """Make what is attached to targets of `engine`, look their pages up and read some.

    Raises when all are refused.
    """
    before: dict[int, measure.Held] = {}
    settle, settled = engine.options.settle_seconds, 0.0
    count = len(attaching.wanted)
    engine.progress.update("attach", 0, count)
    with _Ahead(engine) as ahead:
        for number, armed in enumerate(attaching):
            if armed.held is not None:
                before[armed.request.pid] = armed.held
            for target in engine.take(armed.reply):
                if armed.at is None:
                    target.leave()
                elif target.tracker is not None:
                    # Of those that are armed later the guard makes sure, if that does not take long.
                    if not settled or settle > MOST_GUARD_SECONDS:
                        settled = armed.at + settle
                    ahead.put(target)
            engine.progress.update("attach", number + 1, count)
        ahead.finish()
    if engine.targets and all(target.refusal is not None for target in engine.targets):
        raise error_of(engine.targets[0].refusal or {})
    return Opening(before, ahead.scanned, settled)


class _Ahead:
    """A thread that looks targets up as they are put, and reads from the front of all while none waits.

    What it reads is not known to be calm for long: see `slices.merge_everything`.
    """

    def __init__(self, engine: Engine) -> None:
        self.scanned: dict[int, int] = {}
        self._engine = engine
        self._todo: queue.SimpleQueue[Target | None] = queue.SimpleQueue()
        self._unread: deque[tuple[Tracker, int]] = deque()  # and the first page that was not read
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._labour, name="gpuksm-ahead", daemon=True)

    def put(self, target: Target) -> None:
        """Look `target` up, which is armed, behind those that were put before."""
        self._todo.put(target)

    def finish(self) -> None:
        """Wait until all are looked up; raises what that raised."""
        self._end()
        if self._error is not None:
            raise self._error

    def _labour(self) -> None:
        while True:
            try:
                target = self._todo.get(block=not self._unread)
            except queue.Empty:
                self._attempt(self._read_a_piece)
                continue
            if target is None:
                return
            if self._error is None:
                self._attempt(partial(self._look, target))

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
            self._unread.clear()

    def _look(self, target: Target) -> None:
        tracker = target.followed()
        try:
            tracker.look()
        except TargetGone:
            return target.leave()
        if len(tracker.columns) >= _LEAST_PAGES:
            self._unread.append((tracker, 0))
        return None

    def _read_a_piece(self) -> None:
        """Some pages of the target of which least was read."""
        tracker, first = self._unread.popleft()
        end = first + _PIECE_PAGES
        piece, engine = [(tracker, tracker.wanted(first, end))], self._engine
        for pid, pages in digest(piece, engine.hasher, engine.options.batch_pages, lambda *_: None).items():
            self.scanned[pid] = self.scanned.get(pid, 0) + pages
        if end < len(tracker.columns):
            self._unread.append((tracker, end))

    def _end(self) -> None:
        self._todo.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        # The guard has a processor to itself meanwhile.
        self._engine.hasher.leave(1)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread, before what it works with is closed."""
        if self._thread.is_alive():
            self._end()
        self._engine.hasher.leave(0)
