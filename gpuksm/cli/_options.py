"""Options that several verbs share: TARGETS, durations, --json."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from gpuksm.targets import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_BATCH_PAGES = 1 << 22
_MAX_PID = (1 << 31) - 1  # pid_t
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0}
_SIZE = re.compile(r"([0-9]+) *([KMGT]?)(?:I?B)?")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *(us|ms|s|m|)")


class Duration(click.ParamType[float]):
    """A length of time as `5ms`, `0.2s`, `200us`, `1m` or plain seconds; the value is in seconds."""

    name = "duration"

    def __init__(self, lowest: float, highest: float) -> None:
        self._lowest, self._highest = lowest, highest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a duration such as 5ms, 0.2s or 1", param, ctx)
        seconds = float(match[1]) * _UNITS[match[2]]
        if not self._lowest <= seconds <= self._highest:
            self.fail(f"{value} is not between {self._lowest:g} s and {self._highest:g} s", param, ctx)
        return seconds


class Size(click.ParamType[int]):
    """A size as `512M`, `2G` or plain bytes; the value is in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip().upper())
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is not a size such as 512M or 2G", param, ctx)
        return int(match[1]) << _SHIFTS[match[2]]


class Count(click.IntRange):
    """A whole number within bounds."""

    name = "number"


class PidList(click.ParamType[tuple[int, ...]]):
    """One pid, or several with commas between."""

    name = "pid"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        pids = []
        for part in str(value).split(","):
            if not part.strip().isdecimal() or not 0 < int(part) <= _MAX_PID:
                self.fail(f"{part.strip()!r} is not a process id", param, ctx)
            pids.append(int(part))
        return tuple(pids)


def _selection(
    pid: tuple[tuple[int, ...], ...],
    more: tuple[tuple[int, ...], ...],
    tree: tuple[tuple[int, ...], ...],
    **patterns: Any,
) -> Selection:
    if more and not pid:
        given = ",".join(str(number) for group in more for number in group)
        raise click.UsageError(f"unexpected argument {given}: name processes with --pid")
    return Selection(
        pids=tuple(number for group in (*pid, *more) for number in group),
        trees=tuple(number for group in tree for number in group),
        **patterns,
    )


def targets(function: Function) -> Function:
    """Add TARGETS; the command gets them as `selection`."""

    def collect(**values: Any) -> Any:
        names = ("pid", "more", "tree", "name", "user", "cgroup", "registered")
        return function(selection=_selection(**{name: values.pop(name) for name in names}), **values)

    collect.__doc__ = function.__doc__
    collect.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    pid = PidList()
    decorators = (
        click.option("--pid", type=pid, multiple=True, metavar="N...", help="These processes."),
        click.argument("more", type=pid, nargs=-1, metavar=""),
        click.option("--tree", type=pid, multiple=True, metavar="PID", help="This process and all below it."),
        click.option("--name", metavar="REGEX", help="Processes whose name matches."),
        click.option("--user", metavar="U", help="Processes of this user (name or uid)."),
        click.option("--cgroup", metavar="PATH", help="Processes in this control group and those below."),
        click.option("--registered", is_flag=True, help="What is registered (the default)."),
    )
    result: Any = collect
    for decorator in reversed(decorators):
        result = decorator(result)
    return result  # type: ignore[no-any-return]


def json_flag(function: Function) -> Function:
    """Add --json; the command gets it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def max_pause(function: Function) -> Function:
    """Add --max-pause; the command gets it as `max_pause`, in seconds."""
    return click.option(
        "--max-pause",
        type=Duration(0.0001, 10),
        default="5ms",
        show_default=True,
        metavar="TIME",
        help="Longest time for which a process may be stopped at once.",
    )(function)
