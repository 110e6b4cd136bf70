"""How much a pause takes is learnt from the usual pauses, not from the odd one."""

from __future__ import annotations

from gpuksm.guard.pace import Pace


def _learned(pauses: int, work_us: float, stop_us: float = 0.0) -> Pace:
    pace = Pace()
    for _ in range(pauses):
        pace.learn_work(1000, work_us)
        pace.learn_stop(stop_us)
    return pace


def test_one_long_pause_changes_next_to_nothing() -> None:
    pace = _learned(15, 1200, 300)
    usual = pace.limit(5000)
    pace.learn_work(1000, 80_000)
    pace.learn_stop(80_000)
    assert pace.limit(5000) == usual
    assert usual == (0.6 * 5000 - 300) / 1.2


def test_slices_follow_what_work_takes_within_bounds() -> None:
    slow, fast = _learned(15, 3000), _learned(15, 300)
    assert slow.limit(5000) == 1000
    assert fast.limit(5000) == 10_000
    for _ in range(15):
        slow.learn_work(1000, 1_000_000)
    assert slow.limit(5000) == 600  # not smaller: stopping alone would take more than mapping
    fast.learn_work(10, 1_000_000)  # too small a slice to tell anything
    assert fast.limit(5000) == 10_000


def test_where_stopping_takes_long_no_less_is_done_for_each_stop() -> None:
    """On a loaded machine each stop may take 100 ms; a few pages for each would last for minutes."""
    assert _learned(15, 1000, 100_000).limit(5000) == 0.3 * 5000
    assert _learned(15, 1000, 500).limit(5000) == 0.6 * 5000 - 500
