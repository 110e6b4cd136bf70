"""What comparing needs of a guard, without one: a store, targets that are threads, and perhaps comparers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from gpuksm.guard.comparers import Comparers
from gpuksm.guard.store import Store


class Host:
    """A `comparing.Host`; `dropped` are the targets that were found to be gone."""

    def __init__(self, store: Store, targets: dict[int, Any]) -> None:
        self.store, self.targets = store, targets
        self.comparers = Comparers(store)
        self.dropped: list[Any] = []

    def breathe(self) -> None:
        pass

    def drop(self, target: Any) -> None:
        self.dropped.append(target)

    @contextlib.contextmanager
    def helped(self, count: int) -> Iterator[list[int]]:
        """Have `count` comparers within; yields their pids."""
        self.comparers.want(count)
        self.comparers.tend()
        assert len(self.comparers) == count
        try:
            yield self.comparers.pids
        finally:
            self.comparers.dismiss()
            deadline = time.monotonic() + 10
            while self.comparers.ending and time.monotonic() < deadline:
                self.comparers.tend()
                time.sleep(0.001)
            assert not self.comparers.ending


def target(tid: int, user: int) -> Any:
    """A target of `user` that is read through thread `tid`."""
    link = SimpleNamespace(agent=SimpleNamespace(tid=tid))
    return SimpleNamespace(user=user, link=link, references=None, held=lambda _start, _pages: None)
