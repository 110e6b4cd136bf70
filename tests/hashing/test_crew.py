"""Each piece of work is done once, by one worker at a time, and errors come through."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from gpuksm.hashing.crew import Crew, usable_cpus


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 2, 1000])
def test_every_item_once(threads, items):
    crew = Crew(threads)
    assert crew.threads == (threads or usable_cpus())
    done: list[int] = []
    busy: set[int] = set()

    def work(worker, item):
        assert 0 <= worker < crew.threads
        assert worker not in busy
        busy.add(worker)
        done.append(item)
        busy.discard(worker)

    crew.run(work, items)
    crew.close()
    assert Counter(done) == Counter(range(items))


def test_a_helper_s_error_comes_through_after_all_have_ended():
    crew = Crew(2)
    caller = threading.current_thread()
    running = Counter()

    def work(worker, item):
        running["now"] += 1
        try:
            time.sleep(0.001)
            if threading.current_thread() is not caller:
                raise OSError("helper")
        finally:
            running["now"] -= 1

    with pytest.raises(OSError, match="helper"):
        crew.run(work, 10_000)
    assert running["now"] == 0
    crew.close()


def test_negative_threads():
    with pytest.raises(ValueError, match="threads"):
        Crew(-1)
