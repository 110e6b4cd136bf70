"""Threads that wait for one of our events, and the system calls they wait in.

What must hold (docs/hazards.md 1, 5, 18): an event is read only when the thread that
caused it has been seen waiting, because only its call says everything that has to be
done first, and reading lets it go on.  A thread queues its event a moment before it
sleeps, and may lose its processor in between: with an event in the queue, a thread
that is neither asleep nor stopped may be the one.  Looked at after the event was seen
to be there, and with all such threads waited for, its caller is among those found.

Nothing here changes the target.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterable

from gpuksm.errors import NotPermitted, TargetGone
from gpuksm.guard import arch
from gpuksm.guard.freeze import Freeze, FreezeFailed
from gpuksm.guard.target import Target
from gpuksm.linux import mappings, procfs

Call = tuple[int, tuple[int, ...]]  # number and arguments of a system call

_WAITS_FOR_US = "userfaultfd_event_wait_completion"
_DONTNEED_LOCKED = 24
_DISCARDING = (4, 8, _DONTNEED_LOCKED)  # MADV_DONTNEED, MADV_FREE, MADV_DONTNEED_LOCKED
_SEEN_NS = 100_000_000
_WINDOW_CPU_NS = 1_000_000


def readable(fd: int) -> bool:
    """True when an event waits."""
    return bool(readable_of([fd]))


def readable_of(fds: Iterable[int]) -> set[int]:
    """Those of `fds` with an event that waits."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, flags in poll.poll(0) if flags & select.POLLIN}


def waiting_calls(target: Target, freeze: Freeze) -> list[Call] | None:
    """Calls of the threads that wait for us, asked after an event was readable; None: look again later.

    None while a thread may own an event and is not seen waiting.  An empty list in a
    freeze means that the caller is none of its threads.
    """
    if freeze.holds:
        return _calls(target.pid, list(freeze.waiting))
    if not _all_asleep(target):
        return None
    return _calls(target.pid, procfs.threads(target.pid), running=True) or None


def still_calls(target: Target) -> list[Call] | None:
    """Calls of all threads of a target that is not frozen, when every one of them waits for us."""
    threads = [tid for tid in procfs.threads(target.pid) if tid != target.link.agent.tid]
    calls = _calls(target.pid, threads)
    return calls if calls is not None and len(calls) == len(threads) else None


def calls_of(pid: int) -> list[Call] | None:
    """Calls of the threads of `pid` that wait for us; None while one may be on its way there."""
    return _calls(pid, procfs.threads(pid))


def _calls(pid: int, threads: Iterable[int], *, running: bool = False) -> list[Call] | None:
    """Calls of those of `threads` that wait for us; None while one runs, unless that is allowed."""
    calls = []
    for tid in threads:
        try:
            where = procfs.wchan(pid, tid)
            if where == _WAITS_FOR_US:
                call = procfs.thread_syscall(pid, tid)
                if call is None:
                    return None
                calls.append(call)
            elif not where and not running:
                return None
        except (TargetGone, NotPermitted):
            continue
    return calls


def anyone_waits(pid: int) -> bool:
    """Whether a thread of `pid` waits for an event, of whichever userfaultfd, to be read."""
    return any(procfs.wchan(pid, tid) == _WAITS_FOR_US for tid in procfs.threads(pid))


def runs(pid: int, tid: int) -> bool:
    """Whether a thread that was asked to stop is on its way, rather than waiting for an event to be read."""
    try:
        return procfs.wchan(pid, tid) != _WAITS_FOR_US
    except TargetGone:
        return False


def wait_for_others(target: Target, freeze: Freeze) -> None:
    """Let threads that do not wait for events come to their stop, so that content can be copied.

    Raises FreezeFailed.
    """
    for _ in range(2000):
        freeze.begin()
        freeze.collect()
        blocked = 0
        for tid in freeze.waiting:
            try:
                blocked += procfs.wchan(target.pid, tid) == _WAITS_FOR_US
            except TargetGone:
                continue
        if blocked == len(freeze.waiting):
            return
        time.sleep(0.0002)
    raise FreezeFailed(f"a thread of process {target.pid} did not stop in time")


def discards(call: Call) -> bool:
    """True for a call that discards memory: madvise or process_madvise with such an advice."""
    number, arguments = call
    nr = arch.current().NR
    advice = {nr.MADVISE: 2, nr.PROCESS_MADVISE: 3}.get(number)
    return advice is not None and arguments[advice] in _DISCARDING


def discarded(pid: int, call: Call) -> list[tuple[int, int]]:
    """The [start, end) ranges that a call of `pid` discards, none for other calls."""
    if not discards(call):
        return []
    number, arguments = call
    if number == arch.current().NR.MADVISE:
        ranges, advice = [arguments[:2]], arguments[2]
    else:
        ranges, advice = _iovec(pid, arguments[1], arguments[2]), arguments[3]
    return [(start, _before_locked(pid, start, start + length, advice)) for start, length in ranges]


def _iovec(pid: int, address: int, count: int) -> list[tuple[int, ...]]:
    """The (start, length) pairs of a struct iovec array in `pid`; empty when it cannot be read."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        data = os.pread(memory, min(count, 1024) * 16, address)
    except OSError:
        return []
    finally:
        os.close(memory)
    return list(struct.iter_unpack("<QQ", data[: len(data) // 16 * 16]))


def _before_locked(pid: int, start: int, end: int, advice: int) -> int:
    """Where madvise will stop: at the first locked VMA, which it refuses with EINVAL and leaves alone."""
    if advice == _DONTNEED_LOCKED or not mappings.locked_kib(pid):
        return end
    flags = mappings.smaps_flags(pid)
    for vma in mappings.maps(pid):
        if vma.end > start and vma.start < end and "lo" in flags.get(vma.start, ()):
            return max(start, vma.start)
    return end


def _all_asleep(target: Target) -> bool:
    """Wait until no thread can own an event that was there before, unless it is seen waiting for us.

    A thread is between queueing its event and sleeping for some microseconds of its own
    processor time; one that sleeps elsewhere, or has used more since, is not there.
    """
    agent = target.link.agent.tid
    used: dict[int, int] = {}
    deadline = time.monotonic_ns() + _SEEN_NS
    while True:
        unknown = False
        for tid in procfs.threads(target.pid):
            try:
                state, cpu_ns = procfs.thread_activity(target.pid, tid)
                if tid == agent or state not in "RD" or procfs.wchan(target.pid, tid):
                    continue
            except TargetGone:
                continue
            unknown |= cpu_ns - used.setdefault(tid, cpu_ns) < _WINDOW_CPU_NS
        if not unknown:
            return True
        if time.monotonic_ns() > deadline:
            return False
        time.sleep(0.001)
