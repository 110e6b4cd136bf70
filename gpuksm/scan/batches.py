"""Hashing what has no digest yet, batch by batch, across targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpuksm.errors import TargetGone
from gpuksm.hashing.protocol import Hasher
from gpuksm.scan.columns import I64
from gpuksm.scan.reader import LivePages
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.types import Progress

Part = tuple[Tracker, I64]


def cut(wanted: list[Part], batch_pages: int) -> Iterator[list[Part]]:
    """Batches of `batch_pages` pages (the last may be smaller): parts of one or several targets."""
    batch: list[Part] = []
    room = batch_pages
    for tracker, index in wanted:
        at = 0
        while at < len(index):
            part = index[at : at + room]
            batch.append((tracker, part))
            at += len(part)
            room -= len(part)
            if not room:
                yield batch
                batch, room = [], batch_pages
    if batch:
        yield batch


def digest_wanted(
    trackers: list[Tracker], hasher: Hasher, batch_pages: int, progress: Progress
) -> dict[int, int]:
    """Hash every page of `trackers` that has no digest; {pid: pages read}."""
    return digest([(tracker, tracker.wanted()) for tracker in trackers], hasher, batch_pages, progress.update)


def digest(
    wanted: list[Part], hasher: Hasher, batch_pages: int, report: Callable[[str, int, int], None]
) -> dict[int, int]:
    """Hash the pages `wanted` (indices into a tracker's columns); {pid: pages read}.

    Each batch looks again, just before it is read, which of its pages are still calm, unless that
    was a moment ago: a page that was freed or swapped out since must not be touched.
    """
    total = sum(len(index) for _, index in wanted)
    scanned = dict.fromkeys((tracker.pid for tracker, _ in wanted), 0)
    done = 0
    for batch in cut(wanted, batch_pages):
        report("hash", done, total)
        done += sum(len(index) for _, index in batch)
        calm = [(tracker, _still_calm(tracker, index)) for tracker, index in batch]
        source = LivePages([(tracker.pid, tracker.columns.address[index]) for tracker, index in calm])
        digests, kinds = np.zeros(source.pages, np.uint64), np.zeros(source.pages, np.uint8)
        try:
            hasher.digest(source, digests, kinds)
        finally:
            source.close()
        at = 0
        for tracker, index in calm:
            end = at + len(index)
            tracker.learn(index, digests[at:end], kinds[at:end])
            scanned[tracker.pid] += len(index)
            at = end
    report("hash", total, total)
    return scanned


def _still_calm(tracker: Tracker, index: I64) -> I64:
    try:
        return index if tracker.was_just_looked_up() else tracker.still_calm(index)
    except TargetGone:
        return index[:0]
