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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuksm import errors
from gpuksm.errors import NoSuchProcess, TargetGone
from gpuksm.hashing import select
from gpuksm.hashing.protocol import Hasher
from gpuksm.scan import measure
from gpuksm.scan.batches import digest_wanted
from gpuksm.scan.columns import I64, PAGE_BYTES
from gpuksm.scan.planner import Plan, make_plan
from gpuksm.scan.requests import Request, requests
from gpuksm.scan.tracker import Tracker, gather
from gpuksm.scan.trees import StableTree, stable_tree
from gpuksm.scan.types import Progress, ScanOptions, ScanResult, TargetReport, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient


@dataclass
class _Target:
    """One attached target over the scan."""

    pid: int
    ident: int
    name: str
    tracker: Tracker | None
    skipped: Counter[str]
    error: str | None = None
    pages_scanned: int = 0
    pages_merged: int = 0
    zero_pages: int = 0
    runs: int = 0
    vmas: int = 0
    unshared: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def volatile(self) -> int:
        return self.tracker.volatile if self.tracker else 0

    def leave(self) -> None:
        """The target has exited: a normal outcome."""
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None

    def report(self) -> TargetReport:
        skipped = Counter(self.skipped)
        skipped.update(self.left_out)
        return TargetReport(
            self.pid,
            self.name,
            self.pages_scanned,
            self.pages_merged + self.zero_pages,
            self.runs,
            self.vmas,
            dict(skipped),
            self.error,
        )


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
        self.targets: list[_Target] = []
        self.hasher: Hasher | None = None
        self.backend_reason = ""
        self.pauses_us: list[int] = []
        self.skipped: Counter[str] = Counter()

    def close(self) -> None:
        """Give descriptors and threads back."""
        for target in self.targets:
            target.leave()
        if self.hasher is not None:
            self.hasher.close()

    def run(self, wanted: Sequence[TargetRequest]) -> ScanResult:
        began, cpu_began = time.monotonic(), time.process_time()
        hello, _ = self.client.request("hello")
        guard_cpu = measure.cpu_seconds(int(hello["pid"]))
        store_before = int(self.client.request("status")[0]["store_bytes"])
        before = measure.snapshot(request.pid for request in wanted)
        self._attach(wanted)
        # The store's own, so that the digests it remembers can be compared with ours.
        seed = int(hello.get("seed", 0))
        self.hasher, self.backend_reason = select.create(
            self.options.backend, seed, self.options.threads, self.options.device, self.options.gpu_memory
        )
        for number in range(self.options.passes):
            self._round(number)
        self.progress.update("measure", 0, 0)
        status, _ = self.client.request("status")
        after = measure.snapshot(before)
        cpu = time.process_time() - cpu_began + measure.cpu_seconds(int(hello["pid"])) - guard_cpu
        return self._result(status, before, after, store_before, time.monotonic() - began, cpu)

    # -- attach ------------------------------------------------------------------

    def _attach(self, wanted: Sequence[TargetRequest]) -> None:
        self.progress.update("attach", 0, len(wanted))
        options = {
            "allow_seccomp": self.options.allow_seccomp,
            "allow_direct_io": self.options.allow_direct_io,
            "max_pause_us": self.options.max_pause_us,
        }
        asked = [{"pid": t.pid, "named": t.named, "ranges": t.ranges} for t in wanted]
        reply, _ = self.client.request("attach", targets=asked, options=options)
        checksum = reply.get("tracking", "write-tracking") == "checksum"
        for item in reply["targets"]:
            self.targets.append(_opened(item, checksum))
        failed = [item for item in reply["targets"] if item["target"] is None]
        if failed and len(failed) == len(self.targets):
            raise _error_of(failed[0])
        self.progress.update("attach", len(wanted), len(wanted))

    # -- one round ---------------------------------------------------------------

    def _living(self) -> list[_Target]:
        return [target for target in self.targets if target.tracker is not None]

    def _round(self, number: int) -> None:
        self._arm()
        self.progress.update("settle", number, self.options.passes)
        time.sleep(self.options.settle_seconds)
        for target in self._living():
            assert target.tracker is not None
            try:
                target.tracker.look()
            except TargetGone:
                target.leave()
        trackers = [target.tracker for target in self._living() if target.tracker is not None]
        assert self.hasher is not None
        scanned = digest_wanted(trackers, self.hasher, self.options.batch_pages, self.progress)
        for target in self._living():
            target.pages_scanned += scanned.get(target.pid, 0)
        self._merge()

    def _arm(self) -> None:
        for target in self._living():
            assert target.tracker is not None
            try:
                _, payload = self.client.request("arm", target=target.ident)
            except (TargetGone, NoSuchProcess):
                target.leave()
                continue
            target.tracker.forget(np.frombuffer(payload, "<u8").reshape(-1, 2).astype(np.uint64))

    def _merge(self) -> None:
        living = self._living()
        pages = gather([target.tracker for target in living if target.tracker is not None])
        self.progress.update("plan", 0, 0)
        self.skipped.clear()
        assert self.hasher is not None
        plan = make_plan(pages, self._stable(), self._budgets(living), self.hasher.sort)
        for index, target in enumerate(living):
            target.left_out = plan.skipped[index]
            target.unshared = int(plan.unshared[index])
        self._commit(plan, living)

    def _stable(self) -> StableTree:
        reply, payload = self.client.request("slots")
        return stable_tree(int(reply["extents"]), payload)

    def _budgets(self, living: list[_Target]) -> I64:
        status, _ = self.client.request("status")
        left = {int(item["target"]): item["vma_budget"] or 0 for item in status["targets"]}
        return np.array([max(0, int(left.get(target.ident, 0))) for target in living], np.int64)

    def _commit(self, plan: Plan, living: list[_Target]) -> None:
        ids = np.array([target.ident for target in living], np.int64)
        total = int(plan.runs.pages.sum() + plan.zeros.pages.sum())
        done = 0
        for request in requests(plan):
            self.progress.update("commit", done, total)
            reply, column = self.client.request(
                "commit",
                request.payload(ids),
                extents=len(request.extents),
                records=len(request.records),
                max_pause_us=self.options.max_pause_us,
            )
            self._account(request, reply, np.frombuffer(column, "<u4"), living)
            done += request.merging_pages
        self.progress.update("commit", total, total)

    def _account(self, request: Request, reply: dict[str, Any], merged: Any, living: list[_Target]) -> None:
        self.pauses_us += [int(pause) for pause in reply["pauses_us"]]
        self.skipped.update({str(reason): int(pages) for reason, pages in reply["skipped"].items()})
        of, zero = request.records["target"], request.zero
        mapped = np.bincount(of[~zero], merged[~zero], len(living))
        zeroed = np.bincount(of[zero], merged[zero], len(living))
        runs = np.bincount(of[merged > 0], minlength=len(living))
        for index, target in enumerate(living):
            target.pages_merged += int(mapped[index])
            target.zero_pages += int(zeroed[index])
            target.runs += int(runs[index])
            target.vmas = int(reply["vmas"].get(str(target.ident), target.vmas))

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
        zero = sum(target.zero_pages for target in self.targets)
        reports = tuple(target.report() for target in self.targets)
        skipped = Counter(self.skipped)
        for report in reports:
            skipped.update(report.skipped)
        store_growth = int(status["store_bytes"]) - store_before
        assert self.hasher is not None
        return ScanResult(
            pages_scanned=sum(report.pages_scanned for report in reports),
            pages_merged=sum(report.pages_merged for report in reports),
            pages_shared=shared,
            pages_sharing=sharing,
            pages_unshared=sum(target.unshared for target in self.targets),
            pages_volatile=sum(target.volatile for target in self.targets),
            pages_skipped=sum(skipped.values()),
            zero_pages=zero,
            full_scans=self.options.passes,
            general_profit=(sharing + zero) * PAGE_BYTES - vmas * measure.VMA_BYTES,
            bytes_saved=measure.saved_bytes(before, after, store_growth),
            seconds=seconds,
            cpu_seconds=cpu,
            max_pause_ms=max(self.pauses_us, default=0) / 1000,
            backend=self.hasher.name,
            backend_reason=self.backend_reason,
            skipped=dict(skipped),
            pauses_us=tuple(self.pauses_us),
            targets=reports,
        )


def _opened(item: dict[str, Any], checksum: bool) -> _Target:
    """A target as the guard's reply to `attach` describes it."""
    target = _Target(
        pid=int(item["pid"]),
        ident=-1 if item["target"] is None else int(item["target"]),
        name=str(item.get("name", "")),
        tracker=None,
        skipped=Counter({str(reason): int(pages) for reason, pages in item.get("skipped", {}).items()}),
    )
    if item["target"] is None:
        target.error = f"{item['error']}: {item['message']}"
        return target
    try:
        target.tracker = Tracker(target.pid, item["regions"], checksum=checksum)
    except TargetGone:
        target.error = f"TargetGone: process {target.pid} has exited"
    return target


def _error_of(item: dict[str, Any]) -> errors.GpuksmError:
    kind = getattr(errors, str(item["error"]), errors.GuardError)
    return kind(str(item["message"]))
