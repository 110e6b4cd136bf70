"""`gpuksm status`: what the guard holds."""

from __future__ import annotations

from typing import Any

import click

from gpuksm.cli import _options, _output
from gpuksm.client import GuardClient


@click.command()
@_options.json_flag
def command(as_json: bool) -> None:
    """Show what is registered and merged now, and the pauses so far."""
    from gpuksm.report import text

    _output.show(found(), text.status, as_json)


def found() -> dict[str, Any]:
    """What `gpuksm status --json` prints."""
    guard = GuardClient.find()
    if guard is None:
        return {"running": False}
    with guard:
        reply, _ = guard.request("status")
    del reply["ok"]
    return {"running": True, **reply}
