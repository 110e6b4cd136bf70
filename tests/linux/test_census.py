"""census: which ids there are, and whether a processor is idle."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from gpuksm.linux import census


def test_a_processor_is_idle_unless_more_threads_run_than_there_are() -> None:
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range((os.cpu_count() or 1) + 1)
    ]
    try:
        deadline = time.monotonic() + 30
        while census.processor_is_idle():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 30
    while not census.processor_is_idle():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_newest_id_is_one_that_was_just_given() -> None:
    child = subprocess.Popen(["true"])
    assert census.newest_pid() >= child.pid
    child.wait()
