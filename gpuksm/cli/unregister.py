"""`gpuksm unregister`: forget registrations."""

from __future__ import annotations

import click

from gpuksm.cli import _options, _output
from gpuksm.targets import Selection


@click.command()
@_options.targets
@click.option("--all", "everything", is_flag=True, help="All that is registered.")
def command(selection: Selection, everything: bool) -> None:
    """Take the registration of the TARGETS back; what is merged stays merged (see `gpuksm unmerge`)."""
    from gpuksm import targets
    from gpuksm.client import GuardClient

    if everything != selection.empty:
        raise click.UsageError("say which processes to unregister, for example --pid N, or --all")
    chosen = Selection(registered=True) if everything else selection
    pids = [request.pid for request in targets.resolve(chosen)]
    with GuardClient.connect(start=False) as guard:
        for pid in pids:
            guard.request("unregister", pid=pid, ranges=None)
    _output.note(f"unregistered {_output.count(len(pids), 'process', 'processes')}")
