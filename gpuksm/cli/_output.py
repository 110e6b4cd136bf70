"""Printing for the verbs: one JSON object or a rendered report on stdout, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpuksm.report.plain import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH_WITHOUT_TERMINAL = 110


def show(found: dict[str, Any], render: Callable[[dict[str, Any]], RenderableType], as_json: bool) -> None:
    """Print `found` as one JSON object, or as `render` shows it."""
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    Console(width=width, highlight=False, soft_wrap=False).print(render(found))


def rendered(name: str) -> Callable[[dict[str, Any]], RenderableType]:
    """`gpuksm.report.text`'s function `name`, which is loaded only when it is called."""

    def render(found: dict[str, Any]) -> RenderableType:
        from gpuksm.report import text

        made: RenderableType = getattr(text, name)(found)
        return made

    return render


def note(line: str) -> None:
    """One line for the user that is not part of the result."""
    print("gpuksm:", printable(line), file=sys.stderr, flush=True)


def count(number: int, one: str, many: str) -> str:
    """`1 process`, `3 processes`."""
    return f"{number} {one if number == 1 else many}"
