"""Whose turn it is: work on several targets in steps, none of which stands still twice in a row.

After each pause a target is left alone for as long as it stood: meanwhile it is the others' turn, and where
there is none to go on with, others are served.  So no process stands for more than half of the time while it
is merged.

If we die: each step is whole by itself; see who makes them (commit.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from gpuksm.guard import faults

_NAP_SECONDS = 0.0005  # between looks at who waits for us


def take_turns(work: Mapping[int, Iterator[float]], breathe: Callable[[], None]) -> None:
    """Do all steps of `work`, by target; each tells for how many seconds its target stood."""
    left = dict(work)
    rested = dict.fromkeys(left, 0.0)  # from when on it may stand again
    while left:
        number = min(left, key=rested.__getitem__)
        faults.point("turn")
        rest(rested[number] - time.monotonic(), breathe)
        stood = next(left[number], None)
        if stood is None:
            del left[number]
        else:
            rested[number] = time.monotonic() + stood


def rest(seconds: float, breathe: Callable[[], None]) -> None:
    """Let a target run for so long; others are served, once in any case."""
    end = time.monotonic() + seconds
    breathe()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_SECONDS))
        breathe()
