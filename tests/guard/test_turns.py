"""Nobody stands still twice in a row: targets take turns, and rest as long as they stood."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from gpuksm.guard.turns import rest, take_turns

_STOOD = 0.004


def _work(number: int, steps: int, began: list[tuple[int, float]]) -> Iterator[float]:
    for _ in range(steps):
        began.append((number, time.monotonic()))
        time.sleep(_STOOD)
        yield _STOOD


def test_all_is_done_and_each_rests_as_long_as_it_stood() -> None:
    began: list[tuple[int, float]] = []
    take_turns(
        {number: _work(number, steps, began) for number, steps in ((1, 5), (2, 3), (3, 0))}, lambda: None
    )
    for number, steps in ((1, 5), (2, 3), (3, 0)):
        times = [at for who, at in began if who == number]
        assert len(times) == steps
        assert all(later - at >= 2 * _STOOD for at, later in itertools.pairwise(times))


def test_others_go_on_meanwhile() -> None:
    began: list[tuple[int, float]] = []
    take_turns({number: _work(number, 4, began) for number in (1, 2)}, lambda: None)
    assert [number for number, _ in began] == [1, 2] * 4


def test_nobody_is_served_before_it_is_due() -> None:
    began: list[tuple[int, float]] = []
    start = time.monotonic()
    due = {1: start + 0.05, 2: start + 0.02, 9: start + 60}
    take_turns({number: _work(number, 1, began) for number in (1, 2, 3)}, lambda: None, due=due)
    assert [number for number, _ in began] == [3, 2, 1]
    assert all(at >= due.get(number, start) for number, at in began)


def test_a_step_that_fails_ends_all() -> None:
    def failing() -> Iterator[float]:
        yield 0.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        take_turns({1: failing()}, lambda: None)


def test_others_are_served_while_one_rests() -> None:
    served: list[None] = []
    rest(0.0, lambda: served.append(None))
    assert len(served) == 1
    rest(0.01, lambda: served.append(None))
    assert len(served) > 3
