"""`gpuksm estimate`: what a scan would save, found by reading only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuksm.cli import _options, _output, _scanning
from gpuksm.targets import Selection

if TYPE_CHECKING:
    from gpuksm.scan import ScanOptions


@click.command()
@_options.targets
@click.option(
    "--same-layout",
    is_flag=True,
    help="Also say what more would be equal had the processes been started by `gpuksm exec --same-layout`.",
)
@_scanning.across_nodes
@_options.json_flag
def command(selection: Selection, same_layout: bool, merge_across_nodes: bool, as_json: bool) -> None:
    """Say what a scan of the TARGETS would save now, without attaching to or changing anything."""
    from gpuksm.scan import ScanOptions

    options = ScanOptions(merge_across_nodes=merge_across_nodes)
    run(selection, options, as_json, same_layout=same_layout)


def run(selection: Selection, options: ScanOptions, as_json: bool, *, same_layout: bool = False) -> None:
    """Estimate and print; also what `gpuksm scan --dry-run` does.  Starts no guard."""
    from gpuksm import targets
    from gpuksm.report import json, progress
    from gpuksm.scan import run_estimate

    requests = targets.resolve(selection)
    with progress.bar() as bar:
        result = run_estimate(requests, options, bar, same_layout=same_layout)
    _output.show(json.as_object(result), _output.rendered("estimate"), as_json)
