"""A first pass over much memory, in slices: while the guard merges one, the next is read.

A slice is the same share of every target, by address: processes that do the same
lay their memory out alike, so most of what is equal meets within a slice.  What
found no partner there is joined with everything else at the end.  A slice may
spend mappings in proportion to its size only, so that long runs in later ones are
not left without.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from functools import partial

import numpy as np

from gpuksm.errors import TargetGone
from gpuksm.scan.batches import digest
from gpuksm.scan.columns import I64, ranges_within
from gpuksm.scan.commits import Commits
from gpuksm.scan.engine import Engine, Target
from gpuksm.scan.equals import Repeats, candidates_with_equals
from gpuksm.scan.planner import Plan
from gpuksm.scan.state import KNOWN
from gpuksm.scan.tracker import Tracker, gather

# Pages of a slice: large enough that planning it takes no longer than planning all at once.
SLICE_PAGES = 1 << 18
# Of the first slice: until something is planned the guard has nothing to do.
_FIRST_PARTS = (0.25, 0.5, 0.75, 1.0)


def merge_everything(engine: Engine, living: list[Target], settled: float = 0.0) -> dict[int, int]:
    """Hash, plan and commit all pages of `living` that were found calm; {pid: pages read}.

    Until `settled` (of the monotonic clock) nothing is planned, only read.
    """
    trackers = [target.tracker for target in living if target.tracker is not None]
    total = sum(len(tracker.columns) for tracker in trackers)
    bounds = _bounds(max(1, total // SLICE_PAGES))
    budgets, stable = engine.budgets(living), engine.stable()
    repeats = Repeats(total + len(stable.digest), stable.digest)
    scanned = dict.fromkeys((tracker.pid for tracker in trackers), 0)

    def read(low: float, high: float) -> bool:
        """Read what has no digest; whether as much again can be read until memory has settled."""
        began, done = time.monotonic(), sum(scanned.values())
        share = [(tracker, tracker.wanted(*_share(tracker, low, high))) for tracker in trackers]
        if any(len(index) for _, index in share):
            report = partial(_report, engine, done, total)
            for pid, pages in digest(share, engine.hasher, engine.options.batch_pages, report).items():
                scanned[pid] += pages
        return 2 * time.monotonic() - began < settled

    with Commits() as commits:
        low = 0.0
        for number, high in enumerate(bounds[1:]):
            early = read(bounds[number], high)
            if not low:
                for start, end in itertools.pairwise(bounds[1:]):
                    early = early and read(start, end)
                _settle(engine, trackers, settled)
            for tracker in trackers:
                repeats.add(tracker, *_share(tracker, low, high))
            if len(bounds) == 2:
                break
            chosen = [repeats.candidates(tracker, *_share(tracker, low, high)) for tracker in trackers]
            spend = (budgets * (high - low) / (1 - low)).astype(np.int64)
            plan = engine.plan(gather(trackers, chosen), living, stable, spend)
            budgets -= _mark(plan, trackers, chosen)
            engine.commit(plan, living, commits)
            engine.hasher.leave(1)  # to the guard, which targets that are stopped wait for
            if not low:
                _count_volatile(trackers)
            low = high
        _merge_rest(engine, living, trackers, repeats, commits)
        if len(bounds) == 2:
            _count_volatile(trackers)
        commits.finish()
    engine.hasher.leave(0)
    return scanned


def _report(engine: Engine, done: int, total: int, stage: str, at: int, _: int) -> None:
    engine.progress.update(stage, done + at, total)


def _settle(engine: Engine, trackers: list[Tracker], settled: float) -> None:
    """Wait until `settled`, and forget what was written of the pages that were read while they were."""
    if (left := settled - time.monotonic()) > 0:
        engine.progress.update("settle", 0, 0)
        time.sleep(left)
    for tracker in trackers:
        index = np.flatnonzero(tracker.columns.known())
        try:
            tracker.keep_calm(index)
        except TargetGone:
            tracker.columns.unmark(KNOWN, index)


def _count_volatile(trackers: list[Tracker]) -> None:
    """What was written while memory settled; the guard is at work by now."""
    for tracker in trackers:
        with contextlib.suppress(TargetGone):
            tracker.count_volatile()


def _bounds(count: int) -> list[float]:
    """Where slices begin and end, as shares of each target; the first of `count` in several parts."""
    if count == 1:
        return [0.0, 1.0]
    first = [part / count for part in _FIRST_PARTS]
    return [0.0, *first, *(number / count for number in range(2, count + 1))]


def _share(tracker: Tracker, low: float, high: float) -> tuple[int, int]:
    pages = len(tracker.columns)
    return int(pages * low), pages if high == 1 else int(pages * high)


def _mark(plan: Plan, trackers: list[Tracker], chosen: list[I64]) -> I64:
    """Note what `plan` takes of the pages `chosen`; mappings that it costs each target at most."""
    first = np.concatenate((plan.runs.first, plan.zeros.first))
    pages = np.concatenate((plan.runs.pages, plan.zeros.pages))
    taken = np.zeros(len(plan.pages.address), np.bool_)
    taken[np.repeat(first, pages) + ranges_within(pages)] = True
    at = 0
    for tracker, index in zip(trackers, chosen, strict=True):
        tracker.plan(index[taken[at : at + len(index)]])
        at += len(index)
    return 2 * np.bincount(plan.pages.target[plan.runs.first], minlength=len(trackers)).astype(np.int64)


def _merge_rest(
    engine: Engine, living: list[Target], trackers: list[Tracker], repeats: Repeats, commits: Commits
) -> None:
    """Plan what no slice has taken and what may have an equal anywhere."""
    some, unshared = candidates_with_equals(trackers, repeats)
    for target in living:
        target.left_out, target.unshared = {}, 0
    if any(map(len, some)):
        commits.finish()
        pages = gather(trackers, some)
        plan = engine.plan(pages, living, engine.stable(), engine.budgets(living))
        engine.commit(plan, living, commits)
    for target, pages_alone in zip(living, unshared, strict=True):
        target.unshared += pages_alone
