"""`gpuksm ctl`: knobs and counters of the running daemon, by KSM's own names."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from gpuksm import errors, knobs
from gpuksm.cli import _options, _output
from gpuksm.client import GuardClient

_OBEYED_SECONDS = 5.0


@click.group()
def command() -> None:
    """Read and set what the running daemon goes by, with the names of /sys/kernel/mm/ksm."""


@command.command("get")
@click.argument("name", required=False)
@_options.json_flag
def get(name: str | None, as_json: bool) -> None:
    """Print the value of NAME, or all names with their values."""
    if name is not None and name not in knobs.TABLE:
        raise errors.UsageError(f"there is no knob {name!r}; `gpuksm ctl get` lists them")
    with _connected() as guard:
        numbers = _numbers(guard.request("knobs")[0])
    if name is not None:
        print(json.dumps({name: numbers[name]}) if as_json else numbers[name])
    elif as_json:
        print(json.dumps(numbers))
    else:
        for each in knobs.TABLE:
            print(f"{each} {numbers[each]}")


@command.command("set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Set NAME to VALUE; holds until the daemon ends or reads its configuration again."""
    number = knobs.checked(name, value)
    with _connected() as guard:
        reply, _ = guard.request("knobs", set={name: number})
        deadline = time.monotonic() + _OBEYED_SECONDS
        while name in reply["wanted"] and time.monotonic() < deadline:
            time.sleep(0.02)
            reply, _ = guard.request("knobs")
            _numbers(reply)
    if name in reply["wanted"]:
        _output.note(f"{name} takes effect after the round that is under way")


def _connected() -> GuardClient:
    guard = GuardClient.find()
    if guard is None:
        raise errors.GuardError("no daemon is running; start one with `gpuksm daemon`")
    return guard


def _numbers(reply: dict[str, Any]) -> dict[str, int]:
    numbers: dict[str, int] | None = reply["daemon"]
    if numbers is None:
        raise errors.GuardError("no daemon is running; start one with `gpuksm daemon`")
    return numbers
