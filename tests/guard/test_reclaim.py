"""When slots are reclaimed; what is freed is tested in tests/guard/test_store.py and on real processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpuksm.guard import reclaim
from gpuksm.guard.store import Store


def _nothing() -> None:
    pass


def test_soon_after_a_target_is_gone_and_now_and_then_after_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    runs: list[float] = []
    answer: int | None = None

    def reclaimed(store: Store, born: int, breathe: Callable[[], None]) -> int | None:
        breathe()
        runs.append(now)
        return answer

    monkeypatch.setattr(reclaim.time, "monotonic", lambda: now)
    monkeypatch.setattr(reclaim, "reclaim", reclaimed)
    reclaimer = reclaim.Reclaimer(Store())
    reclaimer.tick(0, 0, _nothing)
    assert runs == []
    reclaimer.soon()
    reclaimer.tick(0, 0, _nothing)
    assert runs == [1000.0]
    reclaimer.tick(0, 0, _nothing)  # it had to wait: tried again a little later
    assert runs == [1000.0]
    now, answer = 1002.0, 5
    reclaimer.tick(0, 0, _nothing)
    assert runs == [1000.0, 1002.0]
    reclaimer.tick(0, 3, _nothing)
    now = 1050.0
    reclaimer.tick(0, 4, _nothing)
    assert len(runs) == 2
    now = 1063.0
    reclaimer.tick(0, 4, _nothing)
    assert len(runs) == 3
    now = 2000.0
    reclaimer.tick(0, 4, _nothing)  # nothing has happened since
    assert len(runs) == 3
    # Somebody goes while slots are freed.
    reclaimer.soon()
    reclaimer.tick(0, 4, reclaimer.soon)
    reclaimer.tick(0, 4, _nothing)
    assert len(runs) == 5
    reclaimer.tick(0, 4, _nothing)
    assert len(runs) == 5
