"""Performs steps on real puppets and a real guard, and compares every byte with the model.

Commands that follow each other travel together, to all puppets at the same time.  A
scan runs in this process (tens of milliseconds instead of the second that a command
takes); the guard is a process of its own as always.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpuksm import errors
from gpuksm.client import GuardClient
from gpuksm.scan import NoProgress, ScanOptions, TargetRequest, run_scan
from tests.model.memory import ARENA, AWAY, AWAY_AT, FIXED, HEAP_AT, MAYMOVE, PAGES, Memory, Wrong
from tests.model.steps import PUPPETS, Step
from tests.support import processes
from tests.support.victims import Victim
from tests.support.world import World

_OPTIONS = ScanOptions(batch_pages=1024, settle_seconds=0.01, backend="cpu", threads=1)
_MOST_AT_ONCE = 12
_ALONE = frozenset("txPQsig")
_WAITS_FOR_GUARD = "userfaultfd_event_wait_completion"
_HELD_SECONDS = 2.0
_TRY_AGAIN = ("try again later", "does not stop", "is stopped")


class _ScannerDied(Exception):
    """The scanner is to end here."""


class _DyingClient(GuardClient):
    """A connection of a scanner that dies at its n-th request; at a commit it may just have sent it."""

    left = 0

    def request(self, op: str, payload: Any = b"", **fields: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _ScannerDied
        return super().request(op, payload, **fields)


class Puppet:
    """A running puppet, what its memory must contain, and what that of its waiting parents must."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.memory = Memory()
        self.parents: list[tuple[int, Memory]] = []
        self.writers: dict[int, int] = {}
        self.waiting: list[tuple[str, list[int], bool]] = []
        self.sent = False  # what waits has been sent and its answer is to come

    def overlaps_hot(self, first: int, count: int) -> bool:
        return any(first <= page < first + count for page in self.memory.hot)

    def allowed(self, name: str, a: list[int]) -> bool:
        """Whether a command has a defined outcome now."""
        memory = self.memory
        if name in "muwpalkf" and self.overlaps_hot(a[0], a[1]):
            return False
        if name == "r" and (
            self.overlaps_hot(a[0], max(a[1], a[2])) or (a[3] & FIXED and self.overlaps_hot(a[4], a[2]))
        ):
            return False
        if name == "r" and memory.linux_may_lose(a[0], a[1], a[3]):
            return False
        if name in "muwpalkr" and a[0] >= AWAY_AT:
            # Where nothing is, the kernel may have placed mappings that are not ours.
            end = HEAP_AT if a[0] < HEAP_AT else PAGES
            return a[0] + a[1] <= end and memory.mapped(a[0], a[1])
        if name == "r" and a[3] & MAYMOVE and not a[3] & FIXED:
            return memory.away_is_free and a[2] <= AWAY and a[0] + a[2] <= ARENA
        if name == "t":
            page = memory.pages[a[1]]
            writable = all(one is not None and one.access == "w" for one in page)
            return a[0] not in self.writers and writable and a[1] not in memory.hot
        if name == "s":
            return a[0] in self.writers
        if name == "P":
            return len(self.parents) < 2 and not self.writers
        if name == "Q":
            return bool(self.parents) and not self.writers
        if name == "x":
            return not self.writers and not self.parents
        if name == "g":
            return not memory.away_is_free and memory.mapped(AWAY_AT, 1)
        return True

    def send(self) -> None:
        words = [("q" if quiet else "") + " ".join(map(str, (name, *a))) for name, a, quiet in self.waiting]
        self.victim.send(";".join(words))

    def has_answered(self) -> bool:
        """Whether the answer to what was sent can be read."""
        return bool(select.select([self.victim.output], [], [], 0)[0])

    def receive(self, timeout: float) -> None:
        commands, self.waiting = self.waiting, []
        words = self.victim.line(timeout).split(" ")
        if words[0] in ("FAILED", "CORRUPT"):
            raise Wrong(f"puppet: {' '.join(words)}")
        if commands[0][0] == "x":
            self.memory = Memory()
            return
        if len(words) != len(commands):
            raise Wrong(f"puppet: {len(words)} answers to {commands}")
        for (name, a, _), word in zip(commands, words, strict=True):
            try:
                self._take(name, a, word.split(","))
            except Wrong as error:
                said = word.split(",")[:2] if name != "f" else []
                raise Wrong(f"after {name} {a}, which gave {said}: {error}") from None

    def _take(self, name: str, a: list[int], parts: list[str]) -> None:
        if name == "f":
            child = self.memory.copy()
            child.hot = dict(self.memory.hot)
            child.check(parts[0], "child")
            if a[1]:
                child._purge(a[0], a[1], 24, 0)  # a child inherits no lock
            child.check(parts[1], "child after DONTNEED")
            parts = parts[2:]
        result, error, report = int(parts[0]), int(parts[1]), parts[2]
        if name == "P":
            self.parents.append((self.victim.pid, self.memory.copy()))
            self.memory._do_k([0, PAGES], 0, 0)
            self.victim.pid = result
        elif name == "Q":
            self.victim.pid, self.memory = self.parents.pop()
            if result:
                raise Wrong("child ended badly")
        elif name == "s":
            self.memory.writer_stopped(self.writers.pop(a[0]), result)
        elif name == "t":
            self.writers[a[0]] = a[1]
        self.memory.apply(name, a, result, error)
        if report:
            self.memory.check(report)


class Driver:
    """One guard and its puppets; `counts` says what was done."""

    def __init__(self, world: World) -> None:
        self.world = world
        os.environ["GPUKSM_RUNTIME_DIR"] = str(world.folder)
        # The first guard stops itself when it has compared a plan; a successor does not.
        os.environ["GPUKSM_FAULT"] = "verified:*:stop"
        self.puppets = [Puppet(world.victim("puppet")) for _ in range(PUPPETS)]
        self.counts: Counter[str] = Counter()
        self.guard: int | None = None
        self.killed: list[int] = []
        self.killing: threading.Timer | None = None
        self.done = 0

    def perform(self, steps: Iterable[Step]) -> None:
        """Perform `steps`; Wrong when memory is not what it must be.  `done` counts those begun."""
        for step in steps:
            self.done += 1
            if step[0] == "op":
                self._op(*step[1:])
            else:
                self.flush()
                self.counts[step[0]] += 1
                getattr(self, "_" + step[0].replace("-", "_"))(*step[1:])
        self._look()

    def _op(self, index: int, name: str, a: list[int], quiet: bool) -> None:
        puppet = self.puppets[index]
        alone = name in _ALONE or (
            name != "b" and bool(a) and (a[0] >= AWAY_AT or (name == "r" and not a[3] & FIXED))
        )
        if alone or sum(len(each.waiting) for each in self.puppets) >= _MOST_AT_ONCE:
            self.flush()
        if name == "g" and puppet.allowed(name, a):
            if puppet.memory.mapped(AWAY_AT, 1):
                count = next(n for n in range(AWAY, 0, -1) if puppet.memory.mapped(AWAY_AT, n))
                puppet.waiting.append(("u", [AWAY_AT, count], True))
                self.flush()
            if not puppet.memory.away_is_free:
                return  # in several pieces
            puppet.waiting.append(("g", [], False))
        elif puppet.allowed(name, a):
            if name == "x":
                puppet.waiting.append(("i", [0], True))
                self.flush()
            if name == "r" and a[3] & MAYMOVE and not a[3] & FIXED:
                puppet.waiting.append(("g", [], True))  # all that was away has moved back by now
            puppet.waiting.append((name, a, quiet))
        else:
            self.counts["not allowed"] += 1
            return
        self.counts[name] += 1
        if alone:
            self.flush()

    def flush(self) -> None:
        """Let the puppets perform what waits; check all of it."""
        busy = [puppet for puppet in self.puppets if puppet.waiting]
        for puppet in busy:
            puppet.send()
        for puppet in busy:
            try:
                puppet.receive(30)
            except Wrong as error:
                raise Wrong(f"puppet {self.puppets.index(puppet)}: {error}") from None

    def _look(self) -> None:
        self.flush()
        for puppet in self.puppets:
            puppet.waiting.append(("v", [], False))
        self.flush()

    # -- what is done to gpuksm ----------------------------------------------------

    @contextlib.contextmanager
    def _client(self, kind: type[GuardClient] = GuardClient) -> Iterator[GuardClient]:
        with kind.connect(start=True) as client:
            pid = int(client.request("hello")[0]["pid"])
            # A timer may have killed the guard just after it had answered.
            if self.guard not in (None, pid, *self.killed):
                raise Wrong(f"guard {self.guard} died by itself: {self._log()}")
            self.guard = pid
            yield client

    def _log(self) -> str:
        return (self.world.folder / "guard.log").read_text()[-3000:]

    def _targets(self) -> list[TargetRequest]:
        pids = [puppet.victim.pid for puppet in self.puppets]
        pids += [pid for puppet in self.puppets for pid, _ in puppet.parents]
        return [TargetRequest(pid) for pid in pids]

    def _scan(self, die_after: int | None = None, held: Sequence[Step] = ()) -> None:
        try:
            with (
                self._going_on(held),
                self._client(GuardClient if die_after is None else _DyingClient) as client,
            ):
                if isinstance(client, _DyingClient):
                    client.left = die_after or 0
                result = run_scan(client, self._targets(), _OPTIONS, NoProgress())
        except _ScannerDied:
            return
        except errors.GpuksmError as error:
            if self.killing is None and not any(text in str(error) for text in _TRY_AGAIN):
                raise Wrong(f"scan: {error!r}; {self._log()}") from None
            self.counts["scan refused"] += 1
        else:
            self.counts["pages merged"] += result.pages_merged
            for target in result.targets:
                if target.error is not None:
                    self.counts["target refused"] += 1
                    if not any(text in target.error for text in _TRY_AGAIN):
                        raise Wrong(f"scan: {target.error}")
        finally:
            self._killed()
        self._look()

    @contextlib.contextmanager
    def _going_on(self, held: Sequence[Step]) -> Iterator[None]:
        """Continue the guard whenever it stops itself; the first time only when `held` was done."""
        ended = threading.Event()
        failures: list[BaseException] = []

        def watch() -> None:
            left = list(held)
            while not ended.wait(0.001):
                if self.guard is None or processes.thread_states(self.guard).get(self.guard) != "T":
                    continue
                try:
                    if left:
                        self._hold(left)
                except BaseException as error:
                    failures.append(error)
                finally:
                    left = []
                    with contextlib.suppress(ProcessLookupError, TypeError):
                        os.kill(self.guard, signal.SIGCONT)  # type: ignore[arg-type]

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self._receive_what_was_sent()
        if failures:
            raise failures[0]

    def _receive_what_was_sent(self) -> None:
        for puppet in self.puppets:
            if puppet.sent:
                puppet.sent = False
                puppet.receive(30)

    def _hold(self, held: Sequence[Step]) -> None:
        """Let puppets do `held` while the guard stands still; some will wait for it."""
        for _, index, name, a, quiet in held:
            if self.puppets[index].allowed(name, a) and len(self.puppets[index].waiting) < 1:
                self.puppets[index].waiting.append((name, a, quiet))
                self.counts["held"] += 1
        self._send_what_may_wait()

    def _send_what_may_wait(self) -> None:
        """Send what waits, until it is answered or waits for the guard."""
        busy = [puppet for puppet in self.puppets if puppet.waiting]
        for puppet in busy:
            puppet.send()
            puppet.sent = True
        deadline = time.monotonic() + _HELD_SECONDS
        while time.monotonic() < deadline and any(
            not puppet.has_answered() and processes.waits_in(puppet.victim.pid) != _WAITS_FOR_GUARD
            for puppet in busy
        ):
            time.sleep(0.001)

    def _scan_held(self, held: Sequence[Step]) -> None:
        """A scan that stands still between comparing and replacing until puppets have done `held`."""
        self._killed()
        self._scan(held=held)

    def _scan_die(self, after: int) -> None:
        self._scan(after + 2)
        self._look()

    def _unmerge(self, pids: list[int] | None = None) -> None:
        self._killed()
        with self._client() as client:
            reply, _ = client.request("unmerge", pids=pids, max_pause_us=5000)
        self.counts["pages unmerged"] += int(reply["pages"])
        if failed := reply.get("failed"):
            raise Wrong(f"unmerge failed: {failed}")
        self._look()

    def _unmerge_one(self, index: int) -> None:
        self._unmerge([self.puppets[index].victim.pid])

    def _kill(self) -> None:
        if self.guard is not None:
            self.killed.append(self.guard)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.guard, signal.SIGKILL)
            self.guard = None

    def _kill_soon(self, milliseconds: int) -> None:
        """Kill the guard while the next commands, or the next scan, are under way."""
        if self.guard is None:
            return
        self._killed()
        self.killing = threading.Timer(milliseconds / 1000, self._kill)
        self.killing.start()

    def _killed(self) -> None:
        if self.killing is not None:
            self.killing.join()
            self.killing = None

    def _keeper(self) -> None:
        """Kill the keeper: the guard starts another, on which later kills of the guard rely."""
        self._killed()
        if self.guard is None:
            return
        keepers = self.world.keepers()
        for pid in keepers:
            os.kill(pid, signal.SIGKILL)
        self._scan()
        if keepers:
            self.world.await_other_keeper(keepers[0])

    def _both(self, held: Sequence[Step]) -> None:
        """Kill guard and keeper together; what puppets do then waits for another guard."""
        self._killed()
        if self.guard is None:
            return
        self.killed.append(self.guard)
        self.world.kill_guard_and_keeper()
        self.guard = None
        self._hold(held)
        with self._client():
            self._receive_what_was_sent()
        self._look()

    def _shut_down(self) -> None:
        self._killed()
        if GuardClient.find() is None:
            return
        self._unmerge()
        with self._client() as client:
            client.request("shutdown", force=False)
        self.guard = None
        deadline = time.monotonic() + 10
        while self.world.guard_processes():
            if time.monotonic() > deadline:
                raise Wrong("guard or keeper do not end")
            time.sleep(0.005)

    def close(self) -> None:
        """A last look, with everything unmerged; guard, children and puppets end."""
        self._killed()
        self.flush()
        for puppet in self.puppets:
            for index in list(puppet.writers):
                self._op(self.puppets.index(puppet), "s", [index], False)
            while puppet.parents:
                self._op(self.puppets.index(puppet), "Q", [], False)
        self._look()
        self._shut_down()
        self._look()
