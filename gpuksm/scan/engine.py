"""What one-shot scans and the daemon share: targets that are attached, and committing a plan.

Nothing here decides when; see `round.py` and `session.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuksm import errors
from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.hashing import select
from gpuksm.hashing.protocol import Hasher
from gpuksm.linux import numa
from gpuksm.scan import asking, nodes
from gpuksm.scan.columns import I64, U64
from gpuksm.scan.commits import Commits
from gpuksm.scan.planner import Plan, make_plan
from gpuksm.scan.requests import Request, requests
from gpuksm.scan.runs import Pages
from gpuksm.scan.tracker import Tracker
from gpuksm.scan.trees import StableTree, no_stable_tree, stable_tree
from gpuksm.scan.types import Progress, ScanOptions, TargetReport, TargetRequest

if TYPE_CHECKING:
    from gpuksm.client import GuardClient

_DRAIN_SECONDS = 1.0  # between two times that pages are taken off the kernel's lists


@dataclass
class Target:
    """One attached target over a scan or a daemon's session."""

    pid: int
    ident: int
    name: str
    tracker: Tracker | None
    skipped: Counter[str]
    error: str | None = None
    refusal: dict[str, Any] | None = None  # what the guard said when it did not attach
    pages_scanned: int = 0
    pages_merged: int = 0
    zero_pages: int = 0
    runs: int = 0
    vmas: int = 0
    unshared: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def followed(self) -> Tracker:
        """Its tracker, of a target that is living."""
        assert self.tracker is not None
        return self.tracker

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


class Engine:
    """Attached targets and the guard connection over which their pages are merged."""

    def __init__(self, client: GuardClient, options: ScanOptions, progress: Progress) -> None:
        self.client = client
        self.options = options
        self.by_node = nodes.wanted(options.merge_across_nodes)
        self.progress = progress
        self.targets: list[Target] = []
        self.pauses_us: list[int] = []
        self.skipped: Counter[str] = Counter()
        self.backend_reason = ""
        self._hasher: Hasher | None = None
        self._stable = no_stable_tree()
        self._generation: int | None = None
        self._drained = 0.0

    @property
    def hasher(self) -> Hasher:
        assert self._hasher is not None
        return self._hasher

    def open_hasher(self, seed: int, work_bytes: int | None = None) -> None:
        """`seed` is the store's own, so that the digests it remembers can be compared with ours.

        `work_bytes` as in `select.create`.
        """
        options = self.options
        self._hasher, self.backend_reason = select.create(
            options.backend, seed, options.threads, options.device, options.gpu_memory, work_bytes
        )

    def close(self) -> None:
        """Give descriptors and threads back."""
        for target in self.targets:
            target.leave()
        if self._hasher is not None:
            self._hasher.close()

    def living(self) -> list[Target]:
        return [target for target in self.targets if target.tracker is not None]

    def ask_attach(self, wanted: Sequence[TargetRequest]) -> dict[str, Any]:
        """The guard's reply to `attach`; takes the scan lock.  Raises GuardError when another has it."""
        return asking.attach(self.client, self.options, wanted)

    def attach(self, wanted: Sequence[TargetRequest]) -> list[Target]:
        """Attach to `wanted` and keep them as targets, with their error those that cannot be."""
        return self.take(self.ask_attach(wanted))

    def take(self, reply: dict[str, Any]) -> list[Target]:
        """Keep what the guard's reply to `attach` tells of as targets."""
        checksum = reply.get("tracking", "write-tracking") == "checksum"
        fresh = [_opened(item, checksum, self.by_node) for item in reply["targets"]]
        self.targets += fresh
        self.pauses_us += [int(pause) for item in reply["targets"] for pause in item.get("pauses_us", ())]
        return fresh

    def arm(self, target: Target) -> U64 | None:
        """Arm `target`; stretches (n, 2) written since the last time, or None when it has exited."""
        payload = asking.arm(self.client, target.ident, self.options.settle_seconds)
        if payload is None:
            target.leave()
            return None
        return np.frombuffer(payload, "<u8").reshape(-1, 2).astype(np.uint64)

    def merge(self, pages: Pages, living: list[Target]) -> int:
        """Plan over the candidates `pages` of `living` and commit; pages merged or given back."""
        before = [target.pages_merged + target.zero_pages for target in living]
        self.skipped.clear()
        plan = self.plan(pages, living, self.stable(), self.budgets(living))
        with Commits() as commits:
            self.commit(plan, living, commits)
            commits.finish()
        return sum(target.pages_merged + target.zero_pages for target in living) - sum(before)

    def plan(self, pages: Pages, living: list[Target], stable: StableTree, budgets: I64) -> Plan:
        """A plan for `pages` of `living`, and what it leaves out."""
        self.progress.update("plan", 0, 0)
        plan = make_plan(pages, stable, budgets, self.hasher.sort)
        for index, target in enumerate(living):
            target.left_out = plan.skipped[index]
            target.unshared = int(plan.unshared[index])
        return plan

    def stable(self) -> StableTree:
        """The stable tree; fetched only when the store has changed."""
        reply, payload = self.client.request("slots", generation=self._generation)
        if reply["extents"] is not None:
            self._stable = stable_tree(int(reply["extents"]), payload, self.by_node)
            self._generation = int(reply["generation"])
        return self._stable

    def merge_across_nodes(self, across: bool) -> None:
        """Tell pages of different nodes apart from now on, or no longer; no digest is known any more."""
        self.by_node = nodes.wanted(across)
        self.options = replace(self.options, merge_across_nodes=across)
        self._generation = None
        for target in self.targets:
            if target.tracker is not None:
                target.tracker.tell_nodes_apart(self.by_node)

    def budgets(self, living: list[Target]) -> I64:
        """How many mappings each target may gain, as the guard says."""
        status, _ = self.client.request("status", budgets=[target.ident for target in living])
        left = {int(item["target"]): item["vma_budget"] or 0 for item in status["targets"]}
        return np.array([max(0, int(left.get(target.ident, 0))) for target in living], np.int64)

    def commit(self, plan: Plan, living: list[Target], commits: Commits) -> None:
        """Have `commits` send the requests of `plan`; its numbers are entered as the guard answers."""
        if time.monotonic() > self._drained + _DRAIN_SECONDS:
            numa.drain_lists()  # or pages seem held; not in the guard, which must not wait for all processors
            self._drained = time.monotonic()
        ids = np.array([target.ident for target in living], np.int64)
        total = int(plan.runs.pages.sum() + plan.zeros.pages.sum())
        done = 0
        for request in requests(plan):
            commits.put(partial(self._send, request, ids, living, done, total))
            done += request.merging_pages

    def _send(self, request: Request, ids: I64, living: list[Target], done: int, total: int) -> None:
        self.progress.update("commit", done, total)
        reply, column = self.client.request(
            "commit",
            request.payload(ids),
            extents=len(request.extents),
            records=len(request.records),
            max_pause_us=self.options.max_pause_us,
        )
        self._account(request, reply, np.frombuffer(column, "<u4"), living)

    def _account(self, request: Request, reply: dict[str, Any], merged: Any, living: list[Target]) -> None:
        self.pauses_us += [int(pause) for pause in reply["pauses_us"]]
        self.skipped.update({str(reason): int(pages) for reason, pages in reply["skipped"].items()})
        of, zero = request.records["target"], request.zero
        mapped = np.bincount(of[~zero], merged[~zero], len(living))
        zeroed = np.bincount(of[zero], merged[zero], len(living))
        runs = np.bincount(of, np.where(merged > 0, request.runs, 0), len(living))
        for index, target in enumerate(living):
            target.pages_merged += int(mapped[index])
            target.zero_pages += int(zeroed[index])
            target.runs += int(runs[index])
            target.vmas = int(reply["vmas"].get(str(target.ident), target.vmas))


def _opened(item: dict[str, Any], checksum: bool, by_node: bool) -> Target:
    """A target as the guard's reply to `attach` describes it."""
    target = Target(
        pid=int(item["pid"]),
        ident=-1 if item["target"] is None else int(item["target"]),
        name=str(item.get("name", "")),
        tracker=None,
        skipped=Counter({str(reason): int(pages) for reason, pages in item.get("skipped", {}).items()}),
    )
    if item["target"] is None:
        target.refusal = item
        target.error = f"{item['error']}: {item['message']}"
        return target
    try:
        merged = item.get("merged", ())
        target.tracker = Tracker(target.pid, item["regions"], merged, checksum=checksum, by_node=by_node)
    except (TargetGone, NotPermitted):
        return target  # it has exited since (its pid may be another's): a normal outcome
    return target


def error_of(item: dict[str, Any]) -> errors.GpuksmError:
    """The error that the guard named when it refused to attach."""
    kind = getattr(errors, str(item["error"]), errors.GuardError)
    return kind(str(item["message"]))
