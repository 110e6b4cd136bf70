"""What a scan would save, found by reading alone: no guard, no attach, nothing changed.

Every present anonymous page that its process alone maps is read and hashed, and
the same planner as in a scan lays out what could be merged.  What a scan would
find written meanwhile cannot be known from outside.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpuksm import eligibility
from gpuksm.errors import GpuksmError, NotPermitted, TargetGone
from gpuksm.hashing import select
from gpuksm.hashing.protocol import Hasher
from gpuksm.linux import procfs
from gpuksm.scan.batches import digest_wanted
from gpuksm.scan.columns import I64, PAGE_BYTES
from gpuksm.scan.planner import Plan, make_plan
from gpuksm.scan.runs import VMA_PAGES
from gpuksm.scan.same_layout import same_layout_pages
from gpuksm.scan.tracker import Tracker, gather
from gpuksm.scan.trees import no_stable_tree
from gpuksm.scan.types import EstimateResult, EstimateTarget, Progress, ScanOptions, TargetRequest


@dataclass
class _Subject:
    """One process of the estimate; `tracker` is None where it would be left out."""

    pid: int
    name: str
    tracker: Tracker | None
    skipped: dict[str, int]
    error: str | None
    budget: int = 0


def run(
    targets: Sequence[TargetRequest], options: ScanOptions, progress: Progress, *, same_layout: bool
) -> EstimateResult:
    """See `gpuksm.scan.run_estimate`."""
    began, cpu_began = time.monotonic(), time.process_time()
    hasher, why = select.create(
        options.backend, secrets.randbits(64), options.threads, options.device, options.gpu_memory
    )
    subjects: list[_Subject] = []
    try:
        subjects.extend(_open_all(targets, options, progress))
        living = _look(subjects)
        scanned = digest_wanted(living, hasher, options.batch_pages, progress)
        progress.update("plan", 0, 0)
        plan = _plan(living, subjects, hasher)
        more = same_layout_pages(living, plan, hasher, options.batch_pages, progress) if same_layout else None
        cpu = time.process_time() - cpu_began
        return _result(subjects, scanned, plan, more, hasher, why, time.monotonic() - began, cpu)
    finally:
        for subject in subjects:
            if subject.tracker is not None:
                subject.tracker.close()
        hasher.close()


def _open_all(targets: Sequence[TargetRequest], options: ScanOptions, progress: Progress) -> list[_Subject]:
    """Look every target up; raises the first one's error when none can be read."""
    subjects = []
    errors: list[GpuksmError] = []
    for number, target in enumerate(targets):
        progress.update("look", number, len(targets))
        error = eligibility.process_reason(target.pid, named=target.named, allowed=options.allowed)
        subject = _Subject(target.pid, "", None, {}, None)
        try:
            subject.name = procfs.stat(target.pid).comm
            if error is None:
                found, subject.skipped = eligibility.regions(target.pid, target.ranges, tracked=True)
                subject.budget = procfs.max_map_count() // 2 - len(procfs.maps(target.pid))
                subject.tracker = Tracker(target.pid, found, passive=True)
        except (TargetGone, NotPermitted) as trouble:
            error = error or trouble
        if error is not None:
            errors.append(error)
            subject.error = f"{type(error).__name__}: {error}"
        subjects.append(subject)
    if errors and len(errors) == len(subjects):
        raise errors[0]
    return subjects


def _look(subjects: list[_Subject]) -> list[Tracker]:
    living = []
    for subject in subjects:
        if subject.tracker is not None:
            try:
                subject.tracker.look()
            except TargetGone:
                subject.tracker.close()
                subject.tracker = None
                continue
            living.append(subject.tracker)
    return living


def _plan(living: list[Tracker], subjects: list[_Subject], hasher: Hasher) -> Plan:
    budgets = [max(0, subject.budget) for subject in subjects if subject.tracker is not None]
    return make_plan(gather(living), no_stable_tree(), np.array(budgets, np.int64), hasher.sort)


def _per_target(plan: Plan, targets: int) -> tuple[I64, I64, I64]:
    """(pages mapped, zero pages, runs) of every target."""
    of_run = plan.pages.target[plan.runs.first]
    of_zero = plan.pages.target[plan.zeros.first]
    return (
        np.bincount(of_run, plan.runs.pages, targets).astype(np.int64),
        np.bincount(of_zero, plan.zeros.pages, targets).astype(np.int64),
        np.bincount(of_run, minlength=targets),
    )


def _result(
    subjects: list[_Subject],
    scanned: dict[int, int],
    plan: Plan,
    more: int | None,
    hasher: Hasher,
    why: str,
    seconds: float,
    cpu: float,
) -> EstimateResult:
    living = sum(subject.tracker is not None for subject in subjects)
    mapped, zeros, runs = _per_target(plan, living)
    reports = []
    at = 0
    for subject in subjects:
        if subject.tracker is None:
            reports.append(
                EstimateTarget(subject.pid, subject.name, 0, 0, 0, 0, 0, 0, subject.skipped, subject.error)
            )
            continue
        skipped = Counter(subject.skipped)
        skipped.update(plan.skipped[at])
        reports.append(
            EstimateTarget(
                pid=subject.pid,
                name=subject.name,
                pages_scanned=scanned[subject.pid],
                pages_mergeable=int(mapped[at]),
                zero_pages=int(zeros[at]),
                pages_unshared=int(plan.unshared[at]),
                runs=int(runs[at]),
                vmas=2 * int(runs[at]),
                skipped=dict(skipped),
                error=None,
            )
        )
        at += 1
    slots, pages = int(plan.lot_pages.sum()), int(mapped.sum())
    overhead = 2 * VMA_PAGES * len(plan.runs)
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.skipped)
    return EstimateResult(
        pages_scanned=sum(report.pages_scanned for report in reports),
        pages_mergeable=pages,
        pages_shared=slots,
        pages_sharing=pages - slots,
        pages_unshared=int(plan.unshared.sum()),
        pages_skipped=total.total(),
        zero_pages=int(zeros.sum()),
        runs=len(plan.runs),
        vmas=2 * len(plan.runs),
        bytes_saved=int((pages - slots + int(zeros.sum()) - overhead) * PAGE_BYTES),
        same_layout_pages=more,
        same_layout_bytes=None if more is None else more * PAGE_BYTES,
        seconds=seconds,
        cpu_seconds=cpu,
        backend=hasher.name,
        backend_reason=why,
        skipped=dict(total),
        targets=tuple(reports),
    )
