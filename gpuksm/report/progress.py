"""A progress bar on stderr where a person looks at it, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Stages:
    """One line per stage of a scan; `total` 0 means that it is not known."""

    def __init__(self, shown: Progress | None) -> None:
        self._shown = shown
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Move the line of `stage`."""
        if self._shown is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._shown.add_task(stage, total=None)
        self._shown.update(self._tasks[stage], completed=done, total=total or None)


@contextmanager
def bar() -> Iterator[Stages]:
    """Show progress on stderr while the block runs; nothing of it stays there."""
    if not sys.stderr.isatty():
        yield Stages(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Stages(shown)
