"""Everything that is present in processes that nobody attaches to, looked up, read and hashed in one pass.

A thread looks up which pages of a window are present while the window before is
read, so that a page is looked up once, shortly before it is read, and neither
waits for the other.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import TargetGone
from gpuksm.hashing.protocol import KIND_UNREADABLE, KIND_ZERO, Hasher
from gpuksm.scan.columns import PAGE_BYTES, U64, pages_of, windows_of
from gpuksm.scan.equals import Repeats
from gpuksm.scan.nodes import Nodes, apart, no_nodes, parted, taken
from gpuksm.scan.reader import LivePages
from gpuksm.scan.runs import Pages
from gpuksm.scan.tracker import Tracker, user_key
from gpuksm.scan.types import Progress

# Windows that are looked up but not yet read, at most: what is read was present a moment ago.
_AHEAD = 1
_WAIT_SECONDS = 0.1


class Window(NamedTuple):
    """Pages of the target number `target`, `tracker`, that are present and its own alone, ascending."""

    target: int
    tracker: Tracker
    address: U64


class Lookout:
    """A thread that looks up windows of at most `pages` pages each, a little ahead of `windows`.

    `trackers` are asked for one after the other, in that thread.
    """

    def __init__(self, trackers: Iterable[Tracker], pages: int) -> None:
        self.trackers: list[Tracker] = []
        self._wanted, self._pages = trackers, pages
        self._found: queue.Queue[Window | BaseException | None] = queue.Queue(_AHEAD)
        self._stopped = False
        self._thread = threading.Thread(target=self._labour, name="gpuksm-lookout", daemon=True)
        self._thread.start()

    def windows(self) -> Iterator[Window]:
        """All windows, target by target, ascending; raises what looking raised.

        A target that has gone has no more of them.
        """
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def _labour(self) -> None:
        last: BaseException | None = None
        try:
            for tracker in self._wanted:
                self.trackers.append(tracker)
                self._look(tracker)
                if self._stopped:
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _look(self, tracker: Tracker) -> None:
        number = len(self.trackers) - 1
        try:
            for low, high in windows_of(*tracker.map.present(), self._pages):
                if self._stopped:
                    return
                self._put(Window(number, tracker, pages_of(*tracker.map.exclusive_in(low, high))))
        except TargetGone:
            return

    def _put(self, item: Window | BaseException | None) -> None:
        while not self._stopped:
            try:
                return self._found.put(item, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread; what it found and nobody took is dropped."""
        self._stopped = True
        self._thread.join()


def batches(found: Iterator[Window], pages: int) -> Iterator[list[Window]]:
    """Windows put together, at most `pages` pages in a batch; one that is half full waits for no more."""
    batch: list[Window] = []
    room = pages
    for window in found:
        if batch and len(window.address) > room:
            yield batch
            batch, room = [], pages
        batch.append(window)
        room -= len(window.address)
        if room < pages // 2:
            yield batch
            batch, room = [], pages
    if batch:
        yield batch


class Survey(NamedTuple):
    """What a survey found.

    pages: the planner's columns of what was read; scanned: pages read of each tracker; alone: those of
    them that are not in `pages`, for they have no equal.
    """

    pages: Pages
    scanned: list[int]
    alone: list[int]


class _Part(NamedTuple):
    """Pages of the target number `target` that could be read."""

    target: int
    address: U64
    digest: U64
    kind: NDArray[np.uint8]
    node: Nodes

    def take(self, mask: NDArray[np.bool_]) -> _Part:
        if mask.all():
            return self
        return _Part(
            self.target, self.address[mask], self.digest[mask], self.kind[mask], taken(self.node, mask)
        )


def survey(
    lookout: Lookout,
    hasher: Hasher,
    batch_pages: int,
    progress: Progress,
    expected: Callable[[], int],
    repeats: Repeats | None = None,
) -> Survey:
    """Read all windows of `lookout`.  `expected` says how many pages there may be, for `progress`.

    With `repeats` what has no equal is left out.
    """
    parts: list[_Part] = []
    scanned: Counter[int] = Counter()
    done = 0
    for batch in batches(lookout.windows(), batch_pages):
        total = expected()
        progress.update("hash", min(done, total), total)
        source = LivePages([(window.tracker.pid, window.address) for window in batch])
        digest, kind = np.empty(source.pages, np.uint64), np.empty(source.pages, np.uint8)
        try:
            hasher.digest(source, digest, kind)
        finally:
            source.close()
        at = 0
        for target, tracker, address in batch:
            mine, kinds = digest[at : at + len(address)], kind[at : at + len(address)]
            at += len(address)
            scanned[target] += len(address)
            mine ^= user_key(tracker)
            readable = kinds != KIND_UNREADABLE
            node = no_nodes()
            if tracker.by_node:
                node = tracker.ask_nodes(address, kinds)
                mine = apart(mine, node)
                readable &= (node > 0) | (kinds == KIND_ZERO)
            parts.append(_Part(target, address, mine, kinds, node).take(readable))
            if repeats is not None:
                repeats.note(parts[-1].digest)
        done += source.pages
    progress.update("hash", done, done)
    alone: Counter[int] = Counter()
    if repeats is not None:
        for number, part in enumerate(parts):
            parts[number] = part.take(repeats.hold(part.digest) | (part.kind == KIND_ZERO))
            alone[part.target] += len(part.address) - len(parts[number].address)
    of_each = range(len(lookout.trackers))
    pages = _columns(lookout.trackers, parts)
    return Survey(pages, [scanned[number] for number in of_each], [alone[number] for number in of_each])


def _columns(trackers: Sequence[Tracker], parts: list[_Part]) -> Pages:
    address = np.concatenate([np.empty(0, np.uint64), *(part.address for part in parts)])
    digest = np.concatenate([np.empty(0, np.uint64), *(part.digest for part in parts)])
    kind = np.concatenate([np.empty(0, np.uint8), *(part.kind for part in parts)])
    node = np.concatenate([no_nodes(), *(part.node for part in parts)])
    owners = np.array([part.target for part in parts], np.uint32)
    target = np.repeat(owners, [len(part.address) for part in parts])
    joins = np.zeros(len(address), np.bool_)
    np.equal(address[1:], address[:-1] + np.uint64(PAGE_BYTES), out=joins[1:])
    ends = np.searchsorted(target, np.arange(len(trackers) + 1))
    for tracker, at, end in zip(trackers, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        joins[at : min(at + 1, end)] = False
        joins[at + tracker.map.starts_of(address[at:end])] = False
    watched = np.zeros(len(address), np.bool_)
    return Pages(target, address, digest, kind, parted(joins, node), watched, node)
