"""Waiting for descriptors of any number: select(2) knows none above 1023, and a guard has many."""

from __future__ import annotations

import select
from collections.abc import Iterable


def await_readable(fds: Iterable[int], seconds: float | None) -> set[int]:
    """Those of `fds` that can be read, or have ended, as soon as there is one; none after `seconds`."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
