"""Rounds over targets that stay attached: what `gpuksm daemon` does all day.

A round arms every target, looks up, reads and hashes only what had been written
and has been calm since, and plans only when one of those pages has an equal.  In
settled memory it costs one request and one PAGEMAP_SCAN per region.  The guard
keeps its say: whatever is remembered here may be out of date, and costs a refused
page then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuksm.errors import NoSuchProcess, NotPermitted, TargetGone
from gpuksm.linux import procfs
from gpuksm.scan import measure
from gpuksm.scan.batches import digest_wanted
from gpuksm.scan.columns import I64, PAGE_BYTES, U64
from gpuksm.scan.engine import Engine, Target
from gpuksm.scan.equals import with_equals
from gpuksm.scan.follow import Follower
from gpuksm.scan.seen import Seen
from gpuksm.scan.tracker import Tracker, equals_elsewhere, gather, user_key
from gpuksm.scan.types import Progress, ScanOptions, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

_GONE = (TargetGone, NoSuchProcess, NotPermitted)
# Every so many rounds all pages are looked up: some were swapped out, or shared with a child, before.
_LOOK_ROUNDS = 32
# What could not be stopped is planned again in the next rounds, as often as this; what a device held less
# often, for it may do so for good.
_RETRIES = {"busy": 8, "stopped": 8, "pinned": 2, "direct-io": 2}
_RETRY_SECONDS, _MAX_RETRY_SECONDS = 2.0, 600.0


class Round(NamedTuple):
    """What one round did: pages read, pages merged or given back; whether a plan was made; new targets."""

    scanned: int
    merged: int
    planned: bool
    attached: int


class Session:
    """Targets and everything known of them, as long as one connection to the guard lasts."""

    def __init__(self, client: GuardClient, options: ScanOptions, progress: Progress) -> None:
        self.client = client
        self.engine = Engine(client, options, progress)
        self.followers: dict[int, Follower] = {}
        self.rounds = 0
        self.plans = 0
        self.pages_scanned = 0
        self.regions_skipped = 0
        self.guard_pid = 0
        self._zero_pages = 0
        self._pages_merged = 0
        self._refused: dict[int, tuple[int, float, float]] = {}  # pid: start time, try again at, after
        self._seen = Seen()  # all contents that were planned with
        self._retries = 0
        self._unshared = 0

    def open(self) -> None:
        """Take the scan lock (GuardError when another scanner has it) and get ready to hash."""
        hello, _ = self.client.request("hello")
        self.guard_pid = int(hello["pid"])
        self.engine.ask_attach([])
        self.engine.open_hasher(int(hello["seed"]))
        self._note_contents(np.empty(0, np.uint64))  # what the store holds of an earlier scanner's

    def close(self) -> None:
        """Give descriptors and threads back; the connection is the caller's."""
        self.engine.close()

    # -- targets -----------------------------------------------------------------

    def follow(self, wanted: Sequence[TargetRequest]) -> list[Target]:
        """Attach to what is new in `wanted`, let go what is no longer in it; those newly tried.

        What the guard refuses is tried again later, after longer and longer times.
        """
        asked = {request.pid: request for request in wanted}
        for pid, follower in list(self.followers.items()):
            request = asked.get(pid)
            if request is None or self._start_time(pid) != follower.start_time:
                self._leave(follower)
            elif request.ranges != follower.request.ranges:
                follower.request, follower.changed = request, True
        fresh = [
            request for request in wanted if request.pid not in self.followers and self._may_try(request.pid)
        ]
        if not fresh:
            return []
        began = {request.pid: self._start_time(request.pid) for request in fresh}
        targets = self.engine.attach(fresh)
        for request, target in zip(fresh, targets, strict=True):
            if target.tracker is not None:
                follower = Follower(target, request, began[target.pid])
                follower.cover()
                self.followers[target.pid] = follower
                self._refused.pop(target.pid, None)
            else:
                self.engine.targets.remove(target)
                _, _, after = self._refused.get(target.pid, (0, 0.0, _RETRY_SECONDS / 2))
                after = min(2 * after, _MAX_RETRY_SECONDS)
                self._refused[target.pid] = (began[target.pid], time.monotonic() + after, after)
        return targets

    def _may_try(self, pid: int) -> bool:
        start_time, again, _ = self._refused.get(pid, (0, 0.0, 0.0))
        if start_time and start_time != self._start_time(pid):
            del self._refused[pid]
            return True
        return time.monotonic() >= again

    @staticmethod
    def _start_time(pid: int) -> int:
        try:
            return procfs.stat(pid).start_time
        except _GONE:
            return 0

    def _leave(self, follower: Follower) -> None:
        """The process has exited, or is no longer wanted."""
        self._zero_pages += follower.target.zero_pages
        self._pages_merged += follower.target.pages_merged
        follower.target.leave()
        self.engine.targets.remove(follower.target)
        del self.followers[follower.target.pid]

    def _refresh(self, follower: Follower) -> None:
        """Ask the guard what is there now; keeps what is known of pages that are still there."""
        began = time.monotonic()
        item = self.engine.ask_attach([follower.request])["targets"][0]
        if item["target"] != follower.target.ident:
            # Refused now, or another program by now: what is known is void.
            self._leave(follower)
            return
        follower.refreshed(item["regions"], item["merged"], time.monotonic() - began)

    # -- a round -----------------------------------------------------------------

    def round(self, *, smart: bool, use_zero_pages: bool) -> Round:
        """One pass over everything that may have changed."""
        self.regions_skipped = 0
        attached = sum(not follower.visits for follower in self.followers.values())
        for follower in list(self.followers.values()):
            try:
                self._look(follower, smart)
            except _GONE:
                self._leave(follower)
        new = [follower for follower in self.followers.values() if follower.tracker.count_wanted()]
        scanned, fresh = self._digest(new, use_zero_pages)
        planned = self._retries > 0 or self._has_equals(fresh)
        merged = self._merge(use_zero_pages) if planned else 0
        self.rounds += 1
        self.plans += planned
        self.pages_scanned += scanned
        if scanned or planned:
            self._unshared = sum(
                int(np.count_nonzero(columns.known()) - np.count_nonzero(columns.zeros()))
                for columns in (follower.tracker.columns for follower in self.followers.values())
            )
        return Round(scanned, merged, planned, attached)

    def _look(self, follower: Follower, smart: bool) -> None:
        if follower.wants_refresh():
            self._refresh(follower)
            if follower.target.pid not in self.followers:
                return
        stretches = follower.choose(self.rounds, smart)
        self.regions_skipped += follower.skipped_pieces
        if stretches is None:
            reply, payload = self.client.request("arm", target=follower.target.ident)
        else:
            body = stretches.astype("<u8").tobytes()
            reply, payload = self.client.request("arm", body, target=follower.target.ident, some=True)
        follower.changed |= bool(reply["changed"])
        follower.armed(self.rounds, np.frombuffer(payload, "<u8").reshape(-1, 2).astype(np.uint64))
        if follower.visits > 1 and (self.rounds + follower.target.ident) % _LOOK_ROUNDS == 0:
            follower.tracker.look()
            follower.tracker.drop(*follower.pending)  # armed a moment ago: not known to be calm

    def _digest(self, new: list[Follower], use_zero_pages: bool) -> tuple[int, U64]:
        """Hash the pages of `new` that have no digest: (pages read, digests, 0 for pages of zeros)."""
        wanted: list[tuple[Follower, I64]] = [(follower, follower.tracker.wanted()) for follower in new]
        if not wanted:
            return 0, np.empty(0, np.uint64)
        engine = self.engine
        trackers = [follower.tracker for follower in new]
        scanned = digest_wanted(trackers, engine.hasher, engine.options.batch_pages, engine.progress)
        found = []
        for follower, index in wanted:
            follower.target.pages_scanned += scanned[follower.target.pid]
            columns = follower.tracker.columns
            index = index[columns.known(index)]
            zero = columns.zeros(index)
            digest = columns.digest[index] ^ user_key(follower.tracker)
            found.append(np.where(zero, np.uint64(0), digest) if use_zero_pages else digest[~zero])
        return sum(scanned.values()), np.concatenate(found)

    def _has_equals(self, fresh: U64) -> bool:
        """Whether a new page is all zeros, or its digest is one of the others or the store's."""
        if not len(fresh):
            return False
        ordered = np.sort(fresh)
        known = self._seen.holds(ordered)
        if not ordered[0] or (ordered[1:] == ordered[:-1]).any():
            return True
        # What was seen may have been this very page, before it was written with what it held.
        trackers = [follower.tracker for follower in self.followers.values()]
        if known.any() and equals_elsewhere(ordered[known], trackers, self.engine.stable()):
            return True
        self._seen.add(ordered[~known])
        return False

    def _merge(self, use_zero_pages: bool) -> int:
        for follower in list(self.followers.values()):
            try:
                follower.tracker.prune()
            except _GONE:
                self._leave(follower)
        living = self.engine.living()
        trackers = [target.tracker for target in living if target.tracker is not None]
        worth = with_equals(trackers, self.engine.stable())
        masks = [_candidates(tracker, use_zero_pages) for tracker in trackers]
        some = [np.flatnonzero(mask & equal) for mask, equal in zip(masks, worth, strict=True)]
        before = {target.ident: target.runs for target in living}
        merged = self.engine.merge(gather(trackers, some), living)
        seen = [np.empty(0, np.uint64)]
        for tracker, mask in zip(trackers, masks, strict=True):
            seen.append(tracker.columns.digest[mask] ^ user_key(tracker))
        self._note_contents(np.concatenate(seen))
        tries = max(
            (_RETRIES.get(reason, 0) for reason, pages in self.engine.skipped.items() if pages), default=0
        )
        self._retries = (self._retries or tries + 1) - 1 if tries else 0
        for target in living:
            follower = self.followers[target.pid]
            if target.runs == before[target.ident]:
                continue
            try:
                self._refresh(follower)
                if target.pid in self.followers:
                    follower.tracker.prune()
            except _GONE:
                self._leave(follower)
        return merged

    def _note_contents(self, digest: U64) -> None:
        """From now on a new page is worth a plan when it is one of these, or of the store's."""
        ordered = np.concatenate((digest, self.engine.stable().digest))
        ordered.sort()
        self._seen.replace(ordered)

    # -- numbers -----------------------------------------------------------------

    def set_batch(self, pages: int) -> None:
        """Read `pages` at a time from now on."""
        self.engine.options = replace(self.engine.options, batch_pages=pages)

    def merge_across_nodes(self, across: bool) -> bool:
        """Merge pages of different nodes from now on, or no longer; False while something is merged.

        FeatureMissing where pages cannot be told apart.
        """
        if self.engine.options.merge_across_nodes != across:
            if int(self.client.request("hello")[0]["merged_pages"]):
                return False
            self.engine.merge_across_nodes(across)
            self._note_contents(np.empty(0, np.uint64))
        return True

    def counters(self) -> dict[str, int]:
        """What only grows; the guard is not asked."""
        targets = [follower.target for follower in self.followers.values()]
        zero = self._zero_pages + sum(target.zero_pages for target in targets)
        merged = self._pages_merged + sum(target.pages_merged for target in targets)
        return {
            "zero_pages": zero,
            "full_scans": self.rounds,
            "pages_scanned": self.pages_scanned,
            "pages_merged": merged + zero,
            "plans": self.plans,
        }

    def numbers(self) -> dict[str, int]:
        """What describes the present state; asks the guard."""
        hello, _ = self.client.request("hello")
        shared = int(hello["store_bytes"]) // PAGE_BYTES
        sharing = max(0, int(hello["merged_pages"]) - shared)
        targets = [follower.target for follower in self.followers.values()]
        skipped = sum(self.engine.skipped.values())
        skipped += sum(sum(target.left_out.values()) for target in targets)
        return {
            "pages_shared": shared,
            "pages_sharing": sharing,
            "pages_unshared": max(0, self._unshared - skipped),
            "pages_volatile": sum(follower.volatile for follower in self.followers.values()),
            "pages_skipped": skipped,
            # Without pages of zeros: they may have been written again since they were given back.
            "general_profit": sharing * PAGE_BYTES - 2 * int(hello["runs"]) * measure.VMA_BYTES,
            "regions_skipped": self.regions_skipped,
            "targets": len(targets),
        }


def _candidates(tracker: Tracker, use_zero_pages: bool) -> NDArray[np.bool_]:
    """For each page of `tracker` whether it may be merged."""
    mask = tracker.may_be_merged()
    return mask if use_zero_pages else mask & ~tracker.columns.zeros()
