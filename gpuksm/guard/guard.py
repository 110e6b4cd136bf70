"""The guard's state and everything a request or an event can ask of it.

One `Guard` per process; `server.py` drives it.  It is the host of the event
handlers (`events.Host`) and owns store, journal and targets.  Nothing here may
block for long: while one target is worked on, `breathe` serves the events of the
others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from gpuksm import eligibility, writers
from gpuksm.errors import GpuksmError, TargetGone, Unsupported
from gpuksm.guard import (
    adoption,
    arch,
    callers,
    children,
    events,
    faults,
    journal,
    plan,
    reclaim,
    tracking,
    unmerging,
)
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.attach import attach
from gpuksm.guard.attic import Attic
from gpuksm.guard.commit import vma_budget
from gpuksm.guard.comparers import Comparers
from gpuksm.guard.freeze import Freeze, FreezeFailed, ProcessCensus, release_stragglers
from gpuksm.guard.keeping import Keeping
from gpuksm.guard.leftovers import unmap_leftovers
from gpuksm.guard.pace import Pace
from gpuksm.guard.pins import Pins
from gpuksm.guard.registry import Registry
from gpuksm.guard.sandbox import MUZZLED
from gpuksm.guard.store import NOBODY, Store
from gpuksm.guard.target import Target
from gpuksm.guard.tether import Tether
from gpuksm.guard.urgency import urgent
from gpuksm.linux import census, probe, procfs, uffd

# Between two looks at which processes have ended all but the agent, which keeps them from being gone.
_SWEEP_SECONDS = 0.1
# Between two looks at whose events wait, in the midst of something long: it takes 0.1 ms with 200 targets.
_ASK_SECONDS = 0.0003


class Guard:
    """Targets, store and ledger of one security domain."""

    def __init__(self, keeping: Keeping, store: Store, log: journal.Journal, attic: Attic) -> None:
        self.keep = keeping.keep  # keep(tag, fd): the keeper holds a duplicate; keep(tag, None): lets it go
        self._keeping = keeping
        self.store = store
        self.store_born = 0
        self.seed = 0  # of the scanner's digests: random for each store, so nobody can prepare collisions
        self.journal = log
        self.attic = attic
        self.targets: dict[int, Target] = {}
        self.registry = Registry(log)
        self.event_counts: dict[str, int] = {}
        self.pauses_us: list[int] = []
        self.census = ProcessCensus()
        self.pace = Pace()
        self.orphans: list[children.Orphan] = []
        self.privileged = probe.has_fork_events()
        self.tether = Tether(self)
        self.comparers = Comparers(store)
        self.pins = Pins()
        self._next_target = 1
        self.reclaimer = reclaim.Reclaimer(store)
        self._remerged = 0  # pages that were mapped over merged ones
        self._serving = False
        self._swept = self._asked = 0.0

    # -- targets -----------------------------------------------------------------

    def find(self, pid: int) -> Target | None:
        """The target with this pid, or None."""
        for target in self.targets.values():
            if target.pid == pid:
                return target
        return None

    def target(self, number: Any) -> Target:
        """The target with this id; TargetGone when there is none any more."""
        found = self.targets.get(number) if isinstance(number, int) else None
        if found is None:
            raise TargetGone(f"target {number} is gone")
        return found

    def attach(
        self, pid: int, ranges: list[tuple[int, int]] | None, *, named: bool, options: dict[str, Any]
    ) -> tuple[Target, list[eligibility.Region], dict[str, int]]:
        """Make process `pid` a target (or refresh it); its regions, and pages left out by reason.

        Raises the class that says why not: NoSuchProcess, NotPermitted, Unsupported...
        """
        target = self.find(pid)
        if target is not None and not target.has_agent():
            self.drop(target)
            target = None
        allowed = writers.Allowed(*(bool(options.get(name)) for name in writers.Allowed._fields))
        if target is None:
            target = adoption.take_over(self, pid)
        if target is None:
            reason = eligibility.process_reason(
                pid, named=named, allowed=allowed, can_look=self.pins.can_look
            )
            if reason is not None:
                raise reason
            self._check_domain(pid)
            target = self._attach(pid, allowed.seccomp)
        elif target.link.agent.muzzled():
            raise Unsupported(f"process {pid} {MUZZLED}")
        elif (reason := writers.writer_reason(pid, allowed, self.pins.can_look)) is not None:
            raise reason  # what is merged stays so: a device that pins such a page gets a copy
        target.allowed = allowed
        try:
            with self.frozen(target):
                pass  # applies pending events, so that tracking starts from a true ledger
        except (FreezeFailed, AgentStuck) as error:
            raise Unsupported(f"{error}; try again later") from None
        return target, *tracking.begin(target, self.journal, self.breathe, ranges)

    def _check_domain(self, pid: int) -> None:
        """Refuse a process whose user may not read what the store holds: its agent would let it."""
        user = procfs.user(pid)
        users = self.store.users() | {target.user for target in self.targets.values()}
        others = users - {user, NOBODY}
        if others:
            raise Unsupported(
                f"process {pid} belongs to uid {user}, and this guard holds memory of uid {min(others)}: "
                "merge it with another GPUKSM_RUNTIME_DIR, or as its user"
            )

    def _attach(self, pid: int, allow_seccomp: bool) -> Target:
        tethered: set[int] = set()
        kinds: dict[str, Any] = {"fork_events": self.privileged, "tethered": tethered}
        kinds["believed"] = None if allow_seccomp else 0
        try:
            link = _retry(lambda: attach(pid, self.gifts(), self.census, **kinds))
        except ProcessLookupError:
            raise TargetGone(f"process {pid} has exited") from None
        except (FreezeFailed, AgentStuck) as error:
            raise Unsupported(f"{error}; try again later") from None
        try:
            target = Target.open(self._next_target, pid, link)
        except GpuksmError:
            link.close()
            raise
        with contextlib.suppress(OSError, TargetGone, AgentStuck):
            unmap_leftovers(link, target.memory)
        self.adopt(target)
        self.pauses_us.append(link.pause_us)
        if not self.privileged:
            self.tether.hold(target)
        return target

    def adopt(self, target: Target) -> None:
        """Take a new target into the books, and let the keeper hold its userfaultfds."""
        self._next_target = max(self._next_target, target.id + 1)
        self.targets[target.id] = target
        self.journal.append(journal.TARGET, target.id, target.pid, target.start_time, target.link.code)
        if target.coredump_filter is not None:
            self.journal.append(journal.COREDUMP, target.id, target.coredump_filter)
        if target.link.agent.filters:
            self.journal.append(journal.FILTERS, target.id, target.link.agent.filters)
        for start, end, bits in target.advice:
            self.journal.append(journal.ADVICE, target.id, start, end, bits)
        self.keep(f"track:{target.id}", target.link.uffd_track)
        self.keep(f"event:{target.id}", target.link.uffd_event)
        self.keep(f"word:{target.id}", target.link.agent.word)
        with contextlib.suppress(TargetGone):
            target.link.stay(target.id)
        if target.link.agent.tid:
            self.attic.remove(target.id)
        else:
            self.attic.put(target.id, target.link.uffd_event)

    def gifts(self) -> tuple[int, ...]:
        """What each agent holds for our successor: store and ledger, read-only, and the attic."""
        return self.store.read_only, self.journal.read_only, self.attic.sending, self.attic.receiving

    def reserve_ids(self, highest: int) -> None:
        """Never hand out ids up to `highest` again (takeover)."""
        self._next_target = max(self._next_target, highest + 1)

    def vma_budget(self, target: Target) -> int:
        """VMAs that merging may still add to `target`; 0 when it is gone."""
        return max(0, _budget(target.pid) or 0)

    def new_id(self) -> int:
        self._next_target += 1
        return self._next_target - 1

    def drop(self, target: Target) -> None:
        """Forget a target that has exited, called exec, or has nothing merged any more.

        One that only seemed to be gone stays: without us its MADV_DONTNEED would show old bytes.
        """
        if target.runs.pages and _lives(target):
            return
        if self.targets.pop(target.id, None) is None:
            return
        self.tether.release(target)
        target.restore_core_dumps()
        self.keep(f"track:{target.id}", None)
        self.keep(f"event:{target.id}", None)
        target.close()
        self.keep(f"word:{target.id}", None)
        self.attic.remove(target.id)
        self.journal.append(journal.GONE, target.id)
        self.census.forget(target.pid)
        if target.runs.pages:
            self.reclaimer.soon()

    # -- freezing ------------------------------------------------------------------

    @contextlib.contextmanager
    def frozen(self, target: Target, attempts: int = 6) -> Iterator[Freeze]:
        """Freeze `target` with all pending events applied; thaws, except while its agent is stuck.

        A busy machine may not let every thread stop within the deadline; the target
        runs on between `attempts`.
        """
        with urgent(target.pid, target.link.agent.tid):
            freeze = self._freeze(target, attempts)
            try:
                yield freeze
            except AgentStuck:
                target.parked = freeze
                raise
            finally:
                if target.parked is not freeze:
                    freeze.thaw()

    def _freeze(self, target: Target, attempts: int) -> Freeze:
        for attempt in range(attempts):
            freeze = target.freeze()
            try:
                self._complete(target, freeze)
                return freeze
            except FreezeFailed:
                if attempt + 1 == attempts:
                    raise
            except AgentStuck:
                target.parked = freeze
                raise
            self.breathe()
            time.sleep(0.002 * 2**attempt)
        raise AssertionError

    def _complete(self, target: Target, freeze: Freeze) -> None:
        """Stop every thread of `target`, its agent being there; thawed when that fails."""
        if target.parked is not None:
            raise FreezeFailed(f"process {target.pid} is stopped; waiting for SIGCONT")
        try:
            self._check_agent(target)
            freeze.complete(lambda: events.pump(self, target, freeze))
            self._check_agent(target)
            freeze.check_unshared(self.census)
            events.pump(self, target, freeze)
        except AgentStuck:
            raise
        except BaseException:
            freeze.thaw()
            raise

    @staticmethod
    def _check_agent(target: Target) -> None:
        if not target.has_agent():
            raise TargetGone(f"process {target.pid} has exited or started another program")

    def serve_events(self, target: Target) -> None:
        """Handle the events that wait on `target`."""
        try:
            if target.parked is None:
                self._check_agent(target)
                events.serve_still(self, target)
                if not callers.readable(target.link.uffd_event):
                    return
            with self.frozen(target, attempts=1):
                pass
        except FreezeFailed:
            self._serve_unfrozen(target)
        except (TargetGone, ProcessLookupError):
            self.drop(target)
        except AgentStuck:
            return

    def _serve_unfrozen(self, target: Target) -> None:
        """Zeros first, then read, is right without a freeze when the waiting thread is seen (hazard 18)."""
        if target.parked is not None:
            return
        freeze = target.freeze()
        try:
            with contextlib.suppress(AgentStuck, TargetGone, FreezeFailed):
                events.pump(self, target, freeze)
        finally:
            freeze.thaw()

    def breathe(self, *, at_once: bool = False) -> None:
        """Serve what cannot wait, between two steps of something long.

        Events are asked for now and then only, unless `at_once`.
        """
        if self._serving:
            return
        self._serving = True
        try:
            if at_once or time.monotonic() > self._asked + _ASK_SECONDS:
                self._serve_waiting()
                self.tether.serve()
                self._asked = time.monotonic()
            adoption.adopt_orphans(self)
        finally:
            self._serving = False

    def _serve_waiting(self) -> None:
        waiting = callers.readable_of(target.link.uffd_event for target in self.targets.values())
        for target in [other for other in self.targets.values() if other.link.uffd_event in waiting]:
            if target.id in self.targets:  # serving another may have dropped it
                self.serve_events(target)

    def read_event(self, uffd_event: int, number: int, calls: Iterable[callers.Call]) -> uffd.Event | None:
        """The next event of target `number`, whose threads wait in `calls`; a fork's by way of the keeper."""
        if any(call in arch.current().NR.FORKS for call, _ in calls):
            return self._keeping.read_event(uffd_event, number, self.new_id(), self.attic)
        return uffd.read_event(uffd_event)

    def held_as(self, fd: int) -> int | None:
        """The number under which the keeper holds the userfaultfd `fd` already, or None."""
        return self._keeping.number_of(fd)

    def forked(self, parent: Target, uffd_event: int, freeze: Freeze, held: list[int]) -> None:
        """events.Host: remember the child; it is adopted as soon as the parent runs again."""
        filters = parent.link.agent.filters
        has = children.Inherited(set(parent.borders), parent.coredump_filter, list(parent.advice), filters)
        orphan = children.forked(self, parent.id, uffd_event, has)
        self.orphans.append(orphan)  # whatever fails from here on, it is served
        faults.point("fork-read")
        orphan.pid = children.pid_of_fork(parent, freeze, held)
        if orphan.pid is not None:
            with contextlib.suppress(TargetGone):  # a successor need not search for it
                started = procfs.stat(orphan.pid).start_time
                self.journal.append(journal.TARGET, orphan.id, orphan.pid, started)
                self.journal.append(journal.FILTERS, orphan.id, filters)

    # -- requests --------------------------------------------------------------------

    def arm(
        self, target: Target, ranges: list[tuple[int, int]] | None, calm_seconds: float
    ) -> tracking.Armed:
        """Re-arm write tracking; see tracking.py.  Nothing is merged for `calm_seconds`.  TargetGone."""
        try:
            armed = tracking.arm(target, self.breathe, ranges)
            target.calm_from = time.monotonic() + calm_seconds
            return armed
        except ProcessLookupError:
            self.drop(target)
            raise TargetGone(f"process {target.pid} has exited") from None

    def commit(
        self, extents: int, records: int, payload: bytes | bytearray, max_pause_us: int
    ) -> plan.Result:
        """Fill, verify and commit a plan; see plan.py."""
        result = plan.execute(self, extents, records, payload, max_pause_us)
        self._remerged += result.outcome.remerged_pages
        return result

    def unmerge(self, pids: list[int] | None, max_pause_us: int) -> unmerging.Unmerged:
        """Unmerge targets (None: all); see unmerging.py."""
        return unmerging.unmerge(self, pids, max_pause_us)

    def release_idle(self) -> None:
        """Leave targets in which nothing is merged (after a scan)."""
        unmerging.leave_idle(self)

    def status(self, budgets: Container[int] | None = None) -> dict[str, Any]:
        """What `gpuksm status` shows; `budgets`: ids of the targets whose VMAs are counted, all when None."""
        return {
            "targets": [
                {
                    "pid": target.pid,
                    "name": target.name,
                    "target": target.id,
                    "merged_pages": target.runs.pages,
                    "runs": len(target.runs),
                    "vma_budget": _budget(target.pid) if budgets is None or target.id in budgets else None,
                    "stopped": target.parked is not None,
                }
                for target in self.targets.values()
            ],
            "comparers": self.comparers.pids,
            "store_slots": self.store.slots(),
            "store_bytes": self.store.used_bytes(),
            "registered": self.registry.listed(),
            "events": dict(self.event_counts),
            "pauses_us": self.pauses_us[-10000:],
        }

    # -- housekeeping ------------------------------------------------------------------

    def tick(self) -> None:
        """Things that are due now and then: parked targets, stragglers, orphans, empty slots."""
        release_stragglers()
        # Reading of hundreds of processes whether they live takes longer than most requests.
        due = time.monotonic() > self._swept + _SWEEP_SECONDS
        for target in list(self.targets.values()):
            if target.parked is not None and target.link.agent.settled():
                target.parked.thaw()
                target.parked = None
            elif due and _only_agent_left(target):
                self.drop(target)  # the agent ends and with it the process (hazard 22)
        if due:
            self._swept = time.monotonic()
        adoption.adopt_orphans(self)
        happened = self._remerged + sum(self.event_counts.values())
        self.reclaimer.tick(self.store_born, happened, self._ledger, self.breathe)

    def _ledger(self) -> list[tuple[int, int]] | None:
        if self.orphans:
            return None
        return [(run.slot, run.slot_end) for target in self.targets.values() for run in target.runs]

    @property
    def busy(self) -> bool:
        """True while the guard has a reason to live."""
        return bool(
            self.orphans
            or not release_stragglers()
            or self.registry.listed()
            or any(target.runs.pages or target.parked for target in self.targets.values())
        )


def _retry(call: Callable[[], Any]) -> Any:
    for attempt in range(5):
        try:
            return call()
        except FreezeFailed:
            if attempt == 4:
                raise
            time.sleep(0.02 * (attempt + 1))
    raise AssertionError


def _budget(pid: int) -> int | None:
    try:
        return vma_budget(pid)
    except (TargetGone, GpuksmError):
        return None


def _lives(target: Target) -> bool:
    """True while the process runs the program that we attached to: its agent holds its socket open."""
    return not target.closed and not target.link.agent.ended() and not _only_agent_left(target)


def _only_agent_left(target: Target) -> bool:
    if not target.link.agent.tid:
        return not target.link.agent.exists()
    try:
        if procfs.stat(target.pid).state != "Z":
            return False
        alive = [tid for tid in procfs.threads(target.pid) if tid != target.pid]
    except TargetGone:
        return True
    return alive == [target.link.agent.tid] or not census.thread_exists(target.pid, target.link.agent.tid)
