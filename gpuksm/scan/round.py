"""A scan from start to end: attach, rounds, commits, and the numbers.

One round: the guard re-arms and tells what was written; after a while the pages
that stayed calm are looked up, read, hashed, joined with the stable tree and
each other, planned and sent to the guard in small requests.  Only the guard
changes anything; everything here may stop at any moment.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuksm.errors import TargetGone
from gpuksm.hashing.protocol import KIND_ZERO
from gpuksm.scan import measure
from gpuksm.scan.attaching import Attaching
from gpuksm.scan.batches import digest_wanted
from gpuksm.scan.columns import I64, PAGE_BYTES, U64, count_pages, heads
from gpuksm.scan.engine import Engine, Target
from gpuksm.scan.equals import candidates_with_equals, repeats_of
from gpuksm.scan.opening import Opening, open_targets
from gpuksm.scan.slices import merge_everything
from gpuksm.scan.tracker import Tracker, equals_elsewhere, gather
from gpuksm.scan.types import Progress, ScanOptions, ScanResult

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

_NOTHING: U64 = np.empty((0, 2), np.uint64)
# Fewer written pages of each target than this are not worth another pass: being stopped for a
# commit alone makes each thread write one (the kernel does, to its rseq area).
_FEW_PAGES = 16
# What the guard could not do then, but may do now.
_TRY_AGAIN = ("busy", "stopped")


def run(client: GuardClient, attaching: Attaching, options: ScanOptions, progress: Progress) -> ScanResult:
    """See `gpuksm.scan.run_scan`; of the targets that are being attached to."""
    scan = _Scan(client, options, progress)
    try:
        return scan.run(attaching)
    finally:
        scan.close()


class _Scan:
    def __init__(self, client: GuardClient, options: ScanOptions, progress: Progress) -> None:
        self.client = client
        self.options = options
        self.progress = progress
        self.engine = Engine(client, options, progress)

    def close(self) -> None:
        """Give descriptors and threads back."""
        self.engine.close()

    def run(self, attaching: Attaching) -> ScanResult:
        self.engine.open_hasher(attaching.seed, attaching.work_bytes)
        opening = open_targets(self.engine, attaching)
        self._first_pass(opening)
        for number in range(1, self.options.passes):
            if self._checksums:
                self._checksum_pass(number)
            elif not self._further_pass(number):
                break
        self.progress.update("measure", 0, 0)
        status, _ = self.client.request("status", budgets=[])
        after = measure.snapshot(opening.before)
        cpu = time.process_time() - attaching.cpu_began
        cpu += measure.cpu_seconds(attaching.guard) - attaching.guard_cpu
        cpu += sum(measure.cpu_seconds(int(pid)) for pid in status.get("comparers", ()))
        seconds = time.monotonic() - attaching.began
        return self._result(status, opening.before, after, attaching.store_bytes, seconds, cpu)

    # -- passes ------------------------------------------------------------------

    @property
    def _checksums(self) -> bool:
        """Whether there is no write tracking: then only a second digest tells what is calm."""
        return any(target.tracker is not None and target.tracker.unarmed for target in self.engine.targets)

    def _first_pass(self, opening: Opening) -> None:
        living = self.engine.living()
        self._count(opening.scanned, living)
        # While memory settles it is read; what was written meanwhile is dropped again.
        self._count(merge_everything(self.engine, living, opening.settled), living)

    def _checksum_pass(self, number: int) -> None:
        """All over again."""
        self._settle(number, time.monotonic())
        self._look()
        living = self.engine.living()
        self._count(merge_everything(self.engine, living), living)

    def _further_pass(self, number: int) -> bool:
        """Look only at what was written before the last arming; False when that is not worth it."""
        written = self._arm()
        armed = time.monotonic()
        again = any(self.engine.skipped.get(reason) for reason in _TRY_AGAIN)
        if not again and all(count_pages(*pair.T) < _FEW_PAGES for pair in written.values()):
            return False
        self._settle(number, armed)
        for target in self.engine.living():
            try:
                _look_again(target.followed(), written.get(target.pid, _NOTHING))
            except TargetGone:
                target.leave()
        living = self.engine.living()
        trackers = [target.tracker for target in living if target.tracker is not None]
        fresh = [tracker.wanted() for tracker in trackers]
        batch_pages, hasher = self.options.batch_pages, self.engine.hasher
        self._count(digest_wanted(trackers, hasher, batch_pages, self.progress), living)
        if again or self._worth_a_plan(trackers, fresh):
            some, alone = candidates_with_equals(trackers, repeats_of(trackers, self.engine.stable()))
            self.engine.merge(gather(trackers, some), living)
            for target, pages in zip(living, alone, strict=True):
                target.unshared += pages
        return True

    def _worth_a_plan(self, trackers: list[Tracker], fresh: list[I64]) -> bool:
        """Whether a page of `fresh` (indices into each tracker's columns) is zeros or has an equal."""
        known = [index[each.columns.known(index)] for each, index in zip(trackers, fresh, strict=True)]
        new = gather(trackers, known)
        if (new.kind == KIND_ZERO).any():
            return True
        ordered = np.sort(new.digest)
        wanted = ordered[heads(ordered)]
        return len(wanted) > 0 and equals_elsewhere(wanted, trackers, self.engine.stable())

    def _look(self) -> None:
        for target in self.engine.living():
            try:
                target.followed().look()
            except TargetGone:
                target.leave()

    def _settle(self, number: int, since: float) -> None:
        self.progress.update("settle", number, self.options.passes)
        time.sleep(max(0.0, since + self.options.settle_seconds - time.monotonic()))

    def _count(self, scanned: dict[int, int], living: list[Target]) -> None:
        for target in living:
            target.pages_scanned += scanned.get(target.pid, 0)

    def _arm(self) -> dict[int, U64]:
        """Arm all; {pid: stretches (n, 2) written since the last time}."""
        written = ((target.pid, self.engine.arm(target)) for target in self.engine.living())
        return {pid: stretches for pid, stretches in written if stretches is not None}

    # -- the result --------------------------------------------------------------

    def _result(
        self,
        status: dict[str, Any],
        before: dict[int, measure.Held],
        after: dict[int, measure.Held],
        store_before: int,
        seconds: float,
        cpu: float,
    ) -> ScanResult:
        merged = sum(int(item["merged_pages"]) for item in status["targets"])
        # A run is one VMA, and usually one more for what is behind it.
        vmas = 2 * sum(int(item["runs"]) for item in status["targets"])
        shared = int(status["store_bytes"]) // PAGE_BYTES
        sharing = max(0, merged - shared)
        zero = sum(target.zero_pages for target in self.engine.targets)
        reports = tuple(target.report() for target in self.engine.targets)
        skipped = Counter(self.engine.skipped)
        for report in reports:
            skipped.update(report.skipped)
        store_growth = int(status["store_bytes"]) - store_before
        return ScanResult(
            pages_scanned=sum(report.pages_scanned for report in reports),
            pages_merged=sum(report.pages_merged for report in reports),
            pages_shared=shared,
            pages_sharing=sharing,
            pages_unshared=sum(target.unshared for target in self.engine.targets),
            pages_volatile=sum(target.volatile for target in self.engine.targets),
            pages_skipped=sum(skipped.values()),
            zero_pages=zero,
            full_scans=self.options.passes,
            general_profit=(sharing + zero) * PAGE_BYTES - vmas * measure.VMA_BYTES,
            bytes_saved=measure.saved_bytes(before, after, store_growth),
            seconds=seconds,
            cpu_seconds=cpu,
            max_pause_ms=max(self.engine.pauses_us, default=0) / 1000,
            backend=self.engine.hasher.name,
            backend_reason=self.engine.backend_reason,
            skipped=dict(skipped),
            pauses_us=tuple(self.engine.pauses_us),
            targets=reports,
        )


def _look_again(tracker: Tracker, written: U64) -> None:
    """Drop what was `written` or is no longer calm, and find what of it is calm now; TargetGone."""
    low, high = written[:, 0].copy(), written[:, 1].copy()
    tracker.drop(low, high)
    tracker.prune()
    tracker.plan_anew()
    if len(low):
        tracker.look_at(low, high)
    tracker.count_volatile()
