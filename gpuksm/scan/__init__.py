"""The bulk engine: what a scan or an estimate is asked for, and what it answers.

`run_scan` attaches through the guard, finds calm pages, hashes them, plans and
has the guard commit; `run_estimate` only reads; `run_bench` measures the stages of
a scan.  All load numpy and numba when they are called, not when this package is
imported, so that a command line that only checks its options starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpuksm.scan.types import (
    BenchResult,
    EstimateResult,
    EstimateTarget,
    NoProgress,
    Progress,
    ScanOptions,
    ScanResult,
    Stage,
    TargetReport,
    TargetRequest,
)

# numpy's linear algebra is not used, but starts a thread for each CPU when it is loaded, which
# spins for a while: up to 40 ms of CPU time in each scan.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

__all__ = [
    "BenchResult",
    "EstimateResult",
    "EstimateTarget",
    "NoProgress",
    "Progress",
    "ScanOptions",
    "ScanResult",
    "Stage",
    "TargetReport",
    "TargetRequest",
    "run_bench",
    "run_estimate",
    "run_scan",
]


def load() -> None:
    """Load what scans need, and compile what no earlier process has: some 10 s of processor time then."""
    from gpuksm.scan import attaching  # noqa: F401, first what asks the guard

    from gpuksm.hashing import cpu, sort  # isort: skip
    from gpuksm.hashing.compiled import library
    from gpuksm.scan import columns, round, runs  # noqa: F401

    for kernels in (cpu.KERNELS, sort.KERNELS, columns.COLUMN_KERNELS, runs.KERNELS):
        library(kernels)


def run_scan(
    client: GuardClient, targets: Sequence[TargetRequest], options: ScanOptions, progress: Progress
) -> ScanResult:
    """Run `options.passes` rounds over `targets` and merge what is equal.

    A target that cannot be attached to is reported with its error; when none
    can, the first one's error is raised.  A target that exits is no error.  When
    this fails the connection is closed.
    """
    from gpuksm.scan.attaching import attaching

    with attaching(client, targets, options) as begun:
        if options.hashes_anywhere:
            begun.start()
        from gpuksm.scan.round import run

        return run(client, begun, options, progress)


def run_estimate(
    targets: Sequence[TargetRequest],
    options: ScanOptions,
    progress: Progress,
    *,
    same_layout: bool = False,
) -> EstimateResult:
    """Say what a scan of `targets` would save; attaches to nothing and changes nothing.

    With `same_layout` also what it would save had the processes been started
    with equal address layouts.  Errors of targets as in `run_scan`.
    """
    from gpuksm.scan.estimate import run

    return run(targets, options, progress, same_layout=same_layout)


def run_bench(processes: int, bytes_each: int, options: ScanOptions, progress: Progress) -> BenchResult:
    """Measure the stages of a scan on `processes` helpers of `bytes_each`, with a guard of their own.

    Nothing of it is left behind.  Raises NotEnoughMemory, BackendUnavailable, UsageError,
    GuardError; SIGINT, SIGTERM and SIGHUP end it in order.  For the main thread.
    """
    from gpuksm.scan.stages import run

    return run(processes, bytes_each, options, progress)
