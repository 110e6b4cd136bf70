"""Unmerging a target leaves it alone between its pauses, and others have their turn."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import restore, unmerging
from gpuksm.guard.advice import Advice
from gpuksm.guard.agent import AgentStuck
from gpuksm.guard.commit import Committer
from gpuksm.guard.pace import Pace
from gpuksm.guard.runs import Run, Runs
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE


def _target(number: int) -> Any:
    """One in which nothing is merged."""
    agent = SimpleNamespace(muzzled=lambda: False)
    link = SimpleNamespace(agent=agent)
    return SimpleNamespace(id=number, pid=number, runs=Runs(), placeholders=set(), link=link, parked=None)


def test_a_target_runs_for_as_long_as_it_stood_while_it_is_others_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stood: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    served, dropped = list[float](), list[int]()

    def piece(target: Any, _journal: Any, start: int, end: int, **_: Any) -> None:
        time.sleep(0.004)
        target.runs.remove(start, end)

    @contextlib.contextmanager
    def frozen(target: Any) -> Iterator[Any]:
        began, freeze = time.monotonic(), SimpleNamespace()
        yield freeze
        freeze.thawed_ns = time.monotonic_ns()
        stood[target.id].append((began, time.monotonic()))

    monkeypatch.setattr(restore, "restore_piece", piece)
    targets = [_target(number) for number in stood]
    for target, count in zip(targets, (400, 200), strict=True):
        target.runs.add(Run(0, count * PAGE_SIZE, 7))
    guard: Any = SimpleNamespace(
        journal=None,
        frozen=frozen,
        breathe=lambda: served.append(time.monotonic()),
        drop=lambda target: dropped.append(target.id),
        pins=SimpleNamespace(review=lambda _target, anew: None),
    )
    pages, pauses, failed = unmerging._unmerge_each(guard, targets, 1000)
    assert (pages, failed, sorted(dropped)) == (600, {}, [1, 2])
    assert len(pauses) == sum(map(len, stood.values()))
    for mine in stood.values():
        assert len(mine) > 3
        for (began, ended), (again, _) in itertools.pairwise(mine):
            assert again - ended >= (ended - began) * 0.9
            assert any(ended <= moment <= again for moment in served), "others are not served meanwhile"
    order = [who for _, who in sorted((times, who) for who, mine in stood.items() for times in mine)]
    assert set(order[:2]) == {1, 2}, "one waits for the other to be done"


@pytest.mark.parametrize(
    ("error", "failed", "left"),
    [(ProcessLookupError("gone"), {}, []), (OSError(5, "no"), {"1": "[Errno 5] no"}, [1])],
    ids=["it dies", "it fails"],
)
def test_what_becomes_of_one_is_nothing_to_the_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception, failed: dict[str, str], left: list[int]
) -> None:
    def piece(target: Any, _journal: Any, start: int, end: int, **_: Any) -> None:
        if target.id == 1:
            raise error
        target.runs.remove(start, end)

    dropped: list[int] = []
    monkeypatch.setattr(restore, "restore_piece", piece)
    targets = [_target(number) for number in (1, 2)]
    for target in targets:
        target.runs.add(Run(0, 40 * PAGE_SIZE, 7))
    guard: Any = SimpleNamespace(
        journal=None,
        frozen=lambda _: contextlib.nullcontext(SimpleNamespace(thawed_ns=time.monotonic_ns())),
        breathe=lambda: None,
        drop=lambda target: dropped.append(target.id),
        pins=SimpleNamespace(review=lambda _target, anew: None),
    )
    assert unmerging._unmerge_each(guard, targets, 5000)[::2] == (40, failed)
    assert sorted({1, 2} - set(dropped)) == left


def test_a_pause_is_over_when_the_target_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if we have to wait for a processor then, having come first until now."""

    @contextlib.contextmanager
    def frozen(_: Any) -> Iterator[Any]:
        freeze = SimpleNamespace()
        yield freeze
        freeze.thawed_ns = time.monotonic_ns()
        time.sleep(0.05)

    monkeypatch.setattr(
        restore, "restore_piece", lambda target, _, low, high, **__: target.runs.remove(low, high)
    )
    target: Any = SimpleNamespace(id=1, pid=1, runs=Runs(), placeholders=set(), regions=[])
    target.runs.add(Run(0, 40 * PAGE_SIZE, 7))
    journal: Any = None
    ((pages, pause_us),) = restore.restore_all(target, journal, frozen, 5000)
    assert pages == 40
    assert pause_us < 40_000
    committer: Any = SimpleNamespace(frozen=frozen, pace=Pace(), outcome=SimpleNamespace(pauses_us=[]))
    target = SimpleNamespace(pauses_us=[])
    with Committer.paused(committer, target, 100.0):
        pass
    assert committer.outcome.pauses_us[0] == target.pauses_us[0] < 40_000


def test_what_lies_behind_a_hole_is_still_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, given_back = Runs(), list[tuple[int, int]]()
    runs.add(Run(0, 4 * PAGE_SIZE, 7))
    mapped = mappings.VmaQuery(PAGE_SIZE, 4 * PAGE_SIZE, 3, 8 * PAGE_SIZE, 99)
    target: Any = SimpleNamespace(
        pid=os.getpid(), runs=runs, query=lambda at: mapped if at else None, advice=Advice()
    )
    monkeypatch.setattr(mappings, "locked_kib", lambda _pid: 0)
    monkeypatch.setattr(restore, "_restore_part", lambda *given: given_back.append(given[2:4]))
    restore.restore_piece(target, SimpleNamespace(), 0, 4 * PAGE_SIZE)  # type: ignore[arg-type]
    assert given_back == [(PAGE_SIZE, 4 * PAGE_SIZE)]
    assert list(runs) == [Run(PAGE_SIZE, 4 * PAGE_SIZE, 8)]


def test_who_was_left_is_read_about_when_its_agent_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel walks over all that was tracked then; others are served meanwhile."""
    left, asked, breaths = [3], [], []

    def exists(pid: int, tid: int) -> bool:
        asked.append((pid, tid))
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(unmerging.census, "thread_exists", exists)
    guard: Any = SimpleNamespace(breathe=lambda: breaths.append(1))
    numbers = ((1, 11, True), (2, 12, False), (3, 0, True))  # the last one had no agent
    chosen: Any = [
        SimpleNamespace(pid=pid, closed=closed, link=SimpleNamespace(agent=SimpleNamespace(tid=tid)))
        for pid, tid, closed in numbers
    ]
    unmerging._await_agents(guard, chosen)
    assert asked == [(1, 11)] * 4
    assert len(breaths) >= 3
    left[0] = 10**9  # one that does not end, under a debugger perhaps
    monkeypatch.setattr(unmerging, "_END_SECONDS", 0.01)
    unmerging._await_agents(guard, chosen)


def test_who_cannot_go_on_yet_is_not_left() -> None:
    """Nobody would let its threads go on, before the guard ends."""
    targets = {number: _target(number) for number in (1, 2, 3, 4)}
    targets[2].runs.add(Run(0, PAGE_SIZE, 7))
    targets[3].parked = "a freeze"
    left: list[int] = []

    @contextlib.contextmanager
    def frozen(target: Any) -> Iterator[None]:
        if target.id == 4:
            target.parked = "another"
            raise AgentStuck
        yield

    guard: Any = SimpleNamespace(targets=targets, frozen=frozen, drop=lambda target: left.append(target.id))
    unmerging.leave_idle(guard)
    assert left == [1]
