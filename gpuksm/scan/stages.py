"""What the stages of a scan reach on this machine: read, hash, sort, fill, compare, commit, unmerge.

Each is timed by itself, on the code that a scan runs: `LivePages` reads, the backend's
`Hasher` hashes and sorts, the planner plans, and the guard gets the requests that a
scan would send.  Only one thing is different: what fills slots is sent apart
from what is compared with them, so that the two can be told apart.

A commit request's time is split by the guard's own account: while a target is stopped
(`pauses_us`) the guard commits, the rest of the time it fills or compares.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuksm import wire
from gpuksm.errors import GuardError, NotEnoughMemory
from gpuksm.hashing.cpu import readers
from gpuksm.hashing.crew import Crew
from gpuksm.hashing.protocol import PAGE_BYTES, Hasher
from gpuksm.hashing.source import ArraySource
from gpuksm.linux import procfs
from gpuksm.scan.batches import digest
from gpuksm.scan.columns import I64, U64, pages_of
from gpuksm.scan.engine import Engine, Target, error_of
from gpuksm.scan.reader import LivePages
from gpuksm.scan.requests import Request, requests
from gpuksm.scan.tracker import Tracker, gather
from gpuksm.scan.trial import Area, Helper, Trial, trial
from gpuksm.scan.types import BenchResult, Progress, ScanOptions, Stage

REPEATS = 3
_CHUNK_PAGES = 128  # read at once, as the CPU backend does
_SORT_DIGESTS = 1 << 21
# Pages that are mapped one by one: a share of all, and never so many that mappings run out.
_TURNED_SHARE, _MAX_TURNED_BYTES = 8, 16 << 20
_SPARE_BYTES = 256 << 20  # interpreters, compiled code, digests

Sample = tuple[float, float]  # amount, seconds


@dataclass
class _Samples:
    """What the repeats of every stage gave, in the order in which stages are shown."""

    progress: Progress
    found: dict[tuple[str, str, str], list[Sample]] = field(default_factory=dict)

    def repeat(self, stage: str, what: str, unit: str, amount: float, work: Callable[[], object]) -> None:
        """Time `work` on `amount` of `unit`, after a first time that warms up."""
        samples = self.found.setdefault((stage, what, unit), [])
        work()
        for number in range(REPEATS):
            self.progress.update(stage, number, REPEATS)
            began = time.perf_counter()
            work()
            samples.append((amount, time.perf_counter() - began))

    def add(self, stage: str, what: str, unit: str, amount: float, seconds: float) -> None:
        """Enter one sample; nothing done in no time says nothing."""
        if amount and seconds > 0:
            self.found.setdefault((stage, what, unit), []).append((amount, seconds))

    def stages(self) -> tuple[Stage, ...]:
        """Medians."""
        return tuple(
            Stage(
                stage,
                what,
                int(statistics.median(amount for amount, _ in samples)),
                unit,
                statistics.median(seconds for _, seconds in samples),
                statistics.median(amount / seconds for amount, seconds in samples),
            )
            for (stage, what, unit), samples in self.found.items()
        )


def run(processes: int, bytes_each: int, options: ScanOptions, progress: Progress) -> BenchResult:
    """See `gpuksm.scan.run_bench`."""
    needed = (processes + 2) * bytes_each + _SPARE_BYTES
    free = procfs.available_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"{processes} processes of {bytes_each >> 20} MiB need {needed >> 20} MiB in all, "
            f"and only {free >> 20} MiB are available; try a smaller --size"
        )
    began = time.monotonic()
    samples = _Samples(progress)
    turned = min(bytes_each // _TURNED_SHARE, _MAX_TURNED_BYTES)
    progress.update("start", 0, 0)
    with trial(processes, bytes_each - turned, turned) as tried:
        engine = Engine(tried.guard, options, progress)
        try:
            engine.open_hasher(int(tried.guard.request("hello")[0]["seed"]))
            threads = _measure_pages(tried.helpers, engine.hasher, options.threads, samples)
            _Merging(tried, engine, samples).run()
            backend, reason = engine.hasher.name, engine.backend_reason
        finally:
            engine.close()
    seconds = time.monotonic() - began
    stages = samples.stages()
    return BenchResult(processes, bytes_each, REPEATS, threads, seconds, backend, reason, stages)


# -- read, hash, sort ----------------------------------------------------------------


def _measure_pages(helpers: Sequence[Helper], hasher: Hasher, threads: int, samples: _Samples) -> int:
    """Time the stages that only look; how many threads read."""
    source = LivePages([(helper.pid, _addresses(helper.straight)) for helper in helpers])
    size = source.pages * PAGE_BYTES
    digests, kinds = np.empty(source.pages, np.uint64), np.empty(source.pages, np.uint8)
    crew = Crew(readers(threads))
    try:
        samples.repeat("read", "other processes' pages", "bytes", size, lambda: _read_all(source, crew))
        mine = _copied(helpers[0])
        here = ArraySource(mine)
        part = slice(here.pages)
        samples.repeat(
            "hash",
            "pages in memory here",
            "bytes",
            mine.nbytes,
            lambda: hasher.digest(here, digests[part], kinds[part]),
        )
        samples.repeat(
            "read and hash",
            "other processes' pages",
            "bytes",
            size,
            lambda: hasher.digest(source, digests, kinds),
        )
        keys = np.random.default_rng(1).integers(0, 1 << 64, _SORT_DIGESTS, np.uint64)
        samples.repeat("sort", "random digests", "digests", len(keys), lambda: hasher.sort(keys))
    finally:
        source.close()
        crew.close()
    return crew.threads


def _addresses(area: Area) -> U64:
    return pages_of(*np.array([[area.start], [area.end]], np.uint64))


def _read_all(source: LivePages, crew: Crew) -> None:
    staging = [np.empty(_CHUNK_PAGES * PAGE_BYTES, np.uint8) for _ in range(crew.threads)]
    readable = [np.empty(_CHUNK_PAGES, np.bool_) for _ in range(crew.threads)]

    def chunk(worker: int, item: int) -> None:
        first = item * _CHUNK_PAGES
        source.read(first, min(_CHUNK_PAGES, source.pages - first), staging[worker], readable[worker])

    crew.run(chunk, -(-source.pages // _CHUNK_PAGES))


def _copied(helper: Helper) -> NDArray[np.uint8]:
    """The pages of a helper, in this process."""
    source = LivePages([(helper.pid, _addresses(helper.straight))])
    octets = np.empty(source.pages * PAGE_BYTES, np.uint8)
    try:
        source.read(0, source.pages, octets, np.empty(source.pages, np.bool_))
    finally:
        source.close()
    return octets


# -- fill, compare, commit -----------------------------------------------------------


@dataclass
class _Sent:
    """What the guard did of some requests: pages merged, seconds in all and with a target stopped."""

    pages: int = 0
    seconds: float = 0.0
    stopped: float = 0.0


class _Merging:
    """Merges the helpers' memory and gives it back, again and again."""

    def __init__(self, tried: Trial, engine: Engine, samples: _Samples) -> None:
        self._helpers, self._guard = tried.helpers, tried.guard
        self._engine, self._samples = engine, samples

    def run(self) -> None:
        """All repeats; GuardError when nothing could be merged in any of them."""
        for number in range(REPEATS):
            self._samples.progress.update("merge", number, REPEATS)
            targets = self._attach()
            self._merge_straight(targets)
            self._merge_turned(targets)
            self._unmerge()
            for target in targets:
                target.leave()
                self._engine.targets.remove(target)
        done = {stage for stage, _, _ in self._samples.found}
        if not {"fill", "compare", "commit"} <= done:
            raise GuardError("the guard could not stop the helper processes in time; try when less runs here")

    def _unmerge(self) -> None:
        """Give everything back; the guard lets go what it unmerges."""
        began = time.perf_counter()
        pause_us = self._engine.options.max_pause_us
        reply, _ = self._guard.request("unmerge", pids=None, max_pause_us=pause_us)
        self._samples.add("unmerge", "all of these", "pages", reply["pages"], time.perf_counter() - began)

    def _attach(self) -> list[Target]:
        """Attach to all helpers, arm them, and hash what is calm."""
        targets = self._engine.attach([helper.request for helper in self._helpers])
        wanted = []
        for target in targets:
            if target.refusal is not None:
                raise error_of(target.refusal)
            tracker = target.followed()
            self._guard.request("arm", target=target.ident)
            tracker.look()
            wanted.append((tracker, tracker.wanted()))
        digest(wanted, self._engine.hasher, self._engine.options.batch_pages, _quiet)
        return targets

    def _merge_straight(self, targets: list[Target]) -> None:
        areas = [helper.straight for helper in self._helpers]
        filled = self._send(targets, areas, _only_fills)
        compared = self._send(targets, areas, _as_it_is)
        for stage, what, sent in (
            ("fill", "slots of the store", filled),
            ("compare", "pages with their slots", compared),
        ):
            self._samples.add(stage, what, "bytes", sent.pages * PAGE_BYTES, sent.seconds - sent.stopped)
        pages, stopped = filled.pages + compared.pages, filled.stopped + compared.stopped
        self._samples.add("commit", "long runs", "pages", pages, stopped)

    def _merge_turned(self, targets: list[Target]) -> None:
        areas = [helper.turned for helper in self._helpers]
        self._send(targets, areas, _only_fills)
        sent = self._send(targets, areas, _as_it_is)
        self._samples.add("commit", "single pages", "pages", sent.pages, sent.stopped)

    def _send(self, targets: list[Target], areas: list[Area], chosen: Callable[[Request], Request]) -> _Sent:
        """Plan what of the areas is still private, and have the guard do what of it is `chosen`."""
        trackers = [target.followed() for target in targets]
        candidates = [_inside(tracker, area) for tracker, area in zip(trackers, areas, strict=True)]
        stable, budgets = self._engine.stable(), self._engine.budgets(targets)
        plan = self._engine.plan(gather(trackers, candidates), targets, stable, budgets)
        ids = np.array([target.ident for target in targets], np.int64)
        sent = _Sent()
        for request in _nonempty(map(chosen, requests(plan))):
            payload = request.payload(ids)
            began = time.perf_counter()
            reply, column = self._guard.request(
                "commit",
                payload,
                extents=len(request.extents),
                records=len(request.records),
                max_pause_us=self._engine.options.max_pause_us,
            )
            sent.seconds += time.perf_counter() - began
            sent.stopped += sum(reply["pauses_us"]) / 1e6
            sent.pages += int(np.frombuffer(column, "<u4").sum())
        return sent


def _quiet(_stage: str, _done: int, _total: int) -> None:
    """Progress of something that is not shown."""


def _inside(tracker: Tracker, area: Area) -> I64:
    """Pages of the area that are calm now and have a digest."""
    tracker.prune()
    columns = tracker.columns
    first, end = columns.address.find(np.array(area, np.uint64)).tolist()
    found: I64 = np.flatnonzero(columns.known(slice(first, end))) + first
    return found


def _only_fills(request: Request) -> Request:
    return request.only(request.records["op"] == wire.OP_FILL)


def _as_it_is(request: Request) -> Request:
    return request


def _nonempty(sent: Iterator[Request]) -> Iterator[Request]:
    return (request for request in sent if len(request.records))
