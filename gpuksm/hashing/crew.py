"""A few threads that share out numbered pieces of work; kernels in them run without the GIL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


class Crew:
    """`threads` workers, the caller being worker 0; 0 means one per usable CPU."""

    def __init__(self, threads: int = 0) -> None:
        if threads < 0:
            raise ValueError(f"threads must be 0 or more, not {threads}")
        self.threads = threads or usable_cpus()
        self._pool = (
            ThreadPoolExecutor(self.threads - 1, thread_name_prefix="gpuksm") if self.threads > 1 else None
        )

    def run(self, work: Callable[[int, int], None], items: int, workers: int | None = None) -> None:
        """Call work(worker, item) once for each item of range(items), in any order, by at most `workers`.

        One worker never runs two calls at once.  The first exception stops the
        rest and is raised here, after every worker has ended.
        """
        claims = itertools.count()
        stopped = False

        def labour(worker: int) -> None:
            nonlocal stopped
            try:
                # next() on a count is atomic under the GIL.
                while not stopped and (item := next(claims)) < items:
                    work(worker, item)
            except BaseException:
                stopped = True
                raise

        helpers = min(self.threads if workers is None else workers, items) - 1
        futures = [self._pool.submit(labour, worker + 1) for worker in range(helpers)] if self._pool else []
        try:
            labour(0)
        finally:
            stopped_with = [future.exception() for future in futures]
        for error in stopped_with:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
