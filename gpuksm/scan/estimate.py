"""What a scan would save, found by reading alone: no guard, no attach, nothing changed.

Every present anonymous page that its process alone maps is read and hashed, and
the same planner as in a scan lays out what could be merged.  What a scan would
find written meanwhile cannot be known from outside.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gpuksm import eligibility
from gpuksm.errors import GpuksmError, NotPermitted, TargetGone
from gpuksm.hashing import select
from gpuksm.hashing.compiled import library
from gpuksm.hashing.protocol import Hasher
from gpuksm.hashing.sort import KERNELS as SORT_KERNELS
from gpuksm.linux import mappings, page_references, procfs
from gpuksm.scan import nodes
from gpuksm.scan.columns import COLUMN_KERNELS, I64, PAGE_BYTES
from gpuksm.scan.equals import Repeats
from gpuksm.scan.planner import Plan, make_plan
from gpuksm.scan.runs import KERNELS as LAYOUT_KERNELS
from gpuksm.scan.runs import VMA_PAGES
from gpuksm.scan.same_layout import same_layout_pages
from gpuksm.scan.survey import Lookout, Survey, survey
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.trees import no_stable_tree
from gpuksm.scan.types import EstimateResult, EstimateTarget, Progress, ScanOptions, TargetRequest


@dataclass
class _Subject:
    """One process of the estimate; `tracker` is None where it would be left out."""

    pid: int
    name: str
    tracker: Tracker | None
    skipped: dict[str, int]
    reason: GpuksmError | None
    budget: int = 0
    resident: int = 0

    @property
    def error(self) -> str | None:
        return f"{type(self.reason).__name__}: {self.reason}" if self.reason else None


def run(
    targets: Sequence[TargetRequest], options: ScanOptions, progress: Progress, *, same_layout: bool
) -> EstimateResult:
    """See `gpuksm.scan.run_estimate`."""
    began, cpu_began = time.monotonic(), time.process_time()
    by_node = nodes.wanted(options.merge_across_nodes)
    subjects: list[_Subject] = []
    resident = procfs.resident_bytes(target.pid for target in targets)
    with ThreadPoolExecutor(1) as pool:
        # Loading the backend takes as long as looking the first targets up, which the lookout does meanwhile.
        making = pool.submit(
            select.create,
            options.backend,
            secrets.randbits(64),
            options.threads,
            options.device,
            options.gpu_memory,
            resident,
        )
        try:
            opened = _opened(targets, options, by_node, progress, subjects)
            with Lookout(opened, options.batch_pages) as lookout:
                hasher, why = making.result()
                pool.submit(_load_planner)
                # The same layout is looked for among what has no equal as well.
                repeats = None if same_layout else Repeats(resident // PAGE_BYTES, no_stable_tree().digest)
                found = survey(
                    lookout,
                    hasher,
                    options.batch_pages,
                    progress,
                    lambda: sum(each.resident for each in subjects),
                    repeats,
                )
            living = [subject.tracker for subject in subjects if subject.tracker is not None]
            reasons = [subject.reason for subject in subjects if subject.reason is not None]
            if reasons and len(reasons) == len(subjects):
                raise reasons[0]
            progress.update("plan", 0, 0)
            plan = make_plan(found.pages, no_stable_tree(), _budgets(subjects), hasher.sort)
            more = (
                same_layout_pages(living, plan, hasher, options.batch_pages, progress)
                if same_layout
                else None
            )
            cpu = time.process_time() - cpu_began
            return _result(subjects, found, plan, more, hasher, why, time.monotonic() - began, cpu)
        finally:
            for subject in subjects:
                if subject.tracker is not None:
                    subject.tracker.close()
            if making.exception() is None:
                making.result()[0].close()


def _load_planner() -> None:
    """Load the machine code that planning needs, while memory is read."""
    for kernels in (SORT_KERNELS, COLUMN_KERNELS, LAYOUT_KERNELS):
        library(kernels)


def _opened(
    targets: Sequence[TargetRequest],
    options: ScanOptions,
    by_node: bool,
    progress: Progress,
    subjects: list[_Subject],
) -> Iterator[Tracker]:
    """Look one target up after the other and append it to `subjects`; those that can be read."""
    for number, target in enumerate(targets):
        progress.update("look", number, len(targets))
        subject = _Subject(target.pid, "", None, {}, None)
        error = eligibility.process_reason(
            target.pid, named=target.named, allowed=options.allowed, can_look=page_references.can_look
        )
        try:
            subject.name = procfs.stat(target.pid).comm
            if error is None:
                found, subject.skipped = eligibility.regions(
                    target.pid, target.ranges, tracked=True, allowed=options.allowed
                )
                subject.budget = procfs.max_map_count() // 2 - len(mappings.maps(target.pid))
                subject.resident = procfs.resident_size(target.pid)
                subject.tracker = Tracker(target.pid, found, passive=True, by_node=by_node)
        except (TargetGone, NotPermitted) as trouble:
            error = error or trouble
        subject.reason = error
        subjects.append(subject)
        if subject.tracker is not None:
            yield subject.tracker


def _budgets(subjects: list[_Subject]) -> I64:
    """Mappings that each target that can be read may gain."""
    return np.array([max(0, subject.budget) for subject in subjects if subject.tracker is not None], np.int64)


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
    found: Survey,
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
                pages_scanned=found.scanned[at],
                pages_mergeable=int(mapped[at]),
                zero_pages=int(zeros[at]),
                pages_unshared=int(plan.unshared[at]) + found.alone[at],
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
        pages_unshared=int(plan.unshared.sum()) + sum(found.alone),
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
