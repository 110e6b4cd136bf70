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


def take_turns(
    work: Mapping[int, Iterator[float]],
    breathe: Callable[[], None],
    *,
    due: Mapping[int, float] | None = None,
    idle: float = 0.0,
) -> None:
    """Do all steps of `work`, by target; each tells for how many seconds its target stood.

    None of a target is done before it is `due` (of the monotonic clock).

    For `idle` times as long nobody's turn follows: steps that are hardly more than a freeze would keep a
    processor at real-time priority all the time, and those who wait for it come in just then, for long.
    """
    left, idle_until = dict(work), 0.0
    rested = dict.fromkeys(left, 0.0) | dict(due or {})  # from when on it may stand again
    while left:
        number = min(left, key=rested.__getitem__)
        faults.point("turn")
        now = time.monotonic()
        rest(max(rested[number], idle_until) - now, breathe)
        stood = next(left[number], None)
        if stood is None:
            del left[number]
        else:
            now = time.monotonic()
            rested[number], idle_until = now + stood, now + idle * stood


def rest(seconds: float, breathe: Callable[[], None]) -> None:
    """Let a target run for so long; others are served, once in any case."""
    end = time.monotonic() + seconds
    breathe()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_SECONDS))
        breathe()
