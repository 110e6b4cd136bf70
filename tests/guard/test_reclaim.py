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

    def reclaimed(store: Store, born: int, ledger: reclaim.Ledger, breathe: Callable[[], None]) -> int | None:
        breathe()
        runs.append(now)
        return answer

    monkeypatch.setattr(reclaim.time, "monotonic", lambda: now)
    monkeypatch.setattr(reclaim, "reclaim", reclaimed)
    reclaimer = reclaim.Reclaimer(Store())
    reclaimer.tick(0, 0, list, _nothing)
    assert runs == []
    reclaimer.soon()
    reclaimer.tick(0, 0, list, _nothing)
    assert runs == [1000.0]
    reclaimer.tick(0, 0, list, _nothing)  # it had to wait: tried again a little later
    assert runs == [1000.0]
    now, answer = 1002.0, 5
    reclaimer.tick(0, 0, list, _nothing)
    assert runs == [1000.0, 1002.0]
    reclaimer.tick(0, 3, list, _nothing)
    now = 1050.0
    reclaimer.tick(0, 4, list, _nothing)
    assert len(runs) == 2
    now = 1063.0
    reclaimer.tick(0, 4, list, _nothing)
    assert len(runs) == 3
    now = 2000.0
    reclaimer.tick(0, 4, list, _nothing)  # nothing has happened since
    assert len(runs) == 3
    # Somebody goes while slots are freed.
    reclaimer.soon()
    reclaimer.tick(0, 4, list, reclaimer.soon)
    reclaimer.tick(0, 4, list, _nothing)
    assert len(runs) == 5
    reclaimer.tick(0, 4, list, _nothing)
    assert len(runs) == 5


def test_what_a_target_maps_by_the_ledger_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be unmapped already, and a child that nobody sees yet has it: the events tell, and they wait."""
    kept, freed = store.allocate(4, 0), store.allocate(4, 0)
    for slot in (kept, freed):
        store.write(slot, [memoryview(b"x" * 4096)] * 4)
    monkeypatch.setattr(reclaim.mappings, "file_mappings", lambda *_: [])
    order: list[str] = []
    pids = reclaim.procfs.pids

    def ledger() -> list[tuple[int, int]]:
        order.append("ledger")
        return [(kept, kept + 4)]

    def looked() -> list[int]:
        order.append("processes")
        return list(pids())

    monkeypatch.setattr(reclaim.procfs, "pids", looked)
    assert reclaim.reclaim(store, 0, ledger, lambda: order.append("others")) == 4
    assert order[:2] == ["ledger", "processes"], "nobody is served before all was read"
    assert [start for start, _, _ in store.extents()] == [kept]
    assert reclaim.reclaim(store, 0, lambda: None, _nothing) is None, "a child waits to be taken in"
    assert reclaim.reclaim(store, 0, list, _nothing) == 4
