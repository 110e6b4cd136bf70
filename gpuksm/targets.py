"""From what the user typed (TARGETS) to the processes meant.

`--pid`, `--tree` and registration name a process: whatever keeps it from being
a target is an error.  `--name`, `--user` and `--cgroup` are patterns: they
narrow each other down, and pass silently over what can never be a target (the
kernel's threads, pid 1, gpuksm itself, other users' processes, zombies).
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpuksm import eligibility, errors, writers
from gpuksm.client import GuardClient
from gpuksm.linux import cgroup, procfs

if TYPE_CHECKING:
    import psutil

    from gpuksm.scan import TargetRequest

HOW_TO_REGISTER = (
    "nothing is registered: run `gpuksm register --pid N` or `gpuksm exec -- CMD` first, "
    "or say what to scan (--pid, --tree, --name, --user, --cgroup)"
)


@dataclass(frozen=True)
class Selection:
    """TARGETS as typed; empty means what is registered."""

    pids: tuple[int, ...] = ()
    trees: tuple[int, ...] = ()
    name: str | None = None
    user: str | None = None
    cgroup: str | None = None
    registered: bool = False

    @property
    def has_pattern(self) -> bool:
        return self.name is not None or self.user is not None or self.cgroup is not None

    @property
    def empty(self) -> bool:
        return not (self.pids or self.trees or self.has_pattern or self.registered)


class Finder:
    """The targets of `selection` again and again, as processes come and go.

    The first call raises what `resolve` does for processes that were named.  Later
    ones never do: those that have exited are left out, and a pid that was given to
    another process meanwhile is not taken for the one that was named.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._named: dict[int, int] | None = None  # pid: start time

    def __call__(self) -> list[TargetRequest]:
        chosen = self._selection
        try:
            if self._named is None:
                found = resolve(chosen)
                self._named = {pid: _start_time(pid) for pid in (*chosen.pids, *chosen.trees)}
                return found
            alive = {pid for pid, start_time in self._named.items() if start_time == _start_time(pid) != 0}
            left = replace(
                chosen,
                pids=tuple(pid for pid in chosen.pids if pid in alive),
                trees=tuple(pid for pid in chosen.trees if pid in alive),
            )
            return [] if left.empty and not chosen.empty else resolve(left, strict=False)
        except errors.NoTargets:
            self._named = self._named or {}
            return []
        except errors.UsageError:
            if self._named is None:
                raise
            return []  # a control group that is gone for now


def _start_time(pid: int) -> int:
    """When process `pid` started, in clock ticks since boot; 0 when there is none, or only its remains."""
    try:
        stat = procfs.stat(pid)
        return 0 if stat.state in "ZX" else stat.start_time
    except (errors.TargetGone, errors.NotPermitted):
        return 0


def resolve(selection: Selection, *, strict: bool = True) -> list[TargetRequest]:
    """The targets of `selection`, each process once, in the order given.

    Asks the guard what is registered where that is wanted, and never starts
    one.  Raises UsageError, NoSuchProcess, NotPermitted, Unsupported (named
    processes, if `strict`), NoTargets, GuardError.
    """
    from gpuksm.scan import TargetRequest

    for pid in (*selection.pids, *selection.trees) if strict else ():
        check_named(pid)
    found: dict[int, TargetRequest] = {}
    trees = _trees(selection.trees, strict=strict) if selection.trees else []
    for pid in (*selection.pids, *trees):
        found.setdefault(pid, TargetRequest(pid=pid, named=True))
    if selection.registered or selection.empty:
        registered = _registered()
        if not registered and not found and not selection.has_pattern:
            raise errors.NoTargets(HOW_TO_REGISTER)
        for pid, ranges in registered:
            found.setdefault(pid, TargetRequest(pid=pid, named=True, ranges=ranges))
    if selection.has_pattern:
        for pid in _matching(selection):
            found.setdefault(pid, TargetRequest(pid=pid, named=False))
    if not found:
        raise errors.NoTargets(f"no process matches {_spelled(selection)}")
    return list(found.values())


def check_named(pid: int) -> None:
    """Raise what keeps process `pid`, which the user named, from being a target.

    What an option can allow is left to the guard, which reports it per target.
    """
    try:
        leader = int(procfs.status(pid)["Tgid"])
    except errors.TargetGone:
        raise errors.NoSuchProcess(f"there is no process {pid}; see `ps -e` for those that run") from None
    if leader != pid:
        raise errors.NoSuchProcess(f"{pid} is a thread of process {leader}; name that one")
    reason = eligibility.process_reason(pid, named=True, allowed=writers.EVERYTHING)
    if reason is not None:
        raise reason


def _trees(roots: tuple[int, ...], *, strict: bool) -> list[int]:
    import psutil  # here and below: not for what names its processes by pid

    pids: list[int] = []
    for root in roots:
        try:
            children = psutil.Process(root).children(recursive=True)
        except psutil.NoSuchProcess:
            if strict:
                raise errors.NoSuchProcess(f"process {root} has just exited") from None
            continue
        pids.append(root)
        pids += [child.pid for child in children if _can_be_target(child)]
    return pids


def _registered() -> list[tuple[int, tuple[tuple[int, int], ...] | None]]:
    guard = GuardClient.find()
    if guard is None:
        return []
    with guard:
        reply, _ = guard.request("registered")
    result: list[tuple[int, tuple[tuple[int, int], ...] | None]] = []
    for entry in reply["targets"]:
        ranges = entry["ranges"]
        result.append((entry["pid"], None if ranges is None else tuple((a, b) for a, b in ranges)))
    return result


def _matching(selection: Selection) -> Iterable[int]:
    """Pids that match every pattern given."""
    import psutil

    uid = None if selection.user is None else _uid(selection.user)
    try:
        pattern = None if selection.name is None else re.compile(selection.name)
    except re.error as error:
        raise errors.UsageError(f"--name {selection.name!r} is no regular expression: {error}") from None
    members: set[int] | None = None
    if selection.cgroup is not None:
        try:
            members = set(cgroup.processes(selection.cgroup))
        except FileNotFoundError:
            raise errors.UsageError(f"there is no cgroup {selection.cgroup}: see /sys/fs/cgroup") from None
    for process in psutil.process_iter():
        try:
            if members is not None and process.pid not in members:
                continue
            if uid is not None and process.uids().real != uid:
                continue
            if pattern is not None and not pattern.search(process.name()):
                continue
            if _can_be_target(process):
                yield process.pid
        except psutil.NoSuchProcess:
            continue


def _can_be_target(process: psutil.Process) -> bool:
    """Whether a pattern may pick this process up at all; what can be helped is the guard's to report."""
    import psutil

    try:
        if process.pid == 1 or eligibility.is_own(process.pid):
            return False
        if os.geteuid() not in (0, process.uids().real):
            return False
        stat = procfs.stat(process.pid)
        return not stat.flags & procfs.PF_KTHREAD and stat.state not in "ZX"
    except (psutil.NoSuchProcess, errors.TargetGone, errors.NotPermitted):
        return False


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise errors.UsageError(f"there is no user {user!r}") from None


def _spelled(selection: Selection) -> str:
    given = (("--name", selection.name), ("--user", selection.user), ("--cgroup", selection.cgroup))
    return " ".join(f"{option} {value}" for option, value in given if value is not None)
