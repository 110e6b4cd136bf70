"""A first pass over much memory, in slices: while the guard merges one, the next is read.

A slice is the same share of every target, by address: processes that do the same
lay their memory out alike, so most of what is equal meets within a slice.  What
found no partner there is joined with everything else at the end.  A slice may
spend mappings in proportion to its size only, so that long runs in later ones are
not left without.
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from gpuksm.errors import TargetGone
from gpuksm.scan.batches import digest
from gpuksm.scan.columns import I64, ranges_within
from gpuksm.scan.commits import Commits
from gpuksm.scan.engine import Engine, Target
from gpuksm.scan.equals import candidates_with_equals
from gpuksm.scan.planner import Plan
from gpuksm.scan.state import KNOWN
from gpuksm.scan.tracker import Tracker, gather

# Pages of a slice: large enough that planning it takes no longer than planning all at once.
SLICE_PAGES = 1 << 18
_FIRST_PART = 0.25  # of the first slice: until it is planned the guard has nothing to do


def merge_everything(engine: Engine, living: list[Target], settled: float = 0.0) -> dict[int, int]:
    """Hash, plan and commit all pages of `living` that were found calm; {pid: pages read}.

    Until `settled` (of the monotonic clock) nothing is planned, only read.
    """
    trackers = [target.tracker for target in living if target.tracker is not None]
    total = sum(tracker.count_wanted() for tracker in trackers)
    bounds = _bounds(max(1, total // SLICE_PAGES))
    budgets, stable = engine.budgets(living), engine.stable()
    scanned: dict[int, int] = {}
    done = 0

    def report(stage: str, at: int, _total: int) -> None:
        engine.progress.update(stage, done + at, total)

    with Commits() as commits:
        for number, (low, high) in enumerate(itertools.pairwise(bounds)):
            share = [tracker.wanted(*_share(tracker, low, high)) for tracker in trackers]
            early = time.monotonic() < settled
            read = digest(
                list(zip(trackers, share, strict=True)), engine.hasher, engine.options.batch_pages, report
            )
            if early or not number:
                _settle(engine, trackers, share, settled)
            done += sum(map(len, share))
            for pid, pages in read.items():
                scanned[pid] = scanned.get(pid, 0) + pages
            if len(bounds) == 2:
                break
            known = [
                index[tracker.columns.known(index)] for tracker, index in zip(trackers, share, strict=True)
            ]
            spend = (budgets * (high - low) / (1 - low)).astype(np.int64)
            plan = engine.plan(gather(trackers, known), living, stable, spend)
            budgets -= _mark(plan, trackers, known)
            engine.commit(plan, living, commits)
            engine.hasher.leave(1)  # to the guard, which targets that are stopped wait for
        _merge_rest(engine, living, trackers, commits, sliced=len(bounds) > 2)
        commits.finish()
    engine.hasher.leave(0)
    return scanned


def _settle(engine: Engine, trackers: list[Tracker], read: list[I64], settled: float) -> None:
    """Wait until `settled`, and forget what was written of the pages `read` while they were."""
    if (left := settled - time.monotonic()) > 0:
        engine.progress.update("settle", 0, 0)
        time.sleep(left)
    for tracker, index in zip(trackers, read, strict=True):
        try:
            tracker.keep_calm(index)
            tracker.count_volatile()
        except TargetGone:
            tracker.columns.unmark(KNOWN, index)


def _bounds(count: int) -> list[float]:
    """Where slices begin and end, as shares of each target; the first of `count` in two parts."""
    whole = [number / count for number in range(1, count + 1)]
    return [0.0, *([_FIRST_PART / count] if count > 1 else []), *whole]


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
    engine: Engine, living: list[Target], trackers: list[Tracker], commits: Commits, *, sliced: bool
) -> None:
    """Plan what no slice has taken and what has an equal anywhere."""
    if sliced:
        some, unshared = candidates_with_equals(trackers, engine.known_stable, engine.hasher.sort)
    else:  # these are few, and the plan itself will tell
        some, unshared = [tracker.candidates() for tracker in trackers], [0] * len(trackers)
    for target in living:
        target.left_out, target.unshared = {}, 0
    if any(map(len, some)):
        commits.finish()
        pages = gather(trackers, some)
        plan = engine.plan(pages, living, engine.stable(), engine.budgets(living))
        engine.commit(plan, living, commits)
    for target, pages_alone in zip(living, unshared, strict=True):
        target.unshared += pages_alone
