"""Doing the next thing beside the use of the last one's result, where there are processors for both."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def results(work: Iterable[Callable[[], T]], beside: bool) -> Generator[T]:
    """What each of `work` gives, in order; `beside`: the next is done while one's result is used.

    It is done by a thread, one after the other.  An exception is raised in the place of its result, and
    nothing is done after it.  Closed, it waits for what has begun.
    """
    if not beside:
        for each in work:
            yield each()
        return
    with ThreadPoolExecutor(1, "gpuksm-beside") as thread:
        begun: Future[T] | None = None
        for each in work:
            result = None if begun is None else (begun.result(),)
            begun = thread.submit(each)
            if result is not None:
                yield result[0]
        if begun is not None:
            yield begun.result()
