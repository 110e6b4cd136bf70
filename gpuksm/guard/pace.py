"""How much fits into one pause, by what the last ones took.

Medians count: a pause that was long because a processor was taken away says nothing about the next.  What
stopping a process takes is kept apart from the work that is done meanwhile: where processors are busy it may
be more than a pause shall take, and then little work for each stop would make everything last for ever.
"""

from __future__ import annotations

from collections import deque

_LEAST = 0.3  # of the longest pause, for work in any case
_KEPT = 15


class Pace:
    """Work whose time is guessed, in microseconds, and corrected by what it takes.

    A pause is to take `aim` of the longest one.  Work of `least_weight` guessed microseconds or less says
    nothing.
    """

    def __init__(self, aim: float = 0.6, least_weight: float = 200.0) -> None:
        self._aim, self._least_weight = aim, least_weight
        self._ratios: deque[float] = deque([1.0], maxlen=_KEPT)  # microseconds measured to guessed
        self._stops: deque[float] = deque([0.0], maxlen=_KEPT)  # what a pause takes beside the work

    def limit(self, max_pause_us: int) -> float:
        """Guessed microseconds that the work of the next pause may take."""
        return max(50.0, self.work_us(max_pause_us) / self.ratio())

    def work_us(self, max_pause_us: int) -> float:
        """Microseconds that are left for work in a pause."""
        return max(_LEAST * max_pause_us, self._aim * max_pause_us - _median(self._stops))

    def ratio(self) -> float:
        """How many microseconds one that was guessed takes."""
        return min(5.0, max(0.2, _median(self._ratios)))

    def learn_work(self, weight: float, took_us: float) -> None:
        """Note how long work of `weight` guessed microseconds took."""
        if weight > self._least_weight:
            self._ratios.append(took_us / weight)

    def learn_stop(self, took_us: float) -> None:
        """Note how long a pause was, less the work that was done in it."""
        self._stops.append(took_us)


def _median(values: deque[float]) -> float:
    return sorted(values)[len(values) // 2]
