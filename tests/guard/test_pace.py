"""How much a pause takes is learnt from the usual pauses, not from the odd one."""

from __future__ import annotations

from gpuksm.guard.commit import Pace


def test_one_long_pause_changes_next_to_nothing() -> None:
    pace = Pace()
    for _ in range(15):
        pace.learn(1000, 1200)
    usual = pace.limit(5000)
    pace.learn(1000, 80_000)
    assert pace.limit(5000) == usual
    assert 0.6 * 5000 / 1.3 < usual < 0.6 * 5000


def test_slices_follow_what_pauses_take_within_bounds() -> None:
    slow, fast = Pace(), Pace()
    for _ in range(15):
        slow.learn(1000, 3000)
        fast.learn(1000, 300)
    assert slow.limit(5000) == 1000
    assert fast.limit(5000) == 10_000
    for _ in range(15):
        slow.learn(1000, 1_000_000)
    assert slow.limit(5000) == 600  # not smaller: stopping alone would take more than mapping
    fast.learn(10, 1_000_000)  # too small a slice to tell anything
    assert fast.limit(5000) == 10_000
