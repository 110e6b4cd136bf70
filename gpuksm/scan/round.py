"""A scan from start to end: attach, rounds, commits, and the numbers.

One round: the guard re-arms and tells what was written; after a while the pages
that stayed calm are looked up, read, hashed, joined with the stable tree and
each other, planned and sent to the guard in small requests.  Only the guard
changes anything; everything here may stop at any moment.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuksm.errors import NoSuchProcess, TargetGone
from gpuksm.scan import measure
from gpuksm.scan.batches import digest_wanted
from gpuksm.scan.columns import PAGE_BYTES
from gpuksm.scan.engine import Engine, error_of
from gpuksm.scan.tracker import gather
from gpuksm.scan.types import Progress, ScanOptions, ScanResult, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient


def run(
    client: GuardClient, targets: Sequence[TargetRequest], options: ScanOptions, progress: Progress
) -> ScanResult:
    """See `gpuksm.scan.run_scan`."""
    scan = _Scan(client, options, progress)
    try:
        return scan.run(targets)
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

    def run(self, wanted: Sequence[TargetRequest]) -> ScanResult:
        began, cpu_began = time.monotonic(), time.process_time()
        hello, _ = self.client.request("hello")
        guard_cpu = measure.cpu_seconds(int(hello["pid"]))
        store_before = int(self.client.request("status")[0]["store_bytes"])
        before = measure.snapshot(request.pid for request in wanted)
        self._attach(wanted)
        self.engine.open_hasher(int(hello.get("seed", 0)))
        for number in range(self.options.passes):
            self._round(number)
        self.progress.update("measure", 0, 0)
        status, _ = self.client.request("status")
        after = measure.snapshot(before)
        cpu = time.process_time() - cpu_began + measure.cpu_seconds(int(hello["pid"])) - guard_cpu
        return self._result(status, before, after, store_before, time.monotonic() - began, cpu)

    def _attach(self, wanted: Sequence[TargetRequest]) -> None:
        self.progress.update("attach", 0, len(wanted))
        targets = self.engine.attach(wanted)
        if targets and all(target.refusal is not None for target in targets):
            raise error_of(targets[0].refusal or {})
        self.progress.update("attach", len(wanted), len(wanted))

    # -- one round ---------------------------------------------------------------

    def _round(self, number: int) -> None:
        self._arm()
        self.progress.update("settle", number, self.options.passes)
        time.sleep(self.options.settle_seconds)
        for target in self.engine.living():
            assert target.tracker is not None
            try:
                target.tracker.look()
            except TargetGone:
                target.leave()
        trackers = [target.tracker for target in self.engine.living() if target.tracker is not None]
        scanned = digest_wanted(trackers, self.engine.hasher, self.options.batch_pages, self.progress)
        for target in self.engine.living():
            target.pages_scanned += scanned.get(target.pid, 0)
        living = self.engine.living()
        self.engine.merge(gather([target.tracker for target in living if target.tracker is not None]), living)

    def _arm(self) -> None:
        for target in self.engine.living():
            assert target.tracker is not None
            try:
                _, payload = self.client.request("arm", target=target.ident)
            except (TargetGone, NoSuchProcess):
                target.leave()
                continue
            target.tracker.forget(np.frombuffer(payload, "<u8").reshape(-1, 2).astype(np.uint64))

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
