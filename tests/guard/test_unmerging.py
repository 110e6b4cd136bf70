"""Unmerging a target leaves it alone between its pauses."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gpuksm.guard import restore
from gpuksm.guard.runs import Run, Runs
from gpuksm.linux import mappings
from gpuksm.linux._libc import PAGE_SIZE


def test_a_target_runs_for_as_long_as_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, stood, served = Runs(), list[tuple[float, float]](), list[float]()
    runs.add(Run(0, 400 * PAGE_SIZE, 7))
    target: Any = SimpleNamespace(runs=runs, placeholders=set())
    journal: Any = SimpleNamespace()

    def piece(_target: Any, _journal: Any, start: int, end: int) -> None:
        time.sleep(0.004)
        runs.remove(start, end)

    @contextlib.contextmanager
    def frozen(_target: Any) -> Iterator[Any]:
        began = time.monotonic()
        yield None
        stood.append((began, time.monotonic()))

    monkeypatch.setattr(restore, "restore_piece", piece)
    pages, pauses = restore.restore_all(
        target, journal, frozen, 1000, lambda: served.append(time.monotonic())
    )
    assert pages == 400
    assert len(pauses) == len(stood) > 3
    for (began, ended), (again, _) in itertools.pairwise(stood):
        assert again - ended >= (ended - began) * 0.9
        assert sum(ended <= moment <= again for moment in served) > 3, "others are not served meanwhile"


def test_what_lies_behind_a_hole_is_still_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, given_back = Runs(), list[tuple[int, int]]()
    runs.add(Run(0, 4 * PAGE_SIZE, 7))
    mapped = mappings.VmaQuery(PAGE_SIZE, 4 * PAGE_SIZE, 3, 8 * PAGE_SIZE, 99)
    target: Any = SimpleNamespace(pid=os.getpid(), runs=runs, query=lambda at: mapped if at else None)
    monkeypatch.setattr(mappings, "locked_kib", lambda _pid: 0)
    monkeypatch.setattr(restore, "_restore_part", lambda *given: given_back.append(given[2:4]))
    restore.restore_piece(target, SimpleNamespace(), 0, 4 * PAGE_SIZE)  # type: ignore[arg-type]
    assert given_back == [(PAGE_SIZE, 4 * PAGE_SIZE)]
    assert list(runs) == [Run(PAGE_SIZE, 4 * PAGE_SIZE, 8)]
