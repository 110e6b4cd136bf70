"""The resident scanner: rounds for ever, as far apart as what happens allows.

The time to the next round is shortest while something merges and doubles with
every round in which nothing changed.  A limit on CPU time is kept by sleeping,
between the batches of a round too.  What is set with `gpuksm ctl` and what gets
registered wakes it at once: the guard answers a `watch` only then.

It may be killed at any moment: everything that is merged is the guard's.  When
the guard dies, its successor is attached to anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gpuksm import knobs
from gpuksm.client import GuardClient
from gpuksm.errors import FeatureMissing, GuardError
from gpuksm.linux.descriptors import await_readable
from gpuksm.scan import measure
from gpuksm.scan.session import Round, Session
from gpuksm.scan.types import ScanOptions, TargetRequest

_RECONNECT_SECONDS = 1.0
_FIND_SECONDS = 1.0
_MIN_NAP = 0.002


class Stopped(Exception):
    """The daemon was told to end."""


class Control(Protocol):
    """What the daemon is told from outside, by signals."""

    def wait(self, seconds: float, readable: Sequence[int]) -> None:
        """Return after `seconds`, or as soon as one of `readable` is, or a signal came."""

    def stopping(self) -> bool:
        """Whether it was told to end."""

    def reloaded(self) -> Setup | None:
        """The new setup when it was told to read its configuration again (once), else None."""


@dataclass(frozen=True)
class Setup:
    """What to scan and how; `find` names the processes wanted now, `values` are the knobs that can be set."""

    find: Callable[[], Sequence[TargetRequest]]
    options: ScanOptions
    values: dict[str, int]


@dataclass
class Daemon:
    """Runs until it is told to stop; `say` gets one line for each thing worth a log."""

    setup: Setup
    control: Control
    say: Callable[[str], None]
    values: dict[str, int] = field(default_factory=dict)
    _interval: float = 0.0
    _find_at: float = 0.0
    _serial: int = -1
    _guard_pid: int = 0
    _carried: dict[str, int] = field(default_factory=dict)  # counters of earlier sessions
    _used_before: float = 0.0  # CPU seconds when the round (and its sleep) began
    _began: float = 0.0
    _opened: bool = False

    def run(self) -> None:
        """Rounds until stopped.  GuardError at the start: another scanner runs."""
        self.values = dict(self.setup.values)
        with contextlib.suppress(Stopped):
            while True:
                try:
                    client, watcher = self._connect()
                except GuardError as error:
                    # None can be had: that ends us at the very start only.
                    if not self._carried:
                        raise
                    self._say_starting_over(error)
                    self._pause(_RECONNECT_SECONDS)
                    continue
                with client, watcher:
                    try:
                        self._serve(client, watcher)
                    except GuardError as error:
                        # Another scanner that has the lock ends us; what goes wrong later does not, nor does
                        # a guard that is lost, at whatever time.
                        if not self._opened and client.fileno() >= 0:
                            raise
                        self._say_starting_over(error)
                self._pause(_RECONNECT_SECONDS)

    def _connect(self) -> tuple[GuardClient, GuardClient]:
        """For requests, and to be told of what others set; the guard is started where none runs."""
        client = GuardClient.connect(start=True)
        try:
            return client, GuardClient.connect(start=False)
        except GuardError:
            client.close()
            raise

    def _say_starting_over(self, error: GuardError) -> None:
        self.say(f"{error.args[0].removesuffix('; run the command again')}; starting over")

    # -- one connection ------------------------------------------------------------

    def _serve(self, client: GuardClient, watcher: GuardClient) -> None:
        across = bool(self.values["merge_across_nodes"])
        session = Session(client, replace(self.setup.options, merge_across_nodes=across), self)
        self._opened = False
        try:
            session.open()
            self._opened = True
            session.set_batch(self.values["pages_to_scan"])
            self._guard_pid = session.guard_pid
            self._serial = -1
            self._find_at = 0.0
            self._interval = self._shortest()
            self._watch(watcher)
            while True:
                self._begin_round()
                if self.values["run"] == knobs.RUN_ON:
                    self._adapt(self._round(session))
                self._exchange(session)
                self._sleep(session, watcher)
        finally:
            for name, number in self._counters(session).items():
                self._carried[name] = number
            session.close()

    def _round(self, session: Session) -> Round:
        if time.monotonic() >= self._find_at:
            for target in session.follow(self.setup.find()):
                said = target.error or f"attached to process {target.pid} ({target.name})"
                self.say(said)
            self._find_at = time.monotonic() + max(_FIND_SECONDS, self._shortest())
        done = session.round(
            smart=bool(self.values["smart_scan"]), use_zero_pages=bool(self.values["use_zero_pages"])
        )
        if done.merged:
            self.say(f"merged {done.merged} pages")
        return done

    def _adapt(self, done: Round) -> None:
        """Short while something merges or is new, as it is while pages are read, else longer and longer."""
        if done.merged or done.attached:
            self._interval = self._shortest()
        elif not done.scanned:
            self._interval = min(2 * self._interval, self._longest())
        self._interval = min(max(self._interval, self._shortest()), self._longest())

    def _shortest(self) -> float:
        return self.values["sleep_millisecs"] / 1000

    def _longest(self) -> float:
        return max(self.values["max_sleep_millisecs"] / 1000, self._shortest())

    # -- what others set and see ---------------------------------------------------

    def _counters(self, session: Session) -> dict[str, int]:
        """Counters that go on growing over several sessions."""
        own = session.counters()
        return {name: self._carried.get(name, 0) + number for name, number in own.items()}

    def _exchange(self, session: Session) -> None:
        """Publish numbers, and obey what was set."""
        while True:
            numbers = {
                **self.values,
                **session.numbers(),
                **self._counters(session),
                "max_page_sharing": 0,
                "interval_millisecs": round(self._interval * 1000),
                "cpu_millisecs": round(time.process_time() * 1000),
            }
            reply, _ = session.client.request("knobs", publish=numbers)
            if not reply["wanted"]:
                return
            self._obey(session, reply["wanted"])

    def _obey(self, session: Session, wanted: dict[str, int]) -> None:
        for name, value in wanted.items():
            self.say(f"{name} set from {self.values[name]} to {value}")
        self.values |= wanted
        session.set_batch(self.values["pages_to_scan"])
        self._interval = self._shortest()
        if wanted.get("run") == knobs.RUN_UNMERGED:
            reply, _ = session.client.request(
                "unmerge", pids=None, max_pause_us=self.setup.options.max_pause_us
            )
            session.follow([])
            self._find_at = 0.0
            for pid, reason in reply["failed"].items():
                self.say(f"process {pid} is still merged: {reason}")
        self._set_across_nodes(session)

    def _set_across_nodes(self, session: Session) -> None:
        """Have `merge_across_nodes` obeyed; it stays as it was while something is merged, as with KSM."""
        name, wanted = "merge_across_nodes", self.values["merge_across_nodes"]
        self.values[name] = int(session.engine.options.merge_across_nodes)
        try:
            if session.merge_across_nodes(bool(wanted)):
                self.values[name] = wanted
            else:
                self.say(f"{name} stays {self.values[name]} while something is merged")
        except FeatureMissing as error:
            self.say(str(error))

    def _watch(self, watcher: GuardClient) -> None:
        """Ask to be told when something is set or registered."""
        watcher.ask("watch", serial=self._serial)

    def _sleep(self, session: Session, watcher: GuardClient) -> None:
        """Until the next round is due: a pause for as long as it lasts, knobs and signals obeyed at once."""
        wake_at = time.monotonic() + max(self._interval, self._owed())
        while True:
            paused = self.values["run"] != knobs.RUN_ON
            left = 3600.0 if paused else wake_at - time.monotonic()
            if left <= 0:
                return
            self.control.wait(left, [watcher.fileno(), session.client.fileno()])
            self._signals(session)
            if _readable(session.client.fileno()):
                session.client.answer()  # nothing was asked: the guard is gone
            if _readable(watcher.fileno()):
                self._serial = int(watcher.answer()["serial"])
                self._watch(watcher)
                self._exchange(session)
                self._find_at = 0.0
                # Something was set or registered: go on, but never faster than the CPU limit allows.
                wake_at = min(wake_at, time.monotonic() + self._owed())

    def _signals(self, session: Session | None) -> None:
        if self.control.stopping():
            raise Stopped
        setup = self.control.reloaded()
        if setup is not None:
            self.setup = setup
            self.values = {**setup.values, "run": self.values["run"]}
            self._find_at = 0.0
            self._interval = self._shortest()
            if session is not None:
                across = session.engine.options.merge_across_nodes
                session.engine.options = replace(setup.options, merge_across_nodes=across)
                self._set_across_nodes(session)
            self.say("configuration read again")

    def _pause(self, seconds: float) -> None:
        self.control.wait(seconds, [])
        self._signals(None)

    # -- CPU time --------------------------------------------------------------------

    def update(self, stage: str, done: int, total: int) -> None:
        """As `Progress`, called between batches: stop here when told to, and sleep off what was used."""
        if self.control.stopping():
            raise Stopped
        if stage in ("hash", "commit"):
            until = time.monotonic() + self._owed()
            while (left := until - time.monotonic()) > _MIN_NAP:
                self.control.wait(left, [])
                if self.control.stopping():
                    raise Stopped

    def _begin_round(self) -> None:
        self._began, self._used_before = time.monotonic(), self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        """CPU time of daemon and guard."""
        return time.process_time() + measure.cpu_seconds(self._guard_pid)

    def _owed(self) -> float:
        """Seconds to sleep until CPU time since the round began is within the limit."""
        percent = self.values["max_cpu_percent"]
        if not percent:
            return 0.0
        used = self._cpu_seconds() - self._used_before
        return max(0.0, used * 100 / percent - (time.monotonic() - self._began))


def _readable(fd: int) -> bool:
    return fd >= 0 and bool(await_readable([fd], 0))
