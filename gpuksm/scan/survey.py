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
from gpuksm.scan.nodes import Nodes, apart, no_nodes, parted
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


def survey(
    lookout: Lookout, hasher: Hasher, batch_pages: int, progress: Progress, expected: Callable[[], int]
) -> tuple[Pages, list[int]]:
    """(the planner's columns of all pages that were read, pages read of each of the lookout's trackers).

    `expected` says how many pages there may be, for `progress`.
    """
    addresses: list[tuple[int, U64]] = []
    digests: list[U64] = [np.empty(0, np.uint64)]
    kinds: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
    nodes: list[Nodes] = [no_nodes()]
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
            part = slice(at, at + len(address))
            at += len(address)
            scanned[target] += len(address)
            digest[part] ^= user_key(tracker)
            readable = kind[part] != KIND_UNREADABLE
            if tracker.by_node:
                node = tracker.ask_nodes(address, kind[part])
                digest[part] = apart(digest[part], node)
                readable &= (node > 0) | (kind[part] == KIND_ZERO)
                nodes.append(node[readable])
            whole = bool(readable.all())
            addresses.append((target, address if whole else address[readable]))
            digests.append(digest[part] if whole else digest[part][readable])
            kinds.append(kind[part] if whole else kind[part][readable])
        done += source.pages
    progress.update("hash", done, done)
    columns = np.concatenate(digests), np.concatenate(kinds), np.concatenate(nodes)
    pages = _columns(lookout.trackers, addresses, *columns)
    return pages, [scanned[number] for number in range(len(lookout.trackers))]


def _columns(
    trackers: Sequence[Tracker],
    addresses: list[tuple[int, U64]],
    digest: U64,
    kind: NDArray[np.uint8],
    node: Nodes,
) -> Pages:
    address = np.concatenate([np.empty(0, np.uint64), *(part for _, part in addresses)])
    owners = np.array([number for number, _ in addresses], np.uint32)
    target = np.repeat(owners, [len(part) for _, part in addresses])
    joins = np.zeros(len(address), np.bool_)
    np.equal(address[1:], address[:-1] + np.uint64(PAGE_BYTES), out=joins[1:])
    ends = np.searchsorted(target, np.arange(len(trackers) + 1))
    for tracker, at, end in zip(trackers, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        joins[at : min(at + 1, end)] = False
        joins[at + tracker.map.starts_of(address[at:end])] = False
    watched = np.zeros(len(address), np.bool_)
    return Pages(target, address, digest, kind, parted(joins, node), watched, node)
