"""How a scan begins: each target is measured, attached to, armed, looked up, and its first pages are read.

The guard does one thing at a time, and each of these takes some ten milliseconds for a GiB.  So three threads
share them: one measures what processes hold, ahead of the guard's attaching, which adds an agent to that; the
caller's asks the guard to attach to a target and to arm it; and one looks up what is armed, and reads
of it while the guard does the next.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from gpuksm.errors import TargetGone
from gpuksm.scan import measure
from gpuksm.scan.batches import digest
from gpuksm.scan.engine import MOST_GUARD_SECONDS, Engine, Target, error_of
from gpuksm.scan.slices import SLICE_PAGES
from gpuksm.scan.types import TargetRequest

# Read at a time, so that the next target need not wait; fewer of each target are not worth it.
_PIECE_PAGES, _LEAST_PAGES = 1 << 13, 1 << 10


class Opening(NamedTuple):
    """What processes held before (of those that run), pages read so far of each, when memory has settled.

    Of targets that were armed last the guard makes sure that it has.
    """

    before: dict[int, measure.Held]
    scanned: dict[int, int]
    settled: float  # of the monotonic clock


def open_targets(engine: Engine, wanted: Sequence[TargetRequest]) -> Opening:
    """Make `wanted` targets of `engine`, look their pages up and read some; raises when all are refused."""
    before: dict[int, measure.Held] = {}
    settle, settled = engine.options.settle_seconds, 0.0
    engine.progress.update("attach", 0, len(wanted))
    if not wanted:
        engine.attach([])  # it takes the scan lock all the same
    measuring = ThreadPoolExecutor(1)
    try:
        with _Ahead(engine, SLICE_PAGES // max(1, len(wanted))) as ahead:
            found = [measuring.submit(measure.held, request.pid) for request in wanted]
            for number, (request, held) in enumerate(zip(wanted, found, strict=True)):
                if (holds := held.result()) is not None:
                    before[request.pid] = holds
                for target in engine.attach([request]):
                    if target.tracker is not None and engine.arm(target) is not None:
                        settled = settled or time.monotonic() + settle
                        ahead.put(target)
                engine.progress.update("attach", number + 1, len(wanted))
            settled = max(settled, time.monotonic() + settle - MOST_GUARD_SECONDS)
            ahead.finish()
    finally:
        measuring.shutdown(cancel_futures=True)
    if engine.targets and all(target.refusal is not None for target in engine.targets):
        raise error_of(engine.targets[0].refusal or {})
    return Opening(before, ahead.scanned, settled)


class _Ahead:
    """A thread that looks up targets as they are put, and reads up to `pages` of each while none waits."""

    def __init__(self, engine: Engine, pages: int) -> None:
        self.scanned: dict[int, int] = {}
        self._engine, self._pages = engine, pages
        self._todo: queue.SimpleQueue[Target | None] = queue.SimpleQueue()
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
        while (target := self._todo.get()) is not None:
            if self._error is None:
                try:
                    self._look_and_read(target)
                except BaseException as error:
                    self._error = error

    def _look_and_read(self, target: Target) -> None:
        tracker, engine = target.followed(), self._engine
        try:
            tracker.look()
        except TargetGone:
            return target.leave()
        wanted = tracker.wanted(0, self._pages)
        if len(wanted) < _LEAST_PAGES:
            return None
        for at in range(0, len(wanted), _PIECE_PAGES):
            if not self._todo.empty():
                return None
            piece = wanted[at : at + _PIECE_PAGES]
            batch = engine.options.batch_pages
            for pid, pages in digest([(tracker, piece)], engine.hasher, batch, lambda *_: None).items():
                self.scanned[pid] = self.scanned.get(pid, 0) + pages
        return None

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
