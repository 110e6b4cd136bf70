"""Commits: one after another, in order, and what happens when one fails or the caller gives up."""

from __future__ import annotations

import threading

import pytest

from gpuksm.scan.commits import Commits


def test_all_is_done_in_order_by_another_thread():
    done = []
    with Commits() as commits:
        for number in range(100):
            commits.put(lambda number=number: done.append((number, threading.get_ident())))
        commits.finish()
    assert [number for number, _ in done] == list(range(100))
    assert {thread for _, thread in done} - {threading.get_ident()} == {done[0][1]}


def test_it_can_be_used_again_after_it_has_finished():
    done = []
    with Commits() as commits:
        commits.put(lambda: done.append(1))
        commits.finish()
        commits.put(lambda: done.append(2))
        commits.finish()
        commits.finish()
    assert done == [1, 2]


def test_the_first_failure_is_raised_and_the_rest_dropped():
    done = []
    with Commits() as commits:
        commits.put(lambda: done.append(1))
        commits.put(lambda: 1 // 0)
        commits.put(lambda: done.append(2))
        with pytest.raises(ZeroDivisionError):
            commits.finish()
    assert done == [1]


def test_leaving_drops_what_has_not_begun():
    started, go, done = threading.Event(), threading.Event(), []

    def first():
        started.set()
        go.wait(10)
        done.append(1)

    def give_up():
        with Commits() as commits:
            commits.put(first)
            commits.put(lambda: done.append(2))
            started.wait(10)
            go.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert done == [1]
