"""Results come in order, the next is done meanwhile, and nothing is done behind what failed or was closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from gpuksm.scan.beside import results


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_in_order(beside: bool, count: int) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        return number * number

    assert list(results((partial(work, n) for n in range(count)), beside)) == [n * n for n in range(count)]
    assert done == list(range(count))


def test_the_next_is_done_while_a_result_is_used() -> None:
    begun = [threading.Event() for _ in range(4)]
    with closing(results((partial(each.set) for each in begun), True)) as found:
        for number, _ in enumerate(found):
            if number < 3:
                assert begun[number + 1].wait(10)
            assert not any(event.is_set() for event in begun[number + 2 :])


def test_alone_nothing_is_done_before_it_is_asked_for() -> None:
    done: list[int] = []
    for number, _ in enumerate(results((partial(done.append, n) for n in range(4)), False)):
        assert done == list(range(number + 1))


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_comes_in_its_place_and_ends_it(beside: bool) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        if number == 2:
            raise OSError(5, "it")
        return number

    found: list[int] = []
    with pytest.raises(OSError, match="it"):
        found.extend(results((partial(work, n) for n in range(6)), beside))
    assert found == [0, 1]
    assert done == [0, 1, 2]


def test_closed_it_waits_for_what_has_begun() -> None:
    ended: list[int] = []
    going = threading.Event()

    def slow() -> None:
        going.set()
        threading.Event().wait(0.1)
        ended.append(1)

    work: list[Callable[[], object]] = [lambda: None, slow, lambda: ended.append(2)]
    with closing(results(work, True)) as found:
        next(found)
        assert going.wait(10)
    assert ended == [1]
