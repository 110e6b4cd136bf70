"""Waiting for descriptors."""

from __future__ import annotations

import os
import resource
import threading
import time

from gpuksm.linux.descriptors import await_readable


def test_descriptors_of_any_number() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    reading, writing = os.pipe()
    high = os.dup2(reading, 2000)
    try:
        assert await_readable([high, reading], 0) == set()
        threading.Timer(0.05, os.write, (writing, b"x")).start()
        assert await_readable([high], None) == {high}
        os.read(high, 1)
        os.close(writing)
        assert await_readable([high], 5) == {high}, "its other end is closed"
    finally:
        os.close(high)
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_longer_than_asked() -> None:
    reading, writing = os.pipe()
    began = time.monotonic()
    assert await_readable([reading], 0.05) == set()
    assert time.monotonic() - began >= 0.05
    os.close(reading)
    os.close(writing)
