"""`gpuksm register`: remember processes for a scan without TARGETS."""

from __future__ import annotations

import click

from gpuksm.cli import _options, _output
from gpuksm.targets import Selection


@click.command()
@_options.targets
def command(selection: Selection) -> None:
    """Register the TARGETS as whole processes; nothing is merged before the next scan."""
    from gpuksm import targets
    from gpuksm.client import GuardClient

    if selection.empty or selection.registered:
        raise click.UsageError("say which processes to register, for example --pid N")
    pids = [request.pid for request in targets.resolve(selection)]
    with GuardClient.connect(start=True) as guard:
        for pid in pids:
            guard.request("register", pid=pid, ranges=None)
    _output.note(f"registered {_output.count(len(pids), 'process', 'processes')}; `gpuksm scan` merges them")
