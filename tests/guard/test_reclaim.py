"""When slots are reclaimed; what is freed is tested in tests/guard/test_store.py and on real processes."""

from __future__ import annotations

import pytest

from gpuksm.guard import reclaim
from gpuksm.guard.store import Store


def test_soon_after_a_target_is_gone_and_now_and_then_after_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    runs: list[float] = []
    answer: int | None = None

    def reclaimed(store: Store, born: int) -> int | None:
        runs.append(now)
        return answer

    monkeypatch.setattr(reclaim.time, "monotonic", lambda: now)
    monkeypatch.setattr(reclaim, "reclaim", reclaimed)
    reclaimer = reclaim.Reclaimer(Store())
    reclaimer.tick(0, 0)
    assert runs == []
    reclaimer.soon()
    reclaimer.tick(0, 0)
    assert runs == [1000.0]
    reclaimer.tick(0, 0)  # it had to wait: tried again a little later
    assert runs == [1000.0]
    now, answer = 1002.0, 5
    reclaimer.tick(0, 0)
    assert runs == [1000.0, 1002.0]
    reclaimer.tick(0, 3)
    now = 1050.0
    reclaimer.tick(0, 4)
    assert len(runs) == 2
    now = 1063.0
    reclaimer.tick(0, 4)
    assert len(runs) == 3
    now = 2000.0
    reclaimer.tick(0, 4)  # nothing has happened since
    assert len(runs) == 3
